"""The programs of a graph's nodes: a node is traced once for all that call the same with arguments of one kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from xfcompile.called import callable_of, identity_of, opened
from xfcompile.example import UNKNOWN, example_or_shape, makes_sizes, stand_in
from xfcompile.memory import Cell
from xfcompile.scope import Scope
from xfcompile.trace import Program, signature, trace


class Programs:
    """What was traced so far."""

    def __init__(self) -> None:
        self._known: dict[Any, Program | None] = {}

    def of(
        self, node: fx.Node, gm: fx.GraphModule, cells: Mapping[fx.Node, Any], scope: Scope, mode: FakeTensorMode | None
    ) -> Program | None:
        """The program of a node of `gm`; None of one that cannot be traced. cells: what is read of the nodes before it.
        mode: the one that the graph's fake tensors belong to."""
        if makes_sizes(node):
            return None
        fn = callable_of(node, gm)
        flat, spec = pytree.tree_flatten(opened((node.args, node.kwargs)))
        fakes = []
        for x in flat:
            if not isinstance(x, fx.Node):
                fakes.append(x)
                continue
            cell = cells.get(x)
            if isinstance(cell, Cell):
                fakes.append(stand_in(x, cell.value.meta))
            elif isinstance(cell, (tuple, list)):
                fakes.append([stand_in(x, c.value.meta) if isinstance(c, Cell) else c for c in cell])
            elif isinstance(cell, sympy.Basic):
                fakes.append(example_or_shape(x))
            else:
                fakes.append(cell)
        if any(f is UNKNOWN for f in pytree.tree_leaves(fakes)):
            return None
        inner, inner_spec = pytree.tree_flatten(pytree.tree_unflatten(fakes, spec))
        key = (identity_of(node), str(inner_spec), tuple(signature(x) for x in inner), scope.autocast)
        module = node.op == "call_module"
        try:
            known = key in self._known
        except TypeError:  # an unhashable argument: trace it every time
            return _trace(fn, inner, inner_spec, scope, mode, module)
        if not known:
            self._known[key] = _trace(fn, inner, inner_spec, scope, mode, module)
        return self._known[key]


def _trace(
    fn: Callable[..., Any],
    flat: list[Any],
    spec: pytree.TreeSpec,
    scope: Scope,
    mode: FakeTensorMode | None,
    module: bool,
) -> Program | None:
    if not scope.autocast:
        return trace(fn, flat, spec, mode, module=module)
    device, dtype, enabled = (*scope.autocast[-1], None, None)[:3]
    with torch.autocast(device, dtype=dtype, enabled=enabled is not False, cache_enabled=False):
        return trace(fn, flat, spec, mode, module=module)
