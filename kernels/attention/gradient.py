"""Derivatives of a score: by the product of queries and keys, and by every load that needs a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import sympy

from xfcompile.evaluate import Unsupported
from xfcompile.kernels.attention.blocks import along_diagonal
from xfcompile.score import POSITION, I, J, Load, Rounded, S, Where
from xfcompile.site import ScoreSpec

Kind = Literal["rows", "columns", "diagonal", "dense", "sink"]
"""How the gradient of a load is added up: over the keys of a row, over the queries of a column, along a diagonal of
scores, for each score by itself; or of a sink, which has one for each row."""


@dataclass(frozen=True)
class LoadGradient:
    """The derivative of a score (or of the sink) by one load, and what the load has an axis for.

    kind: see `Kind`. axes: the positions that the load depends on, in the order of `POSITION`; the gradient is added up
    over all others.
    """

    load: Load
    derivative: sympy.Expr
    kind: Kind
    axes: tuple[sympy.Symbol, ...]


@dataclass(frozen=True)
class Gradients:
    """slope: the derivative of the score by S. loads: those by the loads that need a gradient."""

    slope: sympy.Expr
    loads: tuple[LoadGradient, ...]

    def apart(self, scalars: Sequence[sympy.Symbol]) -> tuple[sympy.Expr, sympy.Expr]:
        """The slope as a number that is the same for all scores times what is each score's own: 1 if nothing is."""
        others = [*(self.slope.free_symbols - set(scalars)), *self.slope.atoms(Load)]
        if not others:
            return self.slope, sympy.S.One
        if len(others) > 1 or others[0] != S:  # such terms are found again by how they are written
            return sympy.S.One, self.slope
        same, own = sympy.factor_terms(self.slope).as_independent(S, as_Add=False)
        return same, own

    def of(self, *kinds: Kind) -> list[tuple[int, LoadGradient]]:
        """The loads of some kinds, with their numbers."""
        return [(n, x) for n, x in enumerate(self.loads) if x.kind in kinds]


def gradients(spec: ScoreSpec, needed: Sequence[int]) -> Gradients:
    """needed: the operands that need a gradient. Raises Unsupported for a score that cannot be differentiated."""
    reason = why_not(spec)
    if reason is not None:
        raise Unsupported(reason)
    found: list[LoadGradient] = []
    for load in sorted(spec.score.atoms(Load), key=str):
        if load.operand in needed:
            derivative = differentiate(spec.score, load)
            if derivative != 0:
                found.append(LoadGradient(load, derivative, _kind(load), _axes(load)))
    for load in sorted(spec.sink.atoms(Load), key=str) if spec.sink is not None else ():
        if load.operand in needed:
            found.append(LoadGradient(load, differentiate(spec.sink, load), "sink", _axes(load)))
    return Gradients(differentiate(spec.score, S), tuple(found))


def why_not(spec: ScoreSpec) -> str | None:
    """Why a score has no backward here; None if it has."""
    if spec.full is not None:
        return "rows that score as low as masked keys have gradients that depend on all keys"
    if any(S in load.free_symbols for load in spec.score.atoms(Load)):
        return "a term of the score is loaded at a place that depends on the score"
    return None


def why_no_gradient(score: sympy.Expr, sink: sympy.Expr | None) -> str | None:
    """Why a score, or a sink, cannot be differentiated by all that is in it; None if it can."""
    try:
        differentiate(score, S)
        for expr in (score, sink):
            for load in expr.atoms(Load) if expr is not None else ():
                differentiate(expr, load)
    except Unsupported as error:
        return str(error)
    return None


def _axes(load: Load) -> tuple[sympy.Symbol, ...]:
    return tuple(x for x in POSITION if x in load.free_symbols)


def _kind(load: Load) -> Kind:
    if J not in load.free_symbols:
        return "rows"
    if I not in load.free_symbols:
        return "columns"
    return "dense" if along_diagonal(load) is None else "diagonal"


# -- the calculus -------------------------------------------------------------------------------------------------

_STEPS = frozenset(
    "floor ceiling sign FloorDiv CleanDiv Mod PythonMod ModularIndexing FloorToInt CeilToInt TruncToInt".split()
)
"""Functions that are constant but for jumps: their derivative is 0, as torch has it."""


