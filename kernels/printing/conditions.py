"""Rules of conditions, and of choices by them."""

from __future__ import annotations

import sympy

from xfcompile.kernels.printing.extent import extent
from xfcompile.kernels.printing.printer import Printer, Rule
from xfcompile.kernels.printing.term import AND, COMPARE, OR, UNARY, Kind, Term
from xfcompile.score import Load, Where

RELATIONS = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.Lt: "<",
    sympy.Le: "<=",
    sympy.Gt: ">",
    sympy.Ge: ">=",
}


def _truth(p: Printer, expr: sympy.Basic) -> Term:
    return Term("True" if expr == sympy.true else "False", "bool", literal=True)


def _relation(p: Printer, expr: sympy.Basic) -> Term:
    left, right = expr.args
    boolean = _boolean_comparison(p, expr)
    if boolean is not None:
        return boolean
    (a, b), kind = p.alike((left, right))
    text = f"{a.at(OR)} {RELATIONS[type(expr)]} {b.at(OR)}"
    if kind == "float" and not extent(expr):
        # Triton's interpreter takes a comparison of two real numbers for a real number where it makes a tile of it.
        text = f"tl.cast({text}, tl.int32) != 0"
    return Term(text, "bool", COMPARE)


def _boolean_comparison(p: Printer, expr: sympy.Basic) -> Term | None:
    """`t != 0` of a boolean operand is `t` itp."""
    load, number = expr.args if isinstance(expr.args[0], Load) else reversed(expr.args)
    if not isinstance(load, Load) or number not in (0, 1) or not isinstance(expr, (sympy.Eq, sympy.Ne)):
        return None
    term = p.print(load)
    if term.kind != "bool":
        return None
    holds = isinstance(expr, sympy.Eq) == (number == 1)
    return term if holds else Term(f"~{term.at(UNARY)}", "bool", UNARY)


def _junction(p: Printer, expr: sympy.Basic, operator: str, precedence: int) -> Term:
    # A load in one argument is looked at only where the others, as far as they load nothing, have not decided.
    free = [a for a in expr.args if not a.has(Load)]
    guards = [a if operator == "&" else sympy.Not(a) for a in free]
    texts = []
    for arg in sorted(expr.args, key=lambda a: a.has(Load)):
        with p.under(*(guards if arg.has(Load) else ())):
            texts.append(p.print(arg).at(precedence))
    return Term(f" {operator} ".join(texts), "bool", precedence)


def _and(p: Printer, expr: sympy.Basic) -> Term:
    return _junction(p, expr, "&", AND)


def _or(p: Printer, expr: sympy.Basic) -> Term:
    return _junction(p, expr, "|", OR)


def _not(p: Printer, expr: sympy.Basic) -> Term:
    return Term(f"~{p.print(expr.args[0]).at(UNARY)}", "bool", UNARY)


def _xor(p: Printer, expr: sympy.Basic) -> Term:
    return Term(" ^ ".join(p.print(a).at(UNARY) for a in expr.args), "bool", OR)


def _where(p: Printer, expr: sympy.Basic) -> Term:
    condition, a, b = expr.args
    test = p.print(condition)
    with p.under(condition):
        left = p.print(a)
    with p.under(sympy.Not(condition)):
        right = p.print(b)
    left, right = left.as_number(), right.as_number()
    kind: Kind = "int" if left.kind == right.kind == "int" else "float"
    if kind == "float":
        left, right = left.as_float(), right.as_float()
    return Term(f"tl.where({test.text}, {left.text}, {right.text})", kind)


def _piecewise(p: Printer, expr: sympy.Piecewise) -> Term:
    value: sympy.Basic = sympy.nan
    for branch, condition in reversed(expr.args):
        value = Where(condition, branch, value) if condition != sympy.true else branch
    return p.print(value)


def _ite(p: Printer, expr: sympy.Basic) -> Term:
    condition, a, b = expr.args
    return p.print(sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b)))


BY_TYPE: tuple[tuple[type, Rule], ...] = (
    (Where, _where),
    (sympy.logic.boolalg.BooleanAtom, _truth),
    (sympy.core.relational.Relational, _relation),
    (sympy.And, _and),
    (sympy.Or, _or),
    (sympy.Not, _not),
    (sympy.Xor, _xor),
    (sympy.ITE, _ite),
    (sympy.Piecewise, _piecewise),
)
