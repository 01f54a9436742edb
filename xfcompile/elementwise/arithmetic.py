"""Rules of arithmetic: sums, products, whole divisions, bounds, and the functions that scores go through."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from xfcompile.elementwise.constants import as_boolean, fold, is_mask, literal, rounded
from xfcompile.elementwise.digits import holds, operating
from xfcompile.elementwise.elements import Elements, Rule
from xfcompile.elementwise.positions import Index
from xfcompile.elementwise.rows import row_statistic
from xfcompile.indexing import floordiv, mod, nonnegative
from xfcompile.order import orders
from xfcompile.score import Load
from xfcompile.site import Miss
from xfcompile.values import Value


def _add(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    if e.depends_on_dot(v) and any(is_mask(t) or t.atoms(Load) for x in (a, b) for t in sympy.Add.make_args(x)):
        e.masked_in.add(v.dtype)
    if v.dtype.is_floating_point:
        e.orders.update(orders(a, b, v.dtype))
    sign = -1 if v.op == "sub" else 1
    alpha = literal(v.args.get("alpha", 1))
    if v.dtype == torch.bool:  # true and true are true, not 2
        return sympy.Or(as_boolean(a), as_boolean(b)) if alpha == 1 else None
    return fold(lambda x, y: x + sign * alpha * y, a, b)


def _mul(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    if v.dtype == torch.bool:
        return sympy.And(as_boolean(a), as_boolean(b))
    if e.depends_on_dot(v) and any(x.is_infinite and x.is_number for x in (a, b)):
        _no("scores are multiplied by infinity", v)
    return fold(lambda x, y: x * y, a, b)


def _div(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    rounding = v.args.get("rounding_mode")
    if rounding is None and v.op == "div":
        return fold(lambda x, y: x / y if y != 0 else _no("division by zero", v), a, b)
    if not _divides(e, v, a, b):
        return None
    if rounding == "trunc" and not nonnegative(a, e.ranges):
        return None
    return floordiv(a, b, e.ranges)


def _mod(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    if not _divides(e, v, a, b):
        return None
    if v.op == "fmod" and not nonnegative(a, e.ranges):
        return None
    return mod(a, b, e.ranges)


def _divides(e: Elements, v: Value, a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a whole number is divided by one above 0, both of them what they are read as."""
    whole = a.is_integer and b.is_integer and b.is_positive
    return bool(whole) and not any(x in e.rounded for x in v.inputs()) and holds(operating(v), a, b)


def _no(reason: str, *culprits: object) -> Any:
    raise Miss(reason, *culprits)


def _extremum(e: Elements, v: Value, index: Index) -> Any:
    if "other" not in v.args:
        return row_statistic(e, v, index)
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    return (sympy.Max if v.op in ("maximum", "max") else sympy.Min)(a, b) if holds(v.dtype, a, b) else None


def _clamp(e: Elements, v: Value, index: Index) -> Any:
    x = e.numeric(v["self"], index, v.shape)
    for bound, f in (("min", sympy.Max), ("max", sympy.Min)):
        if v.args.get(bound) is not None:
            limit = e.numeric(v[bound], index, v.shape)
            if not holds(v.dtype, limit):
                return None
            x = f(x, rounded(limit, v.dtype))
    return x


def _pow(e: Elements, v: Value, index: Index) -> Any:
    exponent = v["exponent"]
    if isinstance(exponent, Value) or exponent not in (1, 2, 3):
        return None
    return _power(e, v, index, int(exponent))


def _square(e: Elements, v: Value, index: Index) -> Any:
    return _power(e, v, index, 2)


def _power(e: Elements, v: Value, index: Index, exponent: int) -> Any:
    """Of scores, or of positions alone in a dtype that has it."""
    x = e.numeric(v["self"], index, v.shape)
    positions = v.dtype == torch.int64 and x.is_integer
    return x**exponent if positions or e.depends_on_dot(v) else None


def _log(e: Elements, v: Value, index: Index) -> Any:
    """Of a mask of 0 and 1: -inf and 0."""
    x = e.numeric(v["self"], index, v.shape)
    if not is_mask(x) or any(a < 0 for a in x.args[1:]):
        return None
    return fold(lambda a: literal(math.log(a) if a else -math.inf), x)


def _unary(f: Callable[[sympy.Expr], Any]) -> Rule:
    def rule(e: Elements, v: Value, index: Index) -> Any:
        return fold(f, e.numeric(v["self"], index, v.shape))

    return rule


def _smooth(f: Callable[[sympy.Expr], Any]) -> Rule:
    """A function that is worth evaluating in a kernel only where the scores themselves go through it."""

    def rule(e: Elements, v: Value, index: Index) -> Any:
        if not e.depends_on_dot(v):
            return None
        return f(e.numeric(v["self"], index, v.shape))

    return rule


RULES: dict[str, Rule] = {
    "add": _add, "sub": _add, "mul": _mul, "div": _div, "floor_divide": _div, "mod": _mod, "fmod": _mod,
    "neg": _unary(lambda x: -x), "abs": _unary(sympy.Abs), "square": _square, "pow": _pow,
    "minimum": _extremum, "maximum": _extremum, "min": _extremum, "max": _extremum,
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp,
    "tanh": _smooth(sympy.tanh), "exp": _smooth(sympy.exp), "sigmoid": _smooth(lambda x: 1 / (1 + sympy.exp(-x))),
    "log": _log,
}  # fmt: skip
