"""Random programs around an attention."""

# ruff: noqa: E501 (the text of programs)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from whole import Length, matrix, moved, predicate, small, truth, vector
from writer import Draw, Program, Writer, write


@st.composite
def programs(draw: Draw) -> Program:
    w = Writer(draw)
    grad = w.chance(20)
    dtype = w.one(*[torch.float32] * 8, torch.bfloat16, torch.float16, torch.float64)
    lead = [w.one(1, 2, 3) for _ in range(w.one(0, 1, 2, 2, 2, 2, 3))]
    queries = w.one(1, 4, 4, 5, 7)
    keys = queries if w.chance(50) else w.one(1, 4, 5, 6)
    features = w.one(1, 4, 4, 8)
    wide = features if w.chance(80) else w.one(4, 6)

    q = _operand(w, "q", [*lead, queries, features], grad)
    groups = 1
    if lead and w.chance(25):
        groups = lead[-1]
        lead[-1] = lead[-1] * w.one(1, 2)
    kv = [*lead[:-1], groups] if lead and groups != lead[-1] else list(lead)
    k = _operand(w, "k", [*kv, keys, features], grad)
    v = _operand(w, "v", [*kv, keys, wide], grad)
    if kv != lead:
        w.shapes[0] = tuple(w.shapes[0])
        _regroup_query(w, lead, queries, features)
        _grow(w, "k", kv, lead, keys, features)
        _grow(w, "v", kv, lead, keys, wide)
    del q, k, v
    state = _State(lead, queries, keys, features, wide, dtype, grad)
    if w.chance(12):
        _moved_operand(w, state)
    _scores(w, state)
    for _ in range(w.one(0, 1, 1, 2, 3)):
        _mutation(w, state, 8)
        w.one(*_SCORE_OPS)(w, state)
    _mutation(w, state, 8)
    _softmax(w, state)
    _mutation(w, state, 8)
    for _ in range(w.one(0, 0, 0, 1)):
        w.one(*_WEIGHT_OPS)(w, state)
    _values(w, state)
    shown = _shown(w, state)
    source = w.source(shown)
    return Program(source, tuple(w.shapes), dtype, grad, w.chance(8), w.chance(50), exact=w.exact(shown))


@dataclass
class _State:
    lead: list[int]
    queries: int
    keys: int
    features: int
    wide: int
    dtype: torch.dtype
    grad: bool
    shown: tuple[str, ...] = ()
    masks: int = 0

    def lengths(self, w: Writer) -> tuple[Length, Length]:
        """Of the queries and of the keys."""
        return (
            Length(self.queries, w.one(str(self.queries), "q.shape[-2]")),
            Length(self.keys, w.one(str(self.keys), "k.shape[-2]")),
        )


def _operand(w: Writer, name: str, shape: list[int], grad: bool) -> str:
    """An input, perhaps stored in another order of its axes."""
    n = len(shape)
    order = list(range(n))
    if w.chance(35):
        order = list(w.order(order))
    w.input(name, *(shape[d] for d in order))
    if order != list(range(n)):
        back = [order.index(d) for d in range(n)]
        w.line(
            w.one(f"{name} = {name}.permute({', '.join(map(str, back))})", f"{name} = torch.permute({name}, {back})")
        )
    if grad or w.chance(20):  # what is written in place must not be a leaf
        w.line(f"{name} = {name} * 1.0")
    return name


def _regroup_query(w: Writer, lead: list[int], queries: int, features: int) -> None:
    """The queries have all the heads: forget what `_operand` wrote of them."""
    w.lines = [line for line in w.lines if not line.strip().startswith("q =")]
    w.shapes[0] = (*lead, queries, features)
    w.line("q = q * 1.0")


