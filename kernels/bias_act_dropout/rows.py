"""Tensors [.., N] as rows: how these lie in memory, and which are copied that do not lie so."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Tensors [.., N] as rows: `inner` rows to a group, and of each tensor whether it is a copy, and the strides of
    groups, rows and columns."""

    tensors: tuple[Tensor, ...]
    copies: tuple[bool, ...]
    count: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]

    @property
    def copied(self) -> tuple[bool, ...]:
        """Empty where none is a copy."""
        return self.copies if any(self.copies) else ()

    @property
    def split(self) -> bool:
        return any(outer != inner_stride * self.inner for outer, inner_stride, _ in self.strides)


def rows_of(*tensors: Tensor) -> Rows:
    """As rows, grouped where that makes the fewest copies: none, where leading dimensions have two strides at most, and
    these change at one place. All but the last size must be the same."""
    lead = tensors[0].shape[:-1]
    count = lead.numel()

    def at(d: int) -> list[tuple[int, int, int] | None]:
        return [_strides(x, d) for x in tensors]

    best = min(range(max(len(lead), 1)), key=lambda d: (at(d).count(None), -d))
    taken = tuple(x if s is not None else x.contiguous() for x, s in zip(tensors, at(best), strict=True))
    strides = tuple(s for x in taken if (s := _strides(x, best)) is not None)
    copies = tuple(s is None for s in at(best))
    return Rows(taken, copies, count, max(lead[best:].numel(), 1), strides)


def _strides(x: Tensor, d: int) -> tuple[int, int, int] | None:
    """The strides of groups, rows and columns where dimensions from d on are the rows of a group."""
    inner = _merged(x, d, x.ndim - 1)
    outer = _merged(x, 0, d)
    if inner is None or outer is None:
        return None
    rows = x.shape[d:-1].numel()
    return outer if d > 0 else inner * rows, inner, x.stride(-1)


def _merged(x: Tensor, start: int, end: int) -> int | None:
    """The stride of some neighbouring dimensions, taken as one; None if they have no single one."""
    dims = [d for d in range(start, end) if x.shape[d] != 1]
    for a, b in itertools.pairwise(dims):
        if x.stride(a) != x.stride(b) * x.shape[b]:
            return None
    return x.stride(dims[-1]) if dims else 0


def taken(tensors: tuple[Tensor, ...], copied: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Other tensors that are laid out alike, as rows: copies where `Rows.copied` says so."""
    return tuple([x.contiguous() if yes else x for x, yes in zip(tensors, copied, strict=True)])
