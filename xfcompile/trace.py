"""One FX node, traced alone over fake tensors into the canonical ATen calls that it stands for."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Meta:
    """What is known of a tensor without its contents. Sizes and strides are ints or sympy expressions."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False


@dataclass(frozen=True)
class Ref:
    """In a program: tensor input `index`, or, with `item`, output `item` of call `index`."""

    index: int
    item: int | None = None


@dataclass(frozen=True)
class Call:
    """One ATen call: arguments by schema name, tensors as `Ref`s, symbolic numbers as sympy expressions."""

    op: torch._ops.OpOverload
    args: dict[str, Any]
    outputs: tuple[Meta | None, ...]
    aliases: tuple[Ref | None, ...]
    """For each output: an earlier tensor whose memory it shares."""


@dataclass(frozen=True)
class Constant:
    """A one-element tensor whose value is written in the program itself."""

    value: float | int | bool
    meta: Meta


@dataclass(frozen=True)
class External:
    """A parameter or buffer of a module that the node calls: a tensor that no node of the graph holds."""

    meta: Meta


@dataclass(frozen=True)
class Program:
    """What a node does: calls in order, and its result as a tree of `Ref`s and numbers."""

    calls: tuple[Call, ...]
    result: Any


def number(x: Any) -> Any:
    """A number as the algebra wants it: SymInt, SymFloat and SymBool become sympy expressions, others stay."""
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = x.node.expr
        return int(expr) if expr.is_Integer else float(expr) if expr.is_Float else expr
    return x


def meta_of(t: torch.Tensor) -> Meta:
    """The `Meta` of a tensor, fake or real."""
    shape = tuple(number(s) for s in t.shape)
    if t.layout is torch.strided:
        stride = tuple(number(s) for s in t.stride())
    else:
        stride = ()
    return Meta(shape, stride, t.dtype, t.device, t.requires_grad)


@functools.cache
def static_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_static(flat: list[Any]) -> bool:
    """Whether all numbers and sizes of some arguments are known."""
    return all(not isinstance(x, (torch.SymInt, torch.SymFloat)) for x in flat) and all(
        isinstance(n, int) for x in flat if isinstance(x, torch.Tensor) for n in (*x.shape, *x.stride())
    )


