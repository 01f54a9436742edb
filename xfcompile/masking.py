"""Takes a score apart: what is computed, which keys are kept, and what a row without keys would have got."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from xfcompile.elementwise.choices import is_choice
from xfcompile.elementwise.rows import ROW
from xfcompile.magnitude import absorbing, coarse
from xfcompile.order import BIASES_FIRST, MASKS_FIRST, Order
from xfcompile.score import Load, Rounded, S, Where
from xfcompile.site import Miss


@dataclass(frozen=True)
class Masked:
    """score where keep; `fills` are the numbers that stood where a key is masked, and whether they were added, in
    `dtype`."""

    score: sympy.Expr
    keep: Any
    fills: tuple[tuple[sympy.Expr, bool], ...] = ()
    dtype: torch.dtype = torch.float32

    def dead(self) -> str:
        """What softmax makes of a row without keys: "nan", "mean" (all weights equal), or "unknown"."""
        if all(fill == -sympy.oo for fill, _ in self.fills):
            return "nan"
        # All weights are equal if every key ends with the same number: replaced by it, or absorbed by it once.
        added = [fill for fill, how in self.fills if how]
        if (
            len({fill for fill, _ in self.fills}) == 1
            and len(added) <= 1
            and all(absorbing(float(f), self.dtype) for f in added)
        ):
            return "mean"
        return "unknown"


def adding(expr: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """The same score, with masks added or put in place of scores where they were subtracted, or multiplied by less than
    0: s - where(m, 1e9, 0) is s + where(m, -1e9, 0)."""
    if expr.is_Number:
        return _held(expr, dtype)
    if isinstance(expr, Where):
        return Where(expr.args[0], adding(expr.args[1], dtype), adding(expr.args[2], dtype))
    if isinstance(expr, sympy.Add):
        return sympy.Add(*(adding(term, dtype) for term in expr.args))
    factor, rest = expr.as_coeff_Mul()
    if factor == 1 or not isinstance(rest, (sympy.Add, Where)):
        return expr
    if not factor.is_negative:
        return factor * adding(rest, dtype)
    if isinstance(rest, sympy.Add):
        return sympy.Add(*(adding(factor * term, dtype) for term in rest.args))
    condition, a, b = rest.args
    if factor in (-2, -3):  # what is subtracted twice is rounded twice
        return -factor * Where(condition, adding(-a, dtype), adding(-b, dtype))
    return Where(condition, adding(factor * a, dtype), adding(factor * b, dtype))


def separate(expr: sympy.Expr, dtype: torch.dtype, *, rounded: bool = False) -> Masked:
    """Split a score into what is computed and which keys are kept.

    A fill counts as a mask only if no score that a model can have competes with it: -inf, or below -1e8, or the
    least number of fp16 in an fp16 score. Others (Swin's -100, BERT's -10000) are arithmetic.

    dtype: of the scores where they are masked. rounded: take every number for a fill that is coarse in that dtype.
    """
    limit = sympy.Integer(-65000) if dtype == torch.float16 else sympy.Integer(-(10**8))

    def is_fill(x: sympy.Expr) -> bool:
        if not x.is_number or x >= 0:
            return False
        return bool(x == -sympy.oo or x <= limit or (rounded and coarse(float(x), dtype)))

    def numbers(x: sympy.Expr) -> tuple[sympy.Expr, ...]:
        return (*numbers(x.args[1]), *numbers(x.args[2])) if isinstance(x, Where) else (x,)

    def are_fills(x: sympy.Expr) -> bool:
        return all(is_fill(y) for y in numbers(x))

    def split(x: sympy.Expr, added: bool) -> Masked:
        if isinstance(x, Where):
            condition, a, b = x.args
            if are_fills(b) and not are_fills(a):
                inner = split(a, added)
                fills = tuple((fill, added) for fill in numbers(b))
                return Masked(inner.score, sympy.And(condition, inner.keep), (*inner.fills, *fills))
            if are_fills(a) and not are_fills(b):
                inner = split(b, added)
                fills = tuple((fill, added) for fill in numbers(a))
                return Masked(inner.score, sympy.And(sympy.Not(condition), inner.keep), (*inner.fills, *fills))
            if is_choice(x) and not are_fills(x):
                yes, no = split(a, added), split(b, added)
                keep = sympy.Or(sympy.And(condition, yes.keep), sympy.And(sympy.Not(condition), no.keep))
                return Masked(Where(condition, yes.score, no.score), keep, (*yes.fills, *no.fills))
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

    return replace(split(sympy.sympify(expr), False), dtype=dtype)


def as_rounded(
    expr: sympy.Expr, dtype: torch.dtype, far: Callable[[Load], bool], order: Order = BIASES_FIRST
) -> sympy.Expr:
    """A score of which, where a key is masked by a large number that is added, no more is left than in that dtype.

    far: whether a load may be such a number.
    """

    def large(x: sympy.Expr) -> bool:
        return bool(x.is_number and x.is_finite) and (
            coarse(float(x), dtype) or (order.summed is not None and coarse(float(x), order.summed))
        )

    def of_large(x: sympy.Expr) -> bool:
        return any(of_large(y) for y in x.args[1:]) if isinstance(x, Where) else large(x)

    def choices(term: sympy.Expr) -> list[Where]:
        """The choices with a large number that a term adds: one that is added twice is rounded twice."""
        times, choice = term.as_coeff_Mul()
        if not isinstance(choice, Where):
            return []
        condition, *numbers = choice.args
        if times not in (1, 2, 3):
            times, numbers = sympy.S.One, [times * x for x in numbers]
        return [Where(condition, *numbers)] * int(times) if any(of_large(x) for x in numbers) else []

    def is_far(x: sympy.Expr) -> bool:
        return any(far(load) for load in x.atoms(Load))

    def held(x: sympy.Expr) -> sympy.Expr:
        return x if dtype == torch.float32 or x.is_number else _rounded(x, dtype)

    def plus(x: sympy.Expr, bias: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        if isinstance(y, Where):
            return Where(y.args[0], plus(x, bias, y.args[1]), plus(x, bias, y.args[2]))
        if not large(y) and not is_far(y):
            return x + bias + y
        if order.summed is not None and bias != 0:
            y = _rounded(bias + y, order.summed)
        return _rounded(held(x) + y, dtype)

    def walk(x: sympy.Expr) -> sympy.Expr:
        if isinstance(x, Where):
            return Where(x.args[0], walk(x.args[1]), walk(x.args[2]))
        if isinstance(x, sympy.Add):
            masks = [c for term in x.args for c in choices(term)]
            rest = [term for term in x.args if not choices(term)]
            apart = [t for t in rest if is_far(t) or (masks and order != BIASES_FIRST and S not in t.free_symbols)]
            total = sympy.Add(*(walk(term) for term in rest if term not in apart))
            biases = sympy.Add(*apart)
            if biases != 0 and (order == BIASES_FIRST or not masks):
                total, biases = _rounded(held(total) + biases, dtype), sympy.S.Zero
            for condition, a, b in (c.args for c in masks):
                bias = biases if order.summed is not None else sympy.S.Zero
                total = Where(condition, plus(total, bias, a), plus(total, bias, b))
            return _rounded(held(total) + biases, dtype) if biases != 0 and order == MASKS_FIRST else total
        coefficient, rest = x.as_coeff_Mul()
        return coefficient * walk(rest) if coefficient != 1 and rest != x else x

    return walk(expr)


def _rounded(x: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    return Rounded(x, 1 - round(math.log2(torch.finfo(dtype).eps)))


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
    _, rest = term.as_coeff_Mul()
    return rest == ROW
