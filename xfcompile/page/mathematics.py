"""Formulas as MathML, which browsers show without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
from sympy.core.relational import Relational

from xfcompile.activation import GATE, KEEP, UP, X
from xfcompile.page.markup import Markup, element, join
from xfcompile.score import ROUNDED, I, J, Load, S

ADD, MUL, POW, ATOM = 1, 2, 3, 4
"""How tightly a printed formula holds together."""

Printed = tuple[Markup, int]


def mi(text: str, upright: bool = False) -> Markup:
    """A name; one of several letters is upright anyway."""
    return element("mi", text, mathvariant="normal" if upright and len(text) == 1 else None)


def mn(text: str) -> Markup:
    return element("mn", text)


def mo(text: str, **attributes: str) -> Markup:
    return element("mo", text, **attributes)


def mtext(text: str) -> Markup:
    return element("mtext", text.replace(" ", "\u00a0"))  # other spaces are dropped at either end


def row(*children: str) -> Markup:
    return element("mrow", *children)


def sub(base: str, index: str) -> Markup:
    return element("msub", base, index)


def fraction(top: str, bottom: str) -> Markup:
    return element("mfrac", top, bottom)


def fenced(inside: str, left: str = "(", right: str = ")") -> Markup:
    return row(mo(left, stretchy="true"), inside, mo(right, stretchy="true"))


def call(name: str, *arguments: str) -> Markup:
    return row(mi(name, upright=True), mo("\u2061"), fenced(comma(arguments)))


def comma(parts: Sequence[str]) -> Markup:
    return join([y for k, x in enumerate(parts) for y in ([mo(","), x] if k else [x])])


def lines(rows: Sequence[Sequence[str]], **attributes: str) -> Markup:
    """Rows of cells, aligned."""
    return element(
        "mtable", *(element("mtr", *(element("mtd", cell) for cell in cells)) for cells in rows), **attributes
    )


def display(inside: str) -> Markup:
    return element("math", inside, display="block")


class Printer:
    """Prints formulas. names: of operand n, for `Load(n, ..)`; flags: which of them are boolean."""

    def __init__(self, names: Mapping[int, str] | None = None, flags: frozenset[int] = frozenset()) -> None:
        self.names = names or {}
        self.flags = flags

    def __call__(self, expr: Any) -> Markup:
        return self.print(sympy.sympify(expr))[0]

    def at(self, expr: Any, level: int) -> Markup:
        """Printed, in parentheses where it holds together less than `level`."""
        text, own = self.print(sympy.sympify(expr))
        return text if own >= level else fenced(text)

    def terms(self, expr: sympy.Expr) -> list[Markup]:
        """The terms of a sum, each with its sign, what depends on the product first."""
        terms = sorted(sympy.Add.make_args(expr), key=lambda t: (S not in t.free_symbols, bool(t.is_number)))
        return [self._signed(term, first=k == 0) for k, term in enumerate(terms)]

    # -- by kind ----------------------------------------------------------------------------------------------

    def print(self, expr: Any) -> Printed:
        name = type(expr).__name__
        if isinstance(expr, sympy.Symbol):
            return self._symbol(expr), MUL if expr == S else ATOM
        if isinstance(expr, Load):
            return self._load(expr), ATOM
        if expr in (sympy.true, sympy.false):
            return mtext(str(bool(expr)).lower()), ATOM
        if expr in (sympy.oo, -sympy.oo):
            return (mi("∞"), ATOM) if expr == sympy.oo else (row(mo("−"), mi("∞")), ADD)
        if expr is sympy.pi or expr is sympy.E:
            return mi("π" if expr is sympy.pi else "e"), ATOM
        if expr is sympy.nan:
            return mi("NaN"), ATOM
        if expr.is_Number:
            return self._number(expr)
        if isinstance(expr, sympy.Add):
            return row(*self.terms(expr)), ADD
        if isinstance(expr, sympy.Mul):
            return self._product(expr)
        if isinstance(expr, sympy.Pow) or name in ("FloatPow", "PowByNatural"):
            return self._power(*expr.args)
        if isinstance(expr, Relational):
            return self._relation(expr), 0
        if isinstance(expr, (sympy.And, sympy.Or, sympy.Xor)):
            sign = {"And": "∧", "Or": "∨", "Xor": "⊻"}[name]
            parts = [self.at(x, 0) if isinstance(x, Relational) else self.at(x, ATOM) for x in expr.args]
            return join([y for k, x in enumerate(parts) for y in ([mo(sign), x] if k else [x])]), -1
        if isinstance(expr, sympy.Not):
            return row(mo("¬"), self.at(expr.args[0], ATOM)), ATOM
        if isinstance(expr, sympy.Piecewise):
            return self._cases([(value, condition) for value, condition in expr.args]), ATOM
        if name in ("Where", "ITE"):
            return self._cases(_unnested(expr)), ATOM
        if name in _NAMED:
            return _NAMED[name](self, expr.args)
        if isinstance(expr, sympy.Function):
            return call(name, *(self(x) for x in expr.args)), ATOM
        return mtext(str(expr)), 0

    def _symbol(self, x: sympy.Symbol) -> Markup:
        if x == S:
            return row(sub(mi("q"), mi("i")), mo("·"), sub(mi("k"), mi("j")))
        short = {GATE: "g", UP: "u", KEEP: "m", X: "x"}.get(x)
        if short is not None:
            return mi(short)
        stem = x.name.rstrip("0123456789")
        number = x.name[len(stem) :]
        if len(stem) == 1 and number:
            return sub(mi(stem), mn(number))
        return mi(x.name)

    def _load(self, load: Load) -> Markup:
        name = mi(self.names.get(load.operand, f"t{load.operand}"))
        # An axis of which there is one element is not spoken of.
        indices = [x for x in load.indices if x != 0]
        if not indices:
            return name
        inside = comma([self(x) for x in indices])
        if all(x.is_Symbol or x.is_number for x in indices):
            return sub(name, row(inside))
        return row(name, fenced(inside, "[", "]"))

    def _number(self, x: sympy.Expr) -> Printed:
        if x.is_negative:
            return row(mo("−"), self.at(-x, MUL)), ADD
        if x.is_Integer:
            return mn(str(x)), ATOM
        if x.is_Rational:
            return fraction(mn(str(x.p)), mn(str(x.q))), ATOM
        text = f"{float(x):.6g}"
        mantissa, e, exponent = text.partition("e")
        if not e:
            return mn(text), ATOM
        power = element("msup", mn("10"), mn(str(int(exponent)).replace("-", "−")))
        return (power, POW) if mantissa == "1" else (row(mn(mantissa), mo("×"), power), MUL)

    def _signed(self, term: sympy.Expr, first: bool) -> Markup:
        negative = bool(sympy.sympify(term.as_coeff_Mul()[0]).is_negative)
        text = self.at(-term if negative else term, MUL)
        if negative:
            return row(mo("−"), text) if first else join([mo("−", form="infix"), text])
        return text if first else join([mo("+", form="infix"), text])

    def _product(self, x: sympy.Expr) -> Printed:
        number, rest = x.as_coeff_Mul()
        if number.is_negative:
            return row(mo("−"), self.at(-number * rest, MUL)), ADD
        top, bottom = list(sympy.Mul.make_args(rest)), []
        for factor in list(top):
            if isinstance(factor, sympy.Pow) and factor.exp.is_number and factor.exp.is_negative:
                top.remove(factor)
                bottom.append(factor.base**-factor.exp)
        scale, divisor = _divisor(number)
        above = [] if scale == 1 and top else [self.at(scale, MUL)]
        # The product of matrices first, as one says it.
        top.sort(key=lambda f: (S not in f.free_symbols, not f.is_Symbol))
        above += [self.at(f, POW if f != S or len(top) > 1 or above else MUL) for f in top]
        under = ([divisor(self)] if divisor is not None else []) + [self.at(f, MUL) for f in bottom]
        if not under:
            return _times(above), MUL
        return fraction(_times(above), _times(under)), POW

    def _power(self, base: sympy.Expr, exponent: sympy.Expr) -> Printed:
        if exponent == sympy.S.Half:
            return element("msqrt", self(base)), ATOM
        if exponent.is_number and exponent.is_negative:
            return fraction(mn("1"), self(base**-exponent)), POW
        if base is sympy.E:
            return self._exponential(exponent)
        return element("msup", self.at(base, ATOM), self(exponent)), POW

    def _exponential(self, x: sympy.Expr) -> Printed:
        return element("msup", mi("e"), row(self(x))), POW

    def _relation(self, x: Any) -> Markup:
        left, right = x.args
        flag = left if isinstance(left, Load) and left.operand in self.flags else None
        if flag is not None and right in (0, 1) and isinstance(x, (sympy.Eq, sympy.Ne)):
            return self(flag) if isinstance(x, sympy.Eq) == (right == 1) else row(mo("¬"), self(flag))
        # Keys are what a mask is about: they stand on the left, alone if they can.
        bound = self._bound_of_key(x)
        if bound is not None:
            return bound
        if (J in right.free_symbols and J not in left.free_symbols) or (right == I and left != J):
            x = x.reversed
        sign = {"==": "=", "!=": "≠", "<=": "≤", ">=": "≥"}.get(x.rel_op, x.rel_op)
        return row(self(x.lhs), mo(sign), self(x.rhs))

    def _bound_of_key(self, x: Any) -> Markup | None:
        """A comparison of integers that is linear in the key, as a bound of the key."""
        if not isinstance(x, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) or x.atoms(Load, sympy.Abs):
            return None
        if not all(side.is_integer for side in x.args):
            return None
        low, high = x.args if isinstance(x, (sympy.Le, sympy.Lt)) else x.args[::-1]
        gap = sympy.expand(high - low - (1 if isinstance(x, (sympy.Lt, sympy.Gt)) else 0))  # is >= 0
        slope = gap.coeff(J)
        rest = sympy.expand(gap - slope * J)
        if slope not in (1, -1) or J in rest.free_symbols:
            return None
        return row(self(J), mo("≤" if slope == -1 else "≥"), self(rest if slope == -1 else -rest))

    def _cases(self, parts: Sequence[tuple[Any, Any]]) -> Markup:
        def condition(c: Any) -> Markup:
            return mtext("otherwise") if c == sympy.true else row(mtext("if "), self(c))

        table = lines([(self(value), condition(c)) for value, c in parts], columnalign="left left", class_="cases")
        return row(mo("{", stretchy="true"), table)


def _unnested(x: Any) -> list[tuple[Any, Any]]:
    """Where(c, a, Where(d, b, e)) as cases."""
    condition, a, b = x.args
    rest = _unnested(b) if type(b).__name__ in ("Where", "ITE") else [(b, sympy.true)]
    return [(a, condition), *rest]


def _times(factors: Sequence[str]) -> Markup:
    if not factors:
        return mn("1")
    return row(*[y for k, x in enumerate(factors) for y in ([mo("·" if k else ""), x] if k else [x])])


CLOSE = 1e-9
"""Relative: floats that are this near to a fraction were written as one."""


def _divisor(number: Any) -> tuple[Any, Callable[[Printer], Markup] | None]:
    """A factor as what it multiplies by, and what it divides by: 0.125 divides by 8, 0.17677... by the root of 32."""
    if number.is_Rational:
        q = number.q
        return sympy.Integer(number.p), (lambda printer: printer(sympy.Integer(q))) if q != 1 else None
    if not number.is_Float or number <= 0:
        return number, None
    inverse = 1 / float(number)
    if 1 < inverse < 1e6 and abs(inverse - round(inverse)) < CLOSE * inverse:
        whole = sympy.Integer(round(inverse))
        return sympy.S.One, lambda printer: printer(whole)
    square = inverse * inverse
    if 1 < square < 1e6 and abs(square - round(square)) < CLOSE * square:
        radicand = sympy.Integer(round(square))
        return sympy.S.One, lambda printer: element("msqrt", printer(radicand))
    if float(number) == math.floor(float(number)) and number < 1e6:
        return sympy.Integer(int(number)), None
    return number, None


def _function(name: str) -> Callable[[Printer, Any], Printed]:
    return lambda printer, args: (call(name, *(printer(x) for x in args)), ATOM)


def _floor(printer: Printer, args: Any) -> Printed:
    return fenced(printer(args[0]), "⌊", "⌋"), ATOM


def _quotient(printer: Printer, args: Any) -> Printed:
    return fenced(fraction(printer(args[0]), printer(args[1])), "⌊", "⌋"), ATOM


def _remainder(printer: Printer, args: Any) -> Printed:
    return row(printer.at(args[0], MUL), mspace(), mi("mod"), mspace(), printer.at(args[1], MUL)), ADD


def mspace() -> Markup:
    return element("mspace", width="0.3em")


def _modular(printer: Printer, args: Any) -> Printed:
    floor = _quotient(printer, args[:2])[0] if args[1] != 1 else printer.at(args[0], MUL)
    return row(floor, mspace(), mi("mod"), mspace(), printer.at(args[2], MUL)), ADD


def _division(printer: Printer, args: Any) -> Printed:
    return fraction(printer(args[0]), printer(args[1])), POW


def _less_one(printer: Printer, args: Any) -> Printed:
    return row(printer._exponential(args[0])[0], mo("−"), mn("1")), ADD


_NAMED: dict[str, Callable[[Printer, Any], Printed]] = {
    "exp": lambda printer, args: printer._exponential(args[0]),
    "Abs": lambda printer, args: (fenced(printer(args[0]), "|", "|"), ATOM),
    "Min": _function("min"),
    "Max": _function("max"),
    "log": _function("ln"),
    "Sigmoid": _function("σ"),
    "Softplus": _function("softplus"),
    "Ndtr": _function("Φ"),
    "Gelu": _function("gelu"),
    "Expm1": _less_one,
    "FloorDiv": _quotient,
    "CleanDiv": _quotient,
    "floor": _floor,
    "FloorToInt": _floor,
    "ceiling": lambda printer, args: (fenced(printer(args[0]), "⌈", "⌉"), ATOM),
    "CeilToInt": lambda printer, args: (fenced(printer(args[0]), "⌈", "⌉"), ATOM),
    "TruncToInt": _function("trunc"),
    "Mod": _remainder,
    "PythonMod": _remainder,
    "ModularIndexing": _modular,
    "IntTrueDiv": _division,
    "FloatTrueDiv": _division,
    "ToFloat": lambda printer, args: printer.print(args[0]),
    "Identity": lambda printer, args: printer.print(args[0]),
    "OpaqueUnaryFn_sqrt": lambda printer, args: (element("msqrt", printer(args[0])), ATOM),
    "Rounded": lambda printer, args: (call(ROUNDED.get(int(args[1]), "rounded"), printer(args[0])), ATOM),
}
