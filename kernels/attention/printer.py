"""From a sympy expression of `xfcompile.score` to the text of a Triton expression over a tile of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch

from xfcompile.evaluate import Unsupported
from xfcompile.score import POSITION, ROUNDED, B, H, I, J, Load, S, Where
from xfcompile.site import Operand

Kind = Literal["bool", "int", "float"]

# Python's precedences: a term is put in parentheses where its own is lower than what its surroundings need.
COMPARE, OR, AND, SUM, PRODUCT, UNARY, ATOM = 1, 2, 3, 4, 5, 6, 7

RELATIONS = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.Lt: "<",
    sympy.Le: "<=",
    sympy.Gt: ">",
    sympy.Ge: ">=",
}

# A product of an index with a larger number may not fit in 32 bits: indices are below 2**31 / 256 in any real tensor.
WIDE = 256


LOG2E = sympy.Float(math.log2(math.e), 17)


@dataclass(frozen=True)
class Term:
    """Triton text, what it computes (`kind`), how tightly it binds, and whether it is a literal number."""

    text: str
    kind: Kind
    precedence: int = ATOM
    literal: bool = False

    def at(self, precedence: int) -> str:
        return self.text if self.precedence >= precedence else f"({self.text})"


def extent(expr: sympy.Basic) -> frozenset[sympy.Symbol]:
    """Which of the tile's two axes an expression varies along."""
    symbols = expr.free_symbols
    return frozenset((I, J)) if S in symbols else frozenset(symbols & {I, J})


def axes(expr: sympy.Basic) -> frozenset[sympy.Symbol]:
    """`extent`, and whether an expression varies along heads: in a kernel for decoding, rows differ in these too."""
    return extent(expr) | frozenset(expr.free_symbols & {H})


def is_plain(load: Load) -> bool:
    """Whether every index is a position or 0, hence in range wherever the position is."""
    return all(x == 0 or x in POSITION for x in load.indices)


def guarded_loads(expr: sympy.Basic, guarded: bool = False) -> Iterator[tuple[Load, bool]]:
    """Every load, and whether it stands under a condition, outside of which its indices may be out of range."""
    guards = isinstance(expr, (Where, sympy.And, sympy.Or, sympy.Piecewise, sympy.ITE))
    for arg in expr.args:
        yield from guarded_loads(arg, guarded or guards)
    if isinstance(expr, Load):
        yield expr, guarded


