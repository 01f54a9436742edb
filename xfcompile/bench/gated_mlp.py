"""Gated MLPs: the product of gate and up, packed and not, with the linear after it, and the block around them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile.bench import columns as c
from xfcompile.bench.job import Benchmark, Call, Check, Place, Row, Scale, Skip, Work

FAMILY = "gated_mlp"
FORWARD, BOTH = "forward", "forward+backward"
SIZES = {
    "gpu": (
        (4096, 4096, 11008),
        (16, 4096, 11008),
        (256, 4096, 11008),
        (16384, 4096, 14336),
        (16384, 1024, 2816),
        (1, 4096, 11008),
    ),
    "cpu": ((512, 768, 2048), (1, 768, 2048)),
    "quick": ((5, 32, 48),),
}
"""Rows, width and hidden features."""
FEW = 1024
"""Rows below which a forward alone is timed as a CUDA graph, as decoding is run."""
LEAST_TRAINED = 256
"""Rows: nobody trains by fewer."""

Activate = Callable[[Tensor, Tensor], Tensor]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def separate(act: Activate, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return act(F.linear(x, w), F.linear(x, v))


def packed(act: Activate, x: Tensor, w: Tensor) -> Tensor:
    gate, up = F.linear(x, w).chunk(2, -1)
    return act(gate, up)


def mlp(act: Activate, x: Tensor, w: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return F.linear(separate(act, x, w, v), d)


def packed_mlp(act: Activate, x: Tensor, w: Tensor, d: Tensor) -> Tensor:
    return F.linear(packed(act, x, w), d)


def block(act: Activate, x: Tensor, w: Tensor, v: Tensor, d: Tensor, g: Tensor) -> Tensor:
    return x + mlp(act, F.rms_norm(x, (x.shape[-1],), g), w, v, d)


@dataclass(frozen=True)
class Program:
    """fn: of the activated product, the input and the weights, whose shapes follow from width and features.

    modes: those that are measured. one: whether gate and up are one product.
    """

    fn: Callable[..., Tensor]
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    modes: tuple[str, ...]
    activate: Activate = silu_mul
    one: bool = False

    @property
    def down(self) -> bool:
        return self.fn not in (separate, packed)


PROGRAMS = {
    "swiglu": Program(separate, lambda k, n: [(n, k), (n, k)], (FORWARD,)),
    "geglu": Program(separate, lambda k, n: [(n, k), (n, k)], (FORWARD,), gelu_mul),
    "packed": Program(packed, lambda k, n: [(2 * n, k)], (FORWARD,), one=True),
    "mlp": Program(mlp, lambda k, n: [(n, k), (n, k), (k, n)], (BOTH,)),
    "packed mlp": Program(packed_mlp, lambda k, n: [(2 * n, k), (k, n)], (BOTH,), one=True),
    "block": Program(block, lambda k, n: [(n, k), (n, k), (k, n), (k,)], (FORWARD, BOTH)),
}


def rows(scale: Scale) -> list[Row]:
    return [
        Row(name, mode, (("M", m), ("K", k), ("N", n)))
        for m, k, n in SIZES[scale]
        for name, program in PROGRAMS.items()
        for mode in program.modes
        if mode == FORWARD or m >= LEAST_TRAINED or scale == "quick"
    ]


def prepare(row: Row, place: Place) -> Work:
    program, train = PROGRAMS[row.name], row.mode == BOTH
    m, k, n = row.size("M"), row.size("K"), row.size("N")
    shapes = [(m, k), *program.shapes(k, n)]
    given = [torch.randn(s, device=place.device, dtype=place.dtype) / (math.sqrt(s[-1]) if i else 1)
             for i, s in enumerate(shapes)]  # fmt: skip
    for t in given if train else []:
        t.requires_grad_()
    dout = torch.randn(m, k, device=place.device, dtype=place.dtype) if train else None

    def call(fn: Callable[..., Tensor], x: Sequence[Tensor] = given, dout: Tensor | None = dout) -> Call:
        if dout is None:
            return lambda: fn(*x)
        return lambda: torch.autograd.grad(fn(*x), x, dout)

    def way(column: str) -> Call:
        if column == c.FLOOR:
            return _floor(program, m, k, n, given[0].detach(), train)
        if column == "xformers-cublas" and not program.one:
            raise Skip("its weights are not packed")
        if column == c.LIGER:
            return call(_with(program, _liger(program.activate)))
        fn = _with(program, program.activate)
        return call(c.compiled(fn, column, FAMILY, dynamic=False))

    def reference(dtype: torch.dtype) -> Sequence[Tensor]:
        x = [t.detach().to(dtype).requires_grad_(train) for t in given]
        return seen(call(_with(program, program.activate), x, None if dout is None else dout.to(dtype))())

    def seen(outcome: Any) -> Sequence[Tensor]:
        return list(outcome) if train else [outcome]

    check = Check(lambda: reference(torch.double), lambda: reference(place.dtype), seen)
    few = m < FEW and not train
    return Work(way, check, grad=train, graph=few, unchecked={c.FLOOR: "computes nothing but products"})


def _with(program: Program, act: Activate) -> Callable[..., Tensor]:
    """A function of its own, which Dynamo compiles anew."""

    def run(*given: Tensor) -> Tensor:
        return program.fn(act, *given)

    return run


def _liger(activate: Activate) -> Activate:
    """Liger's fused function of gate and up."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Skip("liger_kernel is not installed")
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = LigerSiLUMulFunction if activate is silu_mul else LigerGELUMulFunction
    return lambda gate, up: function.apply(gate.contiguous(), up.contiguous())


def _floor(program: Program, m: int, k: int, n: int, x: Tensor, train: bool) -> Call:
    """The products of matrices alone, those of gate and up as one where the program has them packed."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=x.device, dtype=x.dtype)

    hidden, both, down = made(m, n), made(m, 2 * n), made(k, n)
    weights = [made(2 * n, k)] if program.one else [made(n, k), made(n, k)]
    grads = [both] if program.one else [hidden, hidden]

    def run() -> None:
        with torch.no_grad():
            for w in weights:
                torch.mm(x, w.t())
            if program.down:
                torch.mm(hidden, down.t())
            if not train:
                return
            torch.mm(x, down)
            torch.mm(x.t(), hidden)
            for g, w in zip(grads, weights, strict=True):
                torch.mm(g, w)
                torch.mm(g.t(), x)

    return run


BENCHMARK = Benchmark(
    "gated-mlp",
    "gated MLPs",
    (c.EAGER, c.INDUCTOR, c.MAX, c.LIGER, c.FLOOR, c.XFORMERS, c.XFORMERS_MAX, "xformers-triton", "xformers-cublas"),
    rows,
    prepare,
)
