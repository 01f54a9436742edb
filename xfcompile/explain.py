"""Runs a program once under the backend and reports what was found in it."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from xfcompile.backend import xformers
from xfcompile.report import Report, collect


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Compile `fn` (a function or a module) for these arguments, run it once, and report every graph that this took.

    Compiles afresh, also what is compiled already, and leaves that in place. The run is a real one: a module in train
    mode updates its statistics. For options of your own, `with xfcompile.collect() as report:` around a call of your
    compiled program gathers the same of whatever is compiled there.
    """
    with collect() as report:
        torch.compile(fresh_call(), backend=_fresh_backend())(original(fn), args, kwargs)
    return report


def original(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What a user gave to torch.compile, if this is its result."""
    if isinstance(fn, torch._dynamo.OptimizedModule):
        return fn._orig_mod
    return getattr(fn, "_torchdynamo_orig_callable", fn)


def fresh_call() -> Callable[..., Any]:
    """A function that calls a function. Dynamo keeps what it compiled by code object: a new one starts from nothing,
    and does not count against the recompile limit of the user's own code."""

    def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "call")


def _fresh_backend() -> Callable[..., Any]:
    """The backend as an object of its own: past a graph break Dynamo compiles the user's own code objects, and takes an
    earlier result only for the same backend."""

    def explaining(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return xformers(gm, example_inputs)

    return explaining