def trace(
    fn: Callable[..., Any],
    flat: list[Any],
    spec: pytree.TreeSpec,
    symbolic: FakeTensorMode | None = None,
    *,
    module: bool = False,
) -> Program | None:
    """Trace `fn(*args, **kwargs)`, flattened as `flat` and `spec`, into a `Program`; None if that fails.

    module: whether `fn` is a module, whose tensors are not part of the program's text.
    symbolic: the mode of the graph's own fake tensors, in which symbolic sizes have their meaning.

    Tensors in `flat` are fake; they are replaced by fresh ones of the same kind, because tracing in-place operations
    on the graph's own would change what is known of them.
    """
    static = is_static(flat)
    mode = static_mode() if static or symbolic is None else symbolic
    positions = [k for k, x in enumerate(flat) if isinstance(x, (torch.Tensor, torch.SymInt, torch.SymFloat))]

    def call(*inputs: Any) -> Any:
        leaves = list(flat)
        for k, x in zip(positions, inputs, strict=True):
            leaves[k] = x
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return fn(*args, **kwargs)

    def fresh(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        with mode:
            return torch.empty_strided(tuple(x.shape), x.stride(), dtype=x.dtype, device=x.device)

    try:
        # Autocast is read from dtypes (see contraction.py); here it would only add clones of weights.
        # Under the mode, factories of symbolic size make fake tensors too.
        with torch.no_grad(), _quiet(), _symbolic(mode, static):
            inputs = [fresh(flat[k]) for k in positions]
            gm = make_fx(call, pre_dispatch=True, tracing_mode="real")(*inputs)
    except Exception as error:
        log.debug("cannot read %s: %s", fn, error)
        return None
    return _parse(gm, [flat[k] for k in positions], module)


@contextlib.contextmanager
def _symbolic(mode: FakeTensorMode, static: bool) -> Iterator[None]:
    """The graph's own fake mode, without new guards: reading must not narrow what the user's program accepts."""
    if static or mode.shape_env is None:
        yield
        return
    with mode, mode.shape_env.suppress_guards():
        yield


class _quiet:
    """Silences the error log of fake tensors while a trace is tried: a failed trace is no failure."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch._subclasses.fake_tensor")
        self._disabled = self._logger.disabled
        self._logger.disabled = True

    def __exit__(self, *_: object) -> None:
        self._logger.disabled = self._disabled


def _parse(gm: fx.GraphModule, inputs: list[Any], module: bool) -> Program | None:
    env: dict[fx.Node, Any] = {}
    storage: dict[Any, Ref] = {}
    calls: list[Call] = []
    placeholders = iter(inputs)
    tensors = 0

    def operand(x: Any) -> Any:
        return env[x] if isinstance(x, fx.Node) else number(x)

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            x = next(placeholders)
            if isinstance(x, torch.Tensor):
                env[node] = Ref(tensors)
                storage[_memory(node.meta.get("val"))] = env[node]
                tensors += 1
            else:
                env[node] = number(x)
        elif node.op == "get_attr":
            constant = getattr(gm, node.target)
            if module and isinstance(constant, torch.Tensor):
                env[node] = External(meta_of(constant))
                continue
            if not isinstance(constant, torch.Tensor) or constant.numel() != 1:
                return None
            if isinstance(constant, torch._subclasses.FakeTensor):
                return None
            env[node] = Constant(constant.item(), meta_of(constant))
        elif node.op == "output":
            return Program(tuple(calls), pytree.tree_map(operand, node.args[0]))
        elif not isinstance(node.target, torch._ops.OpOverload):
            env[node] = _plain(node, env)
            if env[node] is None:
                return None
        else:
            value = node.meta.get("val")
            if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
                env[node] = number(value)
                continue
            args = _bind(node.target, node.args, node.kwargs, operand)
            outputs = value if isinstance(value, (tuple, list)) else (value,)
            metas = tuple(meta_of(o) if isinstance(o, torch.Tensor) else None for o in outputs)
            refs = [Ref(len(calls), item) for item in range(len(outputs))]
            aliases = tuple(storage.get(_memory(o)) for o in outputs)
            for o, ref in zip(outputs, refs, strict=True):
                if isinstance(o, torch.Tensor):
                    storage.setdefault(_memory(o), ref)
            calls.append(Call(node.target, args, metas, aliases))
            env[node] = refs if isinstance(value, (tuple, list)) else refs[0]
    return None


def _plain(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """A Python function in a trace: picking an output, or arithmetic on symbolic sizes. None if it is neither."""
    if node.target.__name__ == "getitem" and isinstance(node.args[0], fx.Node):  # type: ignore[union-attr]
        source = env[node.args[0]]
        return source[node.args[1]] if isinstance(source, list) else None  # type: ignore[index]
    value = node.meta.get("val")
    return number(value) if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else None


def _memory(t: Any) -> Any:
    return t.untyped_storage()._cdata if isinstance(t, torch.Tensor) and t.layout is torch.strided else None


def _bind(op: torch._ops.OpOverload, args: Any, kwargs: Any, operand: Callable[[Any], Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    bound: dict[str, Any] = {}
    for k, parameter in enumerate(op._schema.arguments):
        if k < len(args):
            given = args[k]
        elif parameter.name in kwargs:
            given = kwargs[parameter.name]
        else:
            given = parameter.default_value
        bound[parameter.name] = _tree(given, operand)
    return bound


def _tree(x: Any, operand: Callable[[Any], Any]) -> Any:
    """Containers to tuples (values are hashed), leaves through `operand`."""
    if isinstance(x, (list, tuple)):
        return tuple(_tree(y, operand) for y in x)
    return operand(x)


def signature(x: Any) -> Any:
    """A hashable stand-in for one argument: two calls with equal signatures have equal traces."""
    if isinstance(x, torch.Tensor):
        m = meta_of(x)
        return ("tensor", m.shape, m.stride, m.dtype, m.device)
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("sym", sympy.srepr(x.node.expr))
    return (type(x), repr(x) if isinstance(x, float) else x)
