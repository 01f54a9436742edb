"""The vocabulary of gated MLPs: one sympy expression says what stands between two projections and their product.

It is a function of `GATE` and `UP`, one element of each projection (with its bias), as real numbers: kernels evaluate
it in fp32, and `sympy.diff` by either is what the backward needs. Functions have the derivatives that PyTorch gives
them where they have a kink, and none whose evaluation overflows on the way to a finite number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy

from xfcompile.elementwise import literal
from xfcompile.score import Where
from xfcompile.site import Miss

GATE, UP = sympy.symbols("gate up", real=True)


class Sigmoid(sympy.Function):
    """1 / (1 + exp(-x)). Its derivative is in terms of itself: that of the fraction is inf / inf for x < -88."""

    nargs = 1
    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"sigmoid({printer._print(self.args[0])})"


def real(x: float) -> sympy.Expr:
    """A constant of an activation."""
    return sympy.Float(x, 17)


def silu(x: sympy.Expr) -> sympy.Expr:
    return x * Sigmoid(x)


def gelu(x: sympy.Expr, approximate: str) -> sympy.Expr:
    if approximate == "tanh":
        return x * (1 + sympy.tanh(real(math.sqrt(2 / math.pi)) * (x + real(0.044715) * x**3))) * sympy.S.Half
    if approximate != "none":
        raise Miss(f"gelu(approximate={approximate!r})")
    return x * (1 + sympy.erf(x * real(math.sqrt(0.5)))) * sympy.S.Half


def clamp(x: sympy.Expr, low: Any, high: Any) -> sympy.Expr:
    """As torch.clamp: NaN stays, and the gradient at either bound is that of x."""
    low, high = (None if bound is None else literal(bound) for bound in (low, high))
    if low is not None and high is not None and not low <= high:
        raise Miss(f"clamp from {low} to {high}")
    if low is not None:
        x = Where(sympy.Lt(x, low), low, x)
    if high is not None:
        x = Where(sympy.Gt(x, high), high, x)
    return x


def relu(x: sympy.Expr) -> sympy.Expr:
    """NaN stays, and the gradient at 0 is 0."""
    return Where(sympy.Le(x, 0), sympy.S.Zero, x)


def leaky_relu(x: sympy.Expr, slope: float) -> sympy.Expr:
    return Where(sympy.Gt(x, 0), x, literal(slope) * x)


def hardtanh(x: sympy.Expr, low: Any, high: Any) -> sympy.Expr:
    """A clamp whose gradient at both bounds is 0."""
    low, high = literal(low), literal(high)
    if not low <= high:
        raise Miss(f"hardtanh from {low} to {high}")
    return Where(sympy.Ge(x, high), high, Where(sympy.Le(x, low), low, x))


FUNCTIONS: dict[str, Callable[[sympy.Expr, dict[str, Any]], sympy.Expr]] = {
    "silu": lambda x, _: silu(x),
    "gelu": lambda x, args: gelu(x, args["approximate"]),
    "sigmoid": lambda x, _: Sigmoid(x),
    "relu": lambda x, _: relu(x),
    "relu6": lambda x, _: hardtanh(x, 0, 6),
    "hardtanh": lambda x, args: hardtanh(x, args["min_val"], args["max_val"]),
    "leaky_relu": lambda x, args: leaky_relu(x, args["negative_slope"]),
    "tanh": lambda x, _: sympy.tanh(x),
    "erf": lambda x, _: sympy.erf(x),
    "exp": lambda x, _: sympy.exp(x),
    "neg": lambda x, _: -x,
    "abs": lambda x, _: sympy.Abs(x),
    "square": lambda x, _: x**2,
}
"""Functions of one tensor, by their canonical ATen names; arguments that are not spoken of have no meaning here."""


def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """a / b, where b is a number, or 1 + exp(x), which makes a sigmoid of it."""
    if b.is_number:
        if b == 0 or not b.is_finite:
            raise Miss(f"a gate is divided by {b}")
        return a / b
    inside = b - 1
    if isinstance(inside, sympy.exp):
        return a * Sigmoid(-inside.args[0])
    raise Miss("a gate is divided by what is no number")


def power(x: sympy.Expr, exponent: Any) -> sympy.Expr:
    """Whole powers, as products; the reciprocal where that is a sigmoid."""
    if exponent == -1:
        return quotient(sympy.S.One, x)
    if isinstance(exponent, bool) or exponent not in (1, 2, 3, 4):
        raise Miss(f"a gate to the power of {exponent}")
    return x ** int(exponent)
