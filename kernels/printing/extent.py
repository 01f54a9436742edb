"""What an expression varies along, of a tile of scores, and what it loads."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from xfcompile.score import POSITION, H, I, J, Load, S, Where


def extent(expr: sympy.Basic) -> frozenset[sympy.Symbol]:
    """Which of the tile's two axes an expression varies along."""
    symbols = expr.free_symbols
    return frozenset((I, J)) if S in symbols else frozenset(symbols & {I, J})


def axes(expr: sympy.Basic) -> frozenset[sympy.Symbol]:
    """`extent`, and whether an expression varies along heads: in a kernel for decoding, rows differ in these too."""
    return extent(expr) | frozenset(expr.free_symbols & {H})


def is_plain(load: Load) -> bool:
    """Whether every index is a position or 0, hence in range wherever the position is."""
    return all(x == 0 or x in POSITION for x in load.indices)


def guarded_loads(expr: sympy.Basic, guarded: bool = False) -> Iterator[tuple[Load, bool]]:
    """Every load, and whether it stands under a condition, outside of which its indices may be out of range."""
    guards = isinstance(expr, (Where, sympy.And, sympy.Or, sympy.Piecewise, sympy.ITE))
    for arg in expr.args:
        yield from guarded_loads(arg, guarded or guards)
    if isinstance(expr, Load):
        yield expr, guarded
