"""Rules of comparisons, of what is made of booleans, and of choices by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from xfcompile.elementwise.constants import as_boolean, as_number, fold, is_mask, rounded, where
from xfcompile.elementwise.digits import holds, narrows, operating
from xfcompile.elementwise.elements import Elements, Rule
from xfcompile.elementwise.positions import Index
from xfcompile.score import Load, S
from xfcompile.site import Miss
from xfcompile.values import Value

_COMPARISONS: dict[str, Callable[..., Any]] = {
    "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne,
}  # fmt: skip


def _comparison(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    if S in a.free_symbols or S in b.free_symbols:
        raise Miss("scores are compared", v)
    if (
        not (_exact(e, a) and _exact(e, b))
        or narrows(v)
        or not holds(operating(v), a, b)
        or e.told_apart(v["self"], b)
        or e.told_apart(v["other"], a)
    ):
        return None
    loads = a.atoms(Load) | b.atoms(Load)
    if any(e.loads[load.operand].dtype.is_floating_point for load in loads):
        if v.op not in ("eq", "ne"):
            return None  # NaN is neither above nor below: `not (x < y)` is not `x >= y`, as sympy would have it
        if a == b or a.is_infinite or b.is_infinite:
            return None  # NaN is not equal to itself, and a tensor may hold inf, which no real number is for sympy
    return fold(_COMPARISONS[v.op], a, b)


def _exact(e: Elements, x: sympy.Expr) -> bool:
    """Whether a formula, evaluated in fp32 or, of whole numbers, in theirs, gives the very number that the program has.
    Kernels add 32 bits to 32 in 32, where the program may have added 64."""
    if x.is_integer or x.is_number or isinstance(x, Load) or is_mask(x):
        return True
    loads = x.atoms(Load)
    if any(e.loads[load.operand].dtype != torch.int64 for load in loads):
        return False
    return bool(x.xreplace({load: sympy.Dummy(integer=True) for load in loads}).is_integer)


def _logical(e: Elements, v: Value, index: Index) -> Any:
    parts = [e.arg(v[k], index, v.shape) for k in ("self", "other")]
    if v.dtype != torch.bool or any(e.told_apart(x) for x in v.inputs()):
        return None
    a, b = (as_boolean(x) for x in parts)
    return {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor}[v.op](a, b)


def _not(e: Elements, v: Value, index: Index) -> Any:
    if v.dtype != torch.bool:
        return None
    x = as_boolean(e.at(v["self"], index))
    return None if e.told_apart(v["self"]) else sympy.Not(x)


def _where(e: Elements, v: Value, index: Index) -> Any:
    condition = e.arg(v["condition"], index, v.shape)
    if condition == sympy.true or condition == sympy.false:
        chosen = e.arg(v["self"] if condition == sympy.true else v["other"], index, v.shape)
        return chosen if v.dtype == torch.bool else as_number(chosen)
    a, b = e.arg(v["self"], index, v.shape), e.arg(v["other"], index, v.shape)
    if e.depends_on_dot(v):
        e.masked_in.add(v.dtype)
    if v.dtype == torch.bool:
        a, b = as_boolean(a), as_boolean(b)
        return sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b))
    return where(as_boolean(condition), *(rounded(as_number(x), v.dtype) for x in (a, b)))


RULES: dict[str, Rule] = {
    **dict.fromkeys(_COMPARISONS, _comparison),
    "and": _logical, "or": _logical, "xor": _logical, "not": _not, "where": _where,
}  # fmt: skip
