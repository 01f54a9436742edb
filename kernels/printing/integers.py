"""Rules of whole numbers.

Python's division rounds down and its remainder has the divisor's sign; Triton's do neither.
"""

from __future__ import annotations

import sympy

from xfcompile.evaluate import Unsupported
from xfcompile.kernels.printing.printer import Printer, Rule
from xfcompile.kernels.printing.term import PRODUCT, UNARY, Term


def _floor_div(p: Printer, expr: sympy.Basic) -> Term:
    a, b = expr.args
    terms, kind = p.alike((a, b))
    if kind == "float":
        return Term(f"tl.floor({terms[0].at(PRODUCT)} / {terms[1].at(UNARY)})", "float")
    if a.is_nonnegative and b.is_positive:
        return Term(f"{terms[0].at(PRODUCT)} // {terms[1].at(UNARY)}", "int", PRODUCT)
    p.helpers.add("floor_div")
    return Term(f"floor_div({terms[0].text}, {terms[1].text})", "int")


def _remainder(p: Printer, expr: sympy.Basic) -> Term:
    a, b = expr.args
    terms, kind = p.alike((a, b))
    if kind == "float":
        raise Unsupported(f"{expr}: the remainder of real numbers")
    if a.is_nonnegative and b.is_positive:
        return Term(f"{terms[0].at(PRODUCT)} % {terms[1].at(UNARY)}", "int", PRODUCT)
    p.helpers.add("remainder")
    return Term(f"remainder({terms[0].text}, {terms[1].text})", "int")


def _modular_indexing(p: Printer, expr: sympy.Basic) -> Term:
    a, divisor, modulus = expr.args
    quotient = _floor_div(p, sympy.Basic(a, divisor)) if divisor != 1 else p.print(a)
    if quotient.kind != "int":
        raise Unsupported(f"{expr}: the remainder of real numbers")
    p.helpers.add("remainder")
    return Term(f"remainder({quotient.text}, {p.print(modulus).text})", "int")


def _floor(p: Printer, expr: sympy.Basic) -> Term:
    # floor(j/3) in fp32 is wrong where rounding crosses an integer: divide as integers instead.
    a, b = sympy.fraction(sympy.together(expr.args[0]))
    if p.alike((a, b))[1] == "int":
        return _floor_div(p, sympy.Basic(a, b))
    return Term(f"tl.cast(tl.floor({p.float(expr.args[0]).text}), tl.int32)", "int")


def _ceiling(p: Printer, expr: sympy.Basic) -> Term:
    return Term(f"-{_floor(p, sympy.Basic(-expr.args[0])).at(UNARY)}", "int", UNARY)


def _truncate(p: Printer, expr: sympy.Basic) -> Term:
    term = p.print(expr.args[0])
    return term if term.kind == "int" else Term(f"tl.cast({term.text}, tl.int32)", "int")


BY_NAME: dict[str, Rule] = {
    "floor": _floor,
    "ceiling": _ceiling,
    "FloorDiv": _floor_div,
    "CleanDiv": _floor_div,
    "Mod": _remainder,
    "PythonMod": _remainder,
    "ModularIndexing": _modular_indexing,
    "FloorToInt": _floor,
    "CeilToInt": _ceiling,
    "TruncToInt": _truncate,
}
