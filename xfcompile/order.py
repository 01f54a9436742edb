"""In which order masks and biases are added to scores: it matters to what rounding leaves of rows without keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch

from xfcompile.score import POSITION, Load, S, Where


@dataclass(frozen=True)
class Order:
    """summed: both are added up, in that dtype, before their sum is added to scores."""

    masks_first: bool = False
    summed: torch.dtype | None = None


BIASES_FIRST, MASKS_FIRST = Order(), Order(masks_first=True)


def orders(a: sympy.Expr, b: sympy.Expr, dtype: torch.dtype) -> Iterator[Order]:
    """What a sum of two formulas in a dtype says of the order."""
    for x, y in ((a, b), (b, a)):
        if not _has_bias(x) or not _has_mask(y):
            continue
        if S in x.free_symbols or S in y.free_symbols:
            yield MASKS_FIRST if S in y.free_symbols else BIASES_FIRST
        else:
            yield Order(summed=dtype)


def one_order(found: set[Order], score: sympy.Expr) -> Order | None:
    """The order in which a score adds masks and biases, or None where it is not known."""
    if len(found) > 1:
        return None
    order = next(iter(found), BIASES_FIRST)
    return None if order.summed is not None and _count(score) > 1 else order


def _count(score: sympy.Expr) -> int:
    """How many biases or how many masks a score has, whichever are more."""
    terms = [
        term for x in score.atoms(sympy.Add) if S in x.free_symbols for term in x.args if S not in term.free_symbols
    ]
    masks = [term for term in terms if _has_mask(term)]
    return max(len(masks), len(terms) - len(masks))


def _has_bias(x: sympy.Basic) -> bool:
    """Whether a number of each key's or each row's own is computed with."""
    return any(True for _ in computed_with(x))


def computed_with(x: sympy.Basic) -> Iterator[sympy.Basic]:
    """The loads and positions of a formula that are computed with, and not only compared or looked up by."""
    if isinstance(x, Load) or x in POSITION:
        yield x
    elif isinstance(x, sympy.Symbol) or not isinstance(x, sympy.logic.boolalg.Boolean):
        for y in x.args[1:] if isinstance(x, Where) else x.args:
            yield from computed_with(y)


def _has_mask(x: sympy.Basic) -> bool:
    return any(y.is_number for choice in x.atoms(Where) for y in choice.args[1:])
