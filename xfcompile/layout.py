"""The memory layout of a replaced result, where the program can tell the difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from xfcompile.emit import Emitter
from xfcompile.example import example_of
from xfcompile.layout_seen import is_carried_on, layout_matters
from xfcompile.site import Miss


def with_layout(emitter: Emitter, root: fx.Node, new: fx.Node) -> fx.Node:
    """Give the result the strides of the replaced node where a user could tell the difference. Raises `Miss` where it
    has gaps in memory, as what was written into every other column of another tensor: ours has none."""
    example, other = example_of(root), example_of(new)
    known = isinstance(example, torch.Tensor) and isinstance(other, torch.Tensor)
    if not layout_matters(root) and not (known and is_carried_on(root, memory_order(other))):
        return new
    if not isinstance(example, torch.Tensor):
        return emitter.call("contiguous", new)
    if _has_gaps(example):
        raise Miss("its result has gaps in memory", root)
    order = memory_order(example)
    if order == list(range(example.dim())):
        return emitter.call("contiguous", new)
    dense = emitter.call("contiguous", emitter.call("permute", new, *order))
    return emitter.call("permute", dense, *(order.index(d) for d in range(example.dim())))


def _has_gaps(x: torch.Tensor) -> bool:
    """Not asked of symbolic sizes."""
    sizes = [(s, n) for n, s in zip(x.shape, x.stride(), strict=True) if not isinstance(n, int) or n != 1]
    if not all(isinstance(m, int) for pair in sizes for m in pair) or 0 in x.shape:
        return False
    dense = 1
    for stride, n in sorted(sizes):
        if stride > dense:
            return True
        dense *= n
    return False


def stride_key(x: torch.Tensor, d: int) -> Any:
    """Orders the dimensions of a tensor by their strides."""
    stride = x.stride(d)
    hint = stride.node.hint if isinstance(stride, torch.SymInt) else stride
    return (hint if hint is not None else 0, -d)


def memory_order(x: torch.Tensor) -> list[int]:
    """The dimensions of a tensor, the outermost in memory first."""
    return sorted(range(x.dim()), key=lambda d: stride_key(x, d), reverse=True)
