"""Interval arithmetic over masks: what holds of a whole tile of scores, from bounds of its queries and keys alone.

A predicate over (i, j) becomes two predicates over the bounds of a tile: one that holds wherever some position of the
tile satisfies it (else the tile is skipped), and one that holds only where all do (then it runs unmasked).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from xfcompile.score import Load, Where

Bounds = tuple[sympy.Expr, sympy.Expr]
"""The least and the greatest value."""

Box = Mapping[sympy.Symbol, Bounds]
"""Bounds of some symbols; every other symbol is one number for the whole tile."""

UNKNOWN: Bounds = (-sympy.oo, sympy.oo)


def possible(predicate: Any, box: Box, load: Callable[[Load], Bounds] | None = None) -> Any:
    """What holds of the bounds wherever `predicate` holds at some position within them.

    load: bounds of a load over the tile; None is none.
    """
    return _verdict(predicate, _Ranges(box, load), some=True)


def certain(predicate: Any, box: Box, load: Callable[[Load], Bounds] | None = None) -> Any:
    """What holds of the bounds only where `predicate` holds at every position within them."""
    return _verdict(predicate, _Ranges(box, load), some=False)


def _verdict(p: Any, ranges: _Ranges, some: bool) -> Any:
    if p in (sympy.true, sympy.false) or ranges.settles(p):
        return p
    if isinstance(p, (sympy.And, sympy.Or)):
        return p.func(*(_verdict(x, ranges, some) for x in p.args))
    if isinstance(p, sympy.Not):
        return sympy.Not(_verdict(p.args[0], ranges, not some))
    if isinstance(p, sympy.Xor):
        return _verdict(p.to_nnf(), ranges, some)
    if isinstance(p, sympy.ITE):
        c, a, b = p.args
        return _verdict(sympy.Or(sympy.And(c, a), sympy.And(sympy.Not(c), b)), ranges, some)
    if isinstance(p, sympy.core.relational.Relational):
        return _relation(p, ranges, some)
    return sympy.true if some else sympy.false


def _relation(p: Any, ranges: _Ranges, some: bool) -> Any:
    if isinstance(p, sympy.Ne):
        return sympy.Not(_relation(sympy.Eq(*p.args, evaluate=False), ranges, not some))
    if isinstance(p, (sympy.Ge, sympy.Gt)):
        return _relation(p.reversed, ranges, some)
    a, b = p.args
    if isinstance(p, sympy.Eq):
        if some and (residue := _residue(a, b) or _residue(b, a)) is not None:
            return _some_of_residue(*residue, ranges)
        low, high = ranges.of(_gap(a, b))
        return sympy.And(low <= 0, high >= 0) if some else sympy.And(sympy.Eq(low, 0), sympy.Eq(high, 0))
    low, high = ranges.of(_gap(a, b))
    least = low if some else high
    return least <= 0 if isinstance(p, sympy.Le) else least < 0


def _gap(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """a - b, in which what cancels is gone, and powers are whole: of i*i - 2*i*j + j*j nobody knows the bounds."""
    return sympy.expand(a - b, multinomial=False)


def _residue(a: sympy.Expr, b: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None:
    """x, c, r of x % c == r."""
    if isinstance(a, (Mod, PythonMod, sympy.Mod)) and a.args[1].is_Integer and b.is_Integer and a.args[1] > 0:
        return a.args[0], a.args[1], b
    return None


def _some_of_residue(x: sympy.Expr, c: sympy.Expr, r: sympy.Expr, ranges: _Ranges) -> Any:
    """Whether an interval of integers holds one that leaves r when it is divided by c."""
    if not 0 <= r < c:
        return sympy.false
    low, high = ranges.of(x)
    return FloorDiv(high - r, c) > FloorDiv(low - 1 - r, c)


class _Ranges:
    """Bounds of expressions over one box, each computed once."""

    def __init__(self, box: Box, load: Callable[[Load], Bounds] | None) -> None:
        self.box = box
        self.load = load
        self.known: dict[sympy.Expr, Bounds] = {}

    def settles(self, p: Any) -> bool:
        """Whether a predicate is the same within the whole box."""
        exact = self.load is not None and all(self.load(x) == (x, x) for x in sorted(p.atoms(Load), key=str))
        return not p.free_symbols & self.box.keys() and (exact or not p.atoms(Load))

    def of(self, x: sympy.Expr) -> Bounds:
        if x not in self.known:
            self.known[x] = self._bounds(x)
        return self.known[x]

    def _bounds(self, x: sympy.Expr) -> Bounds:
        if isinstance(x, Load):
            return UNKNOWN if self.load is None else self.load(x)
        if not x.free_symbols & self.box.keys() and not x.atoms(Load):
            return x, x
        if isinstance(x, sympy.Symbol):
            return self.box[x]
        rule = next((rule for kinds, rule in _RULES if isinstance(x, kinds)), None)
        return UNKNOWN if rule is None else rule(self, x)


def _sum(ranges: _Ranges, x: sympy.Add) -> Bounds:
    lows, highs = zip(*(ranges.of(term) for term in x.args), strict=True)
    if -sympy.oo in lows or sympy.oo in highs:
        return (
            -sympy.oo if -sympy.oo in lows else sympy.Add(*lows), sympy.oo if sympy.oo in highs else sympy.Add(*highs)
        )  # fmt: skip
    return sympy.Add(*lows), sympy.Add(*highs)


def _product(ranges: _Ranges, x: sympy.Mul) -> Bounds:
    coefficient, rest = x.as_coeff_Mul()
    if coefficient != 1:
        low, high = ranges.of(rest)
        return (coefficient * low, coefficient * high) if coefficient > 0 else (coefficient * high, coefficient * low)
    a, b = x.as_two_terms()
    corners = [p * q for p in ranges.of(a) for q in ranges.of(b)]
    if any(c.has(sympy.oo, sympy.nan, sympy.zoo) for c in corners):
        return UNKNOWN
    return sympy.Min(*corners), sympy.Max(*corners)


def _power(ranges: _Ranges, x: sympy.Pow) -> Bounds:
    base, exponent = x.args
    if not (exponent.is_Integer and exponent > 0):
        return UNKNOWN
    low, high = ranges.of(base)
    if UNKNOWN[0] in (low, -high):
        return UNKNOWN
    if exponent % 2 == 0:
        low, high = _sizes(low, high)
    return low**exponent, high**exponent


def _quotient(ranges: _Ranges, x: Any) -> Bounds:
    a, c = x.args
    if not (c.is_Integer and c > 0):
        return UNKNOWN
    low, high = ranges.of(a)
    return UNKNOWN if UNKNOWN[0] in (low, -high) else (FloorDiv(low, c), FloorDiv(high, c))


def _remainder(ranges: _Ranges, x: Any) -> Bounds:
    a, c = x.args
    if not (c.is_Integer and c > 0):
        return UNKNOWN
    low, high = ranges.of(a)
    if UNKNOWN[0] in (low, -high):
        return sympy.S.Zero, c - 1
    same = sympy.Eq(FloorDiv(low, c), FloorDiv(high, c))
    return Where(same, PythonMod(low, c), sympy.S.Zero), Where(same, PythonMod(high, c), c - 1)


def _magnitude(ranges: _Ranges, x: sympy.Abs) -> Bounds:
    return _sizes(*ranges.of(x.args[0]))


def _sizes(low: sympy.Expr, high: sympy.Expr) -> Bounds:
    """Of what is nearest to 0, and of what is furthest."""
    return sympy.Max(low, -high, 0), sympy.Max(-low, high)


def _extremum(ranges: _Ranges, x: Any) -> Bounds:
    lows, highs = zip(*(ranges.of(a) for a in x.args), strict=True)
    return x.func(*lows), x.func(*highs)


def _choice(ranges: _Ranges, x: Where) -> Bounds:
    condition, a, b = x.args
    always, never = _verdict(condition, ranges, False), sympy.Not(_verdict(condition, ranges, True))
    (low_a, high_a), (low_b, high_b) = ranges.of(a), ranges.of(b)
    return (
        Where(always, low_a, Where(never, low_b, sympy.Min(low_a, low_b))),
        Where(always, high_a, Where(never, high_b, sympy.Max(high_a, high_b))),
    )


_RULES: list[tuple[Any, Callable[[_Ranges, Any], Bounds]]] = [
    (sympy.Add, _sum), (sympy.Mul, _product), (sympy.Pow, _power), (FloorDiv, _quotient),
    ((Mod, PythonMod, sympy.Mod), _remainder), (sympy.Abs, _magnitude), ((sympy.Min, sympy.Max), _extremum),
    (Where, _choice),
]  # fmt: skip
