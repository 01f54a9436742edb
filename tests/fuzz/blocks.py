"""Random transformer blocks: all families in one program, with norms, residuals, and what layers share."""

# ruff: noqa: E501 (the text of programs)

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from whole import Length, predicate
from writer import AUTOCAST, Draw, Program, Writer


@dataclass
class _State:
    batch: int
    length: int
    heads: int
    size: int
    rate: float
    masked: bool = False
    weights: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.size


@st.composite
def blocks(draw: Draw) -> Program:
    w = Writer(draw)
    dtype = w.one(*[torch.float32] * 6, torch.bfloat16, torch.float16)
    dropped = dtype == torch.float32 and w.chance(15)
    s = _State(
        w.one(1, 2, 2), w.one(3, 4, 4, 5), w.one(1, 2, 2, 4), w.one(2, 4, 4), w.one(0.1, 0.3) if dropped else 0.0
    )
    if w.chance(20):  # axes that are taken for another are no shape error
        s = _State(4, 4, 4, 4, s.rate)
    grad = dropped or w.chance(35)
    w.input("x", s.batch, s.length, s.width)
    w.line(w.one("x = x * 1.0", "x = x * 1.0", "x = x.transpose(0, 1).contiguous().transpose(0, 1)"))
    if w.chance(50):
        s.masked = True
        length = Length(s.length, w.one(str(s.length), "x.shape[1]"))
        whole = predicate(w, length, length) if w.chance(15) else "keep"
        w.line(f"keep = {whole}" if whole != "keep" else w.one(
            f"keep = torch.ones({s.length}, {s.length}, dtype=torch.bool).tril()", f"keep = ({w.extra(s.batch, 1, 1, s.length)} > -0.8) | (torch.arange({s.length}) == 0)",
            f"keep = torch.arange({s.length})[:, None] >= torch.arange({s.length})", f"keep = (torch.arange({s.length})[:, None] - torch.arange({s.length})).abs() < 2",
            f"keep = ({w.extra(s.length, s.length)} > -0.5) | torch.eye({s.length}, dtype=torch.bool)",
        ))  # fmt: skip
    for _ in range(w.one(1, 1, 1, 2)):
        before = w.chance(75)
        for part in w.one((_attention, _mlp), (_attention, _mlp), (_mlp,), (_attention,)):
            _norm(w, s, "n", "x" if before else None)
            part(w, s)
            if s.rate:
                w.line(f"y = F.dropout(y, {s.rate})")
            w.line(
                w.one(
                    "x = x + y",
                    "x = y + x",
                    "x = x + y",
                    "x += y",
                    f"x = x + {w.extra(s.width)} * y",
                    "x = torch.add(x, y)",
                )
            )
            if not before:
                _norm(w, s, "x", "x")
    shown = ["x"]
    if w.chance(8) and s.weights:
        shown.append("p")
    if not s.rate and w.chance(8):
        shown.append(w.one("n", "y"))
    checkpointed = grad and w.chance(15)
    if not s.rate and dtype == torch.float32 and w.chance(10):
        w.region(AUTOCAST)
    routes = (("attention", "triton"), ("gated_mlp", "triton"), ("bias-act-dropout", w.one("triton", "epilogue")))
    source = w.source(shown, checkpointed=checkpointed)
    exact = w.exact(shown, checkpointed=checkpointed)
    return Program(
        source, tuple(w.shapes), dtype, grad, w.chance(5), bool(s.rate) or w.chance(50), dropped=s.rate, exact=exact,
        routes=routes,
    )  # fmt: skip


def _norm(w: Writer, s: _State, name: str, of: str | None) -> None:
    if of is None:
        w.line(f"{name} = x")
        return
    e = s.width
    w.line(w.one(
        f"{name} = F.layer_norm({of}, ({e},), {w.extra(e)}, {w.extra(e)})", f"{name} = F.layer_norm({of}, ({e},))", f"{name} = F.rms_norm({of}, ({e},), {w.extra(e)})",
        f"{name} = {of} * torch.rsqrt({of}.pow(2).mean(-1, keepdim=True) + 1e-5) * {w.extra(e)}", f"{name} = {of} * 1",
        f"{name} = ({of}.float() * torch.rsqrt({of}.float().square().mean(-1, True) + 1e-5)).to({of}.dtype)",
    ))  # fmt: skip


def _project(w: Writer, name: str, x: str, out: int, inner: int) -> None:
    given, weight = w.extra(out, inner), f"w{len(w.names)}"
    w.line(f"{weight} = {given} * {round(inner**-0.5, 3)}")  # else scores and errors grow from layer to layer
    w.line(w.one(
        f"{name} = F.linear({x}, {weight})", f"{name} = F.linear({x}, {weight}, {w.extra(out)})", f"{name} = F.linear({x}, {weight}, {w.extra(out)})",
        f"{name} = {x} @ {weight}.mT + {w.extra(out)}", f"{name} = torch.einsum('bsd,fd->bsf', {x}, {weight})",
    ))  # fmt: skip


