"""What is known of a node's result before anything is read: the example in its metadata, a fake tensor or a number."""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from xfcompile.trace import Meta, number, static_mode

UNKNOWN = object()
"""What nothing can stand for."""


def example_of(node: fx.Node) -> Any:
    """What Dynamo, or an export, noted of a node's result; None where neither did."""
    return node.meta.get("example_value", node.meta.get("val"))


def example_or_shape(node: fx.Node) -> Any:
    """The same, and of a graph that torch.fx's ShapeProp went through a tensor of that shape."""
    example = example_of(node)
    if example is not None:
        return example
    shape = node.meta.get("tensor_meta")
    if isinstance(shape, TensorMetadata):
        with static_mode():
            return torch.empty_strided(tuple(shape.shape), shape.stride, dtype=shape.dtype)
    return None


def is_transformed(node: fx.Node) -> bool:
    """Whether a result is a tensor of a transform of `torch.func`, as of one element of a batch in `vmap`, that means
    nothing outside of it."""
    example = example_of(node)
    return isinstance(example, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(example)


def stand_in(node: fx.Node, meta: Meta) -> Any:
    """A fake tensor like a node's, of which so much is read."""
    example = example_or_shape(node)
    if isinstance(example, torch._subclasses.FakeTensor) and tuple(number(s) for s in example.shape) == meta.shape:
        return example
    if not all(isinstance(n, int) for n in (*meta.shape, *meta.stride)) or len(meta.stride) != len(meta.shape):
        return UNKNOWN
    with static_mode():
        return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=meta.device)


def makes_sizes(node: fx.Node) -> bool:
    """Whether a result's size depends on data, as `nonzero`'s: traced again, it would be another one."""

    def sizes(n: fx.Node) -> set[sympy.Symbol]:
        leaves = pytree.tree_leaves(example_or_shape(n))
        numbers = [m for x in leaves for m in (x.shape if isinstance(x, torch.Tensor) else (x,))]
        return set().union(*(_of_data(m.node.expr) for m in numbers if isinstance(m, torch.SymInt)))

    return not sizes(node) <= set().union(*map(sizes, node.all_input_nodes))


@functools.lru_cache
def _of_data(size: sympy.Expr) -> set[sympy.Symbol]:
    """The symbols in a size that stand for what depends on data."""
    return set(free_unbacked_symbols(size))
