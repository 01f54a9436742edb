"""Prints expressions in one scope of names, by rules, and gathers the statements that load what they read."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sympy
import torch

from xfcompile.evaluate import Unsupported
from xfcompile.kernels.printing.extent import axes, extent, is_plain
from xfcompile.kernels.printing.term import AND, Kind, Term, kind_of
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import Operand

# The names that positions have in generated code.
NAMES: dict[sympy.Symbol, str] = {S: "s", B: "b", H: "h", I: "i", J: "j"}

Rule = Callable[["Printer", sympy.Basic], Term]


@dataclass(frozen=True)
class Rules:
    """How expressions are printed: the first rule of a type that one has, or else that of its class's name.

    as_real: by the class's name, how a whole number is printed as a real one, whose parts are converted and not itself.
    """

    by_type: tuple[tuple[type, Rule], ...]
    by_name: Mapping[str, Rule]
    as_real: Mapping[str, Rule]


class Printer:
    """Prints expressions over one scope of names; loads become statements, gathered in `lines`.

    names: the text of each symbol in scope. hoisted: what has a name already. clamped: loads that may be far from 0,
    and are brought so near that their products stay finite.
    helpers: gathers the names of the functions that the text calls (see `forward_text.HELPERS`).
    """

    def __init__(
        self,
        rules: Rules,
        operands: Sequence[Operand],
        names: Mapping[sympy.Symbol, str],
        hoisted: Mapping[sympy.Basic, Term] | None = None,
        clamped: Container[Load] = (),
    ) -> None:
        self.rules = rules
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
        if isinstance(expr, Load):
            return self._load(expr)
        if isinstance(expr, sympy.Symbol):
            return self._symbol(expr)
        for base, rule in self.rules.by_type:
            if isinstance(expr, base):
                return rule(self, expr)
        name = type(expr).__name__
        if name not in self.rules.by_name:
            raise Unsupported(f"the kernel has no Triton form for {name} in {expr}")
        return self.rules.by_name[name](self, expr)

    def number(self, expr: sympy.Basic) -> Term:
        return self.print(expr).as_number()

    def float(self, expr: sympy.Basic) -> Term:
        """As a real number. Converting is slow: a sum over both axes is converted while it is a row and a column."""
        as_real = self.rules.as_real.get(type(expr).__name__)
        spread = len(extent(expr)) == 2 and bool(expr.is_integer) and not expr.has(Load)
        if spread and as_real is not None:
            return as_real(self, expr)
        return self.print(expr).as_float()

    def alike(self, args: Sequence[sympy.Basic], real: bool = False) -> tuple[list[Term], Kind]:
        """The printed arguments, brought to one numeric kind."""
        terms = [self.number(a) for a in args]
        if not real and all(t.kind == "int" for t in terms):
            return terms, "int"
        return [self.float(a) for a in args], "float"

    @contextmanager
    def under(self, *conditions: sympy.Basic) -> Iterator[None]:
        """What is printed meanwhile is looked at only where these hold."""
        outer = self._guards
        self._guards = outer + tuple(c for c in conditions if c != sympy.true)
        yield
        self._guards = outer

    def _symbol(self, expr: sympy.Symbol) -> Term:
        if expr not in self.names:
            raise Unsupported(f"the score speaks of {expr}, which is neither a position nor one of its scalars")
        return Term(self.names[expr], "int" if expr.is_integer else "float")

    def _load(self, expr: Load) -> Term:
        n, operand = expr.operand, self.operands[expr.operand]
        if len(expr.indices) != operand.ndim:
            raise Unsupported(f"operand {n} has {operand.ndim} dimensions and is loaded at {len(expr.indices)} indices")
        mask = self._mask(expr)
        if (expr, mask) not in self._loaded:
            # Scalar offsets first, then rows, then columns: the sum is as small as it can be for as long as it can be.
            ordered = sorted(enumerate(expr.indices), key=lambda x: (len(extent(x[1])), J in extent(x[1])))
            offsets = [f"{self._wide(x)} * t{n}_stride{d}" for d, x in ordered if x != 0]
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
