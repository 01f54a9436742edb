"""Index algebra against brute force: what is simplified by the ranges has the values of what was written."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv

from xfcompile.elementwise.positions import reshaped
from xfcompile.indexing import extreme, floordiv, join, linear, mod, nonnegative, unravel
from xfcompile.score import B, I, J
from xfcompile.trace import Meta
from xfcompile.values import Values

ALWAYS = settings(max_examples=30, deadline=None, derandomize=True)
SIZES = {B: sympy.Integer(3), I: sympy.Integer(4), J: sympy.Integer(6)}

linear_terms = st.tuples(*[st.integers(-4, 6)] * 4)


def build(terms: tuple[int, int, int, int]) -> sympy.Expr:
    b, i, j, c = terms
    return b * B + i * I + j * J + c


def points() -> list[dict[sympy.Symbol, int]]:
    return [dict(zip(SIZES, p, strict=True)) for p in itertools.product(*(range(int(n)) for n in SIZES.values()))]


def at(expr: Any, point: dict[sympy.Symbol, int]) -> int:
    return int(sympy.sympify(expr).subs(point))


@ALWAYS
@given(linear_terms, st.integers(1, 7))
def test_division_and_remainder(terms: tuple[int, int, int, int], n: int) -> None:
    x = build(terms)
    whole, rest = floordiv(x, sympy.Integer(n), SIZES), mod(x, sympy.Integer(n), SIZES)
    for p in points()[::3]:
        assert at(whole, p) == at(x, p) // n
        assert at(rest, p) == at(x, p) % n


@ALWAYS
@given(linear_terms, linear_terms, st.integers(1, 5))
def test_bounds_hold(a: tuple[int, int, int, int], b: tuple[int, int, int, int], n: int) -> None:
    for x in (
        build(a),
        floordiv(build(a), sympy.Integer(n), SIZES) + build(b),
        sympy.Abs(build(a)),
        sympy.Max(build(a), build(b)),
    ):
        values = [at(x, p) for p in points()[::2]]
        low, high = extreme(x, SIZES, upper=False), extreme(x, SIZES, upper=True)
        assert low is None or int(low) <= min(values)
        assert high is None or int(high) >= max(values)
        if nonnegative(x, SIZES):
            assert min(values) >= 0


def test_bounds_of_linear_expressions_are_attained() -> None:
    assert extreme(2 * I - J + 1, SIZES, upper=False) == -4
    assert extreme(2 * I - J + 1, SIZES, upper=True) == 7


@pytest.mark.parametrize(
    "x",
    [
        I * J,
        -I * J,
        2 * I * J,
        -2 * I * J,
        FloorDiv(I * J, sympy.Integer(3)),
        FloorDiv(I, sympy.Integer(-2)),
        FloorDiv(J, I + 1 - B),
        sympy.Max(I * J, B),
        I + sympy.Min(I * J, B),
    ],
    ids=str,
)
@pytest.mark.parametrize("upper", [False, True])
def test_what_is_not_linear_has_no_bound(x: sympy.Expr, upper: bool) -> None:
    assert extreme(x, SIZES, upper=upper) is None


def test_division_by_a_symbolic_size() -> None:
    n, m = sympy.symbols("n m", integer=True, positive=True)
    ranges = {I: n, J: m}
    assert floordiv(I * m + J, m, ranges) == I
    assert mod(I * m + J, m, ranges) == J
    assert unravel(linear((I, J), (n, m)), (n, m), ranges) == (I, J)


def test_what_division_took_apart_is_put_together() -> None:
    x = 4 * floordiv(J, sympy.Integer(4), SIZES) + mod(J, sympy.Integer(4), SIZES)
    assert join(sympy.expand(x)) == J


def shapes_of(numel: int) -> list[tuple[int, ...]]:
    """Every factorisation of a number in up to four factors, ones among them."""
    return [
        s
        for n in range(1, 5)
        for s in itertools.product([d for d in range(1, numel + 1) if numel % d == 0], repeat=n)
        if np.prod(s) == numel
    ]


@ALWAYS
@given(st.sampled_from(shapes_of(24)), st.sampled_from(shapes_of(24)))
def test_an_element_of_a_reshape_is_where_numpy_has_it(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    values = Values()
    x = values.leaf(Meta(source, (), torch.float32, torch.device("cpu")))
    y = values.reshape(x, Meta(target, (), torch.float32, torch.device("cpu")))
    if y is x:
        return
    symbols = sympy.symbols("a:d", integer=True, nonnegative=True)[: len(target)]
    ranges = {s: sympy.Integer(n) for s, n in zip(symbols, target, strict=True)}
    index = tuple(sympy.S.Zero if n == 1 else s for s, n in zip(symbols, target, strict=True))
    found = reshaped(y, index, ranges)
    data = np.arange(24).reshape(source)
    for position in np.ndindex(target):
        where = tuple(at(f, dict(zip(symbols, position, strict=True))) for f in found)
        assert all(0 <= k < n for k, n in zip(where, source, strict=True))
        assert data[where] == data.reshape(target)[position]


@pytest.mark.parametrize("sizes", [(2, 3, 4), (5,), (1, 6), ()])
def test_unravel_inverts_linear(sizes: tuple[int, ...]) -> None:
    offset = sympy.Symbol("o", integer=True, nonnegative=True)
    numel = int(np.prod(sizes))
    index = unravel(offset, tuple(sympy.Integer(n) for n in sizes), {offset: sympy.Integer(numel)})
    for k in range(numel):
        assert tuple(at(x, {offset: k}) for x in index) == tuple(int(n) for n in np.unravel_index(k, sizes))