def _attention(w: Writer, s: _State) -> None:
    b, n, h, d, e = s.batch, s.length, s.heads, s.size, s.width
    if w.chance(40):
        _project(w, "qkv", "n", 3 * e, e)
        w.line(w.one(
            f"q, k, v = qkv.view({b}, {n}, 3, {h}, {d}).permute(2, 0, 3, 1, 4)", f"q, k, v = qkv.view({b}, {n}, 3, {h}, {d}).permute(2, 0, 3, 1, 4).unbind(0)",
            f"q, k, v = (t.view({b}, {n}, {h}, {d}).transpose(1, 2) for t in qkv.chunk(3, -1))", f"q, k, v = (t.unflatten(-1, ({h}, {d})).transpose(1, 2) for t in qkv.split({e}, -1))",
            f"q, k, v = (t.squeeze(2).transpose(1, 2) for t in qkv.view({b}, {n}, 3, {h}, {d}).split(1, 2))",
        ))  # fmt: skip
    else:
        groups = w.one(h, h, 1)
        for name in "qkv":
            heads = h if name == "q" else groups
            _project(w, name, "n", heads * d, e)
            w.line(
                w.one(
                    f"{name} = {name}.view({b}, {n}, {heads}, {d}).transpose(1, 2)",
                    f"{name} = {name}.reshape({b}, {n}, {heads}, {d}).permute(0, 2, 1, 3)",
                    f"{name} = {name}.unflatten(-1, ({heads}, {d})).movedim(2, 1).contiguous()",
                )
            )
            if heads != h:
                w.line(
                    w.one(
                        f"{name} = {name}.expand({b}, {h}, {n}, {d})",
                        f"{name} = {name}.repeat_interleave({h}, 1)",
                        f"{name} = {name}",
                    )
                )
    if w.chance(10):
        w.line("q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)")
    if w.chance(35):
        mask = (
            w.one("attn_mask=keep", "attn_mask=torch.where(keep, 0.0, float('-inf')).to(q.dtype)")
            if s.masked
            else w.one("is_causal=True", "scale=0.3", "dropout_p=0.0")
        )
        w.line(f"o = F.scaled_dot_product_attention(q, k, v.expand({b}, {h}, {n}, {d}), {mask})")
    else:
        w.line(
            w.one(
                "s = q @ k.mT * 0.4",
                f"s = torch.matmul(q, k.transpose(-1, -2)) / {d} ** 0.5",
                f"s = (q * {d} ** -0.5) @ k.mT",
                "s = torch.einsum('...id,...jd->...ij', q, k) * 0.5",
                "s = q @ k.mT",
            )
        )
        if s.masked:
            w.line(
                w.one(
                    "s = s.masked_fill(~keep, float('-inf'))",
                    "s = torch.where(keep, s, torch.finfo(s.dtype).min)",
                    "s = s + torch.where(keep, 0.0, -1e4)",
                    "s = s.masked_fill(keep == 0, -1e4)",
                )
            )
        if w.chance(25):
            w.line(
                w.one(
                    f"s = s + {w.extra(1, h, n, n)}",
                    f"s = s - 0.3 * (torch.arange({n})[:, None] - torch.arange({n})).abs()",
                    "s = (s / 5).tanh() * 5",
                    f"s = s + {w.extra(h, 1, 1)} * torch.arange({n})",
                )
            )
        w.line(
            w.one(
                "p = s.softmax(-1)",
                "p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)",
                "p = torch.softmax(s, -1)",
                "p = s.softmax(-1)",
                "p = s.softmax(-2)",
            )
        )
        s.weights = True
        w.line(
            f"o = F.dropout(p, {s.rate}) @ v"
            if s.rate
            else w.one(
                "o = p @ v",
                "o = torch.matmul(p, v)",
                "o = F.dropout(p, 0.1, False) @ v",
                "o = torch.einsum('bhij,bhjd->bhid', p, v)" if h == 1 else "o = p @ v",
            )
        )
    w.line(
        w.one(
            f"o = o.transpose(1, 2).reshape({b}, {n}, {e})",
            f"o = o.permute(0, 2, 1, 3).contiguous().view({b}, {n}, {e})",
            "o = o.transpose(1, 2).flatten(2)",
            f"o = o.transpose(1, 2).reshape({b}, {n}, {e})",
            f"o = o.reshape({b}, {n}, {e})",
        )
    )
    _project(w, "y", "o", e, e)


SMOOTH = (
    "F.silu({})",
    "F.gelu({})",
    "F.gelu({}, approximate='tanh')",
    "torch.tanh({})",
    "{} * torch.sigmoid({})",
    "torch.sigmoid({})",
)
KINKED = ("F.relu({})", "F.relu({}) ** 2", "F.relu({}, inplace=True)", "F.leaky_relu({})", "{}.clamp(min=0)")


def _mlp(w: Writer, s: _State) -> None:
    e, f = s.width, w.one(4, 6, s.width)
    act = w.one(*SMOOTH, *(() if s.rate else KINKED))
    if w.chance(60):
        if w.chance(40):
            _project(w, "gu", "n", 2 * f, e)
            w.line(
                w.one(
                    "g, u = gu.chunk(2, -1)",
                    "u, g = gu.chunk(2, -1)",
                    "g, u = gu[..., ::2], gu[..., 1::2]",
                    f"g, u = gu.split({f}, -1)",
                )
            )
        else:
            _project(w, "g", "n", f, e)
            _project(w, "u", w.one("n", "n", "n", "n", "n", "x"), f, e)
        w.line(f"h = {act.replace('{}', 'g')} * u")
    else:
        _project(w, "h", "n", f, e)
        w.line(f"h = {act.replace('{}', 'h')}")
    if s.rate and w.chance(60):
        w.line(f"h = F.dropout(h, {s.rate})")
    _project(w, "y", "h", e, f)
