"""The vocabulary of activations: one sympy expression says what becomes of an element of a projection.

It is a function of `GATE` and `UP`, one element of each projection of a gated MLP, or of `X`, one of a single one (with
its bias), as real numbers: kernels evaluate it in fp32, and `sympy.diff` is what the backward needs. Functions have the
derivatives that PyTorch gives them where they have a kink, and none whose evaluation overflows on the way to a finite
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy

from xfcompile.elementwise.constants import literal
from xfcompile.score import Where
from xfcompile.site import Miss

GATE, UP = sympy.symbols("gate up", real=True)

X = sympy.Symbol("x", real=True)
KEEP = sympy.Symbol("keep", real=True)
"""Of what is activated and dropped out: one element, and what dropout multiplies it by, 0 or 1 / (1 - p)."""

DOUT = sympy.Symbol("dout", real=True)
"""One element of the result's gradient."""


def vector(n: int) -> sympy.Symbol:
    """One element of the n-th vector along the last axis: a bias, or a scale of each channel."""
    return sympy.Symbol(f"v{n}", real=True)


def tensor(n: int) -> sympy.Symbol:
    """One element of the n-th tensor that is added to the result: a residual."""
    return sympy.Symbol(f"r{n}", real=True)


def separate(formula: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """A formula as a function of gate times one of up; None if it is no such product."""
    of_gate, of_up = sympy.sympify(formula).as_independent(UP, as_Add=False)
    return None if GATE in of_up.free_symbols else (of_gate, of_up)


LARGEST_NUMBER = 1e30
"""Beyond it products of a formula overflow in fp32 at other places than eager's do."""


def too_large(formula: sympy.Expr) -> bool:
    """Whether a number stands in it, written so or a product of such, with which fp32 overflows."""
    return any(not abs(x) <= LARGEST_NUMBER for x in formula.atoms(sympy.Number))


def chained(derivative: sympy.Expr) -> sympy.Expr:
    """`DOUT` times a derivative, and 0 where a kink's own derivative is 0, as PyTorch has it, even for a `DOUT` of inf:
    the square root of a relu has one at each element that is 0."""
    if isinstance(derivative, sympy.Add) and has_dead_branch(derivative):
        return sympy.Add(*map(chained, derivative.args))
    if isinstance(derivative, sympy.Mul):
        for n, factor in enumerate(derivative.args):
            if isinstance(factor, Where) and has_dead_branch(factor):
                condition, a, b = factor.args
                rest = sympy.Mul(*derivative.args[:n], *derivative.args[n + 1 :])
                return Where(condition, chained(a * rest), chained(b * rest))
    if isinstance(derivative, Where):
        condition, a, b = derivative.args
        return Where(condition, chained(a), chained(b))
    return DOUT * derivative


def has_dead_branch(formula: sympy.Expr) -> bool:
    """Whether part of a formula is 0 on one side of a kink."""
    return any(0 in where.args[1:] for where in formula.atoms(Where))


class Sigmoid(sympy.Function):
    """1 / (1 + exp(-x)). Its derivative is a function of itself: that of the fraction is inf / inf for x < -88."""

    nargs = 1
    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"sigmoid({printer._print(self.args[0])})"


class Softplus(sympy.Function):
    """log(1 + exp(x)), whose derivative, as sympy has it, is inf / inf for large x."""

    nargs = 1
    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return Sigmoid(self.args[0])

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"softplus({printer._print(self.args[0])})"


class Expm1(sympy.Function):
    """exp(x) - 1, of which little is left near 0 where exp(x) is rounded first."""

    nargs = 1
    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.exp(self.args[0])

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"expm1({printer._print(self.args[0])})"


class Ndtr(sympy.Function):
    """The normal distribution's cumulative function, (1 + erf(x / sqrt(2))) / 2, with digits left where x is low."""

    nargs = 1
    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return real(1 / math.sqrt(2 * math.pi)) * sympy.exp(-(self.args[0] ** 2) / 2)

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"ndtr({printer._print(self.args[0])})"


class Gelu(sympy.Function):
    """x Ndtr(x), whose derivative is computed as one function: its two terms have an exponential in common."""

    nargs = 1
    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return GeluSlope(self.args[0])

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"gelu({printer._print(self.args[0])})"


class GeluSlope(sympy.Function):
    """The derivative of `Gelu`: Ndtr(x) and x times the normal distribution's density."""

    nargs = 1
    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        x = self.args[0]
        return (2 - x**2) * Ndtr(x).fdiff()

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"gelu'({printer._print(self.args[0])})"


def with_distributions(formula: sympy.Expr) -> sympy.Expr:
    """A formula with `Ndtr` in the place of each 1 + erf(..), and `Gelu` where that is times what it is of; and with
    `Sigmoid` in the place of each 1 + tanh(..): they keep their digits where the sum would lose them."""

    def is_sum(x: sympy.Basic) -> bool:
        kinds = (sympy.erf, sympy.tanh)
        return isinstance(x, sympy.Add) and len(x.args) == 2 and x.args[0] == 1 and isinstance(x.args[1], kinds)

    def distribution(x: sympy.Basic) -> sympy.Expr:
        argument = x.args[1].args[0]
        if isinstance(x.args[1], sympy.tanh):
            return 2 * Sigmoid(2 * argument)
        coefficient, rest = (math.sqrt(2) * argument).as_coeff_Mul()
        return 2 * Ndtr(rest if abs(coefficient - 1) < 1e-15 else coefficient * rest)

    def gelus(x: sympy.Basic) -> sympy.Basic:
        for factor in x.args if isinstance(x, sympy.Mul) else ():
            if isinstance(factor, Ndtr) and factor.args[0] in x.args:
                others = [a for a in x.args if a not in (factor, factor.args[0])]
                return sympy.Mul(*others, Gelu(factor.args[0]))
        return x

    return formula.replace(is_sum, distribution).replace(lambda x: isinstance(x, sympy.Mul), gelus)


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


def elu(x: sympy.Expr, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> sympy.Expr:
    alpha, scale, input_scale = (literal(y) for y in (alpha, scale, input_scale))
    return Where(sympy.Gt(x, 0), scale * x, scale * alpha * Expm1(input_scale * x))


def selu(x: sympy.Expr) -> sympy.Expr:
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def celu(x: sympy.Expr, alpha: float) -> sympy.Expr:
    if alpha == 0:
        raise Miss("celu(alpha=0)")
    return elu(x, alpha, 1.0, 1.0 / alpha)


def hardsigmoid(x: sympy.Expr) -> sympy.Expr:
    """The gradients at -3 and 3 are 0; just inside they are not, though the result is rounded to 0 or 1 there."""
    return Where(sympy.Ge(x, 3), sympy.S.One, Where(sympy.Le(x, -3), sympy.S.Zero, x / 6 + sympy.S.Half))


def hardswish(x: sympy.Expr) -> sympy.Expr:
    """The gradients at -3 and 3 are 0 and 1."""
    return Where(sympy.Ge(x, 3), x, Where(sympy.Le(x, -3), sympy.S.Zero, x * (x + 3) / 6))


def mish(x: sympy.Expr) -> sympy.Expr:
    return x * sympy.tanh(Softplus(x))


def softplus(x: sympy.Expr, beta: float, threshold: float) -> sympy.Expr:
    """Beyond the threshold PyTorch gives x itself: the difference is nothing in fp32 where that is 16 or more."""
    if beta == 0 or threshold < 16:
        raise Miss(f"softplus(beta={beta}, threshold={threshold})")
    return Softplus(literal(beta) * x) / literal(beta)


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
"""Functions of one tensor that gates are made of, by their canonical ATen names; arguments that are not spoken of have
no meaning here."""

ALL: dict[str, Callable[[sympy.Expr, dict[str, Any]], sympy.Expr]] = {
    **FUNCTIONS,
    "elu": lambda x, args: elu(x, args["alpha"], args["scale"], args["input_scale"]),
    "selu": lambda x, _: selu(x),
    "celu": lambda x, args: celu(x, args["alpha"]),
    "hardsigmoid": lambda x, _: hardsigmoid(x),
    "hardswish": lambda x, _: hardswish(x),
    "mish": lambda x, _: mish(x),
    "softplus": lambda x, args: softplus(x, args["beta"], args["threshold"]),
}
"""All functions of one tensor."""


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
    if exponent not in (1, 2, 3, 4):
        raise Miss(f"a gate to the power of {exponent}")
    return x ** int(exponent)
