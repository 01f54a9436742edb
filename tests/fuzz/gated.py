"""Random programs around a gated MLP: two projections, an activation, their product, and all that may go wrong."""

# ruff: noqa: E501 (the text of programs)

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from whole import Length, moved, small, truth, vector
from writer import OWN, REGIONS, Draw, Program, Writer, number_type, write


@dataclass
class _State:
    lead: list[int]
    inner: int
    wide: int
    experts: int
    shown: list[str] = field(default_factory=list)

    @property
    def whole(self) -> list[int]:
        """The shape of gate and up."""
        return [*([self.experts] if self.experts else []), *self.lead, self.wide]


@st.composite
def gated(draw: Draw) -> Program:
    w = Writer(draw)
    grad, dtype = w.chance(35), number_type(w)
    if w.chance(35):  # axes that are taken for another are no shape error
        s = _State([4] * w.one(1, 2, 2, 3), 4, 4, 0)
    else:
        s = _State(
            [w.one(1, 2, 3, 5) for _ in range(w.one(1, 2, 2, 2, 3))],
            w.one(4, 8, 8, 12),
            w.one(*([] if w.plain else [1]), 4, 6, 8, 12),
            0,
        )
    if w.chance(12):
        s.experts, s.lead = w.one(*([] if w.plain else [1]), 2, 3, 4), s.lead[-1:]
    w.stored("x", [*([s.experts] if s.experts else []), *s.lead, s.inner])
    if grad or w.chance(15):
        w.line("x = x * 1.0")
    _projections(w, s)
    safe = ["x", "g", "u"]  # what is written in place must not be a leaf
    if w.hazard(40):
        w.one(_moved, _moved, _scaled)(w, s, w.one("g", "u"))
    if w.chance(8):
        _whole(w, s, w.one("g", "u"))
    write(w, safe, 6)
    _activated(w, s)
    write(w, [*safe, "a"], 6)
    if w.chance(6):
        _whole(w, s, "a")
    w.line(w.one(*["h = a * u"] * 12, "h = u * a", "h = torch.mul(a, u)", "h = a.mul_(u)", "h = a.mul(u)", "h = torch.multiply(u, other=a)",
                 "h = a; h *= u", *(["h = a * u"] if w.plain else PRODUCTS)))  # fmt: skip
    write(w, [*safe, "a", "h"], 6)
    for _ in range(w.one(0, 1) if w.plain else w.one(0, 0, 1, 1, 2)):
        w.one(_after, _after, _after, _down, _down, _residual)(w, s, "h")
    write(w, [*safe, "a", "h"], 4)
    shown = ["h", *s.shown]
    if w.hazard(20):
        shown.append(w.one("g", "u", "a", "x"))
    checkpointed = grad and w.chance(15)
    if w.hazard(20):
        w.region(*REGIONS)
    source = w.source(shown, checkpointed=checkpointed)
    routes = (("gated_mlp", w.one("triton", "cublas") if "p" in source.split() else "triton"),)
    exact = w.exact(shown, checkpointed=checkpointed)
    return Program(source, tuple(w.shapes), dtype, grad, w.chance(6), w.chance(50), exact=exact, routes=routes)


# -- projections ---------------------------------------------------------------------------------------------------


def _projections(w: Writer, s: _State) -> None:
    if s.experts:
        _experts(w, s)
    elif w.chance(40):
        _packed(w, s)
    else:
        other = "x"
        if w.hazard(15):
            other = "y"
            w.line(w.one(
                f"y = {w.extra(*s.lead, s.inner)}", "y = x * 2", "y = x.roll(1, 0)", "y = x.flip(0)", "y = x.clone()", "y = x.detach()",
                "y = x.mT.contiguous().view(x.shape)",
            ))  # fmt: skip
        _project(w, s, "g", "x", "w")
        write(w, ["x"], 5)
        _project(w, s, "u", other, "v")


