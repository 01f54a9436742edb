"""What was generated of a formula, in this process: its module of kernels, and the calls that were made of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import sympy
from torch import Tensor

from xfcompile.kernels.attention import cache
from xfcompile.kernels.gated_mlp import codegen

log = logging.getLogger(__name__)

PREFIX = "gated_mlp_"

MANY_CALLS = 1024
"""Layouts that are remembered of a kernel; row counts that change at every call make new ones."""


@dataclass(frozen=True)
class Program:
    """A generated module in this process: its formula, its file, and the calls that were made, by the layout of their
    tensors."""

    key: str
    formula: sympy.Expr
    source: str
    calls: dict[object, Callable[..., Any]] = field(default_factory=dict)

    def kernel(self, name: str, interpreted: bool) -> Any:
        """The Triton function, compiled or interpreted: which one `triton.jit` decides when the file is imported."""
        return getattr(_module(self.key, interpreted), name)

    def remembered(self, layout: object, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The call for tensors of a layout, made at the first of them."""
        call = self.calls.get(layout)
        if call is None:
            if len(self.calls) >= MANY_CALLS:
                self.calls.clear()
            call = self.calls[layout] = make()
        return call


known: dict[str, Program] = {}


@functools.cache
def _module(key: str, interpreted: bool) -> ModuleType:
    path = cache.store(known[key].source, PREFIX)
    return cache.load(path, f"xfcompile_{PREFIX}{key}{'_interpreted' if interpreted else ''}")


def prepare(formula: sympy.Expr) -> str:
    """Generates the kernels of a formula and stores their source; returns the key that the ops are called with.

    Raises evaluate.Unsupported where the formula has no Triton form.
    """
    source = codegen.generate(formula)
    key = cache.key_of(source)
    if key not in known:
        log.info("gated MLP kernels %s: %s", cache.store(source, PREFIX), formula)
        known[key] = Program(key, formula, source)
    return key


def program(key: str) -> Program:
    """The prepared kernels; those that another process prepared are read back from the cache directory."""
    if key not in known:
        source = cache.stored(key, "gated_mlp", "gated_mlp.prepare(formula)", PREFIX)
        module = cache.load(cache.store(source, PREFIX), f"xfcompile_{PREFIX}{key}_formula")
        known[key] = Program(key, codegen.parse(module.FORMULA), source)
    return known[key]


def source_of_kernel(key: str) -> str:
    """The text of a kernel's module."""
    return program(key).source


def layout_of(x: Tensor | None) -> object:
    """All of a tensor that a call depends on."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