def _grow(w: Writer, name: str, kv: list[int], lead: list[int], keys: int, features: int) -> None:
    times, axis = lead[-1] // kv[-1], len(kv) - 1
    full = [*lead, keys, features]
    between = [*kv, times, keys, features]
    ways = [
        f"{name} = {name}.repeat_interleave({times}, dim={axis})",
        f"{name} = {name}.unsqueeze({axis + 1}).expand({between}).reshape({full})",
        f"{name} = torch.repeat_interleave({name}, {times}, dim={axis - len(kv) - 2})",
        f"{name} = {name}.unsqueeze({axis + 1}).expand({between}).flatten({axis}, {axis + 1})",
        f"{name} = torch.cat([{name}] * {times}, dim={axis})",
    ]
    if kv[-1] == 1:
        ways += [f"{name} = {name}.expand({full})", f"{name} = {name}"]
    w.line(w.one(*ways))


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEF"


def _scores(w: Writer, s: _State) -> None:
    n = len(s.lead)
    letters = w.order(LETTERS)
    b, i, j, d = "".join(letters[:n]), letters[n], letters[n + 1], letters[n + 2]
    ways = [
        "s = q @ k.mT",
        "s = q @ k.transpose(-1, -2)",
        f"s = torch.matmul(q, k.transpose({n}, {n + 1}))",
        "s = q.matmul(k.swapaxes(-2, -1))",
        "s = (k @ q.mT).mT",
        "s = torch.einsum('...id,...jd->...ij', q, k)",
        "s = (q * 0.5) @ k.mT",
        "s = q @ (k / 2.0).mT",
        "s = (q * 0.7) @ (k * 0.7).mT",
        "s = q.float() @ k.float().mT",
    ]
    if "k = k" not in [line.strip() for line in w.lines]:
        ways += [
            f"s = torch.einsum('{b}{i}{d},{b}{j}{d}->{b}{i}{j}', q, k)",
            f"s = torch.einsum('{b}{i}{d}, {b}{j}{d} -> {b}{j}{i}', q, k).transpose(-1, -2)",
            f"s = torch.einsum('{b}{j}{d},{b}{i}{d}->{b}{i}{j}', k, q)",
            f"s = torch.einsum('{b}{i}{d},{b}{j}{d}->{i}{b}{j}', q, k).movedim(0, -2)",
        ]
        if n:
            flat_q, flat_k = f"q.reshape(-1, {s.queries}, {s.features})", f"k.reshape(-1, {s.keys}, {s.features})"
            shape = [*s.lead, s.queries, s.keys]
            ways += [
                f"s = torch.bmm({flat_q}, {flat_k}.mT).view({shape})",
                f"s = torch.baddbmm(torch.empty(1, 1, 1, dtype=q.dtype), {flat_q}, {flat_k}.mT, beta=0, alpha=0.5).view({shape})",
                f"s = torch.baddbmm(q.new_ones(1, 1, {s.keys}), {flat_q}, {flat_k}.mT, beta=0.5).view({shape})",
            ]
    w.line(w.one(*ways))


# -- between the products ------------------------------------------------------------------------------------------


def _scale(w: Writer, s: _State) -> None:
    w.line(w.one(
        "s = s * 0.5", "s = s / 2.0", "s = 0.3 * s", "s *= 0.5", "s = torch.mul(s, 0.25)", "s = s.div(3)", "s = -s",
        "s = s.mul_(0.5)", "s = s / torch.tensor(2.0)", "s = s * torch.full((1,), 0.5)", "s = s * q.size(-1) ** -0.5",
    ))  # fmt: skip


def _tensor_scale(w: Writer, s: _State) -> None:
    name = w.input(f"x{len(w.names)}", *w.one((), (1,), _broadcast(w, s, keys=False)))
    w.line(w.one(f"s = s * {name}", f"s = s * {name}.exp()", f"s = s / ({name}.abs() + 1)", f"s = {name} * s"))