def _project(w: Writer, s: _State, name: str, x: str, weight: str) -> None:
    n, k = s.wide, s.inner
    letters = "abcde"[: len(s.lead)]
    if w.chance(30):
        w.stored(weight, [k, n])
        product = w.one(
            f"{x} @ {weight}", f"torch.matmul({x}, {weight})", f"F.linear({x}, {weight}.mT)", f"({weight}.mT @ {x}.mT).mT",
            f"torch.einsum('{letters}k,kn->{letters}n', {x}, {weight})", f"torch.einsum('kn,...k->...n', {weight}, {x})",
            f"({x}.reshape(-1, {k}) @ {weight}).reshape({[*s.lead, n]})",
        )  # fmt: skip
    else:
        w.stored(weight, [n, k])
        product = w.one(
            f"F.linear({x}, {weight})", f"F.linear({x}, {weight})", f"{x} @ {weight}.T", f"{x} @ {weight}.mT", f"torch.einsum('...k,nk->...n', {x}, {weight})",
            f"torch.einsum('{letters}k,nk->{letters}n', {x}, {weight})", f"F.linear({x}.flatten(0, -2), {weight}).view({[*s.lead, n]})",
            f"torch.mm({x}.reshape(-1, {k}), {weight}.t()).reshape({[*s.lead, n]})", f"F.linear({x}, {weight} * 0.5)", f"F.linear({x}[None], {weight})[0]",
            f"F.linear({x}.float(), {weight}.float())",
        )  # fmt: skip
    kind = w.one("none", "none", "none", "linear", "linear", "added", *([] if w.plain else ["odd"]))
    if kind == "linear" and product.startswith("F.linear") and product.endswith(f", {weight})"):
        product = f"{product[:-1]}, {w.extra(n)})"
    elif kind in ("linear", "added"):
        b = w.extra(n)
        product = w.one(f"{product} + {b}", f"{b} + {product}", f"torch.add({product}, {b})", f"{product}.add_({b})")
    elif kind == "odd":
        product = w.one(
            f"{product} + {w.extra(1)}", f"{product} + {w.extra(s.lead[-1], 1)}", f"{product} + {w.extra(*s.lead, n)}",
            f"{product} - {w.extra(n)}", f"torch.add({product}, {w.extra(n)}, alpha=2)", f"{product} * {w.extra(n)}", f"{product} + {w.extra(2, n)}[1]",
            f"{product} + {w.extra(*[1] * len(s.lead), n)}", f"{product} + {w.extra(n)}.exp()",
        )  # fmt: skip
    w.line(f"{name} = {product}")


PACKINGS = (
    "TWO = p[..., :N], p[..., -N:].flip(-1)", "TWO = p[..., :N], p[..., :N]", "TWO = p[..., 1:N + 1], p[..., :N]", "TWO = p.view(LEAD)", "TWO = p[..., N:], p[..., 1:N + 1]",
)  # fmt: skip
"""What is no packing of two projections."""


def _packed(w: Writer, s: _State) -> None:
    n, k = s.wide, s.inner
    w.stored("w", [2 * n, k])
    bias = w.one("", "", f", {w.extra(2 * n)}") if w.chance(50) else ""
    w.line(
        w.one(
            f"p = F.linear(x, w{bias})", f"p = F.linear(x, w{bias})", f"p = x @ w.mT{' + ' + bias[2:] if bias else ''}"
        )
    )
    write(w, ["p"], 4)
    two = w.one("g, u", "g, u", "u, g")
    w.line(w.one(
        f"{two} = p.chunk(2, -1)", f"{two} = p.chunk(2, dim={len(s.lead)})", f"{two} = p.split({n}, -1)", f"{two} = torch.split(p, [{n}, {n}], dim=-1)",
        f"{two} = p[..., :{n}], p[..., {n}:]", f"{two} = p[..., ::2], p[..., 1::2]", f"{two} = p.unflatten(-1, (2, {n})).unbind(-2)",
        f"{two} = p.unflatten(-1, ({n}, 2)).unbind(-1)", f"{two} = p.narrow(-1, 0, {n}), p.narrow(-1, {n}, {n})", f"{two} = F.linear(x, w[:{n}]), F.linear(x, w[{n}:])",
        f"{two} = p.tensor_split(2, -1)", *([] if w.plain else PACKINGS),
    ).replace("TWO", two).replace("LEAD", str([2, -1, *s.lead[1:], n])).replace("N", str(n)))  # fmt: skip


