"""Choices between numbers, however they are put together, as one: a mask that is made of masks is seen as one mask."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from xfcompile.elementwise.constants import is_mask, rounded, where
from xfcompile.score import Where

MOST = 4
"""Conditions that are taken apart into their cases."""


def is_choice(expr: Any) -> bool:
    """Whether an expression is made of choices between numbers and of nothing else."""
    return isinstance(expr, sympy.Expr) and expr.has(Where) and _is_constant(expr)


def _is_constant(expr: sympy.Basic) -> bool:
    if isinstance(expr, Where):
        return all(_is_constant(x) for x in expr.args[1:])
    if isinstance(expr, (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.Abs)):
        return all(_is_constant(x) for x in expr.args)
    return bool(expr.is_Number)


def one_choice(expr: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """The same choice, of numbers as `dtype` holds them: the lesser of where(a, -1e9, 0) and where(b, -1e9, 0) is
    where(a | b, -1e9, 0)."""
    conditions = sorted(_conditions(expr), key=sympy.default_sort_key)
    if len(conditions) > MOST:
        return expr
    if not conditions:
        return rounded(expr, dtype)
    yes, no = (one_choice(_decided(expr, conditions[0], branch), dtype) for branch in (1, 2))
    return expr if sympy.nan in (yes, no) else _merged(conditions[0], yes, no)


def _conditions(expr: sympy.Basic) -> set[Any]:
    """Those of an expression's choices, but not what they are made of."""
    if isinstance(expr, Where):
        return {expr.args[0]}.union(*(_conditions(x) for x in expr.args[1:]))
    return set().union(*(_conditions(x) for x in expr.args))


def _decided(expr: sympy.Expr, condition: Any, branch: int) -> sympy.Expr:
    if isinstance(expr, Where):
        if expr.args[0] == condition:
            return _decided(expr.args[branch], condition, branch)
        return where(expr.args[0], *(_decided(x, condition, branch) for x in expr.args[1:]))
    return expr.func(*(_decided(x, condition, branch) for x in expr.args)) if expr.args else expr


def _merged(condition: Any, yes: sympy.Expr, no: sympy.Expr) -> sympy.Expr:
    """A choice whose branches are numbers or choices, with the conditions of one number put together."""
    if is_mask(no) and yes in no.args[1:]:
        other, a, b = no.args
        return Where(sympy.Or(condition, other), a, b) if yes == a else Where(sympy.Or(condition, ~other), b, a)
    if is_mask(yes) and no in yes.args[1:]:
        other, a, b = yes.args
        return Where(sympy.And(condition, other), a, b) if no == b else Where(sympy.And(condition, ~other), b, a)
    return Where(condition, yes, no)
