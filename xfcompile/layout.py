"""The memory layout of a replaced result, where the program can tell the difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from xfcompile.emit import Emitter
from xfcompile.example import example_of

_LAYOUT_BLIND_VIEWS = frozenset(
    "transpose permute unsqueeze squeeze select getitem chunk split unbind expand t mT".split()
)
_LAYOUT_SENSITIVE = frozenset(
    "view view_as as_strided stride is_contiguous data_ptr storage_offset untyped_storage output set_ resize_ unfold "
    "view_as_complex view_as_real".split()
)


def with_layout(emitter: Emitter, root: fx.Node, new: fx.Node) -> fx.Node:
    """Give the result the strides of the replaced node where a user could tell the difference."""
    if not layout_matters(root):
        return new
    example = example_of(root)
    if not isinstance(example, torch.Tensor):
        return emitter.call("contiguous", new)
    order = sorted(range(example.dim()), key=lambda d: stride_key(example, d), reverse=True)
    if order == list(range(example.dim())):
        return emitter.call("contiguous", new)
    dense = emitter.call("contiguous", emitter.call("permute", new, *order))
    return emitter.call("permute", dense, *(order.index(d) for d in range(example.dim())))


def stride_key(x: torch.Tensor, d: int) -> Any:
    """Orders the dimensions of a tensor by their strides."""
    stride = x.stride(d)
    hint = stride.node.hint if isinstance(stride, torch.SymInt) else stride
    return (hint if hint is not None else 0, -d)


def layout_matters(node: fx.Node, seen: set[fx.Node] | None = None) -> bool:
    """Whether something sees the strides of a node's result, or of a view of it."""
    seen = set() if seen is None else seen
    for user in node.users:
        if user in seen:
            continue
        seen.add(user)
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", str(user.target))
        name = name.split(".")[0]
        if user.op == "output" or name in _LAYOUT_SENSITIVE:
            return True
        if any(isinstance(a, fx.Node) and a.op == "get_attr" for a in user.all_input_nodes):
            return True
        follows = name in _LAYOUT_BLIND_VIEWS or (name.endswith("_") and not name.endswith("__"))
        if follows and layout_matters(user, seen):
            return True
    return False
