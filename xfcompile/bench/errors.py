"""How far results are from fp64's, beside how far eager's own are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Distance:
    """Of one tensor from fp64's: the norm of the difference, and that of the exact one.

    Infinite where one of them is NaN and the other is not.
    """

    difference: float
    size: float


def distance(found: Tensor, exact: Tensor) -> Distance:
    """exact: fp64, on any device."""
    if found.shape != exact.shape:
        raise ValueError(f"results of shape {list(found.shape)} where {list(exact.shape)} was expected")
    exact = exact.to(found.device, torch.float64)
    found = found.detach().to(torch.float64)
    same = (found == exact) | (found.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, found - exact).norm().item()
    size = torch.where(exact.isfinite(), exact, 0.0).norm().item()
    return Distance(math.inf if math.isnan(difference) else difference, size)


def distances(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Distance]:
    return [distance(a, b) for a, b in zip(found, exact, strict=True)]


def relative(found: Sequence[Distance]) -> float:
    """Of all results together: the norm of the difference over that of the exact ones."""
    size = math.hypot(*(d.size for d in found))
    difference = math.hypot(*(d.difference for d in found))
    return difference / size if size else difference


def compared(ours: Sequence[Distance], eager: Sequence[Distance], dtype: torch.dtype) -> dict[str, float]:
    """A cell's entries: the relative error of all results, and the largest of any of them in units of eager's own.

    Eager's own is taken for at least a quarter of a rounding of the largest result: some results are zero but for
    rounding (the gradient of a bias of keys, say), and some of eager's happen to be exact.
    """
    least = torch.finfo(dtype).eps / 4 * max(d.size for d in ours) or torch.finfo(torch.double).tiny
    ratios = [a.difference / max(b.difference, least) for a, b in zip(ours, eager, strict=True)]
    return {"error": relative(ours), "error_by_eager": max(ratios)}


class InDouble(TorchFunctionMode):
    """Inside, fp64 stands in place of every floating dtype that a program names.

    Models cast to fp32 on the way (norms, softmax, rotary embeddings), also those whose weights are fp64.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = _TO_DOUBLE.get(func, func)
        args, kwargs = tree_map(_double, (args, kwargs or {}))
        return func(*args, **kwargs)


_TO_DOUBLE: dict[Any, Any] = {getattr(Tensor, name): Tensor.double for name in ("float", "half", "bfloat16")}


def _double(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x