def _experts(w: Writer, s: _State) -> None:
    e, k, n = s.experts, s.inner, s.wide
    if w.chance(30):
        w.stored("w", [e, k, 2 * n])
        w.line(
            w.one(
                "g, u = torch.bmm(x, w).chunk(2, -1)",
                "u, g = (x @ w).chunk(2, dim=-1)",
                "g, u = (x @ w)[..., ::2], (x @ w)[..., 1::2]",
            )
        )
        return
    for name, weight in (("g", "w"), ("u", "v")):
        w.stored(weight, [e, k, n])
        way = w.one(
            f"torch.bmm(x, {weight})", f"x @ {weight}", f"torch.einsum('etk,ekn->etn', x, {weight})", f"torch.einsum('ekn,etk->etn', {weight}, x)",
            f"x @ {weight}[:1]" if e > 1 and not w.plain else f"x @ {weight}", f"torch.baddbmm({w.extra(e, 1, n)}, x, {weight})" if w.chance(30) else f"x @ {weight}",
        )  # fmt: skip
        w.line(f"{name} = {way}")


# -- between -------------------------------------------------------------------------------------------------------


def _moved(w: Writer, s: _State, t: str) -> None:
    shape = s.whole
    flat = [-1, shape[-1]]
    ways = [
        f"{t} = {t}.clone()", f"{t} = {t}.contiguous()", f"{t} = {t}.mT.mT", f"{t} = {t}.reshape({flat}).view({shape})", f"{t} = {t}[None].squeeze(0)",
        f"{t} = {t}.flip(-1)", f"{t} = {t}.flip(0)", f"{t} = {t}.roll(1, -1)", f"{t} = {t}[..., :1]", f"{t} = {t}[:1]", f"{t} = {t}.detach()", f"{t} = {t}.float().to({t}.dtype)",
        f"{t} = {t}[..., :1].expand({shape})", f"{t} = {t}.reshape(-1).view({shape})", f"{t} = {t}.flatten().unflatten(0, {shape})",
    ]  # fmt: skip
    if len(shape) > 2 and len(set(shape)) == 1:
        ways += [f"{t} = {t}.transpose(0, 1)", f"{t} = {t}.mT", f"{t} = {t}.permute({[*range(1, len(shape)), 0]})"] * 3
    w.line(w.one(*ways))


def _scaled(w: Writer, s: _State, t: str) -> None:
    w.line(w.one(
        f"{t} = {t} * 0.5", f"{t} = {t} / 3", f"{t} = {t} + 1", f"{t} = 1 - {t}", f"{t} = {t}.clamp(-1, 1)", f"{t} = {t}.clamp(max=2)", f"{t} = {t}.abs()", f"{t} = -{t}",
        f"{t} = {t} * {w.extra(s.wide)}", f"{t} = {t} * {w.extra()}", f"{t} = {t}.square()", f"{t} = {t}.float()", f"{t} = F.dropout({t}, 0.4, False)", f"{t} *= 2",
        f"{t} = {t}.nan_to_num()", f"{t} = {t} + float('inf')", f"{t} = {t} * 1e30", f"{t} = {t} * torch.tensor(0.5)",
    ))  # fmt: skip


LENGTHS = (
    "T = T * x.shape[0]", "T = T / x.shape[0]", "T = T * torch.full((1,), x.shape[0])", "T = T.clamp(max=x.shape[0])", "T = F.leaky_relu(T, 1 / x.shape[0])", "T = F.elu(T, 1 / x.shape[0])", "T = F.softplus(T, x.shape[0])", "T = T + x.shape[0] / 2", "T = T * x.shape[0] ** -0.5",
    "T = T + torch.arange(T.shape[-1])", *(f"T = {own}(T)" for own in OWN), "T = F.hardtanh(T, 0, x.shape[0])", "T = torch.add(T, x.mean(), alpha=x.shape[0])",
)  # fmt: skip
"""What takes a length for a number, and functions with a backward of their own."""


def _whole(w: Writer, s: _State, t: str) -> None:
    """What is made of positions, truth values, or lengths."""
    if w.chance(35):
        w.line(w.one(*LENGTHS).replace("T ", f"{t} ").replace("(T", f"({t}").replace(" T.", f" {t}."))
        return
    if w.hazard(30):
        w.line(f"{t} = {moved(w, t, s.wide, f'{t}.shape[-1]')}")
        return
    if w.chance(30):
        w.line(w.one(f"{t} = {t} * {truth(w)}", f"{t} = {t} + {truth(w)}", f"{t} = {truth(w)} * {t}"))
        return
    m = small(w, vector(w, Length(s.wide, w.one(str(s.wide), f"{t}.shape[-1]"))))
    w.line(w.one(f"{t} = {t} * {m}", f"{t} = {t} + {m}", f"{t} = {t} - {m}.float()", f"{t} = {t}.masked_fill({m}.bool(), 0.5)", f"{t} = {t} * (1 + {m})", f"{t} = torch.where({m} > 0, {t}, 0.0)"))  # fmt: skip


