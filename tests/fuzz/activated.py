"""Random programs around bias, activation and dropout: what is done, one by one, to the elements of a projection."""

# ruff: noqa: E501 (the text of programs)

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from whole import Length, moved, small, truth, vector
from writer import OWN, REGIONS, Draw, Program, Writer, number_type, write

RATES = (0.1, 0.25, 0.5, 0.5, 0.9)


@dataclass
class _State:
    lead: list[int]
    inner: int
    wide: int
    dropped: float = 0.0
    shown: list[str] = field(default_factory=list)

    @property
    def whole(self) -> list[int]:
        return [*self.lead, self.wide]


@st.composite
def activated(draw: Draw) -> Program:
    w = Writer(draw)
    grad, dtype = w.chance(45), number_type(w)
    if w.chance(30):
        s = _State([4] * w.one(1, 2, 2, 3), 4, 4)
    else:
        s = _State(
            [w.one(1, 2, 3, 5) for _ in range(w.one(1, 2, 2, 2, 3))],
            w.one(4, 8),
            w.one(*([] if w.plain else [1]), 2, 4, 8, 16),
        )
    w.stored("x", [*s.lead, s.inner])
    if grad or w.chance(10):
        w.line("x = x * 1.0")
    _projection(w, s)
    safe = ["x", "h"]
    dropping = w.chance(30)
    for _ in range(0 if w.plain else w.one(1, 2, 2, 3, 4)):
        write(w, safe, 8)
        w.one(*[_activation] * 4, _number, _vector, _residual, _same, _odd)(w, s)
    if w.plain:
        for step in (_number, _activation, _vector, _cast, _number):
            if step is _activation or w.chance(25):
                step(w, s)
    if dropping:
        _dropout(w, s)
        for _ in range(w.one(0, 0, 1, 2)):
            w.one(_number, _vector, _residual, _residual, _cast)(w, s)
    elif w.plain:
        for step in (_vector, _residual, _residual):
            if w.chance(40):
                step(w, s)
    elif w.chance(40):
        w.line(
            w.one(
                "h = F.dropout(h, 0.0)",
                "h = F.dropout(h, 0.5, False)",
                "h = torch.nn.Dropout(0.3).eval()(h)",
                "h = F.alpha_dropout(h, 0.2, False)",
                "h = F.dropout(h, 0.0, inplace=True)",
            )
        )
        for _ in range(w.one(0, 1, 2)):
            w.one(_activation, _number, _vector, _residual, _residual, _same, _next)(w, s)
        write(w, safe, 4)
    shown = ["h"]
    if not dropping and w.hazard(20):
        shown.append(w.one("x", "h0"))
    checkpointed = grad and w.chance(15)
    if w.hazard(20):
        w.region(*REGIONS)
    routes = (("bias-act-dropout", w.one("triton", "epilogue")),)
    kept = w.source(shown, factors=True) if s.dropped else ""
    # A backend that runs Dynamo's graph as it is draws anew when a checkpoint computes again.
    aot = w.chance(50) or (checkpointed and bool(s.dropped))
    return Program(
        w.source(shown, checkpointed=checkpointed), tuple(w.shapes), dtype, grad, w.chance(6), aot,
        dropped=s.dropped, kept=kept, exact="" if kept else w.exact(shown, checkpointed=checkpointed), routes=routes,
    )  # fmt: skip


def _projection(w: Writer, s: _State) -> None:
    n, k = s.wide, s.inner
    way = w.one(*["linear"] * 6, "matmul", "matmul", *([] if w.plain else ["none", "none", "conv", "two"]))
    if way == "linear":
        w.stored("w", [n, k])
        b = w.extra(n)
        w.line(w.one(
            f"h = F.linear(x, w, {b})", f"h = F.linear(x, w, {b})", f"h = F.linear(x, w) + {b}", f"h = {b} + F.linear(x, w)", "h = F.linear(x, w)", f"h = F.linear(x, w).add_({b})",
            f"h = F.linear(x.reshape(-1, {k}), w, {b}).view({s.whole})", f"h = torch.addmm({b}, x.reshape(-1, {k}), w.T).reshape({s.whole})", f"h = torch.addmm({b}, x.reshape(-1, {k}), w.T, beta=0.5, alpha=2).reshape({s.whole})",
            f"h = F.linear(x, w, {b}) + {b}", f"h = F.linear(x, w).reshape({[*s.lead[:-1], -1, n]}) + {b}",
        ))  # fmt: skip
    elif way == "matmul":
        w.stored("w", [k, n])
        b = w.extra(*w.one((n,), (1,), (1, n), *([] if w.plain else [(s.lead[-1], 1), (s.lead[-1], n)])))
        w.line(
            w.one(
                f"h = x @ w + {b}",
                f"h = torch.matmul(x, w) + {b}",
                f"h = torch.einsum('...k,kn->...n', x, w) + {b}",
                f"h = (w.mT @ x.mT).mT + {b}",
                f"h = x @ w - {b}",
                f"h = torch.sub(x @ w, {b}, alpha=-1)",
            )
        )
    elif way == "conv":
        w.input("w", n, k, 1)
        w.line(f"h = F.conv1d(x.reshape(-1, {k}, 1), w, {w.extra(n)}).reshape({s.whole})")
    elif way == "two":
        w.input("w", n, k)
        w.line(f"h = F.linear(x, w, {w.extra(n)}) + F.linear(x, {w.extra(n, k)})")
    else:
        w.stored("y", s.whole)
        w.line(
            w.one(
                f"h = y * 2 + {w.extra(n)}",
                f"h = y.sin() + {w.extra(n)}",
                f"h = (y - 1) + {w.extra(1)}",
                f"h = y.exp() + {w.extra(s.lead[-1], 1)}",
            )
        )
    w.line("h0 = h.mT" if w.hazard(20) else "h0 = h")


