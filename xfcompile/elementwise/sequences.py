"""Rules of tensors that are made of numbers alone: the same everywhere, counted, or summed up along an axis."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from xfcompile.elementwise.constants import as_boolean, as_number, literal, rounded, where
from xfcompile.elementwise.elements import Elements, Rule
from xfcompile.elementwise.positions import Index
from xfcompile.indexing import Ranges, integer
from xfcompile.masks import prove
from xfcompile.score import Load, Where
from xfcompile.values import Value


def _full(e: Elements, v: Value, index: Index) -> Any:
    x = literal(v["fill"])
    if v.dtype == torch.bool:
        return as_boolean(x)
    return rounded(as_number(x), v.dtype)


def _arange(e: Elements, v: Value, index: Index) -> Any:
    start, step = literal(v.args.get("start") or 0), literal(v.args.get("step", 1))
    if not (start.is_integer and step.is_integer):
        return None
    return start + step * index[0]


def _cumsum(e: Elements, v: Value, index: Index) -> Any:
    if e.depends_on_dot(v):
        return None
    x, d = v["self"], v["dim"] % v.ndim
    walk = sympy.Symbol(f"c{len(e.ranges)}", integer=True, nonnegative=True)
    e.ranges[walk] = integer(x.shape[d])
    element = _settle(as_number(e.at(x, (*index[:d], walk, *index[d + 1 :]))), e.ranges)
    if walk in element.free_symbols or element.atoms(Load):
        return None
    return element * (index[d] + 1)


def _settle(expr: Any, ranges: Ranges) -> Any:
    """Simplify choices and comparisons by what the ranges prove; a choice is split where its branches may agree."""
    choices = sorted(expr.atoms(Where), key=sympy.default_sort_key) if isinstance(expr, sympy.Basic) else []
    inner = [w for w in choices if not any(a.has(Where) for a in w.args)]
    if not inner:
        return prove(expr, ranges)
    condition = inner[0].args[0]
    yes, no = (_settle(expr.xreplace({w: w.args[k] for w in inner if w.args[0] == condition}), ranges) for k in (1, 2))
    pinned = _only_value(condition, ranges)
    if pinned is not None:
        yes = _settle(yes.xreplace(pinned), ranges) if isinstance(yes, sympy.Basic) else yes
    return yes if yes == no else where(condition, as_number(yes), as_number(no))


def _only_value(condition: Any, ranges: Ranges) -> dict[sympy.Symbol, sympy.Expr] | None:
    """{x: 0} if the condition is x < 1."""
    if isinstance(condition, sympy.StrictLessThan) and condition.args[0] in ranges and condition.args[1] == 1:
        return {condition.args[0]: sympy.S.Zero}
    return None


RULES: dict[str, Rule] = {"full": _full, "arange": _arange, "cumsum": _cumsum}
