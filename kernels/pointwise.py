"""From a formula of `xfcompile.activation` to lines of Triton: what it repeats is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import sympy

from xfcompile.kernels.attention.printer import ATOM, LOG2E, PRODUCT, UNARY, Printer, Term
from xfcompile.kernels.attention.template import HELPERS as OF_SCORES

HELPERS = {
    "tanh": OF_SCORES["tanh"],
    "erf": """\
@triton.jit
def erf(x, FAST: tl.constexpr):
    if FAST == 0:
        y = tl.erf(x)
    else:
        # Abramowitz & Stegun, 7.1.26, off by 1.5e-7 at most: enough for what is rounded to 16 bits.
        a = tl.abs(x)
        t = 1.0 / (1.0 + 0.3275911 * a)
        p = 1.061405429 * t - 1.453152027
        p = p * t + 1.421413741
        p = p * t - 0.284496736
        p = p * t + 0.254829592
        y = 1.0 - p * t * tl.exp2(-1.4426950408889634 * a * a)
        y = tl.where(x < 0.0, -y, y)
    return y
""",
    "softplus": """\
@triton.jit
def softplus(x):
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    small = e * (1.0 - e * (0.5 - e * (0.3333333333 - e * 0.25)))  # nothing would be left of it in 1 + e
    log1p = tl.where(e < 0.01, small, 0.6931471805599453 * tl.log2(1.0 + e))
    return tl.where(x < 0.0, 0.0, x) + log1p  # a NaN stays, which `maximum` would not let it
""",
    "expm1": """\
@triton.jit
def expm1(x):
    # Near 0 little would be left of exp(x) - 1; this polynomial is exact to 1 ulp there.
    p = 0.0013888889225 * x + 0.0083333337680
    p = p * x + 0.0416666666667
    p = p * x + 0.1666666666667
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.35, p * x * x + x, tl.exp2(1.4426950408889634 * x) - 1.0)
""",
}
"""Functions that the lines call. FAST is a compile-time argument: 0 is as exact as fp32 is, 1 as 16 bits are."""


class PointwisePrinter(Printer):
    """Prints formulas of numbers that are there, without any loads."""

    def __init__(self, names: Mapping[sympy.Symbol, str]) -> None:
        super().__init__((), names)

    def print(self, expr: sympy.Basic) -> Term:
        own = _OWN.get(type(expr).__name__)
        if own is not None and expr not in self.hoisted:
            return own(self, expr)
        return super().print(expr)

    def _sigmoid(self, expr: sympy.Basic) -> Term:
        exponent = self.float(-LOG2E * expr.args[0])
        return Term(f"1.0 / (1.0 + tl.exp2({exponent.text}))", "float", PRODUCT)

    def _exp(self, expr: sympy.Basic) -> Term:
        return Term(f"tl.exp2({self.float(LOG2E * expr.args[0]).text})", "float")

    def _helper(self, expr: sympy.Basic) -> Term:
        name = type(expr).__name__.lower()
        self.helpers.add(name)
        flag = ", FAST" if name == "erf" else ""
        return Term(f"{name}({self.float(expr.args[0]).text}{flag})", "float")


_OWN: dict[str, Callable[[PointwisePrinter, sympy.Basic], Term]] = {
    "Sigmoid": PointwisePrinter._sigmoid,
    "exp": PointwisePrinter._exp,
    "erf": PointwisePrinter._helper,
    "Softplus": PointwisePrinter._helper,
    "Expm1": PointwisePrinter._helper,
}


def lines(
    formulas: Mapping[str, sympy.Expr], names: Mapping[sympy.Symbol, str], stem: str = "y"
) -> tuple[list[str], set[str]]:
    """Statements that give each formula its name, and the names of the helpers that they call."""
    printer = PointwisePrinter(names)
    exact = {name: _as_numbers(f) for name, f in formulas.items()}
    text: list[str] = []
    for n, part in enumerate(repeated(exact.values())):
        term = printer.print(part)
        text.append(f"{stem}{n} = {term.text}")
        printer.hoisted[part] = Term(f"{stem}{n}", term.kind, ATOM)
    text += [f"{name} = {printer.float(f).text}" for name, f in exact.items()]
    return text, printer.helpers


def repeated(formulas: Iterable[sympy.Basic]) -> Sequence[sympy.Basic]:
    """The parts that occur more than once, each after what it is made of."""
    times: Counter[sympy.Basic] = Counter()
    order: dict[sympy.Basic, None] = {}

    def count(part: sympy.Basic) -> None:
        if not part.args or part.is_number:
            return
        times[part] += 1
        if times[part] > 1:
            return
        for arg in part.args:
            count(arg)
        if isinstance(part, sympy.Pow) and part.exp.is_Integer and abs(part.exp) > 1:
            count(part.base)  # printed as a product
        order[part] = None

    for formula in formulas:
        count(formula)
    return [part for part in order if times[part] > 1]


def _as_numbers(formula: sympy.Expr) -> sympy.Expr:
    """sqrt(pi) and the like as the numbers that they are."""
    return formula.replace(
        lambda x: x.is_number and isinstance(x, (sympy.Pow, sympy.Mul, sympy.Add, sympy.NumberSymbol)),
        lambda x: sympy.Float(x, 17),
    )


assert UNARY > PRODUCT  # a quotient is put in parentheses where it is divided or negated again
