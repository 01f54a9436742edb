"""The meaning of the operators in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from xfcompile.activation import DOUT, KEEP, X, chained, tensor, vector
from xfcompile.evaluate import Evaluator
from xfcompile.kernels import philox
from xfcompile.kernels.bias_act_dropout.formula import Formula


def forward(
    formula: Formula,
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    p: float,
    dtype: torch.dtype,
) -> Tensor:
    """The result, of x's shape, in `dtype`."""
    scope = {tensor(n): r.to(dtype) for n, r in enumerate(tensors)}
    scope |= _scope(formula, x, bias, vectors, seed, stream, p, dtype)
    return _evaluated(formula.value, scope, x, dtype)


def gradients(
    formula: Formula,
    dout: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """d/dx, of x's shape, and for each vector d/dv, of its length, in `dtype`. The bias has d/dx, summed over rows."""
    like = torch.zeros_like(dout) if x is None else x
    scope = _scope(formula, like, bias, vectors, seed, stream, p, dtype)
    scope[DOUT] = dout.to(dtype)
    dx, *dv = (_evaluated(chained(d), scope, dout, dtype) for d in formula.derivatives)
    return dx, [total(d) for d in dv]


def total(x: Tensor) -> Tensor:
    """The sum over all rows."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def _scope(
    formula: Formula,
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    p: float,
    dtype: torch.dtype,
) -> dict[sympy.Symbol, Tensor]:
    scope = {vector(n): v.to(dtype) for n, v in enumerate(vectors)}
    scope[X] = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    if formula.drops:
        assert seed is not None
        scope[KEEP] = philox.linear_keep(seed, p, x.shape, stream).to(dtype) * philox.scale(p)
    return scope


def _evaluated(expr: sympy.Expr, scope: dict[sympy.Symbol, Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    value = Evaluator(scope, (), dtype, like.device)(expr)
    return torch.as_tensor(value, dtype=dtype, device=like.device).expand(like.shape)
