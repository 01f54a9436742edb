"""Moves what is computed in fp64 by what rounding may: how far two right ways to compute one formula lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

FUSED = frozenset(
    {
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    }
)

INNER = 4
"""Roundings in a sum of 128 products, of random signs, added one after the other: sqrt(n / 8) of its usual size. An
inner product of rows of 128 features is such a sum."""


def nearby(x: Any) -> Any:
    """A tensor in fp64, every element moved by one rounding of its own dtype; anything else as it is."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        return x
    return _moved(x.detach().double(), torch.finfo(x.dtype).eps)


class Rounded(TorchDispatchMode):
    """Moves inner products of gradients, in a backward that is fused, by their roundings in `dtype`.

    The gradient of a softmax is p (dp - sum(p dp)). Eager takes the sum from the dp that it has, whose errors cancel
    where one weight is all; a fused kernel takes it as sum(dout out) from the rounded output (FlashAttention-2,
    algorithm 2, line 4), where they don't. So the outputs that fused kernels keep are moved, and sums of terms of
    either sign. Nothing else: whoever rounds positions finds another side of a mask, and everything would be allowed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._eps = INNER * torch.finfo(dtype).eps

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in FUSED:
            return (_moved(out[0], self._eps), *out[1:])
        if func.overloadpacket is aten.sum and out.dtype == torch.float64 and bool((args[0] < 0).any()):
            return out + func(args[0].abs(), *args[1:], **kwargs) * self._eps * _signs(out)
        return out


def _moved(x: Tensor, eps: float) -> Tensor:
    return x * (1 + eps * _signs(x))


def _signs(x: Tensor) -> Tensor:
    return torch.where(torch.rand(x.shape, device=x.device) < 0.5, 1.0, -1.0).double()
