"""Where an element of a view lies in the tensor that is viewed."""

from __future__ import annotations

from typing import Any

import sympy

from xfcompile.indexing import Ranges, floordiv, integer, linear, unravel
from xfcompile.values import Value

Index = tuple[sympy.Expr, ...]


def broadcast(index: Index, shape: tuple[Any, ...], to: tuple[Any, ...]) -> Index:
    """The index into an operand of shape `to` of a result of shape `shape`."""
    tail = index[len(index) - len(to) :]
    sizes = shape[len(shape) - len(to) :]
    return tuple(sympy.S.Zero if n == 1 and m != 1 else x for x, n, m in zip(tail, to, sizes, strict=True))


def reshaped(v: Value, index: Index, ranges: Ranges) -> Index:
    """The index into the base of a reshape."""
    source = v["self"].shape
    kept = [(x, n) for x, n in zip(index, v.shape, strict=True) if n != 1]
    if [n for _, n in kept] == [n for n in source if n != 1]:
        rest = iter(x for x, _ in kept)
        return tuple(sympy.S.Zero if n == 1 else next(rest) for n in source)
    # Leading and trailing dimensions that both shapes share keep their index: only what was reshaped is divided.
    front = 0
    while front < min(len(source), v.ndim) and source[front] == v.shape[front]:
        front += 1
    back = 0
    while back < min(len(source), v.ndim) - front and source[-1 - back] == v.shape[-1 - back]:
        back += 1
    outer, inner = slice(front, v.ndim - back), slice(front, len(source) - back)
    sizes = tuple(integer(n) for n in v.shape[outer])
    offset = linear(index[outer], sizes)
    middle = unravel(offset, tuple(integer(n) for n in source[inner]), ranges)
    return (*index[:front], *middle, *index[v.ndim - back :])


def permuted(v: Value, index: Index) -> Index:
    source: list[Any] = [None] * len(index)
    for k, d in enumerate(v["dims"]):
        source[d] = index[k]
    return tuple(source)


def interleaved(v: Value, index: Index, ranges: Ranges) -> Index | None:
    if v.args.get("dim") is None or isinstance(v.args.get("repeats"), Value):
        return None
    d = v["dim"] % v.ndim
    return (*index[:d], floordiv(index[d], integer(v["repeats"]), ranges), *index[d + 1 :])
