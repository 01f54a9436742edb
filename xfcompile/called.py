"""What a node of a graph calls, and what of it is known without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx


def name_of(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def identity_of(node: fx.Node) -> Any:
    return (node.op, node.target if isinstance(node.target, str) else id(node.target))


def callable_of(node: fx.Node, gm: fx.GraphModule) -> Callable[..., Any]:
    """What a node calls, as a function of arguments with opened slices."""
    if node.op == "call_method":
        method = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, method)(*_closed(args), **_closed(kwargs))
    target: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return lambda *args, **kwargs: target(*_closed(args), **_closed(kwargs))


def attribute_of(gm: fx.GraphModule, node: fx.Node) -> Any:
    target: Any = gm
    for part in str(node.target).split("."):
        target = getattr(target, part)
    return target


def may_write(node: fx.Node) -> bool:
    """Whether an operation that could not be traced may write to its inputs."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = name_of(node)
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    module = getattr(node.target, "__module__", "") or ""
    inplace = name.endswith("_") or (name.startswith("i") and module == "_operator") or name == "setitem"
    return inplace or not is_pytorchs(node)


def is_pytorchs(node: fx.Node) -> bool:
    """Whether a node calls a method of a tensor, or a function of PyTorch's or Python's own."""
    module = getattr(node.target, "__module__", "") or ""
    return node.op == "call_method" or (
        node.op == "call_function"
        and (
            module.startswith(("torch.nn.functional", "torch._C", "_operator", "math"))
            or getattr(torch, name_of(node), None) is node.target
        )
    )


def is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


class _Slice(NamedTuple):
    """A slice as a container, so that the nodes in it are seen."""

    start: Any
    stop: Any
    step: Any


def opened(x: Any) -> Any:
    """Arguments with slices as containers, so that the nodes in them are seen."""
    if isinstance(x, slice):
        return _Slice(opened(x.start), opened(x.stop), opened(x.step))
    if isinstance(x, (list, tuple)) and not isinstance(x, _Slice):
        return tuple(opened(y) for y in x) if isinstance(x, tuple) else [opened(y) for y in x]
    return {k: opened(y) for k, y in x.items()} if isinstance(x, dict) else x


def _closed(x: Any) -> Any:
    if isinstance(x, _Slice):
        return slice(*x)
    if isinstance(x, (list, tuple)):
        return type(x)(_closed(y) for y in x)
    return {k: _closed(y) for k, y in x.items()} if isinstance(x, dict) else x