def differentiate(expr: sympy.Expr, x: sympy.Expr) -> sympy.Expr:
    """The derivative by a symbol or a load, as torch's autograd has it: where a function has a corner, its side.

    Raises Unsupported for functions whose derivative is not known.
    """
    if not expr.has(x):
        return sympy.S.Zero
    variable = x if isinstance(x, sympy.Symbol) else sympy.Dummy("load", real=True)
    prepared = _without_corners(expr.xreplace({x: variable}))
    if _overflows(prepared, variable):
        raise Unsupported(f"the derivative of {expr} by {x} is infinity by infinity where an exponential is not finite")
    steps: dict[sympy.Expr, sympy.Dummy] = {}
    prepared = _replace(prepared, lambda e: _hidden(e, steps))
    found = prepared.diff(variable)
    if found.has(sympy.Derivative, sympy.Subs, sympy.DiracDelta, sympy.Heaviside):
        raise Unsupported(f"{expr} has no derivative by {x} that can be computed")
    return found.xreplace({dummy: e for e, dummy in steps.items()}).xreplace({variable: x})


def _replace(expr: sympy.Basic, rule: Callable[[sympy.Basic], sympy.Basic | None]) -> sympy.Basic:
    """From the leaves up, and not inside of conditions or of loads, which have no derivative."""
    if isinstance(expr, Load) or not expr.args or expr.is_Boolean or expr.is_Relational:
        return expr
    args = [_replace(a, rule) for a in expr.args]
    rebuilt = expr if all(a is b for a, b in zip(args, expr.args, strict=True)) else expr.func(*args)
    made = rule(rebuilt)
    return rebuilt if made is None else made


def _without_corners(expr: sympy.Expr) -> sympy.Expr:
    """Minima, maxima and absolute values as choices. At a tie torch.clamp lets gradients through, as these do."""

    def rule(e: sympy.Basic) -> sympy.Basic | None:
        name = type(e).__name__
        if isinstance(e, sympy.Pow) and e.exp == -1 and isinstance(e.base, sympy.Add) and len(e.base.args) == 2:
            one, power = e.base.args
            if one == 1 and isinstance(power, sympy.exp):  # a sigmoid: its exponential is infinite where it is 0
                return (1 - sympy.tanh(power.args[0] / 2)) / 2
        if name in ("Min", "Max"):
            relation = sympy.Le if name == "Min" else sympy.Ge
            first, *rest = sorted(e.args, key=lambda a: (a.is_number, str(a)))
            for other in rest:
                first = Where(relation(first, other), first, other)
            return first
        if isinstance(e, sympy.Abs):
            (a,) = e.args
            return a * sympy.Function("sign_of", real=True)(a) if not a.is_number else None
        if isinstance(e, Rounded):
            return e.args[0]
        if name in ("IntTrueDiv", "FloatTrueDiv"):
            return e.args[0] / e.args[1]
        if name in ("Identity", "ToFloat"):
            return e.args[0]
        if name in ("PowByNatural", "FloatPow"):
            return e.args[0] ** e.args[1]
        return None

    return _replace(expr, rule)


def _overflows(expr: sympy.Basic, variable: sympy.Symbol, inside: bool = False) -> bool:
    """Whether an exponential of the variable stands where its overflow is a limit: below a division, or in a log."""
    if isinstance(expr, sympy.exp) and inside and expr.has(variable):
        return True
    within = inside or (isinstance(expr, (sympy.log, sympy.Pow)) and not (expr.is_Pow and expr.exp.is_nonnegative))
    return any(_overflows(a, variable, within) for a in expr.args)


def _hidden(e: sympy.Basic, steps: dict[sympy.Expr, sympy.Dummy]) -> sympy.Basic | None:
    """A step function as a constant."""
    name = type(e).__name__
    if name == "sign_of":
        return steps.setdefault(sympy.sign(e.args[0]), sympy.Dummy("step", real=True))
    if name in _STEPS:
        return steps.setdefault(e, sympy.Dummy("step", real=True))
    return None