def _broadcast(w: Writer, s: _State, keys: bool = True) -> tuple[int, ...]:
    """A shape that broadcasts to the scores."""
    full = [*s.lead, s.queries, s.keys]
    shape = [n if w.chance(60) else 1 for n in full]
    shape[-1] = s.keys if keys and w.chance(90) else 1
    return tuple(shape[w.random.randrange(len(shape)) :]) if w.chance(30) else tuple(shape)


def _bias(w: Writer, s: _State) -> None:
    name = w.input(f"x{len(w.names)}", *_broadcast(w, s))
    w.line(w.one(
        f"s = s + {name}", f"s = {name} + s", f"s += {name}", f"s = s.add({name}, alpha=0.5)", f"s = torch.sub(s, {name})",
        f"s = s.add_({name})", f"s = s + {name} * 0.5", f"s = s + {name}.abs()", f"s = s + {name}.expand_as(s)",
        f"s = s + {name}.detach()", f"s = torch.add({name}, s, alpha=2)", f"s = {name} - s",
    ))  # fmt: skip


def _position_bias(w: Writer, s: _State) -> None:
    i, j = f"torch.arange({s.queries})[:, None]", f"torch.arange({s.keys})"
    w.line(w.one(
        f"s = s - 0.5 * ({i} - {j}).abs()", f"s = s + 0.1 * {j}", f"s = s + ({i} >= {j})", f"s = s - ({j} // 2)",
        f"s = s + ({i} * {j} % 3).to(s.dtype)", f"s = s + torch.eye({s.queries}, {s.keys})", f"s = s * (1 + {i})",
    ))  # fmt: skip


def _whole_bias(w: Writer, s: _State) -> None:
    m = small(w, matrix(w, *s.lengths(w)))
    w.line(w.one(f"s = s + {m}", f"s = s + {m} * 0.3", f"s = s * {m}", f"s = {m} + s", f"s = s - {m}.float()", f"s = s + {m}.to(s.dtype)", f"s += {m}",
                 f"s = torch.add(s, {m}, alpha=2)", f"s = s * (1 + {m} * 0.5)", f"s = s + {w.extra(5)}[{m}.long()]", f"s = s + {w.extra(5, s.keys)}[{m}.long(), torch.arange({s.keys})]"))  # fmt: skip


def _moved(w: Writer, s: _State) -> None:
    if w.chance(40):
        w.line(f"s = {moved(w, 's', s.keys, 'k.shape[-2]')}")
        return
    w.line(w.one(f"s = s * {truth(w)}", f"s = s + {truth(w)}", f"s = s / ({truth(w)} + 1)", "s = s * q.shape[-2]", "s = s / k.shape[-2]", "s = s + k.size(-2)", "s = s * (1 / k.shape[-2])", "s = s.clamp(max=k.shape[-2])",
                 "s = s * (q.shape[-1] ** 0.5 / 4)", "s = s - torch.arange(k.shape[-2]) / k.shape[-2]", "s = s * torch.full((1,), q.shape[-2])", "s = s + s.new_full((k.shape[-2],), q.shape[-2])"))  # fmt: skip


def _moved_operand(w: Writer, s: _State) -> None:
    """What is done to queries, keys or values before their product."""
    t = w.one("q", "k", "v")
    n, d = s.queries if t == "q" else s.keys, s.wide if t == "v" else s.features
    if w.chance(30):
        w.line(f"{t} = {moved(w, t, d, f'{t}.shape[-1]')}")
        return
    mode = w.one("'reflect'", "'replicate'", "'circular'")
    w.line(w.one(f"{t} = torch.cat([{t}, {t} * 2], -2)[..., -{n}:, :]", f"{t} = F.pad({t}, (0, 0, 3, 0))[..., -{n} - 2:-2, :]", f"{t} = {t}.narrow(-2, -{n}, {n})", f"{t} = F.pad({t}, (0, 0, 2, 1))[..., 2:-1, :]", f"{t} = {t}[..., -{t}.shape[-2]:, :]",
                 f"{t} = {t}[..., torch.arange({n}) - {n}, :]", f"{t} = {t} * {truth(w)}", f"{t} = {t} * {truth(w)}", f"{t} = {t} * {t}.shape[-2]", f"{t} = {t} * {t}.shape[-1] ** -0.5", f"{t} = {t} * torch.full((1,), {t}.shape[-1]) / 4", f"{t} = {t} * ({t} > 0)",
                 f"{t} = {t}.mT[..., -{d}:, :].mT", f"{t} = {t}.flip(-2)[..., torch.arange({n} - 1, -1, -1), :]", f"{t} = F.pad({t}.reshape(1, -1, {n}, {d}), (0, 0, 1, 0), mode={mode})[..., :-1, :].view({t}.shape)", f"{t} = {t} * {small(w, vector(w, Length(d, str(d))))}"))  # fmt: skip


