"""Rules of numbers and of what is calculated with them."""

from __future__ import annotations

import math
from dataclasses import replace

import sympy

from xfcompile.evaluate import Unsupported
from xfcompile.kernels.printing.extent import extent
from xfcompile.kernels.printing.printer import Printer, Rule
from xfcompile.kernels.printing.term import ATOM, PRODUCT, SUM, UNARY, Term
from xfcompile.score import ROUNDED, J, Where
from xfcompile.sums import summands

LOG2E = sympy.Float(math.log2(math.e), 17)

# A product of an index with a larger number may not fit in 32 bits: indices are below 2**31 / 256 in any real tensor.
WIDE = 256


def _integer(p: Printer, expr: sympy.Integer) -> Term:
    value = int(expr)
    return Term(str(value), "int", ATOM if value >= 0 else UNARY, literal=True)


def _real(p: Printer, expr: sympy.Basic) -> Term:
    value = float(expr)
    return Term(repr(value), "float", ATOM if value >= 0 else UNARY, literal=True)


def _infinity(p: Printer, expr: sympy.Basic) -> Term:
    return Term('float("inf")' if expr == sympy.oo else 'float("-inf")', "float", literal=True)


def _nan(p: Printer, expr: sympy.Basic) -> Term:
    return Term('float("nan")', "float", literal=True)


def _add(p: Printer, expr: sympy.Add, real: bool = False) -> Term:
    # Positive terms first, so that the text starts without a sign; numbers last, as one writes them.
    args = sorted(summands(expr), key=lambda a: (_is_negative(a), a.is_number))
    signs = ["-" if _is_negative(a) else "+" for a in args]
    terms, kind = p.alike([-a if sign == "-" else a for a, sign in zip(args, signs, strict=True)], real)
    text = ("-" if signs[0] == "-" else "") + terms[0].at(PRODUCT if signs[0] == "+" else UNARY)
    for sign, term in zip(signs[1:], terms[1:], strict=True):
        text += f" {sign} {term.at(PRODUCT)}"
    return Term(text, kind, SUM)


def _mul(p: Printer, expr: sympy.Mul) -> Term:
    coefficient, rest = expr.as_coeff_Mul()
    if coefficient == -1:
        term = p.number(rest)
        return Term(f"-{term.at(UNARY)}", term.kind, UNARY)
    # Scalars first, then rows, then columns: few products are as large as the tile.
    factors = sorted(expr.args, key=lambda a: (len(extent(a)), J in extent(a)))
    numerator = [a for a in factors if not _is_reciprocal(a)]
    denominator = [1 / a for a in factors if _is_reciprocal(a)]
    terms, kind = p.alike(numerator) if numerator else ([Term("1.0", "float", literal=True)], "float")
    fraction = any(a.is_Rational and not a.is_Integer for a in numerator)
    if denominator or fraction:
        terms, kind = [t.as_float() for t in terms], "float"
    if kind == "int" and (len([t for t in terms if not t.literal]) > 1 or _is_wide(coefficient)):
        first = next(k for k, t in enumerate(terms) if not t.literal)
        terms[first] = replace(terms[first], text=f"tl.cast({terms[first].text}, tl.int64)", precedence=ATOM)
    text = " * ".join(t.at(PRODUCT if k == 0 else UNARY) for k, t in enumerate(terms))
    if len(denominator) == 1:
        text += f" / {p.float(denominator[0]).at(UNARY)}"
    elif denominator:
        text += f" / ({' * '.join(p.float(d).at(UNARY) for d in denominator)})"
    return Term(text, kind, PRODUCT)


def _pow(p: Printer, expr: sympy.Pow) -> Term:
    base, exponent = expr.args
    if exponent == sympy.S.Half:
        return Term(f"tl.sqrt({p.float(base).text})", "float")
    if exponent == -sympy.S.Half:
        return Term(f"1.0 / tl.sqrt({p.float(base).text})", "float", PRODUCT)
    if exponent.is_Integer and -4 <= int(exponent) <= 4:
        return _small_power(p, base, int(exponent))
    if base == 2:
        return Term(f"tl.exp2({p.float(exponent).text})", "float")
    if not base.is_positive:
        raise Unsupported(f"{expr}: a power whose base may be negative")
    return Term(f"tl.exp2({p.float(exponent).at(PRODUCT)} * tl.log2({p.float(base).text}))", "float")


def _small_power(p: Printer, base: sympy.Expr, exponent: int) -> Term:
    term = p.float(base) if exponent < 0 else p.number(base)
    if term.kind == "int" and not term.literal:
        term = Term(f"tl.cast({term.text}, tl.int64)", "int")
    text = " * ".join([term.at(UNARY)] * abs(exponent))
    if exponent > 0:
        return Term(text, term.kind, PRODUCT)
    return Term(f"1.0 / {text}" if exponent == -1 else f"1.0 / ({text})", "float", PRODUCT)


