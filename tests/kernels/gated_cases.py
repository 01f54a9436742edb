"""Gated MLPs for kernel tests: formulas, inputs of any layout, and errors against fp64 beside those of eager."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile import activation
from xfcompile.activation import GATE, UP, Sigmoid
from xfcompile.kernels import philox
from xfcompile.kernels.gated_mlp import gated_mlp, gated_mlp_backward, prepare, reference
from xfcompile.site import Layout

FORMULAS: dict[str, tuple[sympy.Expr, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (activation.silu(GATE) * UP, lambda g, u: F.silu(g) * u),
    "gelu": (activation.gelu(GATE, "none") * UP, lambda g, u: F.gelu(g) * u),
    "gelu tanh": (activation.gelu(GATE, "tanh") * UP, lambda g, u: F.gelu(g, approximate="tanh") * u),
    "relu": (activation.relu(GATE) * UP, lambda g, u: F.relu(g) * u),
    "relu squared": (activation.relu(GATE) ** 2 * UP, lambda g, u: F.relu(g).square() * u),
    "leaky relu": (activation.leaky_relu(GATE, 0.1) * UP, lambda g, u: F.leaky_relu(g, 0.1) * u),
    "relu6": (activation.hardtanh(GATE, 0, 6) * UP, lambda g, u: F.relu6(g) * u),
    "sigmoid": (Sigmoid(GATE) * UP, lambda g, u: torch.sigmoid(g) * u),
    "tanh": (sympy.tanh(GATE) * UP, lambda g, u: torch.tanh(g) * u),
    "identity": (GATE * UP, lambda g, u: g * u),
    "abs": (sympy.Abs(GATE) * UP, lambda g, u: g.abs() * u),
    "both alike": (Sigmoid(GATE) * sympy.tanh(UP), lambda g, u: torch.sigmoid(g) * torch.tanh(u)),
    "clamped, quick gelu": (
        (activation.clamp(UP, -1, 1) + 1)
        * activation.clamp(GATE, None, 2)
        * Sigmoid(activation.real(1.702) * activation.clamp(GATE, None, 2)),
        lambda g, u: (u.clamp(-1, 1) + 1) * g.clamp(max=2) * torch.sigmoid(1.702 * g.clamp(max=2)),
    ),
    "no product": (
        activation.clamp(activation.silu(GATE) * UP, -1, 1) * 3,
        lambda g, u: (F.silu(g) * u).clamp(-1, 1) * 3,
    ),
}
"""The formula, and the program that it is of."""


@functools.cache
def key_of(name: str) -> str:
    return prepare(FORMULAS[name][0])


@dataclass(frozen=True)
class Case:
    """memory: how x and the weights lie: "usual", "transposed" (features next to each other) or "poisoned" (parts of
    larger tensors full of NaN)."""

    name: str = "silu"
    rows: int = 37
    features: int = 45
    inner: int = 50
    layout: Layout = "separate"
    biased: bool = False
    experts: int | None = None
    dtype: torch.dtype = torch.float32
    memory: str = "usual"
    device: str = "cpu"

    @property
    def slack(self) -> float:
        """The interpreter truncates to bf16 where hardware rounds to the nearest, which errs by one ulp, not half."""
        return 2.0 if self.device == "cpu" and self.dtype == torch.bfloat16 else 1.0

    def but(self, **about: Any) -> Case:
        return replace(self, **about)

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    @property
    def key(self) -> str:
        return key_of(self.name)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weights: tuple[Tensor, Tensor | None]
    biases: tuple[Tensor | None, Tensor | None]


def normal(
    shape: tuple[int, ...], dtype: torch.dtype, memory: str, seed: int, scale: float = 1.0, device: str = "cpu"
) -> Tensor:
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)
    if memory == "transposed":
        return values.mT.contiguous().mT
    if memory == "poisoned":
        large = torch.full([n + 3 for n in shape], torch.nan, dtype=dtype, device=device)
        view = large[tuple(slice(1, n + 1) for n in shape)]
        view.copy_(values)
        return view
    return values


def inputs(case: Case) -> Inputs:
    x = normal((*case.lead, case.rows, case.inner), case.dtype, case.memory, 0, device=case.device)
    both = case.layout != "separate"
    shape = (*case.lead, case.features * (2 if both else 1), case.inner)
    weights = [normal(shape, case.dtype, case.memory, k, 2 * case.inner**-0.5, case.device) for k in (1, 2)]
    biases = [normal((*case.lead, case.features), case.dtype, "usual", k, device=case.device) for k in (3, 4)]
    return Inputs(
        x,
        (weights[0], None if both else weights[1]),
        (biases[0], biases[1]) if case.biased else (None, None),
    )


def eager(case: Case, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The program in its own dtype: product, gate, up."""
    gate, up = reference.project(given.x, given.weights, given.biases, case.layout, case.dtype)
    return FORMULAS[case.name][1](gate, up), gate, up