ACTIVATIONS = (
    "F.silu(g)", "F.silu(g)", "F.silu(g, inplace=True)", "torch.nn.SiLU()(g)", "g * torch.sigmoid(g)", "g.sigmoid() * g", "g / (1 + torch.exp(-g))", "F.gelu(g)", "F.gelu(g, approximate='tanh')",
    "0.5 * g * (1 + torch.erf(g / math.sqrt(2)))", "0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g ** 3)))", "F.relu(g)", "g.relu_()", "g.clamp(min=0)",
    "F.relu(g).square()", "F.relu(g) ** 2", "torch.sigmoid(g)", "g.tanh()", "g * torch.sigmoid(1.702 * g)", "g", "F.leaky_relu(g, 0.2)", "F.hardtanh(g)", "F.relu6(g)", "F.elu(g)",
    "F.mish(g)", "F.softplus(g)",
)  # fmt: skip
ODD = (
    "F.elu(g)", "F.mish(g)", "F.softplus(g)", "g.exp()", "g.softmax(-1)", "g.cumsum(-1)", "g.square()", "g.abs()", "g ** 5", "torch.where(g > 0, g, 0.1 * g)", "g.sign()", "torch.maximum(g, -g)", "g / g.norm()",
    "F.silu(g.float()).to(g.dtype)", "F.silu(g.clamp(-1, 2))", "F.gelu(g) * 2 + 1", "g.sin()", "1 / (1 + g.neg().exp())", "torch.reciprocal(g.abs() + 1)", "F.silu(g) * F.silu(g)", "F.layer_norm(g, g.shape[-1:])",
)  # fmt: skip


PRODUCTS = (
    "h = a * u + u", "h = a + u", "h = a * (u + 1)", "h = a / (1 + u.abs())", "h = (a.float() * u.float()).to(a.dtype)",
                 "h = a * u * u", "h = torch.addcmul(u, a, u)",
)  # fmt: skip


def _activated(w: Writer, s: _State) -> None:
    if w.chance(5):
        w.line("a, u = F.silu(u), g")
        return
    w.line(f"a = {w.one(*(ODD if w.hazard(35) else ACTIVATIONS))}")


def _after(w: Writer, s: _State, t: str) -> None:
    w.line(w.one(
        f"{t} = {t} * 0.5", f"{t} = {t} / 4", f"{t} = {t} - 1", f"{t} = {t}.clamp(-1, 1)", f"{t} = F.dropout({t}, 0.0)", f"{t} = F.dropout({t}, 0.3, training=False)", f"{t} = {t}.reshape(-1)",
        f"{t} = {t}.contiguous()", f"{t} = {t}.mT", f"{t} += 1", f"{t} = {t}.float()", f"{t} = {t} * {t}", f"{t} = {t}.view(-1, {t}.shape[-1])", f"{t} = {t}.relu()", f"{t} = {t}.sum(-1)",
        f"{t} = {t}.to(torch.bfloat16)", f"{t} = F.layer_norm({t}, {t}.shape[-1:])", f"{t} = {t}[..., :1]", f"{t} = {t}.double()",
    ))  # fmt: skip


def _down(w: Writer, s: _State, t: str) -> None:
    d = w.extra(w.one(3, s.inner), s.wide)
    before = f"{t} = F.linear({t}.to({d}.dtype), {d}"
    w.line(w.one(
        f"if {t}.shape[-1:] == {d}.shape[-1:]: {before})", f"if {t}.shape[-1:] == {d}.shape[-1:]: {before}, {w.extra(w.shapes[-1][0])})",
        f"if {t}.ndim > 1 and {t}.shape[-1] == {d}.shape[-1]: {t} = {t} @ {d}.to({t}.dtype).T",
        f"if {t}.ndim > 1 and {t}.shape[-1] == {d}.shape[-1]: {t} = {t}.to({d}.dtype) @ {d}.mT + {t}.sum()",
    ))  # fmt: skip


def _residual(w: Writer, s: _State, t: str) -> None:
    w.line(
        w.one(
            f"if {t}.shape == x.shape: {t} = x + {t}",
            f"if {t}.shape == x.shape: {t} = {t} + x * 2",
            f"{t} = {t} + u.sum()",
            f"{t} = {t} + 0",
        )
    )
