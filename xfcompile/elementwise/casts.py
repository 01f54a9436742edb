"""The rule of casts: what of a formula is still true in another dtype, and what of a score overflows in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch

from xfcompile.elementwise.constants import as_boolean, as_number, fold, is_mask, rounded, where
from xfcompile.elementwise.elements import Elements, Rule
from xfcompile.elementwise.positions import Index
from xfcompile.magnitude import may_absorb
from xfcompile.score import J, Load, Where
from xfcompile.site import Miss
from xfcompile.values import Value


def _cast(e: Elements, v: Value, index: Index) -> Any:
    x = e.at(v["self"], index)
    if v.dtype == torch.bool:
        return None if e.told_apart(v["self"]) else as_boolean(x)
    x = as_number(x)
    if v.dtype.is_floating_point:
        if is_mask(x) or x.is_number:
            return fold(lambda y: rounded(y, v.dtype), x)
        if not e.depends_on_dot(v) or v.dtype.itemsize >= v["self"].dtype.itemsize:
            return x
        wider = {e.loads[n.operand] for n in _apart_from_positions(x)}
        if any(t.dtype.itemsize > v.dtype.itemsize and may_absorb(t) for t in wider):
            raise Miss("what is added to the scores may be infinite in the dtype that they are then cast to", v)
        return _overflown(x, v.dtype)
    return x if not v["self"].dtype.is_floating_point or (x.is_integer and v["self"] not in e.rounded) else None


def _apart_from_positions(x: sympy.Basic) -> Iterator[Load]:
    """The loads that a formula computes with other than as factors of a key's position, or of its distance: a number
    times those is another one for each key of a row, and no row has nothing else (ALiBi)."""
    if isinstance(x, sympy.Mul) and any(_is_place(factor) for factor in x.args):
        return
    if isinstance(x, Load):
        yield x
    elif not isinstance(x, sympy.logic.boolalg.Boolean):
        for arg in x.args[1:] if isinstance(x, Where) else x.args:
            yield from _apart_from_positions(arg)


def _is_place(x: sympy.Basic) -> bool:
    """Whether a number is one for each key, or for two that are equally far away."""
    inner = x.args[0] if isinstance(x, sympy.Abs) else x
    return (
        isinstance(inner, sympy.Expr)
        and not inner.atoms(Load)
        and inner.diff(J).is_nonzero
        and not inner.diff(J).has(J)
    )


def _overflown(x: sympy.Expr, dtype: torch.dtype, factor: sympy.Expr = sympy.S.One) -> sympy.Expr:
    """A score in a smaller dtype, where what it was masked by may be infinite: finfo(float32).min in fp16 is."""

    def branch(y: sympy.Expr) -> sympy.Expr:
        if not y.is_number:
            return _overflown(y, dtype, factor)
        return y * sympy.oo if y != 0 and rounded(y * factor, dtype).is_infinite else y

    if isinstance(x, Where):
        return where(x.args[0], branch(x.args[1]), branch(x.args[2]))
    if isinstance(x, sympy.Add):
        return x.func(*(_overflown(y, dtype, factor) for y in x.args))
    c, rest = x.as_coeff_Mul()
    return c * _overflown(rest, dtype, factor * c) if c != 1 else x


RULES: dict[str, Rule] = {"to": _cast}