class Printer:
    """Prints expressions over one scope of names; loads become statements, gathered in `lines`.

    names: the text of each symbol in scope. hoisted: what has a name already. clamped: loads that may be far from 0,
    and are brought so near that their products stay finite.
    helpers: gathers the names of the functions that the text calls (see `forward_text.HELPERS`).
    """

    def __init__(
        self,
        operands: Sequence[Operand],
        names: Mapping[sympy.Symbol, str],
        hoisted: Mapping[sympy.Basic, Term] | None = None,
        clamped: Container[Load] = (),
    ) -> None:
        self.operands = operands
        self.names = names
        self.hoisted = dict(hoisted or {})
        self.clamped = clamped
        self.lines: list[str] = []
        self.helpers: set[str] = set()
        self._loaded: dict[tuple[Load, str], Term] = {}
        self._guards: tuple[sympy.Basic, ...] = ()

    def print(self, expr: sympy.Basic) -> Term:
        if expr in self.hoisted:
            return self.hoisted[expr]
        for base, method in DISPATCH:
            if isinstance(expr, base):
                return method(self, expr)
        name = type(expr).__name__
        if name not in BY_NAME:
            raise Unsupported(f"the kernel has no Triton form for {name} in {expr}")
        return BY_NAME[name](self, expr)

    # Numbers and names

    def _integer(self, expr: sympy.Integer) -> Term:
        value = int(expr)
        return Term(str(value), "int", ATOM if value >= 0 else UNARY, literal=True)

    def _real(self, expr: sympy.Basic) -> Term:
        value = float(expr)
        return Term(repr(value), "float", ATOM if value >= 0 else UNARY, literal=True)

    def _infinity(self, expr: sympy.Basic) -> Term:
        return Term('float("inf")' if expr == sympy.oo else 'float("-inf")', "float", literal=True)

    def _nan(self, expr: sympy.Basic) -> Term:
        return Term('float("nan")', "float", literal=True)

    def _symbol(self, expr: sympy.Symbol) -> Term:
        if expr not in self.names:
            raise Unsupported(f"the score speaks of {expr}, which is neither a position nor one of its scalars")
        return Term(self.names[expr], "int" if expr.is_integer else "float")

    # Loads

    def _load(self, expr: Load) -> Term:
        n, operand = expr.operand, self.operands[expr.operand]
        if len(expr.indices) != operand.ndim:
            raise Unsupported(f"operand {n} has {operand.ndim} dimensions and is loaded at {len(expr.indices)} indices")
        mask = self._mask(expr)
        if (expr, mask) not in self._loaded:
            # Scalar offsets first, then rows, then columns: the sum is as small as it can be for as long as it can be.
            axes = sorted(enumerate(expr.indices), key=lambda x: (len(extent(x[1])), J in extent(x[1])))
            offsets = [f"{self._wide(x)} * t{n}_stride{d}" for d, x in axes if x != 0]
            name = f"x{n}" if mask == "" and not self._name_taken(f"x{n}") else self._fresh(f"x{n}")
            value = f"tl.load({' + '.join([f't{n}_ptr', *offsets])}{mask})"
            kind = kind_of(operand.dtype)
            if kind == "float" and operand.dtype != torch.float32:
                value += ".to(tl.float32)"
            if kind == "int" and operand.dtype.itemsize < 4:
                value += ".to(tl.int32)"  # sums and negatives of small or unsigned integers would wrap around
            if expr in self.clamped:
                self.helpers.add("clamped")
                value = f"clamped({value})"
            self.lines.append(f"{name} = {value}")
            self._loaded[expr, mask] = Term(name, kind)
        return self._loaded[expr, mask]

    def _name_taken(self, name: str) -> bool:
        return any(term.text == name for term in self._loaded.values())

    def _fresh(self, stem: str) -> str:
        return next(n for k in range(len(self._loaded) + 2) if not self._name_taken(n := f"{stem}_{k}"))

    def _wide(self, index: sympy.Expr) -> str:
        term = self.print(index)
        if term.kind == "float":
            raise Unsupported(f"the index {index} is not an integer")
        return f"tl.cast({term.text}, tl.int64)"

    def _mask(self, load: Load) -> str:
        """A load under a condition is masked by it where it may be out of range otherwise, or where that is free."""
        outer, self._guards = self._guards, ()
        guards = [g for g in outer if not is_plain(load) or axes(g) <= axes(load)]
        terms = [self.print(g) for g in guards]
        self._guards = outer
        mask = terms[0].text if len(terms) == 1 else " & ".join(t.at(AND) for t in terms)
        if any(not axes(g) <= axes(load) for g in guards):
            # A mask may not have axes that the addresses lack.
            return f" + 0 * tl.cast({mask}, tl.int64), mask={mask}, other=0"
        return f", mask={mask}, other=0" if terms else ""

    @contextmanager
    def _under(self, *conditions: sympy.Basic) -> Iterator[None]:
        outer = self._guards
        self._guards = outer + tuple(c for c in conditions if c != sympy.true)
        yield
        self._guards = outer

    # Arithmetic

    def number(self, expr: sympy.Basic) -> Term:
        return self._to_int(self.print(expr))

    def float(self, expr: sympy.Basic) -> Term:
        """As a real number. Converting is slow: a sum over both axes is converted while it is a row and a column."""
        spread = len(extent(expr)) == 2 and bool(expr.is_integer) and not expr.has(Load)
        if spread and isinstance(expr, sympy.Add):
            return self._add(expr, real=True)
        if spread and isinstance(expr, sympy.Abs):
            return Term(f"tl.abs({self.float(expr.args[0]).text})", "float")
        if spread and type(expr).__name__ in ("Min", "Max"):
            return self._extremum("minimum" if type(expr).__name__ == "Min" else "maximum", expr, real=True)
        return self._to_float(self.print(expr))

    def _to_float(self, term: Term) -> Term:
        if term.kind == "float":
            return term
        if term.literal:
            return Term(f"{term.text}.0", "float", term.precedence, literal=True)
        return Term(f"tl.cast({term.text}, tl.float32)", "float")

    def _to_int(self, term: Term) -> Term:
        return Term(f"tl.cast({term.text}, tl.int32)", "int") if term.kind == "bool" else term

    def _alike(self, args: Sequence[sympy.Basic], real: bool = False) -> tuple[list[Term], Kind]:
        """The printed arguments, brought to one numeric kind."""
        terms = [self._to_int(self.print(a)) for a in args]
        if not real and all(t.kind == "int" for t in terms):
            return terms, "int"
        return [self.float(a) for a in args], "float"

    def _add(self, expr: sympy.Add, real: bool = False) -> Term:
        # Positive terms first, so that the text starts without a sign; numbers last, as one writes them.
        args = sorted(expr.args, key=lambda a: (_is_negative(a), a.is_number))
        signs = ["-" if _is_negative(a) else "+" for a in args]
        terms, kind = self._alike([-a if sign == "-" else a for a, sign in zip(args, signs, strict=True)], real)
        text = ("-" if signs[0] == "-" else "") + terms[0].at(PRODUCT if signs[0] == "+" else UNARY)
        for sign, term in zip(signs[1:], terms[1:], strict=True):
            text += f" {sign} {term.at(PRODUCT)}"
        return Term(text, kind, SUM)

    def _mul(self, expr: sympy.Mul) -> Term:
        coefficient, rest = expr.as_coeff_Mul()
        if coefficient == -1:
            term = self._to_int(self.print(rest))
            return Term(f"-{term.at(UNARY)}", term.kind, UNARY)
        # Scalars first, then rows, then columns: few products are as large as the tile.
        factors = sorted(expr.args, key=lambda a: (len(extent(a)), J in extent(a)))
        numerator = [a for a in factors if not _is_reciprocal(a)]
        denominator = [1 / a for a in factors if _is_reciprocal(a)]
        terms, kind = self._alike(numerator) if numerator else ([Term("1.0", "float", literal=True)], "float")
        fraction = any(a.is_Rational and not a.is_Integer for a in numerator)
        if denominator or fraction:
            terms, kind = [self._to_float(t) for t in terms], "float"
        if kind == "int" and (len([t for t in terms if not t.literal]) > 1 or _is_wide(coefficient)):
            first = next(k for k, t in enumerate(terms) if not t.literal)
            terms[first] = replace(terms[first], text=f"tl.cast({terms[first].text}, tl.int64)", precedence=ATOM)
        text = " * ".join(t.at(PRODUCT if k == 0 else UNARY) for k, t in enumerate(terms))
        if len(denominator) == 1:
            text += f" / {self.float(denominator[0]).at(UNARY)}"
        elif denominator:
            text += f" / ({' * '.join(self.float(d).at(UNARY) for d in denominator)})"
        return Term(text, kind, PRODUCT)

    def _pow(self, expr: sympy.Pow) -> Term:
        base, exponent = expr.args
        if exponent == sympy.S.Half:
            return Term(f"tl.sqrt({self.float(base).text})", "float")
        if exponent == -sympy.S.Half:
            return Term(f"1.0 / tl.sqrt({self.float(base).text})", "float", PRODUCT)
        if exponent.is_Integer and -4 <= int(exponent) <= 4:
            return self._small_power(base, int(exponent))
        if base == 2:
            return Term(f"tl.exp2({self.float(exponent).text})", "float")
        if not base.is_positive:
            raise Unsupported(f"{expr}: a power whose base may be negative")
        return Term(f"tl.exp2({self.float(exponent).at(PRODUCT)} * tl.log2({self.float(base).text}))", "float")

    def _small_power(self, base: sympy.Expr, exponent: int) -> Term:
        term = self.float(base) if exponent < 0 else self._to_int(self.print(base))
        if term.kind == "int" and not term.literal:
            term = Term(f"tl.cast({term.text}, tl.int64)", "int")
        text = " * ".join([term.at(UNARY)] * abs(exponent))
        if exponent > 0:
            return Term(text, term.kind, PRODUCT)
        return Term(f"1.0 / {text}" if exponent == -1 else f"1.0 / ({text})", "float", PRODUCT)

    def _extremum(self, function: str, expr: sympy.Basic, real: bool = False) -> Term:
        terms, kind = self._alike(expr.args, real)
        # NaN must come out of whatever it goes into, as in PyTorch.
        option = ", propagate_nan=tl.PropagateNan.ALL" if kind == "float" else ""
        text = terms[0].text
        for term in terms[1:]:
            text = f"tl.{function}({text}, {term.text}{option})"
        return Term(text, kind)

    def _min(self, expr: sympy.Basic) -> Term:
        return self._extremum("minimum", expr)

    def _max(self, expr: sympy.Basic) -> Term:
        return self._extremum("maximum", expr)

    def _abs(self, expr: sympy.Abs) -> Term:
        term = self._to_int(self.print(expr.args[0]))
        return Term(f"tl.abs({term.text})", term.kind)

    def _call(self, function: str, expr: sympy.Basic) -> Term:
        return Term(f"{function}({self.float(expr.args[0]).text})", "float")

    def _tanh(self, expr: sympy.Basic) -> Term:
        self.helpers.add("tanh")
        x = expr.args[0]
        return Term(f"tanh({self.float(x).text}, {self.float(2 * LOG2E * x).text}, FAST)", "float")

    def _rounded(self, expr: sympy.Basic) -> Term:
        term = self.float(expr.args[0])
        dtype = ROUNDED[int(expr.args[1])]
        if dtype == "bfloat16":
            self.helpers.add("rounded_to_bfloat16")
            return Term(f"rounded_to_bfloat16({term.text})", "float")
        return Term(f"tl.cast(tl.cast({term.text}, tl.float16), tl.float32)", "float") if dtype == "float16" else term

    def _sign(self, expr: sympy.Basic) -> Term:
        x = expr.args[0]
        return self.print(Where(x > 0, sympy.S.One, Where(x < 0, sympy.S.NegativeOne, sympy.S.Zero)))

    # Integers: Python's division rounds down and its remainder has the divisor's sign; Triton's do neither.

    def _floor_div(self, expr: sympy.Basic) -> Term:
        a, b = expr.args
        terms, kind = self._alike((a, b))
        if kind == "float":
            return Term(f"tl.floor({terms[0].at(PRODUCT)} / {terms[1].at(UNARY)})", "float")
        if a.is_nonnegative and b.is_positive:
            return Term(f"{terms[0].at(PRODUCT)} // {terms[1].at(UNARY)}", "int", PRODUCT)
        self.helpers.add("floor_div")
        return Term(f"floor_div({terms[0].text}, {terms[1].text})", "int")

    def _remainder(self, expr: sympy.Basic) -> Term:
        a, b = expr.args
        terms, kind = self._alike((a, b))
        if kind == "float":
            raise Unsupported(f"{expr}: the remainder of real numbers")
        if a.is_nonnegative and b.is_positive:
            return Term(f"{terms[0].at(PRODUCT)} % {terms[1].at(UNARY)}", "int", PRODUCT)
        self.helpers.add("remainder")
        return Term(f"remainder({terms[0].text}, {terms[1].text})", "int")

    def _modular_indexing(self, expr: sympy.Basic) -> Term:
        a, divisor, modulus = expr.args
        quotient = self._floor_div(sympy.Basic(a, divisor)) if divisor != 1 else self.print(a)
        if quotient.kind != "int":
            raise Unsupported(f"{expr}: the remainder of real numbers")
        self.helpers.add("remainder")
        return Term(f"remainder({quotient.text}, {self.print(modulus).text})", "int")

    def _floor(self, expr: sympy.Basic) -> Term:
        # floor(j/3) in fp32 is wrong where rounding crosses an integer: divide as integers instead.
        a, b = sympy.fraction(sympy.together(expr.args[0]))
        if self._alike((a, b))[1] == "int":
            return self._floor_div(sympy.Basic(a, b))
        return Term(f"tl.cast(tl.floor({self.float(expr.args[0]).text}), tl.int32)", "int")

    def _ceiling(self, expr: sympy.Basic) -> Term:
        return Term(f"-{self._floor(sympy.Basic(-expr.args[0])).at(UNARY)}", "int", UNARY)

    def _truncate(self, expr: sympy.Basic) -> Term:
        term = self.print(expr.args[0])
        return term if term.kind == "int" else Term(f"tl.cast({term.text}, tl.int32)", "int")

    def _true_div(self, expr: sympy.Basic) -> Term:
        a, b = (self.float(x) for x in expr.args)
        return Term(f"{a.at(PRODUCT)} / {b.at(UNARY)}", "float", PRODUCT)

    def _identity(self, expr: sympy.Basic) -> Term:
        return self.print(expr.args[0])

    def _as_float(self, expr: sympy.Basic) -> Term:
        return self.float(expr.args[0])

    # Conditions

    def _truth(self, expr: sympy.Basic) -> Term:
        return Term("True" if expr == sympy.true else "False", "bool", literal=True)

    def _relation(self, expr: sympy.Basic) -> Term:
        left, right = expr.args
        boolean = self._boolean_comparison(expr)
        if boolean is not None:
            return boolean
        (a, b), _ = self._alike((left, right))
        return Term(f"{a.at(OR)} {RELATIONS[type(expr)]} {b.at(OR)}", "bool", COMPARE)

    def _boolean_comparison(self, expr: sympy.Basic) -> Term | None:
        """`t != 0` of a boolean operand is `t` itself."""
        load, number = expr.args if isinstance(expr.args[0], Load) else reversed(expr.args)
        if not isinstance(load, Load) or number not in (0, 1) or not isinstance(expr, (sympy.Eq, sympy.Ne)):
            return None
        term = self.print(load)
        if term.kind != "bool":
            return None
        holds = isinstance(expr, sympy.Eq) == (number == 1)
        return term if holds else Term(f"~{term.at(UNARY)}", "bool", UNARY)

    def _junction(self, expr: sympy.Basic, operator: str, precedence: int) -> Term:
        # A load in one argument is looked at only where the others, as far as they load nothing, have not decided.
        free = [a for a in expr.args if not a.has(Load)]
        guards = [a if operator == "&" else sympy.Not(a) for a in free]
        texts = []
        for arg in sorted(expr.args, key=lambda a: a.has(Load)):
            with self._under(*(guards if arg.has(Load) else ())):
                texts.append(self.print(arg).at(precedence))
        return Term(f" {operator} ".join(texts), "bool", precedence)

    def _and(self, expr: sympy.Basic) -> Term:
        return self._junction(expr, "&", AND)

    def _or(self, expr: sympy.Basic) -> Term:
        return self._junction(expr, "|", OR)

    def _not(self, expr: sympy.Basic) -> Term:
        return Term(f"~{self.print(expr.args[0]).at(UNARY)}", "bool", UNARY)

    def _xor(self, expr: sympy.Basic) -> Term:
        return Term(" ^ ".join(self.print(a).at(UNARY) for a in expr.args), "bool", OR)

    def _where(self, expr: sympy.Basic) -> Term:
        condition, a, b = expr.args
        test = self.print(condition)
        with self._under(condition):
            left = self.print(a)
        with self._under(sympy.Not(condition)):
            right = self.print(b)
        left, right = self._to_int(left), self._to_int(right)
        kind: Kind = "int" if left.kind == right.kind == "int" else "float"
        if kind == "float":
            left, right = self._to_float(left), self._to_float(right)
        return Term(f"tl.where({test.text}, {left.text}, {right.text})", kind)

    def _piecewise(self, expr: sympy.Piecewise) -> Term:
        value: sympy.Basic = sympy.nan
        for branch, condition in reversed(expr.args):
            value = Where(condition, branch, value) if condition != sympy.true else branch
        return self.print(value)

    def _ite(self, expr: sympy.Basic) -> Term:
        condition, a, b = expr.args
        return self.print(sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b)))


