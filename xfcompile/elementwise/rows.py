"""Numbers that are the same for a whole row of scores: softmax does not see what is added to all of a row."""

from __future__ import annotations

from typing import Any

import sympy

from xfcompile.elementwise.elements import Elements, Rule
from xfcompile.elementwise.positions import Index
from xfcompile.score import J
from xfcompile.values import Value

ROW = sympy.Symbol("row", real=True)
"""A number that is the same for a whole row of scores; softmax does not see it."""


def row_statistic(e: Elements, v: Value, index: Index) -> Any:
    """A maximum over the keys of something made of scores: it shifts the row, and softmax does not see shifts."""
    if not e.depends_on_dot(v) or v.args.get("item", 0) != 0:
        return None
    dims = v.args.get("dim", ())
    dims = dims if isinstance(dims, tuple) else (dims,)
    x = v["self"]
    if len(dims) != 1 or v.op not in ("amax", "max"):
        return None
    d = dims[0] % x.ndim
    kept = index if v.args.get("keepdim") else (*index[:d], sympy.S.Zero, *index[d:])
    if any(J in k.free_symbols for k in kept) or x.shape[d] != e.key_axis_size:
        return None
    e.maxima.append(e.numeric(x, (*kept[:d], J, *kept[d + 1 :]), x.shape))  # it must be made of these very scores
    return ROW


def takes_off(score: sympy.Expr, scores: sympy.Expr) -> bool:
    """Whether a score is a multiple of others less their very maximum: 0 at most, and 0 for some key of each row."""
    times = score.coeff(ROW) / (scores.coeff(ROW) - 1) if scores.coeff(ROW) != 1 else sympy.S.Zero
    return bool(times.is_positive) and sympy.expand_mul(score - times * (scores - ROW)) == 0


def _detach(e: Elements, v: Value, index: Index) -> Any:
    """Of what depends on the scores, only a shift of the row may be detached: softmax gives it no gradient anyway."""
    if not e.depends_on_dot(v):
        return None
    x = e.at(v["self"], index)
    return x if x.free_symbols == {ROW} else None


RULES: dict[str, Rule] = {"amax": row_statistic, "detach": _detach}
