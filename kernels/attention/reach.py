"""Which keys a block of query rows may see at all: the mask with its rows replaced by their bounds over the block."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from xfcompile.kernels.attention.printer import is_plain
from xfcompile.score import I, J, Load
from xfcompile.site import Band, ScoreSpec


@dataclass(frozen=True)
class Reach:
    """A necessary condition on a key, tested once for all rows of a block.

    keys: over J, scalars and the symbols `low0`, `high0` …; sides: for each such pair, what of a row it bounds.
    """

    keys: sympy.Basic
    sides: tuple[sympy.Expr, ...]


def reach(spec: ScoreSpec) -> Reach | None:
    """None where the condition says nothing, or nothing beyond the band."""
    if spec.keep == sympy.true or spec.band.exact:
        return None
    sides: list[sympy.Expr] = []
    keys = _possible(spec.keep, sides, alone=True)
    if keys == sympy.true or (spec.band != Band() and not keys.has(Load)):
        return None
    return Reach(keys, tuple(sides))


FLIPPED = {sympy.Le: sympy.Ge, sympy.Ge: sympy.Le, sympy.Lt: sympy.Gt, sympy.Gt: sympy.Lt}


def bounds(n: int) -> tuple[sympy.Symbol, sympy.Symbol]:
    return sympy.Symbol(f"low{n}", real=True), sympy.Symbol(f"high{n}", real=True)


def _possible(condition: sympy.Basic, sides: list[sympy.Expr], alone: bool) -> sympy.Basic:
    """What holds of a key wherever `condition` holds for some row of the block; true where nothing is known."""
    if isinstance(condition, (sympy.And, sympy.Or)):
        return condition.func(*(_possible(x, sides, alone=False) for x in condition.args))
    if not isinstance(condition, sympy.core.relational.Relational):
        return sympy.true
    if not alone and not all(is_plain(load) for load in condition.atoms(Load)):
        return sympy.true  # it may be out of range where its neighbours do not hold
    if I not in condition.free_symbols:
        return condition
    split = _split(condition.lhs - condition.rhs)
    if split is None:
        return sympy.true
    key, row = split
    relation = type(condition)
    if key.could_extract_minus_sign():
        key, row, relation = -key, -row, FLIPPED.get(relation, relation)
    low, high = bounds(len(sides))
    meaning: dict[type, sympy.Basic] = {
        sympy.Le: sympy.Le(key, high, evaluate=False),
        sympy.Lt: sympy.Lt(key, high, evaluate=False),
        sympy.Ge: sympy.Ge(key, low, evaluate=False),
        sympy.Gt: sympy.Gt(key, low, evaluate=False),
        sympy.Eq: sympy.And(sympy.Ge(key, low, evaluate=False), sympy.Le(key, high, evaluate=False)),
    }
    if relation not in meaning:
        return sympy.true
    sides.append(-row)
    return meaning[relation]


def _split(difference: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """key + row, the first free of I and the second free of J; None where a term has both."""
    key = row = sympy.S.Zero
    for term in sympy.Add.make_args(difference):
        if not term.free_symbols >= {I, J}:
            key, row = (key, row + term) if I in term.free_symbols else (key + term, row)
            continue
        return None
    return key, row
