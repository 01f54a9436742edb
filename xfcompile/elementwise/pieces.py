"""Rules of tensors that are put together of pieces: which of them an element is in depends on its position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from xfcompile.elementwise.constants import as_boolean, as_number, literal, where
from xfcompile.elementwise.elements import Elements, Rule
from xfcompile.elementwise.positions import Index
from xfcompile.indexing import integer, nonnegative
from xfcompile.score import Load
from xfcompile.values import Value


def _cat(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"] % v.ndim
    tensors = [t for t in v["tensors"] if t.shape != (0,) and t.shape[d] != 0]
    if not tensors:
        return None
    start: sympy.Expr = sympy.S.Zero

    def piece(k: int, start: sympy.Expr) -> Any:
        local = (*index[:d], index[d] - start, *index[d + 1 :])
        if k == len(tensors) - 1:
            return e.at(tensors[k], local)
        end = start + integer(tensors[k].shape[d])
        return _choose(v, _below(e, index[d], end), lambda: e.at(tensors[k], local), lambda: piece(k + 1, end))

    return piece(0, start)


def _stack(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"] % v.ndim
    if not index[d].is_Integer:
        return None
    return e.at(v["tensors"][int(index[d])], (*index[:d], *index[d + 1 :]))


def _pad(e: Elements, v: Value, index: Index) -> Any:
    if v.args.get("mode", "constant") != "constant":
        return None
    source = list(index)
    pad = v["pad"]
    inside: Any = sympy.true
    for k in range(len(pad) // 2):
        d = v.ndim - 1 - k
        source[d] = index[d] - integer(pad[2 * k])
        n = integer(v["self"].shape[d])
        low = sympy.true if nonnegative(source[d], e.ranges) else sympy.Ge(source[d], 0)
        inside = sympy.And(inside, low, _below(e, source[d], n))
    outside = literal(v["value"] or 0)
    outside = as_boolean(outside) if v.dtype == torch.bool else as_number(outside)
    if inside != sympy.true:
        element = e.at(v["self"], tuple(source))
        if isinstance(element, sympy.Basic) and element.atoms(Load):
            return None  # an element outside of the tensor must not be loaded
    return _choose(v, inside, lambda: e.at(v["self"], tuple(source)), lambda: outside)


def _triangle(e: Elements, v: Value, index: Index) -> Any:
    row, column = index[-2], index[-1]
    distance = row - column + literal(v["diagonal"])
    inside = sympy.Ge(distance, 0) if v.op == "tril" else sympy.Le(distance, 0)
    zero = sympy.false if v.dtype == torch.bool else sympy.S.Zero
    return _choose(v, inside, lambda: e.at(v["self"], index), lambda: zero)


def _diff(e: Elements, v: Value, index: Index) -> Any:
    if v["n"] != 1 or v["append"] is not None or v.dtype.is_floating_point:
        return None
    x, before, d = v["self"], v["prepend"], v["dim"] % v.ndim

    def element(at: sympy.Expr) -> Any:
        """of cat([prepend, x])"""
        n = integer(before.shape[d]) if before is not None else sympy.S.Zero
        inside = (*index[:d], sympy.expand(at - n), *index[d + 1 :])
        if before is None:
            return e.at(x, inside)
        first = (*index[:d], at, *index[d + 1 :])
        return _choose(x, _below(e, at, n), lambda: e.at(before, first), lambda: e.at(x, inside))

    after, now = element(index[d] + 1), element(index[d])
    if v.dtype == torch.bool:
        return sympy.Xor(after, now)
    return as_number(after) - as_number(now)


def _choose(v: Value, condition: Any, a: Callable[[], Any], b: Callable[[], Any]) -> Any:
    """One of two elements; only the reachable ones are read."""
    if condition == sympy.true:
        return a()
    if condition == sympy.false:
        return b()
    x, y = a(), b()
    if v.dtype == torch.bool:
        return sympy.Or(sympy.And(condition, x), sympy.And(sympy.Not(condition), y))
    return where(condition, as_number(x), as_number(y))


def _below(e: Elements, x: sympy.Expr, n: sympy.Expr) -> Any:
    """x < n, decided by the ranges where they can."""
    if nonnegative(n - 1 - x, e.ranges):
        return sympy.true
    if nonnegative(x - n, e.ranges):
        return sympy.false
    return sympy.Lt(x, n)


RULES: dict[str, Rule] = {
    "cat": _cat, "stack": _stack, "constant_pad_nd": _pad, "pad": _pad, "tril": _triangle, "triu": _triangle,
    "diff": _diff,
}  # fmt: skip
