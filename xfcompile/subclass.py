"""Tensors of other classes than torch's own: DTensor, nested tensors, quantized ones of other packages.

Such a class says itself what each operation does. It reads like any other tensor, for its shape and dtype are those of
what it stands for; but it knows nothing of our operators, and what it makes of SDPA may be far from one fused call:
DTensor (torch 2.13, on CPUs) looks for the sharding of each step of SDPA's decomposition, and does not come to an end.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from xfcompile.example import example_of


def subclass_at(node: fx.Node) -> str | None:
    """The name of such a class, if the node takes or gives one of its tensors."""
    for n in (node, *node.all_input_nodes):
        for x in pytree.tree_leaves(example_of(n)):
            if isinstance(x, torch.Tensor) and is_traceable_wrapper_subclass(x):
                return type(x).__name__
    return None