def kind_of(dtype: torch.dtype) -> Kind:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


def _is_reciprocal(expr: sympy.Basic) -> bool:
    return isinstance(expr, sympy.Pow) and bool(expr.exp.is_Integer) and int(expr.exp) < 0


def _is_negative(expr: sympy.Basic) -> bool:
    return bool(expr.as_coeff_Mul()[0].is_negative)


def _is_wide(coefficient: sympy.Expr) -> bool:
    return bool(coefficient.is_Integer) and abs(int(coefficient)) > WIDE


def _function(name: str) -> Callable[[Printer, sympy.Basic], Term]:
    return lambda printer, expr: printer._call(name, expr)


DISPATCH: tuple[tuple[type, Callable[[Printer, sympy.Basic], Term]], ...] = (
    (Load, Printer._load),
    (Where, Printer._where),
    (sympy.Symbol, Printer._symbol),
    (sympy.Integer, Printer._integer),
    (sympy.Rational, Printer._real),
    (sympy.Float, Printer._real),
    (sympy.NumberSymbol, Printer._real),
    (sympy.core.numbers.Infinity, Printer._infinity),
    (sympy.core.numbers.NegativeInfinity, Printer._infinity),
    (sympy.core.numbers.NaN, Printer._nan),
    (sympy.Add, Printer._add),
    (sympy.Mul, Printer._mul),
    (sympy.Pow, Printer._pow),
    (sympy.logic.boolalg.BooleanAtom, Printer._truth),
    (sympy.core.relational.Relational, Printer._relation),
    (sympy.And, Printer._and),
    (sympy.Or, Printer._or),
    (sympy.Not, Printer._not),
    (sympy.Xor, Printer._xor),
    (sympy.ITE, Printer._ite),
    (sympy.Piecewise, Printer._piecewise),
)

