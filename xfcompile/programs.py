"""The programs of a graph's nodes: a node is traced once for all that call the same with arguments of one kind, and a
function of PyTorch's own once in a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from xfcompile.called import callable_of, identity_of, is_pytorchs, opened
from xfcompile.example import UNKNOWN, example_or_shape, makes_sizes, stand_in
from xfcompile.memory import Cell
from xfcompile.scope import Scope
from xfcompile.trace import Program, is_static, signature, trace


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
            self._known[key] = _shared(node, key, inner, lambda: _trace(fn, inner, inner_spec, scope, mode, module))
        return self._known[key]


_OF_PYTORCH: dict[Any, Program] = {}
"""Programs of PyTorch's own functions, of tensors with known sizes: for all graphs of the process."""

MOST = 1 << 14
"""So many are kept."""


def _shared(node: fx.Node, key: tuple[Any, ...], flat: list[Any], make: Callable[[], Program | None]) -> Program | None:
    """A program that another graph may have traced, where it is the same for both: what it depends on, beside `key`,
    are settings of PyTorch."""
    symbolic = not is_static(flat) or any(isinstance(x, torch.SymBool) for x in flat)
    if symbolic or not is_pytorchs(node) or torch._C._len_torch_function_stack():
        return make()
    settings = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    everywhere = (node.target, *key, *settings)
    found = _OF_PYTORCH.get(everywhere)
    if found is None:
        found = make()
        if found is not None:
            if len(_OF_PYTORCH) >= MOST:
                _OF_PYTORCH.clear()
            _OF_PYTORCH[everywhere] = found
    return found


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
