"""Random programs as source text, written line by line: what a failing example prints is the program itself."""

# ruff: noqa: E501 (the text of programs)

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import _disable_current_modes

Draw = Callable[[st.SearchStrategy[Any]], Any]

HEADER = """\
import math
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
"""

OWN = {
    "scaled_tanh": ("torch.tanh(h) * torch.full((h.shape[-1],), 2.0)", "2 * (1 - torch.tanh(h) ** 2)"),
    "cast_silu": ("F.silu(h) * torch.full((), 0.3, dtype=torch.float64).to(h.dtype)", "0.3 * h.sigmoid() * (1 + h * (1 - h.sigmoid()))"),
    "whole_sigmoid": ("h.sigmoid() * torch.full((), 2).to(h.dtype)", "h.sigmoid() * (1 - h.sigmoid()) * 2"),
    "truthful_tanh": ("torch.tanh(h) + torch.tensor(True)", "1 - torch.tanh(h) ** 2"),
    "viewed_silu": ("F.silu(h) * torch.full((1,), 2.0).reshape(())", "2 * h.sigmoid() * (1 + h * (1 - h.sigmoid()))"),
    "long_tanh": ("torch.tanh(h) * h.shape[0]", "(1 - torch.tanh(h) ** 2) * h.shape[0]"),
}  # fmt: skip
"""Functions with a backward of their own: what they make of h, and its derivative."""

HEADER += "".join(
    f"""
class {name.title()}(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return {value}

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return (grad * ({slope})).to(h.dtype)


{name} = {name.title()}.apply
"""
    for name, (value, slope) in OWN.items()
)


@dataclass(frozen=True)
class Program:
    """Source of a function `program`, and the inputs that it takes.

    aot: compiled through AOTAutograd, and not run as the rewritten graph itself, which is quicker.
    dropped: the rate at which it drops elements out, 0 if it does not. kept: the same program with factors in the place
    of its only dropout, which the function takes as its last argument; "" where it has several.
    exact: the same program with lines that in fp64 too are computed in the dtypes that they name; "" where it has none.
    routes: the ones to force where our kernels are to run.
    """

    source: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    grad: bool
    dynamic: bool
    aot: bool = True
    dropped: float = 0.0
    kept: str = ""
    exact: str = ""
    routes: tuple[tuple[str, str], ...] = (("attention", "triton"),)

    @property
    def computed(self) -> torch.dtype:
        """The least exact dtype that is computed in, whatever its results are cast to."""
        return torch.bfloat16 if AUTOCAST in self.source else self.dtype

    def function(self) -> Callable[..., Any]:
        return _function(self.source)

    def with_factors(self) -> Callable[..., Any]:
        return _function(self.kept, self.dtype)

    def in_fp64(self) -> Callable[..., Any]:
        """What is to be run in fp64, to be compared with."""
        return _function(self.exact or self.source, self.dtype)

    def __str__(self) -> str:
        return f"{self.source}\n# shapes {self.shapes}, {self.dtype}, grad={self.grad}, dynamic={self.dynamic}"


