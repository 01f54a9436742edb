"""What a benchmark is made of: rows, and what each of their columns runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Call = Callable[[], Any]
Scale = Literal["gpu", "cpu", "quick"]
"""The sizes of a benchmark: those of GPUs, those that CPU cores take a while for, those that show that it runs."""


class Skip(Exception):
    """A column, or a row, cannot be measured here, and this is why."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    mode: "forward", "forward+backward", "infer", "train" ... sizes: letters and numbers, in the order in which they
    are written. variant: which of several ways a model is built, "eager" or "sdpa".
    """

    name: str
    mode: str
    sizes: tuple[tuple[str, int], ...] = ()
    variant: str = ""

    @property
    def title(self) -> str:
        shape = " ".join(f"{letter}{number}" for letter, number in self.sizes)
        return ", ".join(filter(None, [self.name, self.mode, self.variant, shape]))

    def size(self, letter: str) -> int:
        return dict(self.sizes)[letter]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "mode": self.mode, "variant": self.variant, "sizes": dict(self.sizes)}

    @staticmethod
    def of(found: Mapping[str, Any]) -> Row:
        """The row of an entry of a file."""
        sizes = tuple((letter, number) for letter, number in found["sizes"].items())
        return Row(found["name"], found["mode"], sizes, found.get("variant", ""))


@dataclass(frozen=True)
class Place:
    """Where is measured: "cuda" or "cpu", and in which dtype."""

    device: str
    dtype: torch.dtype
    scale: Scale


@dataclass(frozen=True)
class Check:
    """How errors are found.

    exact: the results in fp64. eager: those of the program as it is written, in the dtype that is measured. seen: of
    what a call has returned, the tensors that these are compared with.
    """

    exact: Callable[[], Sequence[Tensor]]
    eager: Callable[[], Sequence[Tensor]]
    seen: Callable[[Any], Sequence[Tensor]]


@dataclass(frozen=True)
class Work:
    """A row, made ready.

    way: what a column runs, compiled at its first call; raises `Skip` where it has no way.
    check: how errors are found, or why they are not. unchecked: the same for single columns.
    grad: whether calls run a backward. graph: whether a CUDA graph of the call is timed, on GPUs.
    cold: whether the L2 cache is emptied before each call. per: by what times are divided, tokens say.
    clear: frees what a call leaves behind. facts: what follows from a time in ms, for a cell.
    """

    way: Callable[[str], Call]
    check: Check | str
    grad: bool = False
    graph: bool = False
    cold: bool = True
    per: int = 1
    clear: Callable[[], None] = lambda: None
    unchecked: Mapping[str, str] = field(default_factory=dict)
    facts: Callable[[float], dict[str, float]] = lambda ms: {}


@dataclass(frozen=True)
class Start:
    """A row of compile times: the arguments of `startup`, for processes with caches of their own."""

    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """rows: in the order of their importance, for a budget may end before they do. prepare: makes one ready, in the
    process that measures.

    columns: those that it has, in their order. baseline: the column that speed-ups are over.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Callable[[Scale], list[Row]]
    prepare: Callable[[Row, Place], Work | Start]
    baseline: str = "inductor"
