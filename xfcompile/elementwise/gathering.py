"""Rules of tensors that are indexed by tensors of positions."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from xfcompile.elementwise.elements import Elements, Rule
from xfcompile.elementwise.positions import Index
from xfcompile.indexing import nonnegative
from xfcompile.values import Value


def _index(e: Elements, v: Value, index: Index) -> Any:
    """Advanced indexing by integer tensors in the leading dimensions, broadcast together."""
    x, tensors = v["self"], list(v["indices"])
    tensors += [None] * (x.ndim - len(tensors))
    used = [k for k, t in enumerate(tensors) if t is not None]
    if any(tensors[k].dtype == torch.bool for k in used) or used != list(range(used[0], used[-1] + 1)):
        return None
    width = max(tensors[k].ndim for k in used)
    front = used[0]
    shape = v.shape[front : front + width]
    at = index[front : front + width]
    found = [_wrapped(e.arg(tensors[k], at, shape), x.shape[k], e) for k in used]
    if any(f is None for f in found):
        return None
    return e.at(x, (*index[:front], *found, *index[front + width :]))


def _index_select(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"] % v.ndim
    position = _wrapped(e.at(v["index"], (index[d],)), v["self"].shape[d], e) if v["index"].ndim == 1 else None
    return None if position is None else e.at(v["self"], (*index[:d], position, *index[d + 1 :]))


def _wrapped(position: Any, size: Any, e: Elements) -> Any:
    """A gathered position, negative ones counted from the end; None if its sign is not known."""
    if isinstance(position, sympy.Expr) and nonnegative(position, e.ranges):
        return position
    if isinstance(position, sympy.Expr) and nonnegative(-position - 1, e.ranges):
        return position + size
    return None


RULES: dict[str, Rule] = {"index": _index, "index_select": _index_select}
