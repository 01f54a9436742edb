"""The op's arguments as the kernels take them: views of each projection's part, and where these start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels import philox
from xfcompile.kernels.gated_mlp import reference
from xfcompile.site import Layout


@dataclass(frozen=True)
class Operands:
    """x [E, M, K]; gate and up [E, N, K] and their biases [E, N] or None, views of what the op was given."""

    x: Tensor
    gate: Tensor
    up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Experts, rows, features, inner."""
        return (*self.x.shape[:2], self.gate.shape[1], self.x.shape[2])


@dataclass(frozen=True)
class Dropout:
    """p of the product, and an int64 tensor of one element that is the seed (None where p is 0)."""

    seed: Tensor | None = None
    p: float = 0.0

    @property
    def numbers(self) -> list[Any]:
        """threshold and scale, as the kernels take them."""
        return [philox.threshold(self.p), float(philox.scale(self.p))]


def starts(layout: Layout, features: int) -> tuple[int, int, int]:
    """Where gate's and up's features start in what holds both, and the step between neighbours."""
    gate, up = reference.STARTS[layout]
    return (gate, up, 2) if reference.interleaved(layout) else (gate * features, up * features, 1)


def three(x: Tensor) -> Tensor:
    """[M, K] to [1, M, K]; what has experts is that already."""
    return x if x.ndim == 3 else x.unsqueeze(0)


def operands_of(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    layout: Layout,
) -> Operands:
    """Views of the op's arguments."""
    gate, up = (weight, up_weight) if up_weight is not None else reference.parts(weight, layout, -2)
    biases = [b if b is None or x.ndim == 3 else b.unsqueeze(0) for b in (gate_bias, up_bias)]
    return Operands(three(x), three(gate), three(up), biases[0], biases[1])


def outputs(
    x: Tensor, weight: Tensor, up_weight: Tensor | None, save: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out [.., M, N] and, if they are kept, both projections [.., M, 2 N], else nothing."""
    features = weight.shape[-2] // (1 if up_weight is not None else 2)
    out = x.new_empty((*x.shape[:-1], features), dtype=dtype)
    return out, x.new_empty((*x.shape[:-1], 2 * features) if save else (0,))
