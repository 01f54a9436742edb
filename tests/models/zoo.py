"""Third-party models built tiny, from configurations, with random weights: what real programs look like.

Each entry says how many attentions its model has, counted by hand from its configuration, and how many other softmaxes
a reader must decline (routers of experts, poolings, head mixing). Nothing here downloads anything.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Program:
    """A module and the arguments of one call of it."""

    module: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    attentions: how many a reader must match. declined: how many other candidates it must name and leave.
    train: in training mode. grad: compared by its gradients too, as all that trains is.
    loosen: lets a copy of a module that insists on fp32 somewhere be run in fp64.
    needs: the packages that it is built from.
    """

    name: str
    make: Callable[[], Program]
    attentions: int
    declined: int = 0
    train: bool = False
    grad: bool = False
    loosen: Callable[[torch.nn.Module], None] | None = None
    needs: tuple[str, ...] = ("transformers",)

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    @property
    def differentiates(self) -> bool:
        return self.train or self.grad

    def build(self) -> Program:
        """The model, the same each time, in fp32, without dropout."""
        torch.manual_seed(zlib.crc32(self.name.partition("[")[0].encode()))
        program = self.make()
        program.module.train(self.train)
        return program


def entries() -> tuple[Entry, ...]:
    """All of the zoo, in the order of its files."""
    import zoo_handwritten
    import zoo_language
    import zoo_libraries
    import zoo_vision

    found = zoo_language.ENTRIES + zoo_vision.ENTRIES + zoo_libraries.ENTRIES + zoo_handwritten.ENTRIES
    names = [entry.name for entry in found]
    assert len(set(names)) == len(names), "two entries of one name"
    return found
