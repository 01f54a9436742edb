"""The memory layout of a replaced result, where the program can tell the difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from xfcompile.emit import Emitter
from xfcompile.example import example_of
from xfcompile.layout_seen import is_carried_on, layout_matters


def with_layout(emitter: Emitter, root: fx.Node, new: fx.Node) -> fx.Node:
    """Give the result the strides of the replaced node where a user could tell the difference."""
    example, other = example_of(root), example_of(new)
    known = isinstance(example, torch.Tensor) and isinstance(other, torch.Tensor)
    if not layout_matters(root) and not (known and is_carried_on(root, memory_order(other))):
        return new
    if not isinstance(example, torch.Tensor):
        return emitter.call("contiguous", new)
    order = memory_order(example)
    if order == list(range(example.dim())):
        return emitter.call("contiguous", new)
    dense = emitter.call("contiguous", emitter.call("permute", new, *order))
    return emitter.call("permute", dense, *(order.index(d) for d in range(example.dim())))


def stride_key(x: torch.Tensor, d: int) -> Any:
    """Orders the dimensions of a tensor by their strides."""
    stride = x.stride(d)
    hint = stride.node.hint if isinstance(stride, torch.SymInt) else stride
    return (hint if hint is not None else 0, -d)


def memory_order(x: torch.Tensor) -> list[int]:
    """The dimensions of a tensor, the outermost in memory first."""
    return sorted(range(x.dim()), key=lambda d: stride_key(x, d), reverse=True)
