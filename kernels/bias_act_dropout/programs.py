"""The module of kernels that was generated of a formula, in this process."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from xfcompile.kernels.attention import cache
from xfcompile.kernels.attention.tiles import interpreting
from xfcompile.kernels.bias_act_dropout.formula import parse
from xfcompile.kernels.bias_act_dropout.template import module


@functools.cache
def source_of_kernel(text: str, vectors: int, tensors: int, p: float) -> str:
    """The text of a formula's module."""
    return module(parse(text, vectors, tensors), p)


@functools.cache
def _module(text: str, vectors: int, tensors: int, p: float, interpreted: bool) -> ModuleType:
    source = source_of_kernel(text, vectors, tensors, p)
    path = cache.store(source, "bias_act_dropout_")
    return cache.load(path, f"xfcompile_{path.stem}{'_interpreted' if interpreted else ''}")


def kernel(name: str, text: str, vectors: int, tensors: int, p: float) -> Any:
    """A Triton function of the generated module, compiled or interpreted: which, `triton.jit` decides at its import."""
    return getattr(_module(text, vectors, tensors, p, interpreting()), name)