ACTIVATIONS = (
    "F.relu(h)", "F.relu(h, inplace=True)", "h.relu_()", "h.clamp(min=0)", "F.relu6(h)", "F.relu(h) ** 2", "F.gelu(h)", "F.gelu(h, approximate='tanh')", "0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))",
    "h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0)))", "h * 0.5 * (1.0 + torch.tanh(0.79788456 * h * (1 + 0.044715 * h * h)))", "h * torch.sigmoid(1.702 * h)", "F.silu(h)", "F.silu(h, inplace=True)", "h * h.sigmoid()", "torch.tanh(h)",
    "torch.sigmoid(h)", "1 / (1 + torch.exp(-h))", "F.leaky_relu(h, 0.1)", "F.elu(h, 0.7)", "F.selu(h)", "F.celu(h, 1.5)", "F.hardswish(h)", "F.hardsigmoid(h)", "F.mish(h)", "F.softplus(h)", "F.softplus(h, 2.0, 3.0)", "F.hardtanh(h, -0.5, 0.5)", "h.abs()", "h.square()",
)  # fmt: skip
ODD = (
    "h.erf()", "F.hardshrink(h)", "F.softsign(h)", "F.tanhshrink(h)", "F.threshold(h, 0.1, 0.0)", "F.logsigmoid(h)", "F.rrelu(h)", "F.elu(h, -1.0)", "h.clamp(-1, 2)", "h.clamp(2, -1)", "torch.where(h > 0, h, h * 0.2)", "torch.maximum(h, torch.zeros_like(h))", "F.gelu(F.gelu(h))",
)  # fmt: skip


def _activation(w: Writer, s: _State) -> None:
    w.line(f"h = {w.one(*(ODD if w.hazard(25) else ACTIVATIONS))}")


def _number(w: Writer, s: _State) -> None:
    if not s.dropped and w.chance(15):
        _whole(w, s)
        return
    w.line(
        w.one(
            "h = h * 0.5",
            "h = h / 3",
            "h = h + 1",
            "h = 1 - h",
            "h *= 2",
            "h = -h",
            "h = h.sub(0.5)",
            "h = h * torch.tensor(2.0)",
            "h = torch.add(h, 1, alpha=3)",
            "h = h.div(2)",
        )
    )


LENGTHS = (
    "h = h * x.shape[0]", "h = torch.add(h, h0.sum(), alpha=x.shape[0])", "h = h * torch.full((1,), x.shape[0])", "h = h.clamp(max=x.shape[0])", "h = F.hardtanh(h, 0, x.shape[0])", "h = F.leaky_relu(h, 1 / x.shape[0])", "h = F.elu(h, 1 / x.shape[0])",
    "h = F.softplus(h, x.shape[0])", "h = F.softplus(h, 1, x.shape[0])", "h = F.celu(h, x.shape[0])", "h = h / x.shape[0]", "h = h + x.shape[0] / 2", "h = F.threshold(h, x.shape[0] / 8, 0.0)", "h = h * x.shape[0] ** -0.5", "h = x.shape[-1] - h", "h = h + torch.arange(h.shape[-1])",
    *(f"h = {own}(h)" for own in OWN),
)  # fmt: skip
"""What takes a length for a number, and functions with a backward of their own."""


