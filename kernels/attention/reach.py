"""Which keys a block of query rows may see at all: the mask in interval arithmetic, its rows bounded over the block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from xfcompile.intervals import UNKNOWN, Bounds, possible
from xfcompile.kernels.attention.printer import is_plain
from xfcompile.score import I, J, Load
from xfcompile.site import Band, ScoreSpec


@dataclass(frozen=True)
class Reach:
    """A necessary condition on a key, tested once for all rows of a block.

    keys: over J, scalars and symbols `low0`, `high0` …; sides: what of a row each pair of these bounds.
    """

    keys: sympy.Basic
    sides: Mapping[sympy.Expr, tuple[sympy.Symbol, sympy.Symbol]]


def reach(spec: ScoreSpec) -> Reach | None:
    """None where the condition says nothing, or nothing beyond the band."""
    if spec.keep == sympy.true or spec.band.exact:
        return None
    # A load may be out of range where its neighbours do not hold.
    alone = isinstance(spec.keep, sympy.core.relational.Relational)
    sides: dict[sympy.Expr, tuple[sympy.Symbol, sympy.Symbol]] = {I: _ends(0, whole=True)}

    def load(x: Load) -> Bounds:
        if not (alone or is_plain(x)) or x.free_symbols >= {I, J}:
            return UNKNOWN
        if I not in x.free_symbols:
            return x, x
        whole = not spec.operands[x.operand].dtype.is_floating_point
        return sides.setdefault(x, _ends(len(sides), whole))

    keys = possible(spec.keep, {I: sides[I]}, load)
    if keys == sympy.true or (spec.band != Band() and not keys.has(Load)):
        return None
    return Reach(keys, {side: ends for side, ends in sides.items() if keys.has(*ends)})


def _ends(n: int, whole: bool) -> tuple[sympy.Symbol, sympy.Symbol]:
    about = {"integer": True} if whole else {"real": True}
    return sympy.Symbol(f"low{n}", **about), sympy.Symbol(f"high{n}", **about)
