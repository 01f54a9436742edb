"""Verdicts over tiles against brute force: never unsound, and exact for the masks that have names."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from equivalence import check, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, PythonMod

from xfcompile.evaluate import Evaluator
from xfcompile.intervals import Bounds, certain, possible
from xfcompile.score import B, H, I, J, Load, Where
from xfcompile.site import Band
from xfcompile.sparsity import describe, verdicts

QUERIES, KEYS, TILE = 13, 17, 4
DATA = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4])


def kept(keep: Any, queries: int = QUERIES, keys: int = KEYS) -> torch.Tensor:
    """[queries, keys], by evaluating the predicate everywhere."""
    scope: Any = {I: torch.arange(queries)[:, None], J: torch.arange(keys)[None, :], B: 1, H: 2}
    value = Evaluator(scope, [DATA.expand(2, -1)], torch.float64, torch.device("cpu"))(keep)
    return torch.as_tensor(value).expand(queries, keys)


def brute_force(keep: Any, queries: int, keys: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    cells = kept(keep, queries, keys)
    rows = [list(row.split(tile, 1)) for row in cells.split(tile, 0)]
    runs = torch.tensor([[bool(x.any()) for x in row] for row in rows])
    return runs, torch.tensor([[bool(x.all()) for x in row] for row in rows])


def integers(depth: int = 2) -> st.SearchStrategy[Any]:
    """Expressions over i and j with integer values."""
    leaf = st.sampled_from([I, J, I - J, J - I, I + J, 2 * I - J, B, H]) | st.integers(-4, 9).map(sympy.Integer)
    if depth == 0:
        return leaf
    inner = integers(depth - 1)
    return st.one_of(
        leaf,
        st.tuples(inner, st.integers(1, 5)).map(lambda t: FloorDiv(t[0], sympy.Integer(t[1]))),
        st.tuples(inner, st.integers(1, 5)).map(lambda t: PythonMod(t[0], sympy.Integer(t[1]))),
        inner.map(sympy.Abs),
        st.tuples(inner, inner).map(lambda t: t[0] - t[1]),
        st.tuples(inner, st.integers(-3, 3)).map(lambda t: t[0] * t[1]),
        st.tuples(inner, inner).map(lambda t: t[0] * t[1]),
        st.tuples(inner, inner).map(lambda t: sympy.Min(*t)),
        st.tuples(inner, inner).map(lambda t: sympy.Max(*t)),
        st.tuples(inner, inner, inner).map(lambda t: Where(sympy.Le(t[0], 3), t[1], t[2])),
    )


def predicates(depth: int = 2) -> st.SearchStrategy[Any]:
    relations = st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne])
    leaf = st.tuples(relations, integers(), integers()).map(lambda t: t[0](t[1], t[2]))
    if depth == 0:
        return leaf
    inner = predicates(depth - 1)
    pair = st.tuples(inner, inner)
    return st.one_of(
        leaf,
        pair.map(lambda t: sympy.And(*t)),
        pair.map(lambda t: sympy.Or(*t)),
        pair.map(lambda t: sympy.Xor(*t)),
        inner.map(sympy.Not),
        st.tuples(inner, inner, inner).map(lambda t: sympy.ITE(*t)),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(predicates())
def test_verdicts_of_a_random_predicate_are_sound(keep: Any) -> None:
    keep = sympy.sympify(keep).xreplace({B: sympy.Integer(1), H: sympy.Integer(2)})
    found = verdicts(keep, QUERIES, KEYS, TILE)
    assert found is not None
    runs, whole = found
    some, every = brute_force(keep, QUERIES, KEYS, TILE)
    assert not (some & ~runs).any(), "a tile is skipped that has something to keep"
    assert not (whole & ~every).any(), "a tile runs unmasked that has something to drop"


W = sympy.Integer(4)
NAMED = {
    "causal": J <= I,
    "bottom-right": J <= I + 4,
    "strictly causal": J < I,
    "window": sympy.And(J <= I, J > I - 6),
    "window on both sides": sympy.Le(sympy.Abs(I - J), 3),
    "prefix": sympy.Or(J <= I, J < 7),
    "chunks": sympy.Eq(FloorDiv(I, 5), FloorDiv(J, 5)),
    "causal chunks": sympy.And(J <= I, sympy.Eq(FloorDiv(I, 8), FloorDiv(J, 8))),
    "dilated by 3": sympy.Eq(PythonMod(I - J, 3), 0),
    "every fifth key": sympy.Eq(PythonMod(J, 5), 2),
    "every key but": sympy.Ne(J, 6),
    "neighbourhood on a 4 x 4 grid": sympy.And(
        sympy.Le(sympy.Abs(FloorDiv(I, W) - FloorDiv(J, W)), 1),
        sympy.Le(sympy.Abs(PythonMod(I, W) - PythonMod(J, W)), 1),
    ),
    "not causal": sympy.Not(J <= I),
    "up to a position": J <= 9,
    "sink and window": sympy.Or(J < 2, sympy.And(J <= I, J > I - 5)),
}  # fmt: skip


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (13, 17)])
@pytest.mark.parametrize("name", NAMED)
def test_verdicts_of_a_named_mask_are_exact(name: str, queries: int, keys: int) -> None:
    found = verdicts(NAMED[name], queries, keys, TILE)
    assert found is not None
    for ours, exact in zip(found, brute_force(NAMED[name], queries, keys, TILE), strict=True):
        assert torch.equal(ours, exact)


DATED = {
    "documents": sympy.Eq(Load(0, B, I), Load(0, B, J)),
    "causal documents": sympy.And(sympy.Eq(Load(0, B, I), Load(0, B, J)), J <= I),
    "padding": Load(0, B, J) < 3,
    "not the first document": sympy.Ne(Load(0, B, J), 0),
    "earlier documents": Load(0, B, J) < Load(0, B, I),
}


@pytest.mark.parametrize("name", DATED)
def test_verdicts_over_data_are_exact_with_bounds_of_it(name: str) -> None:
    keep = DATED[name]
    some, every = brute_force(keep, KEYS, KEYS, TILE)
    for row in range(some.shape[0]):
        for column in range(some.shape[1]):
            spans = {I: (row * TILE, min(KEYS, row * TILE + TILE)), J: (column * TILE, min(KEYS, column * TILE + TILE))}
            box = {x: (sympy.Integer(a), sympy.Integer(b - 1)) for x, (a, b) in spans.items()}

            def bounds(load: Load, spans: Any = spans) -> Bounds:
                start, end = spans[load.indices[-1]]
                part = DATA[start:end]
                return sympy.Integer(int(part.min())), sympy.Integer(int(part.max()))

            assert possible(keep, box, bounds) == bool(some[row, column]), (row, column)
            whole = certain(keep, box, bounds) == sympy.true
            assert whole == bool(every[row, column]), (row, column)


def test_of_data_nothing_is_known_without_bounds() -> None:
    found = verdicts(sympy.And(J <= I, sympy.Ne(Load(0, B, J), 0)), 16, 16, TILE)
    assert found is not None
    runs, whole = found
    assert torch.equal(runs, brute_force(J <= I, 16, 16, TILE)[0])
    assert not whole.any()


def test_what_depends_on_the_batch_has_no_verdict() -> None:
    assert verdicts(J <= I + B, 16, 16) is None


def test_words() -> None:
    window = sympy.And(J <= I, J > I - 256)
    n = sympy.Integer(4096)
    assert describe(window, Band(I - 255, I + 1, True), n, n) == (
        "i - 255 <= j < i + 1: 8% of 64x64 tiles run, 3% masked"
    )
    assert describe(J <= I, Band(None, I + 1, True), n, n) == "j < i + 1: 51% of 64x64 tiles run, 2% masked"
    padded = sympy.And(J <= I, sympy.Ne(Load(0, B, J), 0))
    assert describe(padded, Band(None, I + 1, False), n, n) == ("j < i + 1: at most 51% of 64x64 tiles run, 51% masked")
    length = sympy.Symbol("s0", integer=True, positive=True)
    assert describe(J <= I, Band(None, I + 1, True), length, length) == "j < i + 1"
    assert describe(sympy.true, Band(), n, n) is None


def test_a_report_says_what_was_proved() -> None:
    def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(256)[:, None], torch.arange(256)
        return (q @ k.mT).masked_fill((j > i) | (j <= i - 64), -torch.inf).softmax(-1) @ v

    (site,) = check(windowed, *tensors((1, 1, 256, 4), (1, 1, 256, 4), (1, 1, 256, 4))).sites
    assert site.tiles == "i - 63 <= j < i + 1: 44% of 64x64 tiles run, 44% masked"
