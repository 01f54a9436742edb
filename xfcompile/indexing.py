"""Integer algebra over index ranges: division that knows how far an index goes, and signs that can be proved."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

Ranges = Mapping[sympy.Symbol, sympy.Expr]
"""For each index symbol, its exclusive end; it starts at 0."""


def integer(x: object) -> sympy.Expr:
    """A size or an index as sympy sees it; torch infers the size of a view as s**2 // s where two sizes are one s."""
    expr = sympy.sympify(x)
    return expr.replace(FloorDiv, _quotient) if isinstance(expr, sympy.Basic) and expr.has(FloorDiv) else expr


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    exact = a / b
    return exact if b.is_positive and exact.is_integer and _polynomial(exact) else FloorDiv(a, b)


def nonnegative(expr: sympy.Expr, ranges: Ranges) -> bool:
    """Whether `expr >= 0` is proved for all indices in range and all sizes."""
    low = extreme(expr, ranges, upper=False)
    return low is not None and bool(low.is_nonnegative)


def extreme(expr: sympy.Expr, ranges: Ranges, *, upper: bool) -> sympy.Expr | None:
    """A bound of an integer expression that is linear in the indices; None if none is known.

    The result is free of indices. Terms that are not linear are bounded on their own where that is possible.
    """
    total: sympy.Expr = sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(expr)):
        bound = _extreme_of_term(term, ranges, upper)
        if bound is None:
            return None
        total += bound
    return sympy.expand(total)


def _extreme_of_term(term: sympy.Expr, ranges: Ranges, upper: bool) -> sympy.Expr | None:
    symbols = [s for s in term.free_symbols if s in ranges]
    if not symbols and not term.has(sympy.Function):
        return term
    coefficient, rest = term.as_coeff_Mul()
    if coefficient < 0:
        bound = _extreme_of_term(rest, ranges, not upper)
        return None if bound is None else coefficient * bound
    if coefficient != 1:
        bound = _extreme_of_term(rest, ranges, upper)
        return None if bound is None else coefficient * bound
    if term in ranges:
        return ranges[term] - 1 if upper else sympy.S.Zero
    if isinstance(term, FloorDiv):
        base = extreme(term.args[0], ranges, upper=upper)
        return None if base is None or not term.args[1].is_positive else FloorDiv(base, term.args[1])
    if isinstance(term, Mod) and term.args[1].is_positive:
        return term.args[1] - 1 if upper else sympy.S.Zero
    if isinstance(term, sympy.Abs):
        low, high = (extreme(term.args[0], ranges, upper=u) for u in (False, True))
        if low is None or high is None or not (low.is_number and high.is_number):
            return sympy.S.Zero if not upper else None
        if upper:
            return sympy.Max(abs(low), abs(high))
        return sympy.S.Zero if low <= 0 <= high else sympy.Min(abs(low), abs(high))
    if isinstance(term, (sympy.Min, sympy.Max)):
        bounds = [extreme(a, ranges, upper=upper) for a in term.args]
        return None if any(b is None for b in bounds) else term.func(*bounds)
    if isinstance(term, sympy.Mul) and len(symbols) == 1 and term.has(symbols[0]):
        factor = term / symbols[0]
        if symbols[0] not in factor.free_symbols and factor.is_nonnegative:
            return factor * (ranges[symbols[0]] - 1) if upper else sympy.S.Zero
    return None


def floordiv(expr: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """`expr // divisor`, simplified by what the ranges allow."""
    whole, rest = _split(expr, divisor)
    if _within(rest, divisor, ranges):
        return whole
    return whole + FloorDiv(rest, divisor)


def mod(expr: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """`expr % divisor`, simplified by what the ranges allow."""
    _, rest = _split(expr, divisor)
    if _within(rest, divisor, ranges):
        return rest
    return Mod(rest, divisor) if nonnegative(rest, ranges) else rest - divisor * FloorDiv(rest, divisor)


def linear(indices: tuple[sympy.Expr, ...], sizes: tuple[sympy.Expr, ...]) -> sympy.Expr:
    """Row-major offset of an index tuple; `n * (x // n) + x % n` becomes x."""
    total: sympy.Expr = sympy.S.Zero
    for index, size in zip(indices, sizes, strict=True):
        total = sympy.expand(total * size + index)
    return join(total)


def join(expr: sympy.Expr) -> sympy.Expr:
    """Put back together what division took apart: `n * (x // n) + x % n` is x."""
    for m in expr.atoms(Mod):
        x, n = m.args
        whole = sympy.expand(n * FloorDiv(x, n))
        coefficient = expr.coeff(m)
        if coefficient != 0 and whole != 0 and not (expr - coefficient * (m + whole)).has(m, FloorDiv(x, n)):
            expr = sympy.expand(expr - coefficient * (m + whole) + coefficient * x)
    return expr


def unravel(offset: sympy.Expr, sizes: tuple[sympy.Expr, ...], ranges: Ranges) -> tuple[sympy.Expr, ...]:
    """The index tuple of a row-major offset."""
    indices: list[sympy.Expr] = []
    for size in reversed(sizes[1:]):
        indices.append(mod(offset, size, ranges) if size != 1 else sympy.S.Zero)
        offset = floordiv(offset, size, ranges) if size != 1 else offset
    if not sizes:
        return ()
    return (sympy.S.Zero if sizes[0] == 1 else offset, *reversed(indices))


def _split(expr: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """expr = divisor * whole + rest, term by term."""
    whole: sympy.Expr = sympy.S.Zero
    rest: sympy.Expr = sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(expr)):
        quotient = term / divisor
        if quotient.is_integer and _polynomial(quotient):
            whole += quotient
        elif term.is_Integer and divisor.is_Integer:
            whole += term // divisor
            rest += term % divisor
        else:
            rest += term
    return whole, rest


def _polynomial(expr: sympy.Expr) -> bool:
    return all(not (p.exp.is_negative) for p in expr.atoms(sympy.Pow))


def _within(expr: sympy.Expr, size: sympy.Expr, ranges: Ranges) -> bool:
    """0 <= expr < size, proved."""
    return nonnegative(expr, ranges) and nonnegative(size - 1 - expr, ranges)