def _predicate(w: Writer, s: _State, depth: int = 0) -> str:
    i, j = f"torch.arange({s.queries})[:, None]", f"torch.arange({s.keys})[None, :]"
    ones = f"torch.ones({s.queries}, {s.keys}, dtype=torch.bool)"
    if depth < 2 and w.chance(35):
        a, b = _predicate(w, s, depth + 1), _predicate(w, s, depth + 1)
        return w.one(f"({a} & {b})", f"({a} | {b})", f"(~{a})", f"torch.logical_and({a}, {b})", f"({a} ^ {b})")
    kind = w.one("index", "index", "ones", "data", "data", "whole", "whole")
    if kind == "whole":
        return predicate(w, *s.lengths(w))
    if kind == "data":
        name = w.input(f"x{len(w.names)}", *_broadcast(w, s))
        return w.one(
            f"({name} > -0.5)",
            f"({name} < 0.5)",
            f"({name} != 0)",
            f"({name} > -5).expand_as({name})",
            f"(0 < {name}).bool()",
        )
    if kind == "ones":
        n = w.one(-1, 0, 0, 1, s.keys - s.queries)
        return w.one(f"{ones}.tril({n})", f"{ones}.triu({n})", f"(torch.tril({ones}.float(), {n}) == 0)", f"{ones}")
    n = w.one(0, 1, 2, s.keys - s.queries)
    return w.one(
        f"({j} <= {i} + {n})", f"({i} >= {j})", f"(({i} - {j}).abs() <= {n})", f"({j} > {i} - {n})", f"({j} < {n + 1})",
        f"({j} // 2 == {i} // 2)", f"({j} % 2 == 0)", f"({i} >= 0)", f"({j} != {n})", f"({j} <= {i}).logical_not()",
        f"(({i} - {j}) ** 2 <= {n})", f"(({i} - {j}).square() + ({i} // 2 - {j} // 2) ** 2 > {n})",
        f"torch.zeros({s.queries}, {s.keys}, dtype=torch.bool)",
    )  # fmt: skip


def _mask(w: Writer, s: _State) -> None:
    s.masks += 1
    name = f"keep{s.masks}"
    w.line(f"{name} = {_predicate(w, s)}")
    low = "torch.finfo(s.dtype).min"
    fill = (
        w.one("float('-inf')", "-1e4", low)
        if s.dtype == torch.float16
        else w.one("float('-inf')", low, "-1e9", "-1e30", "-1e4", "-100.0")
    )
    w.line(w.one(
        f"s = s.masked_fill(~{name}, {fill})", f"s = s.masked_fill({name}, {fill})",
        f"s = torch.where({name}, s, {fill})", f"s = torch.where({name}, {fill}, s)",
        f"s = s + torch.where({name}, 0.0, {fill})", f"s.masked_fill_(~{name}, {fill})",
        f"s = s + torch.zeros({name}.shape, dtype=s.dtype).masked_fill(~{name}, {fill})",
        f"s = s + (1.0 - {name}.to(s.dtype)) * {fill if 'inf' not in fill or 'finfo' in fill else '-1e4'}",
        f"s = s.masked_fill({name} == 0, {fill})", f"s = s.where({name}, torch.tensor({fill}, dtype=s.dtype))",
        f"s += torch.where({name}, 0.0, {fill})",
    ))  # fmt: skip
    if w.chance(5):
        s.shown = (*s.shown, name)


