"""What one element of a result is, as a formula of what stands at its place, and its derivatives."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy

from xfcompile import activation
from xfcompile.activation import KEEP, X, tensor, vector
from xfcompile.score import Where
from xfcompile.written import formula_of


@dataclass(frozen=True)
class Formula:
    """A formula of `X` (one element of x, with its bias), `KEEP` (0, or what dropout multiplies by), and of further
    operands: vectors along the last axis and tensors of x's shape. Tensors are added, each times a number: derivatives
    know nothing of them.

    derivatives: by X and by each vector. coefficients: of each tensor. kinked: the derivatives are 0 on one side of a
    kink whatever they are multiplied by, so that what counts is `chained` of them.
    """

    value: sympy.Expr
    vectors: int
    tensors: int
    derivatives: tuple[sympy.Expr, ...]
    coefficients: tuple[float, ...]

    @property
    def drops(self) -> bool:
        return KEEP in self.value.free_symbols

    @property
    def kinked(self) -> bool:
        return any(map(activation.has_dead_branch, self.derivatives))

    def reads(self, vectors: bool) -> frozenset[sympy.Symbol]:
        """What the derivative by X is a function of, and, with `vectors`, those by vectors."""
        return frozenset().union(*(d.free_symbols for d in self.derivatives[: None if vectors else 1]))


def text_of(value: sympy.Expr) -> str:
    """A formula as the operators take it."""
    return sympy.srepr(value)


_FUNCTIONS = {f.__name__: f for f in (Where, activation.Sigmoid, activation.Softplus, activation.Expm1)}


@functools.cache
def parse(text: str, vectors: int, tensors: int) -> Formula:
    """The formula that a text of `text_of` is; ValueError for any other, for it may come with a program of others."""
    value = activation.with_distributions(formula_of(text, _FUNCTIONS))
    scaled, added = [vector(n) for n in range(vectors)], [tensor(n) for n in range(tensors)]
    unknown = value.free_symbols - {X, KEEP, *scaled, *added}
    if unknown:
        raise ValueError(f"bias_act_dropout: {value} speaks of {unknown}, of which no operand is given")
    coefficients = [sympy.diff(value, r) for r in added]
    for r, c in zip(added, coefficients, strict=True):
        if not c.is_number:
            raise ValueError(f"bias_act_dropout: {r} is not added in {value}, but times {c}")
    derivatives = tuple(sympy.diff(value, s) for s in (X, *scaled))
    return Formula(value, vectors, tensors, derivatives, tuple(float(c) for c in coefficients))