def _extremum(p: Printer, function: str, expr: sympy.Basic, real: bool = False) -> Term:
    terms, kind = p.alike(expr.args, real)
    # NaN must come out of whatever it goes into, as in PyTorch.
    option = ", propagate_nan=tl.PropagateNan.ALL" if kind == "float" else ""
    text = terms[0].text
    for term in terms[1:]:
        text = f"tl.{function}({text}, {term.text}{option})"
    return Term(text, kind)


def _min(p: Printer, expr: sympy.Basic) -> Term:
    return _extremum(p, "minimum", expr)


def _max(p: Printer, expr: sympy.Basic) -> Term:
    return _extremum(p, "maximum", expr)


def _abs(p: Printer, expr: sympy.Abs) -> Term:
    term = p.number(expr.args[0])
    return Term(f"tl.abs({term.text})", term.kind)


def _sign(p: Printer, expr: sympy.Basic) -> Term:
    x = expr.args[0]
    return p.print(Where(x > 0, sympy.S.One, Where(x < 0, sympy.S.NegativeOne, sympy.S.Zero)))


def _tanh(p: Printer, expr: sympy.Basic) -> Term:
    p.helpers.add("tanh")
    x = expr.args[0]
    return Term(f"tanh({p.float(x).text}, {p.float(2 * LOG2E * x).text}, FAST)", "float")


def _rounded(p: Printer, expr: sympy.Basic) -> Term:
    term = p.float(expr.args[0])
    dtype = ROUNDED[int(expr.args[1])]
    if dtype == "bfloat16":
        p.helpers.add("rounded_to_bfloat16")
        return Term(f"rounded_to_bfloat16({term.text})", "float")
    return Term(f"tl.cast(tl.cast({term.text}, tl.float16), tl.float32)", "float") if dtype == "float16" else term


def _true_div(p: Printer, expr: sympy.Basic) -> Term:
    a, b = (p.float(x) for x in expr.args)
    return Term(f"{a.at(PRODUCT)} / {b.at(UNARY)}", "float", PRODUCT)


def _as_float(p: Printer, expr: sympy.Basic) -> Term:
    return p.float(expr.args[0])


def _identity(p: Printer, expr: sympy.Basic) -> Term:
    return p.print(expr.args[0])


def _is_reciprocal(expr: sympy.Basic) -> bool:
    return isinstance(expr, sympy.Pow) and bool(expr.exp.is_Integer) and int(expr.exp) < 0


def _is_negative(expr: sympy.Basic) -> bool:
    return bool(expr.as_coeff_Mul()[0].is_negative)


def _is_wide(coefficient: sympy.Expr) -> bool:
    return bool(coefficient.is_Integer) and abs(int(coefficient)) > WIDE


def _function(name: str) -> Rule:
    return lambda p, expr: Term(f"{name}({p.float(expr.args[0]).text})", "float")


BY_TYPE: tuple[tuple[type, Rule], ...] = (
    (sympy.Integer, _integer),  # each is a Rational too
    (sympy.Rational, _real),
    (sympy.Float, _real),
    (sympy.NumberSymbol, _real),
    (sympy.core.numbers.Infinity, _infinity),
    (sympy.core.numbers.NegativeInfinity, _infinity),
    (sympy.core.numbers.NaN, _nan),
    (sympy.Add, _add),
    (sympy.Mul, _mul),
    (sympy.Pow, _pow),
)

BY_NAME: dict[str, Rule] = {
    "Min": _min,
    "Max": _max,
    "Abs": _abs,
    "tanh": _tanh,
    "exp": _function("tl.exp"),
    "log": _function("tl.log"),
    "erf": _function("tl.erf"),
    "OpaqueUnaryFn_sqrt": _function("tl.sqrt"),  # math.sqrt of a size
    "sin": _function("tl.sin"),
    "cos": _function("tl.cos"),
    "sign": _sign,
    "Rounded": _rounded,
    "IntTrueDiv": _true_div,
    "FloatTrueDiv": _true_div,
    "PowByNatural": _pow,
    "FloatPow": _pow,
    "ToFloat": _as_float,
    "Identity": _identity,
}

AS_REAL: dict[str, Rule] = {
    "Add": lambda p, expr: _add(p, expr, real=True),
    "Abs": lambda p, expr: Term(f"tl.abs({p.float(expr.args[0]).text})", "float"),
    "Min": lambda p, expr: _extremum(p, "minimum", expr, real=True),
    "Max": lambda p, expr: _extremum(p, "maximum", expr, real=True),
}
