"""Takes a score apart: what is computed, which keys are kept, and what a row without keys would have got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from xfcompile.elementwise import ROW
from xfcompile.magnitude import ABSORBING
from xfcompile.score import Where
from xfcompile.site import Miss


@dataclass(frozen=True)
class Masked:
    """score where keep; `fills` are the numbers that stood where a key is masked, and whether they were added."""

    score: sympy.Expr
    keep: Any
    fills: tuple[tuple[sympy.Expr, bool], ...] = ()

    def dead(self) -> str:
        """What softmax makes of a row without keys: "nan", "mean" (all weights equal), or "unknown"."""
        if all(fill == -sympy.oo for fill, _ in self.fills):
            return "nan"
        # All weights are equal if every key ends with the same number: replaced by it, or absorbed by it once.
        added = [fill for fill, how in self.fills if how]
        if len({fill for fill, _ in self.fills}) == 1 and len(added) <= 1 and all(f <= -ABSORBING for f in added):
            return "mean"
        return "unknown"


def separate(expr: sympy.Expr, dtype: torch.dtype) -> Masked:
    """Split a score into what is computed and which keys are kept.

    A fill counts as a mask only if no score that a model can have competes with it: -inf, or below -1e8, or the
    least number of fp16 in an fp16 score. Others (Swin's -100, BERT's -10000) are arithmetic.
    """
    limit = sympy.Integer(-65000) if dtype == torch.float16 else sympy.Integer(-(10**8))

    def is_fill(x: sympy.Expr) -> bool:
        return bool(x.is_number and (x == -sympy.oo or x <= limit))

    def split(x: sympy.Expr, added: bool) -> Masked:
        if isinstance(x, Where):
            condition, a, b = x.args
            if is_fill(b) and not is_fill(a):
                inner = split(a, added)
                return Masked(inner.score, sympy.And(condition, inner.keep), (*inner.fills, (b, added)))
            if is_fill(a) and not is_fill(b):
                inner = split(b, added)
                return Masked(inner.score, sympy.And(sympy.Not(condition), inner.keep), (*inner.fills, (a, added)))
            return Masked(x, sympy.true)
        if isinstance(x, sympy.Add):
            parts = [split(term, True) for term in x.args]
            return Masked(
                sympy.Add(*(p.score for p in parts)),
                sympy.And(*(p.keep for p in parts)),
                tuple(f for p in parts for f in p.fills),
            )
        coefficient, rest = x.as_coeff_Mul()
        if coefficient != 1 and coefficient.is_positive and rest != x:
            inner = split(rest, added)
            fills = tuple((_held(fill * coefficient, dtype), how) for fill, how in inner.fills)
            if all(is_fill(fill) for fill, _ in fills):
                return Masked(coefficient * inner.score, inner.keep, fills)
        return Masked(x, sympy.true)

    return split(sympy.sympify(expr), False)


def _held(fill: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """A fill as its dtype holds it: finfo.min * 2 is -inf."""
    return -sympy.oo if fill < -torch.finfo(dtype).max else fill


def without_row_shift(expr: sympy.Expr) -> sympy.Expr:
    """A score without what is the same for the whole row; `Miss` if a row statistic does more than shift."""
    if ROW not in expr.free_symbols:
        return expr
    shifted = sympy.expand_mul(expr)
    rest = sympy.Add(*(t for t in sympy.Add.make_args(shifted) if not _is_shift(t)))
    if ROW in rest.free_symbols:
        raise Miss("a row statistic of the scores does more than shift the row")
    return rest


def _is_shift(term: sympy.Expr) -> bool:
    coefficient, rest = term.as_coeff_Mul()
    return rest == ROW and coefficient.is_number