def _shape_round_trip(w: Writer, s: _State) -> None:
    shape = [*s.lead, s.queries, s.keys]
    w.line(w.one(
        f"s = s.reshape(-1, {s.keys}).view({shape})", "s = s.mT.mT", "s = s.clone()", "s = s.contiguous()", "s = s.unsqueeze(0)[0]",
        "s = s.transpose(-1, -2).contiguous().transpose(-2, -1)", "s = s[None].squeeze(0)", "s = s.flatten().unflatten(0, "
        f"{shape})", "s = s.float().to(s.dtype)", "s = s.to(q.dtype)", "s = s.float()", "s = s + 0", "s = s.roll(0, -1)",
    ))  # fmt: skip


def _row_shift(w: Writer, s: _State) -> None:
    w.line(w.one(
        "s = s - s.amax(-1, keepdim=True)", "s = s - s.max(-1, keepdim=True).values", "s = s - s.amax(-1).unsqueeze(-1)",
        "s = s - s.amax(-1, keepdim=True).detach()", "s = (s / 4 - (s / 4).amax(-1, keepdim=True)) * 4",
        "s = s - s.mean(-1, keepdim=True)", "s = s - s.amax(-2, keepdim=True)", "s = s - s.max()", "s = s + 1.5",
    ))  # fmt: skip


def _unusual(w: Writer, s: _State) -> None:
    w.line(w.one(
        "s = (s / 5).tanh() * 5", "s = s.clamp(-3, 3)", "s = s.clamp(min=-2)", "s = s.sigmoid()", "s = s.square()", "s = s + s",
        "s = s.cumsum(-1)", "s = s.flip(-1)", "s = s.roll(1, -1)", "s = s.nan_to_num()", "s = s / (s.std(-1, keepdim=True) + 1)",
        "s = s.detach()", "s = s.relu()", "s = s * s", "s = s + s.detach()", "s = s.abs()", "s = F.dropout(s, 0.5, False)",
        "s = s.sort(-1).values", "s = torch.maximum(s, -s)", "s = s.exp().log()", "s = s[..., :, :]", "s = s * 1", "s = s ** 3",
    ))  # fmt: skip


_SCORE_OPS: list[Callable[[Writer, _State], None]] = [
    _scale, _scale, _bias, _bias, _bias, _mask, _mask, _mask, _mask, _position_bias, _tensor_scale, _shape_round_trip, _row_shift,
    _unusual, _whole_bias, _moved,
]  # fmt: skip


def _mutation(w: Writer, s: _State, percent: int) -> None:
    if not w.chance(percent):
        return
    text = "\n".join(w.lines)
    targets = ["q", "k", "v"] + [t for t in ("s", "w") if f"{t} = " in text]
    t = w.one(*targets)
    if s.grad and not any(line.strip().startswith(f"{t} = ") for line in w.lines):
        return
    write(w, [t], 100)


def _softmax(w: Writer, s: _State) -> None:
    dim = "-1" if w.chance(90) else w.one("-2", "0")
    cast, top = "v.dtype", 8 if s.dtype == torch.float16 else 80  # past which exp, or a sum of these, is inf
    w.line(w.one(
        f"w = s.softmax({dim})", f"w = F.softmax(s, dim={dim})", f"w = torch.softmax(s, {dim})", f"w = torch.special.softmax(s, {dim})",
        f"w = F.softmax(s, dim={dim}, dtype=torch.float32)", f"w = s.float().softmax({dim})", f"w = F.softmax(s, {dim}, _stacklevel=5)",
        f"w = F.log_softmax(s, {dim}).exp()", f"w = s.clamp(max={top}).exp() / s.clamp(max={top}).exp().sum({dim}, keepdim=True)",
        f"w = torch.nn.Softmax(dim={dim})(s)",
    ))  # fmt: skip
    if w.chance(5):
        w.line("w = w.softmax(-1)")
    w.line(w.one(f"w = w.to({cast})", "w = w.type_as(v)", f"w = w.to(dtype={cast})"))


