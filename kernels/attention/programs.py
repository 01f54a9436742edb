"""The generated kernels of this process by their keys, each made of a spec or read back, and what is learned of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from xfcompile.kernels.attention import cache, codegen, fit, lists
from xfcompile.kernels.attention.blocks import Summary, summary
from xfcompile.kernels.attention.tiles import Tiles
from xfcompile.site import ScoreSpec

log = logging.getLogger(__name__)

Call = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, operands, scalars, tiles) -> (out, lse), for tensors of one layout."""

MANY_CALLS = 4096
"""Layouts that are remembered of a kernel; lengths that change at every call make new ones."""


@dataclass(frozen=True)
class Program:
    """A generated kernel in this process: its spec, its file, what lists of tiles it takes (of the mask that
    `lists.program(mask)` has), what was learned about tiles that fit, the calls that were made, by the layout of
    their tensors, and what Triton made for several of these (see `Launch`)."""

    key: str
    spec: ScoreSpec
    source: str
    summary: Summary | None
    mask: str | None
    integers: tuple[bool, ...]
    fitting: dict[Any, Tiles | fit.Unavailable] = field(default_factory=dict)
    calls: dict[object, Call] = field(default_factory=dict)
    made: dict[object, dict[object, Any]] = field(default_factory=dict)

    def kernel(self, interpreted: bool, name: str = "attention_forward") -> Any:
        """The Triton function, compiled or interpreted: which one `triton.jit` decides when the file is imported."""
        return getattr(_module(self.key, interpreted), name)

    def scalars(self, ints: Sequence[Any], floats: Sequence[Any]) -> list[Any]:
        whole, real = iter(ints), iter(floats)
        return [next(whole) if integer else next(real) for integer in self.integers]

    def numbers(self, ints: Sequence[int], floats: Sequence[float]) -> list[int | float]:
        """Scalars, as kernels are compiled for them: generated code may have written 2.0 as 2."""
        if not self.integers:
            return []
        return self.scalars(ints, [float(x) for x in floats])


known: dict[str, Program] = {}
"""All programs that were prepared or read back, by their keys."""


@functools.cache
def _module(key: str, interpreted: bool) -> ModuleType:
    path = cache.store(known[key].source)
    name = f"xfcompile_attention_{key}{'_interpreted' if interpreted else ''}"
    return cache.load(path, name)


def prepare(spec: ScoreSpec) -> str:
    """Generates the kernel of a spec and stores its source; returns the key that the op is called with.

    Raises evaluate.Unsupported where the score has no Triton form.
    """
    spec = codegen.canonical(spec)
    source = codegen.generate(spec)
    key = cache.key_of(source)
    if key not in known:
        log.info("attention kernel %s: score %s, keep %s", cache.store(source), spec.score, spec.keep)
        known[key] = _program(key, spec, source)
    return key


def _program(key: str, spec: ScoreSpec, source: str) -> Program:
    found = summary(spec)
    mask = None if found is None else lists.prepare(found.mask)
    integers = tuple(bool(x.is_integer) for x in spec.scalars)
    return Program(key, spec, source, found, mask, integers)


def program(key: str) -> Program:
    """The prepared kernel; one that another process prepared is read back from the cache directory."""
    if key not in known:
        source, spec = cache.read_back(key, "attention", "prepare")
        assert isinstance(spec, ScoreSpec)
        known[key] = _program(key, spec, source)
    return known[key]


def mask_of(key: str) -> str | None:
    """The key of the lists of tiles that a kernel takes."""
    return program(key).mask


def source_of_kernel(key: str) -> str:
    """The text of a kernel's module."""
    return program(key).source


def source_of_lists(key: str) -> str:
    """The text of the module that makes the lists of tiles which a kernel takes."""
    mask = mask_of(key)
    assert mask is not None
    return lists.program(mask).source
