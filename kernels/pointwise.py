"""From a formula of `xfcompile.activation` to lines of Triton: what it repeats is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import sympy

from xfcompile.activation import Sigmoid
from xfcompile.kernels.printing.arithmetic import LOG2E
from xfcompile.kernels.printing.printer import Printer
from xfcompile.kernels.printing.rules import RULES
from xfcompile.kernels.printing.term import ATOM, Term

HELPERS = {
    "reciprocal": """\
@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST == 2:  # one instruction; what is not a normal number counts as 0
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y
""",
    "exp2": """\
@triton.jit
def exp2(x, FAST: tl.constexpr):
    if FAST == 2:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.exp2(x)
    return y
""",
    "sigmoid": """\
@triton.jit
def sigmoid(e, FAST: tl.constexpr):
    # e = -log2(e) x
    return reciprocal(1.0 + exp2(e, FAST), FAST)
""",
    "complement": """\
@triton.jit
def complement(y, e, FAST: tl.constexpr):
    # 1 - y, of a sigmoid y of the same e; near 0 little is left of the difference in fp32.
    if FAST == 0:
        z = sigmoid(-e, FAST)
    else:
        z = 1.0 - y
    return z
""",
    "tanh": """\
@triton.jit
def tanh(x, x_log2, FAST: tl.constexpr):
    # x_log2 = 2 log2(e) x
    y = 1.0 - 2.0 * reciprocal(exp2(x_log2, FAST) + 1.0, FAST)
    if FAST == 0:
        # Near 0 that is off by 2e-7, which is much for a small y; this polynomial is exact to 2 ulp there.
        x2 = x * x
        p = -0.006094488908823051 * x2 + 0.02098278814222448
        p = p * x2 - 0.05384295941056172
        p = p * x2 + 0.13332642858993402
        p = p * x2 - 0.33333324155150773
        y = tl.where(tl.abs(x) < 0.625, p * x2 * x + x, y)
    return y
""",
    "erf": """\
@triton.jit
def erf(x, FAST: tl.constexpr):
    if FAST == 0:
        y = tl.erf(x)
    else:
        # Abramowitz & Stegun, 7.1.26, off by 1.5e-7 at most: enough for what is rounded to 16 bits.
        t = reciprocal(0.3275911 * tl.abs(x) + 1.0, FAST)
        p = 1.061405429 * t - 1.453152027
        p = p * t + 1.421413741
        p = p * t - 0.284496736
        p = p * t + 0.254829592
        # The exponential as the derivative has it, so that it is computed once.
        y = 1.0 - p * t * exp2(-1.4426950408889634 * (x * x), FAST)
        y = tl.where(x < 0.0, -y, y)
    return y
""",
    "ndtr": """\
@triton.jit
def ndtr(x, FAST: tl.constexpr):
    if FAST == 0:
        y = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)
    else:
        # The logarithm of the lower half, by a polynomial that falls all the way (examples/fit_gelu.py): of 1 it is off
        # by 2e-7, and of the lower half by 2**-14 of it down to x = -5.6, where fp16 ends.
        a = tl.abs(x)
        p = -7.915148909076741e-07 * a + 1.3858657064408364e-05
        p = p * a - 6.209842164983659e-05
        p = p * a - 0.00043539643540855405
        p = p * a + 0.007438815621307091
        p = p * a - 0.052736491005135396
        p = p * a - 0.45913843864227516
        p = p * a - 1.1511118521807433
        q = exp2(p * a - 1.0, FAST)
        y = tl.where(x < 0.0, q, 1.0 - q)
    return y
""",
    "gelu": """\
@triton.jit
def gelu(x, FAST: tl.constexpr):
    return x * ndtr(x, FAST)
""",
    "gelu_slope": """\
@triton.jit
def gelu_slope(x, FAST: tl.constexpr):
    e = exp2(-0.7213475204444818 * (x * x), FAST)
    if FAST == 0:
        y = ndtr(x, FAST) + 0.3989422804014327 * x * e
    else:
        # Of the lower half, what the density is multiplied by, but for sqrt(2 pi): off by 2e-7 then
        # (examples/fit_gelu.py).
        a = tl.abs(x)
        t = reciprocal(0.38 * a + 1.0, FAST)
        p = -0.1518262485757924 * t + 0.6183339474014294
        p = p * t - 0.2672124560339499
        p = p * t + 0.340845336317096
        p = p * t - 0.04014045199463433
        q = (p - 0.3973173228017339 * a) * e
        y = tl.where(x < 0.0, q, 1.0 - q)
    return y
""",
    "softplus": """\
@triton.jit
def softplus(x, FAST: tl.constexpr):
    e = exp2(-1.4426950408889634 * tl.abs(x), FAST)
    small = e * (1.0 - e * (0.5 - e * (0.3333333333 - e * 0.25)))  # nothing would be left of it in 1 + e
    log1p = tl.where(e < 0.01, small, 0.6931471805599453 * tl.log2(1.0 + e))
    return tl.where(x < 0.0, 0.0, x) + log1p  # a NaN stays, which `maximum` would not let it
