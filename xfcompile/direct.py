"""Calls of our ops in the code that Inductor generates: of the device's function itself, past torch's dispatcher.

The dispatcher makes C++ of Python's arguments, and Python of these, which costs as much as an op of ours has to do
until its kernel is launched (examples/bench_host.py). Here nothing is left for it to find out: devices are known,
gradients disabled.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from xfcompile import ahead
from xfcompile.kernels.registration import KERNELS, Site

log = logging.getLogger(__name__)


_known: set[str] = set()
"""Ops that Inductor was told of; those of a family are there from its first site on."""


def lower() -> None:
    """Tells Inductor how our ops are called. What it does of itself, a call of the op, is as right: where this version
    of Inductor has other internals than it takes, that is left."""
    for op in KERNELS.keys() - _known:
        _known.add(op)
        try:
            _lower(getattr(torch.ops.xfcompile, op).default)
        except Exception as error:
            log.debug("calls of %s go through torch's dispatcher: %s", op, error)


def compile_ahead(gm: fx.GraphModule) -> None:
    """Has the kernels of a graph's calls compiled while Inductor is at work, or else at their first launch."""
    try:
        ahead.planned(gm)
    except Exception as error:
        log.debug("not compiled ahead: %s", error)


def _lower(target: torch._ops.OpOverload) -> None:
    from torch._inductor import lowering

    constraint = lowering.tag_to_layout_constraint(torch.Tag.needs_exact_strides)
    lowering.make_fallback(target, layout_constraint=constraint, warn=False)
    lowering.register_lowering(target, type_promotion_kind=None)(_lowered(target))


def _lowered(target: torch._ops.OpOverload) -> Callable[..., Any]:
    from torch._inductor.ir import IRNode, TensorBox
    from torch.utils import _pytree as pytree

    def call(*args: Any, **kwargs: Any) -> Any:
        made = _direct().create(target, *args, **kwargs)
        return pytree.tree_map(lambda x: TensorBox.create(x) if isinstance(x, IRNode) else x, made)

    call._is_fallback_handler = True  # type: ignore[attr-defined]
    return call


@functools.cache
def _direct() -> Any:
    from torch._inductor.ir import FallbackKernel
    from torch._inductor.virtualized import V

    from xfcompile.identity import ours

    class Direct(FallbackKernel):
        """A call of an op, in Python the call of its function."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            try:
                ahead.lowered(self)
            except Exception as error:
                log.debug("not compiled ahead: %s", error)

        def codegen(self, wrapper: Any) -> None:
            other = V.graph.cpp_wrapper or getattr(V.graph, "fx_wrapper", False)
            if not other and ours():  # else a cache's key may not say which version of us has these functions
                self.python_kernel_name = _imported(self.op_overload, self.get_device(), wrapper, _static(self))
            super().codegen(wrapper)

    return Direct


def _imported(op: Any, device: Any, wrapper: Any, static: bool) -> str:
    """The name of the function in a generated module, which imports it. static: whether all sizes and strides are
    numbers, on which Inductor's own kernels rely as well."""
    name = op._opname
    function = KERNELS[name][device.type]
    alias = f"xfcompile_{name}_{device.type}"
    root = wrapper.get_root_graph() if hasattr(wrapper, "get_root_graph") else wrapper
    root.add_import_once(f"from {function.__module__} import {function.__name__} as {alias}")
    if not static or "site" not in inspect.signature(function).parameters:
        return alias
    number = root.xfcompile_sites = getattr(root, "xfcompile_sites", 0) + 1
    root.add_import_once(f"from functools import partial as xfcompile_partial\nfrom {Site.__module__} import Site")
    root.add_import_once(f"{alias}_{number} = xfcompile_partial({alias}, site=Site())")
    return f"{alias}_{number}"


def _static(call: Any) -> bool:
    """Whether no argument of a call has a symbol: lengths may be arguments of their own."""
    try:
        numbers = [n for x in call.inputs for n in (*x.get_size(), *x.get_stride())]
        return not call.get_free_symbol_uses() and all(int(n) == n for n in numbers)
    except (AttributeError, NotImplementedError, TypeError):  # a symbol, or what has no layout
        return False
