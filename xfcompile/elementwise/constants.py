"""Constants of a program as formulas have them: numbers, booleans, and masks, which are choices between numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from xfcompile.score import Where
from xfcompile.site import Miss


def is_mask(expr: Any) -> bool:
    """A choice between constants."""
    return isinstance(expr, Where) and all(x.is_number for x in expr.args[1:])


def literal(x: Any) -> Any:
    """A number of the program as sympy sees it; exact where it is a small integer."""
    if isinstance(x, bool):
        return sympy.true if x else sympy.false
    if isinstance(x, float):
        if math.isinf(x):
            return sympy.oo if x > 0 else -sympy.oo
        if math.isnan(x):
            raise Miss("a NaN constant in the score")
        return sympy.Integer(int(x)) if x.is_integer() and abs(x) < 2**24 else sympy.Float(x, 17)
    return sympy.sympify(x)


def as_number(x: Any) -> sympy.Expr:
    """A boolean as 0 or 1."""
    if x == sympy.true:
        return sympy.S.One
    if x == sympy.false:
        return sympy.S.Zero
    if isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol):
        return where(x, sympy.S.One, sympy.S.Zero)
    return x


def rounded(x: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """A number as a tensor of that dtype holds it: finfo(float32).min in bf16 is -inf, and -1 in uint8 is 255."""
    if x.is_Integer and not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool):
        info = torch.iinfo(dtype)
        return (x - info.min) % (info.max - info.min + 1) + info.min
    if not x.is_number or not dtype.is_floating_point or x in (sympy.oo, -sympy.oo):
        return x
    return literal(torch.tensor(float(x), dtype=torch.float64).to(dtype).item())


def as_boolean(x: Any) -> Any:
    """A number as "is not zero"."""
    if isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol):
        return x
    return fold(lambda y: sympy.Ne(y, 0), x)


def where(condition: Any, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """`Where`, with the branches simplified by what the condition says."""
    if isinstance(condition, sympy.Not):
        condition, a, b = condition.args[0], b, a
    if isinstance(a, Where) and a.args[0] == condition:
        a = a.args[1]
    if isinstance(b, Where) and b.args[0] == condition:
        b = b.args[2]
    return Where(condition, a, b)


def fold(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args), taken into a choice between constants: f(where(c, 1, 0)) is where(c, f(1), f(0))."""
    choices = [x for x in args if isinstance(x, Where)]
    if choices and all(is_mask(x) or x.is_number for x in args) and len({x.args[0] for x in choices}) == 1:
        condition = choices[0].args[0]
        yes = f(*(x.args[1] if isinstance(x, Where) else x for x in args))
        no = f(*(x.args[2] if isinstance(x, Where) else x for x in args))
        if isinstance(yes, sympy.logic.boolalg.Boolean):
            if yes == no:
                return yes
            return condition if yes == sympy.true else sympy.Not(condition)
        if sympy.nan in (yes, no):
            raise Miss("a mask is made by arithmetic that gives NaN")
        return where(condition, yes, no)
    return f(*args)