# Functions by class name: torch.utils._sympy has its own Min, Max, Mod … beside sympy's.
BY_NAME: dict[str, Callable[[Printer, sympy.Basic], Term]] = {
    "Min": Printer._min,
    "Max": Printer._max,
    "Abs": Printer._abs,
    "tanh": Printer._tanh,
    "exp": _function("tl.exp"),
    "log": _function("tl.log"),
    "erf": _function("tl.erf"),
    "OpaqueUnaryFn_sqrt": _function("tl.sqrt"),  # math.sqrt of a size
    "sin": _function("tl.sin"),
    "cos": _function("tl.cos"),
    "sign": Printer._sign,
    "Rounded": Printer._rounded,
    "floor": Printer._floor,
    "ceiling": Printer._ceiling,
    "FloorDiv": Printer._floor_div,
    "CleanDiv": Printer._floor_div,
    "Mod": Printer._remainder,
    "PythonMod": Printer._remainder,
    "ModularIndexing": Printer._modular_indexing,
    "FloorToInt": Printer._floor,
    "CeilToInt": Printer._ceiling,
    "TruncToInt": Printer._truncate,
    "IntTrueDiv": Printer._true_div,
    "FloatTrueDiv": Printer._true_div,
    "PowByNatural": Printer._pow,
    "FloatPow": Printer._pow,
    "ToFloat": Printer._as_float,
    "Identity": Printer._identity,
}

# The names that positions have in generated code.
NAMES: dict[sympy.Symbol, str] = {S: "s", B: "b", H: "h", I: "i", J: "j"}
