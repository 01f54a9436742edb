"""Finds the tensor behind an operand: through transposes, reshapes, expands and scalings, so that nothing is copied."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from xfcompile import indexing
from xfcompile.elementwise.constants import literal
from xfcompile.elementwise.positions import Index, broadcast, interleaved, permuted, reshaped
from xfcompile.indexing import Ranges, integer, linear
from xfcompile.site import Miss, Placed
from xfcompile.values import Value

D = sympy.Symbol("d", integer=True, nonnegative=True)
"""The feature axis."""


@dataclass(frozen=True)
class Walk:
    """Follows an element backwards through views."""

    ranges: Ranges

    def floordiv(self, x: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
        return indexing.floordiv(x, n, self.ranges)

    def back(self, value: Value, index: Index) -> tuple[Value, Index] | None:
        """The same element one view earlier; None if `value` is no view."""
        index = tuple(sympy.S.Zero if n == 1 else x for x, n in zip(index, value.shape, strict=True))
        if value.op == "reshape":
            return value["self"], reshaped(value, index, self.ranges)
        if value.op == "permute":
            return value["self"], permuted(value, index)
        if value.op == "expand":
            return value["self"], broadcast(index, value.shape, value["self"].shape)
        if value.op == "select":
            d = value["dim"]
            return value["self"], (*index[:d], integer(value["index"]), *index[d:])
        if value.op == "slice":
            d = value["dim"]
            moved = integer(value["start"]) + integer(value["step"]) * index[d]
            return value["self"], (*index[:d], moved, *index[d + 1 :])
        if value.op == "repeat_interleave":
            source = interleaved(value, index, self.ranges)
            return None if source is None else (value["self"], source)
        return None


def place(
    value: Value,
    index: Index,
    row: sympy.Symbol,
    lead: tuple[sympy.Symbol, ...],
    walk: Walk,
    *,
    scale: bool = False,
    widened: bool = False,
) -> tuple[Placed, ...]:
    """All readings of an operand whose dimensions are axes of the attention, the deepest first.

    scale: whether multiplications by numbers are looked through (they then are `Placed.factor`).
    widened: whether casts from half precision are looked through: right for queries and keys, whose products a kernel
        sums in fp32 anyway; wrong for values, whose dtype says how exact the weights must be.
    Raises `Miss` if not even the operand itself is one.
    """
    ranges = {**walk.ranges}
    found: list[Placed] = []
    factor: sympy.Expr = sympy.S.One
    current: Value | None = value
    features = _feature_range(value, index)
    if features is not None:
        ranges[D] = features
    walk = Walk(ranges)
    while current is not None:
        placed = _placed(current, index, row, lead, ranges, factor)
        if placed is not None:
            found.append(placed)
        step = walk.back(current, index)
        if step is not None:
            current, index = step
        elif widened and current.op == "to" and _widens(current):
            current = current["self"]
        elif scale and current.op in ("mul", "div") and (scaled := _scaled(current)) is not None:
            current, n = scaled
            factor = factor * n
        else:
            current = None
    if not found:
        raise Miss("an operand is not laid out along the axes of the attention", value)
    return tuple(reversed(found))


def _feature_range(value: Value, index: Index) -> sympy.Expr | None:
    for x, n in zip(index, value.shape, strict=True):
        if x == D:
            return integer(n)
    return None


_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def _widens(cast: Value) -> bool:
    """A cast that changes no number: half precision to single or double, single to double."""
    return cast.dtype in _WIDER.get(cast["self"].dtype, ()) and cast["self"].meta.device == cast.meta.device


def _scaled(product: Value) -> tuple[Value, sympy.Expr] | None:
    """The tensor that a product or a quotient is made of, and the finite number by which it is multiplied."""
    if product.args.get("rounding_mode") is not None:
        return None
    sides = [(product["self"], product["other"])]
    if product.op == "mul":
        sides.append((product["other"], product["self"]))
    for tensor, other in sides:
        number = other["fill"] if isinstance(other, Value) and other.op == "full" and other.ndim == 0 else other
        if isinstance(number, Value) or not tensor.dtype.is_floating_point:
            continue
        n = literal(number)
        if n.is_number and n.is_finite and n != 0:
            return tensor, n if product.op == "mul" else 1 / n
    return None


def _placed(
    value: Value,
    index: Index,
    row: sympy.Symbol,
    lead: tuple[sympy.Symbol, ...],
    ranges: Ranges,
    factor: sympy.Expr,
) -> Placed | None:
    dims: list[tuple[sympy.Symbol, ...]] = []
    picks: list[sympy.Expr] = []
    groups: list[tuple[sympy.Symbol, int]] = []
    for x, n in zip(index, value.shape, strict=True):
        axes, pick, group = _axes_of(x, integer(n), row, lead, ranges)
        if axes is None:
            return None
        dims.append(axes)
        picks.append(pick)
        groups += group
    flat = [a for axes in dims for a in axes]
    assert len(set(flat)) == len(flat), "views put no axis into two dimensions"
    for needed in (row, D):
        if needed not in flat and ranges.get(needed, sympy.S.One) != 1:
            return None
    return Placed(value, tuple(dims), tuple(picks), tuple(groups), factor)


def _axes_of(
    x: sympy.Expr, size: sympy.Expr, row: sympy.Symbol, lead: tuple[sympy.Symbol, ...], ranges: Ranges
) -> tuple[tuple[sympy.Symbol, ...] | None, sympy.Expr, list[tuple[sympy.Symbol, int]]]:
    """The logical axes that one dimension holds, given the index into it."""
    own = (*lead, row, D)
    if x.is_Integer:
        return (), x, []
    if x in own:
        return ((x,), sympy.S.Zero, []) if ranges.get(x) == size else (None, x, [])
    if isinstance(x, FloorDiv) and x.args[0] in lead and x.args[1].is_Integer:
        symbol, group = x.args
        if sympy.expand(ranges[symbol] - group * size) == 0:
            return (symbol,), sympy.S.Zero, [(symbol, int(group))]
        return None, x, []
    used = [s for s in own if s in x.free_symbols]
    if len(used) > 1 and x == linear(tuple(used), tuple(ranges[s] for s in used)):
        if sympy.expand(sympy.prod([ranges[s] for s in used]) - size) == 0:
            return tuple(used), sympy.S.Zero, []
    return None, x, []