""",
    "expm1": """\
@triton.jit
def expm1(x, FAST: tl.constexpr):
    # Near 0 little would be left of exp(x) - 1; this polynomial is exact to 1 ulp there.
    p = 0.0013888889225 * x + 0.0083333337680
    p = p * x + 0.0416666666667
    p = p * x + 0.1666666666667
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.35, p * x * x + x, exp2(1.4426950408889634 * x, FAST) - 1.0)
""",
}
"""Functions that the lines call, each after those that it calls. FAST is a compile-time argument: 0 is as exact as fp32
is, 1 as 16 bits are; 2 is the same with NVIDIA's instructions."""

_CALLS = {
    "sigmoid": {"reciprocal", "exp2"},
    "complement": {"sigmoid", "reciprocal", "exp2"},
    "tanh": {"reciprocal", "exp2"},
    "erf": {"reciprocal", "exp2"},
    "gelu": {"ndtr", "exp2"},
    "gelu_slope": {"ndtr", "reciprocal", "exp2"},
}


def functions(names: Iterable[str]) -> list[str]:
    """The texts of helpers, and of those that they call."""
    needed = set(names)
    for name in names:
        needed |= _CALLS.get(name, {"exp2"} - {name})
    return [text for name, text in HELPERS.items() if name in needed]


class PointwisePrinter(Printer):
    """Prints formulas of numbers that are there, without any loads. exponents: names of those of sigmoids."""

    def __init__(self, names: Mapping[sympy.Symbol, str]) -> None:
        super().__init__(RULES, (), names)
        self.exponents: dict[sympy.Basic, str] = {}

    def print(self, expr: sympy.Basic) -> Term:
        own = _OWN.get(type(expr).__name__)
        if own is not None and expr not in self.hoisted:
            return own(self, expr)
        return super().print(expr)

    def _sigmoid(self, expr: sympy.Basic) -> Term:
        self.helpers.add("sigmoid")
        return Term(f"sigmoid({self._exponent(expr)}, FAST)", "float")

    def _exponent(self, sigmoid: sympy.Basic) -> str:
        return self.exponents.get(sigmoid) or self.float(_scaled(-LOG2E, sigmoid.args[0])).text

    def _sum(self, expr: sympy.Basic) -> Term:
        sigmoid = 1 - expr
        if not isinstance(sigmoid, Sigmoid):
            return super().print(expr)
        self.helpers.add("complement")
        return Term(f"complement({self.float(sigmoid).text}, {self._exponent(sigmoid)}, FAST)", "float")

    def _exp(self, expr: sympy.Basic) -> Term:
        self.helpers.add("exp2")
        return Term(f"exp2({self.float(LOG2E * expr.args[0]).text}, FAST)", "float")

    def _helper(self, expr: sympy.Basic) -> Term:
        name = _HELPER_OF.get(type(expr).__name__, type(expr).__name__.lower())
        self.helpers.add(name)
        return Term(f"{name}({self.float(expr.args[0]).text}, FAST)", "float")


_HELPER_OF = {"GeluSlope": "gelu_slope"}

_OWN: dict[str, Callable[[PointwisePrinter, sympy.Basic], Term]] = {
    "Sigmoid": PointwisePrinter._sigmoid,
    "Add": PointwisePrinter._sum,
    "exp": PointwisePrinter._exp,
    "erf": PointwisePrinter._helper,
    "Ndtr": PointwisePrinter._helper,
    "Gelu": PointwisePrinter._helper,
    "GeluSlope": PointwisePrinter._helper,
    "Softplus": PointwisePrinter._helper,
    "Expm1": PointwisePrinter._helper,
}


def _scaled(factor: sympy.Expr, x: sympy.Expr) -> sympy.Expr:
    """A negative number times x; of a polynomial in one symbol it takes no product of its own."""
    symbols = x.free_symbols
    if len(symbols) == 1 and x.is_polynomial(*symbols) and not x.as_coeff_Mul()[1].is_Symbol:
        # The sign last: a product that is negated before a number is taken from it is none that is added to one.
        return -sympy.horner(sympy.expand(-factor * x))
    return factor * x


def lines(
    formulas: Mapping[str, sympy.Expr], names: Mapping[sympy.Symbol, str], stem: str = "y"
) -> tuple[list[str], set[str]]:
    """Statements that give each formula its name, and the names of the helpers that they call."""
    printer = PointwisePrinter(names)
    exact = {name: _as_numbers(f) for name, f in formulas.items()}
    text: list[str] = []
    for n, part in enumerate(repeated(exact.values())):
        if isinstance(part, Sigmoid) and any(f.has(1 - part) for f in exact.values()):
            text.append(f"e{n} = {printer._exponent(part)}")
            printer.exponents[part] = f"e{n}"
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
