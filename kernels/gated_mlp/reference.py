"""What a gated MLP means, in plain PyTorch: the definition that kernels are tested against."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from xfcompile.activation import GATE, UP
from xfcompile.evaluate import Evaluator
from xfcompile.kernels import philox
from xfcompile.site import Layout

STARTS: dict[Layout, tuple[int, int]] = {
    "separate": (0, 1), "gate first": (0, 1), "up first": (1, 0), "gate even": (0, 1), "up even": (1, 0),
}  # fmt: skip
"""Where gate and up start: at which half of the features, or at which of each pair."""


def interleaved(layout: Layout) -> bool:
    """Whether every other feature is gate's."""
    return layout in ("gate even", "up even")


def parts(x: Tensor, layout: Layout, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Gate and up of what holds both along `dim`, as views."""
    features = x.shape[dim] // 2
    view = x.unflatten(dim, (features, 2) if interleaved(layout) else (2, features))
    axis = (dim % x.ndim) + (1 if interleaved(layout) else 0)
    first, second = STARTS[layout]
    return view.select(axis, first), view.select(axis, second)


def joined(gate: Tensor, up: Tensor, layout: Layout, dim: int = -1) -> Tensor:
    """The inverse of `parts`, as a copy."""
    pair = (gate, up) if STARTS[layout] == (0, 1) else (up, gate)
    dim = dim % gate.ndim
    return torch.stack(pair, dim + (1 if interleaved(layout) else 0)).flatten(dim, dim + 1)


def project(x: Tensor, weights: tuple[Tensor, Tensor | None], biases: tuple[Tensor | None, Tensor | None],
            layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gate and up [.., M, N] of x [.., M, K], computed in `dtype`."""
    weight, up_weight = weights
    both = (weight, up_weight) if up_weight is not None else parts(weight, layout, -2)
    made = []
    for w, b in zip(both, biases, strict=True):
        y = x.to(dtype) @ w.to(dtype).mT
        made.append(y if b is None else y + b.to(dtype).unsqueeze(-2))
    return made[0], made[1]


def evaluate(formula: sympy.Expr, gate: Tensor, up: Tensor) -> Tensor:
    """The formula on tensors, in their dtype."""
    value = Evaluator({GATE: gate, UP: up}, (), gate.dtype, gate.device)(formula)
    return torch.as_tensor(value, dtype=gate.dtype, device=gate.device).expand(gate.shape)


def dropped(product: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """What dropout leaves of a product, whose elements are counted in the order of their indices."""
    if p == 0.0 or seed is None:
        return product
    keep = philox.linear_keep(seed, p, product.shape, device=product.device)
    return torch.where(keep, product * philox.scale(p), 0.0)


def forward(
    formula: sympy.Expr,
    x: Tensor,
    weights: tuple[Tensor, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    layout: Layout,
    seed: Tensor | None = None,
    p: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., M, K], weights [.., N, K] (or one [.., 2 N, K]), biases [.., N] -> out, gate, up [.., M, N]."""
    gate, up = project(x, weights, biases, layout, dtype)
    return dropped(evaluate(formula, gate, up), seed, p), gate, up


def backward(
    formula: sympy.Expr, dout: Tensor, gate: Tensor, up: Tensor, seed: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the product, all [.., M, N] and computed in gate's dtype."""
    dout = dropped(dout.to(gate.dtype), seed, p)
    d_gate, d_up = (dout * evaluate(sympy.diff(formula, v), gate, up) for v in (GATE, UP))
    return d_gate, d_up, dropped(evaluate(formula, gate, up), seed, p)