def exact(case: Case, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The same in fp64, by the program and not by the formula."""
    gate, up = reference.project(given.x, given.weights, given.biases, case.layout, torch.float64)
    return FORMULAS[case.name][1](gate, up), gate, up


def error(x: Tensor, truth: Tensor) -> float:
    assert x.shape == truth.shape
    assert not x.isnan().any()
    return (x.double() - truth).abs().max().item()


def assert_as_exact(ours: Tensor, eagers: Tensor, truth: Tensor, slack: float = 1.0) -> None:
    """Twice eager's error and 4 ulp of the largest number: what two right orders of summation may differ by."""
    assert ours.dtype == eagers.dtype
    floor = 4 * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    mine, theirs = error(ours, truth), error(eagers, truth)
    assert mine <= slack * (2 * theirs + floor), f"error {mine:.3g}, eager's own {theirs:.3g}, floor {floor:.3g}"


def call(
    case: Case, form: str = "dual", save: bool = True, seed: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    given = inputs(case)
    return gated_mlp(given.x, *given.weights, *given.biases, case.key, case.layout, form, save, case.dtype, seed, p)


def check(case: Case, form: str = "dual") -> None:
    """The product and both projections; and that the product does not depend on whether these are saved."""
    given = inputs(case)
    out, saved = call(case, form)
    ours = (out, *reference.parts(saved, case.layout))
    for mine, theirs, truth in zip(ours, eager(case, given), exact(case, given), strict=True):
        assert_as_exact(mine, theirs, truth, case.slack)
    assert torch.equal(call(case, form, save=False)[0], out)


def gradients(case: Case, seed: Tensor | None = None, p: float = 0.0) -> None:
    """gated_mlp_backward of the exact projections, rounded, against autograd in fp64 and in the dtype itself."""
    _, gate, up = exact(case, inputs(case))
    saved = reference.joined(gate, up, case.layout).to(case.dtype)
    dout = normal(tuple(gate.shape), case.dtype, case.memory, 9, device=case.device)
    grad, product = gated_mlp_backward(dout, saved, case.key, case.layout, True, seed, p)
    assert grad.is_contiguous()

    def differentiated(dtype: torch.dtype) -> list[Tensor]:
        mine = [t.to(dtype).detach().requires_grad_() for t in reference.parts(saved, case.layout)]
        value = FORMULAS[case.name][1](*mine)
        if seed is not None:
            value = torch.where(philox.linear_keep(seed, p, value.shape), value * philox.scale(p), 0.0)
        return [*torch.autograd.grad(value, mine, dout.to(dtype)), value.detach()]

    ours = (*reference.parts(grad, case.layout), product)
    for mine, theirs, truth in zip(ours, differentiated(case.dtype), differentiated(torch.float64), strict=True):
        assert_as_exact(mine, theirs, truth, case.slack)
    assert gated_mlp_backward(dout, saved, case.key, case.layout, False, seed, p)[1].numel() == 0