def _whole(w: Writer, s: _State) -> None:
    """What is made of positions, truth values, or lengths."""
    if w.chance(40):
        w.line(w.one(*LENGTHS))
        return
    if w.hazard(30):
        w.line(f"h = {moved(w, 'h', s.wide, 'h.shape[-1]')}")
        return
    if w.chance(30):
        w.line(
            w.one(
                f"h = h * {truth(w)}",
                f"h = h + {truth(w)}",
                f"h = {truth(w)} * h",
                f"h = h - {truth(w)} * 1",
                f"h = h / ({truth(w)} + 1)",
            )
        )
        return
    m = small(w, vector(w, Length(s.wide, w.one(str(s.wide), "h.shape[-1]"))))
    w.line(w.one(f"h = h * {m}", f"h = h + {m}", f"h = {m} + h", f"h = h - {m}.float()", f"h = h * {m}.to(h.dtype)", f"h = h * (1 + {m})", f"h = h.masked_fill({m}.bool(), 0.5)", f"h = torch.where({m} > 0, h, 0.0)", f"h = h + {w.extra(5)}[{m}.long()]", f"h *= {m}"))  # fmt: skip


def _vector(w: Writer, s: _State) -> None:
    g = w.extra(
        *w.one((s.wide,), (s.wide,), (1,), (), (*[1] * len(s.lead), s.wide), *([] if w.plain else [(s.lead[-1], 1)]))
    )
    w.line(
        w.one(
            f"h = h * {g}",
            f"h = {g} * h",
            f"h = h + {g}",
            f"h *= {g}",
            f"h = h.mul({g}.exp())",
            f"h = h - {g}",
            f"h = h * {g}.detach()",
            f"h = h * (1 + {g})",
        )
    )


def _residual(w: Writer, s: _State) -> None:
    r = w.extra(*w.one(s.whole, s.whole, s.whole, s.whole[1:], [1, *s.whole[1:]], [*s.lead[:-1], 1, s.wide]))
    w.line(
        w.one(
            f"h = h + {r}",
            f"h = {r} + h",
            f"h += {r}",
            f"h = torch.add({r}, h, alpha=0.5)",
            f"h = h - {r}",
            f"h = h.add({r}, alpha=2)",
            f"h = h + {r}.mT.mT",
            f"h = h + {r}.to(h.dtype)",
        )
    )


def _same(w: Writer, s: _State) -> None:
    w.line(
        w.one(
            "h = h.clone()",
            "h = h.contiguous()",
            f"h = h.reshape(-1, {s.wide}).reshape({s.whole})",
            "h = h.mT.mT",
            "h = h.float()",
            "h = h.to(x.dtype)",
            "h = h + 0",
            "h = h * 1",
            "h = h[None][0]",
            "h = h.mT.contiguous().mT",
        )
    )


def _cast(w: Writer, s: _State) -> None:
    w.line(w.one("h = h.to(x.dtype)", "h = h.float()"))


def _odd(w: Writer, s: _State) -> None:
    r = w.extra(*s.whole)
    w.line(w.one(
        "h = h.flip(-1)", "h = h.roll(1, -1)", "h = h.cumsum(-1)", "h = h.detach()", f"h = h * {r}", "h = h + h0.sum()", "h = h * h", "h = h / (h.abs() + 1)", "h = F.layer_norm(h, h.shape[-1:])", "h = h + h.mean(-1, keepdim=True)",
        "h = h.softmax(-1)", f"h = {r} * h.sigmoid()", f"h = torch.where({r} > 0, h, 0.0)", "h = h.nan_to_num()", "h = h.pow(2).mean(-1, keepdim=True).rsqrt() * h", "h = h.masked_fill(h < 0, 0.0)", "h = h.sort(-1).values", "h = h.to(torch.bfloat16).float()",
        "h = h.exp()", "h = h.log1p()", "h = h ** 0.5", "h = h.reciprocal()", "h = h.round()", f"h = h + {r}.mul_(2)", f"h.copy_({r})", "h = h.reshape(-1)[: h.numel()].view(h.shape)",
    ))  # fmt: skip


def _next(w: Writer, s: _State) -> None:
    d = w.extra(w.one(3, s.wide), s.wide)
    w.line(
        w.one(
            f"h = F.linear(h.to({d}.dtype), {d}).sum(-1, keepdim=True) + h0.sum()",
            f"h = F.gelu(F.linear(h.to({d}.dtype), {d}))[..., :1] * h0",
        )
    )


def _dropout(w: Writer, s: _State) -> None:
    s.dropped = p = w.one(*RATES)
    w.line(
        w.one(f"h = F.dropout(h, {p})", f"h = F.dropout(h, p={p}, training=True)", f"h = torch.dropout(h, {p}, True)", f"h = torch.nn.Dropout({p})(h)", f"h = F.dropout(h * 1, {p}, inplace=True)"),
        "h = h * keep.to(h.dtype)",
    )  # fmt: skip