def _w_noop(w: Writer, s: _State) -> None:
    shape = [*s.lead, s.queries, s.keys]
    w.line(w.one(
        "w = F.dropout(w, 0.1, False)", "w = F.dropout(w, 0.0, True)", "w = w.clone()", "w = w.contiguous()", "w = w * 1",
        f"w = w.reshape(-1, {s.keys}).reshape({shape})", "w = w.float().to(v.dtype)", "w = w.mT.mT", "w = w + 0",
        "w = torch.where(w.isnan(), 0.0, w)", "w = w.masked_fill(w != w, 0)", "w = w.nan_to_num()",
    ))  # fmt: skip


def _w_change(w: Writer, s: _State) -> None:
    w.line(w.one(
        "w = w * 2", "w = w.square()", "w = w / w.sum(-1, keepdim=True)", "w = w.flip(-1)", "w = w.detach()", "w = w[..., :1, :]",
        "w = w - 0.1", "w = w.mT", "w = w.flip(0)", "w = w.roll(1, -2)", "w.mul_(0.5)", "w[..., 0] = 0", "w = torch.tril(w)",
        f"w = {moved(w, 'w', s.keys, 'k.shape[-2]')}", f"w = w * {truth(w)}",
    ))  # fmt: skip


_WEIGHT_OPS = [_w_noop, _w_noop, _w_noop, _w_change]


def _values(w: Writer, s: _State) -> None:
    n = len(s.lead)
    letters = w.order(LETTERS)
    b, i, j, d = "".join(letters[:n]), letters[n], letters[n + 1], letters[n + 2]
    ways = [
        "o = w @ v",
        "o = torch.matmul(w, v)",
        "o = w.matmul(v)",
        "o = (v.mT @ w.mT).mT",
        "o = torch.einsum('...ij,...jd->...id', w, v)",
    ]
    if "v = v" not in [line.strip() for line in w.lines]:
        out = "".join(w.order([*b, i, d]))
        ways += [
            f"o = torch.einsum('{b}{i}{j},{b}{j}{d}->{out}', w, v)",
            f"o = torch.einsum('{b}{j}{d},{b}{i}{j}->{b}{i}{d}', v, w)",
        ]
        if n:
            shape = [*s.lead, s.queries, s.wide]
            ways.append(
                f"o = torch.bmm(w.reshape(-1, {s.queries}, {s.keys}), v.reshape(-1, {s.keys}, {s.wide})).reshape({shape})"
            )
    w.line(w.one(*ways))
    if w.chance(5):
        w.line("o2 = w @ (v * 2)")
        s.shown = (*s.shown, "o2")


def _shown(w: Writer, s: _State) -> list[str]:
    for _ in range(w.one(0, 0, 1)):
        w.line(w.one(
            "o = o.transpose(-1, -2)", "o = o.flatten(0)", "o = o.transpose(0, -2).contiguous()", "o += 1", "o = o * 2", "o.mul_(0.5)",
            "o = o.to(v.dtype)", "o = o.reshape(-1)", "o[..., 0] = 1", "o = o + v.mean()",
        ))  # fmt: skip
    shown = ["o", *s.shown]
    if w.chance(6):
        shown.append(w.one("s", "w", "q", "v"))
    if w.chance(6):
        w.line(w.one("s.clone().sum()", "w.view(-1).mean()", "q.add_(1)", "v.mul_(2)") if not s.grad else "w.sum()")
    return shown