def _as_is(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Computes something of inputs of that dtype as eager does, also in the midst of fp64. coarse: but for fractions,
    which eager rounds to few digits, and others need not."""

    def as_is(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor, coarse: bool = False) -> torch.Tensor:
        if torch.get_default_dtype() != torch.float64:
            return compute(*inputs)
        torch.set_default_dtype(torch.float32)
        try:
            with _disable_current_modes():
                result = compute(*[x.to(dtype) for x in inputs])
        finally:
            torch.set_default_dtype(torch.float64)
        if not result.is_floating_point():
            return result
        return compute(*inputs) if coarse or dtype.itemsize == 2 else result.double()

    return as_is


def _function(source: str, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    space: dict[str, Any] = {"as_is": _as_is(dtype)}
    exec(compile(HEADER + source, "<fuzz>", "exec"), space)
    return space["program"]


class Writer:
    """The lines of a program and the inputs that it has so far."""

    def __init__(self, draw: Draw) -> None:
        self.random: Random = draw(st.randoms(use_true_random=True))
        """Seeded by hypothesis, which draws each choice by itself only to make a failure smaller, and on the way draws
        the first choice, and what it drew before, far more often than others."""
        self.lines: list[str] = []
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.plain = self.chance(55)
        """Nothing is to go wrong in it: it is to be matched, as it is spelled."""
        self.instead: dict[int, str] = {}
        """For lines that drop out, or that say in which dtypes they are computed, what stands there in the program that
        they are compared with."""

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def hazard(self, percent: int) -> bool:
        """Whether to do what may keep a site from being one."""
        return not self.plain and self.chance(percent)

    def order(self, items: Sequence[Any]) -> list[Any]:
        return self.random.sample(items, len(items))

    def input(self, name: str, *shape: int) -> str:
        self.names.append(name)
        self.shapes.append(shape)
        return name

    def extra(self, *shape: int) -> str:
        """One more input."""
        return self.input(f"x{len(self.names)}", *shape)

    def line(self, text: str, instead: str | None = None) -> None:
        if instead is not None:
            self.instead[len(self.lines)] = instead
        self.lines.append(text)

    def exactly(self, text: str) -> str:
        """A name of what is computed of inputs and sizes alone, and in the dtypes that the text names."""
        name = f"n{len(self.lines)}"
        inputs = ", ".join(dict.fromkeys(re.findall(r"\bx\d+\b", text)))
        lambda_ = f"lambda {inputs}: {text}" if inputs else f"lambda: {text}"
        coarse = bool(re.search("bfloat16|float16|half", text))
        self.line(f"{name} = {text}", f"{name} = as_is({lambda_}, {f'{inputs}, ' if inputs else ''}coarse={coarse})")
        return name

    def permuted(self, shape: list[int]) -> tuple[list[int], list[int]]:
        """A random order to store axes in, and the one that puts them back."""
        order = self.order(range(len(shape)))
        return [shape[d] for d in order], [order.index(d) for d in range(len(shape))]

    def stored(self, name: str, shape: list[int], percent: int = 35) -> str:
        """An input that is perhaps stored in another order of its axes, or as a part of a larger tensor."""
        if not self.chance(percent) or not shape:
            return self.input(name, *shape)
        if self.chance(30):
            d = self.random.randrange(len(shape))
            larger = [n + 2 * (k == d) for k, n in enumerate(shape)]
            self.input(name, *larger)
            self.line(f"{name} = {name}.narrow({d}, {self.one(0, 1, 2)}, {shape[d]})")
            return name
        stored, back = self.permuted(shape)
        self.input(name, *stored)
        if back != list(range(len(shape))):
            self.line(self.one(f"{name} = {name}.permute({back})", f"{name} = torch.permute({name}, {back})"))
        return name

    def region(self, *headers: str) -> None:
        """Put some of the lines under a `with`."""
        start = self.random.randrange(len(self.lines))
        end = self.random.randint(start + 1, len(self.lines))
        inside = [f"    {line}" for line in self.lines[start:end]]
        self.lines[start:end] = [self.one(*headers), *inside]
        self.instead = {
            (n + 1 if n >= start else n): (f"    {text}" if start <= n < end else text)
            for n, text in self.instead.items()
        }

    def body(self, *, compared: bool = False) -> list[str]:
        lines = [self.instead.get(n, line) if compared else line for n, line in enumerate(self.lines)]
        return [f"    {line}" for line in lines]

    def exact(self, shown: list[str], *, checkpointed: bool = False) -> str:
        """The program that this one is compared with in fp64, if that is another."""
        return self.source(shown, checkpointed=checkpointed, compared=True) if self.instead else ""

    def source(
        self, shown: list[str], *, checkpointed: bool = False, compared: bool = False, factors: bool = False
    ) -> str:
        """The program, of which some names are the results; inputs that nothing uses are left out.

        compared: with what stands in its lines for the one that it is compared with. factors: which takes factors.
        """
        used = set(re.findall(r"\w+", "\n".join([*self.lines, *shown])))
        self.shapes = [shape for name, shape in zip(self.names, self.shapes, strict=True) if name in used]
        self.names = [name for name in self.names if name in used]
        names = ", ".join([*self.names, "keep"] if factors else self.names)
        body = [*self.body(compared=compared or factors), f"    return {', '.join(shown)}"]
        if checkpointed:
            body = [f"    def inner({names}):", *(f"    {line}" for line in body)]
            body.append(f"    return checkpoint(inner, {names}, use_reentrant=False)")
        return f"def program({names}):\n" + "\n".join(body) + "\n"


AUTOCAST = "with torch.autocast('cpu', dtype=torch.bfloat16):"
REGIONS = (
    AUTOCAST,
    AUTOCAST,
    "with torch.no_grad():",
    "with torch.enable_grad():",
    "with torch.autocast('cpu', enabled=False):",
)


def number_type(w: Writer) -> torch.dtype:
    return w.one(*[torch.float32] * 8, torch.bfloat16, torch.float16, torch.float64)


def write(w: Writer, targets: list[str], percent: int) -> None:
    """Write into one of some tensors in place, through itself or a view."""
    if not w.hazard(percent):
        return
    t = w.one(*targets)
    w.line(w.one(
        f"{t}.mul_(2)", f"{t}.add_(1)", f"{t}[..., 0] = 0.5", f"{t}.zero_()", f"{t}.mT.mul_(0.5)", f"{t}[..., 0, :].add_(1)",
        f"{t}.select(-1, 0).fill_(0.25)", f"{t}.unsqueeze(0).add_(0.5)", f"{t}.neg_()", f"{t}.copy_({t} * 3)", f"F.relu({t}, inplace=True)",
        f"{t} -= {t}.mean()",
    ))  # fmt: skip
