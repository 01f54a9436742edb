"""What tensors hold at which time: the storages that they lie in, and what a write to one makes of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from xfcompile.values import Value, Values


class Memory:
    """A storage: the tensors that live in it, oldest first."""

    def __init__(self, external: bool) -> None:
        self.cells: list[Cell] = []
        self.external = external


class Cell:
    """A tensor object: its contents now, where they lie, and how it is a view of another."""

    def __init__(self, value: Value, memory: Memory, base: Cell | None = None, derive: Any = None) -> None:
        self.memory = memory
        self.base = base
        self.derive: Callable[[Value], Value] | None = derive
        self.history: list[tuple[int, Value]] = [(-1, value)]
        memory.cells.append(self)

    @property
    def value(self) -> Value:
        return self.history[-1][1]

    def at(self, time: int) -> Value:
        """The contents just before node number `time` runs."""
        for when, value in reversed(self.history):
            if when < time:
                return value
        return self.history[0][1]

    def set(self, value: Value, time: int) -> None:
        if value is not self.value:
            self.history.append((time, value))


def write(target: Cell, value: Value, values: Values, put: Callable[[Cell, Value], None]) -> None:
    """Give a tensor new contents by `put`, and with it all that share its memory."""
    put(target, value)
    cell, contents = target, value
    while cell.base is not None:
        inverse = _inverse(cell, contents, values)
        contents = inverse if inverse is not None else values.leaf(cell.base.value.meta, "written")
        put(cell.base, contents)
        cell = cell.base
    root = cell
    fresh = {root: root.value, target: value}
    for other in target.memory.cells:
        if other in fresh:
            continue
        if other.base in fresh and other.derive is not None:
            fresh[other] = other.derive(fresh[other.base])
        else:
            fresh[other] = values.leaf(other.value.meta, "written")
        put(other, fresh[other])


def _inverse(cell: Cell, contents: Value, values: Values) -> Value | None:
    """What a view's base holds after the whole view was written."""
    assert cell.base is not None
    before, base = cell.history[0][1], cell.base.history[0][1]
    if before is base:
        return contents
    if before.op == "permute" and before["self"] is base:
        order = tuple(sorted(range(base.ndim), key=lambda d: before["dims"][d]))
        return values.permute(contents, order, base.meta)
    numel = [sympy.prod(list(v.shape)) for v in (before, base)]
    if numel[0] == numel[1] and _reshape_of(before, base):
        return values.reshape(contents, base.meta)
    return None


def _reshape_of(before: Value, base: Value) -> bool:
    source = before["self"] if before.op == "reshape" else before
    origin = base["self"] if base.op == "reshape" else base
    return source is origin or source is base
