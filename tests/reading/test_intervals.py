"""Verdicts over tiles against brute force: never unsound, and exact for the masks that have names."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from equivalence import check, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, PythonMod

from xfcompile.evaluate import Evaluator
from xfcompile.intervals import Bounds, certain, possible
from xfcompile.report import Report
from xfcompile.score import B, H, I, J, Load, Where
from xfcompile.site import Band
from xfcompile.sparsity import BOX, I0, I1, J0, J1, describe, verdicts

Grid = tuple[int, int, int, int]
"""Queries, keys, and those of a tile."""
GRIDS: list[Grid] = [(16, 16, 4, 4), (13, 17, 4, 4), (13, 17, 4, 8), (29, 23, 8, 4), (7, 31, 3, 5), (1, 19, 1, 4)]

DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 8, 8, 9])
LENGTHS = torch.tensor([6, 11])
TOKENS = torch.tensor([0] * 5 + [1] * 19 + [0] * 7)
DATA = [DOCUMENTS.expand(2, -1), LENGTHS, TOKENS.expand(2, -1)]
Tiles = tuple[torch.Tensor, torch.Tensor]
"""Which tiles run, and which of them whole."""


def evaluated(expr: Any, scope: Mapping[Any, Any], shape: tuple[int, int]) -> torch.Tensor:
    value = Evaluator({**scope, B: 1, H: 2}, DATA, torch.float64, torch.device("cpu"))(sympy.sympify(expr))
    return torch.as_tensor(value).expand(shape)


def brute_force(keep: Any, grid: Grid) -> Tiles:
    """By evaluating the predicate everywhere."""
    queries, keys, tile_m, tile_n = grid
    cells = evaluated(keep, {I: torch.arange(queries)[:, None], J: torch.arange(keys)[None, :]}, (queries, keys))
    rows = [list(row.split(tile_n, 1)) for row in cells.split(tile_m, 0)]
    runs = torch.tensor([[bool(x.any()) for x in row] for row in rows])
    return runs, torch.tensor([[bool(x.all()) for x in row] for row in rows])


def verdicts_over_data(keep: Any, grid: Grid) -> Tiles:
    """As `verdicts`, with the least and the greatest of each vector over each tile; what is one number is known."""
    queries, keys, tile_m, tile_n = grid
    i0, j0 = torch.arange(0, queries, tile_m)[:, None], torch.arange(0, keys, tile_n)[None, :]
    scope: dict[Any, Any] = {I0: i0, I1: (i0 + tile_m).clamp(max=queries) - 1}
    scope |= {J0: j0, J1: (j0 + tile_n).clamp(max=keys) - 1}
    seen: dict[Load, Bounds] = {}

    def bounds(load: Load) -> Bounds:
        if not load.free_symbols & {I, J}:
            return load, load
        if load not in seen:
            low, high = seen[load] = tuple(sympy.symbols(f"low{len(seen)} high{len(seen)}", integer=True))
            vector = DATA[load.operand][1]
            rows = I in load.free_symbols
            parts = vector[:queries].split(tile_m) if rows else vector[:keys].split(tile_n)
            for end, f in ((low, torch.amin), (high, torch.amax)):
                scope[end] = torch.stack([f(part) for part in parts]).reshape((-1, 1) if rows else (1, -1))
        return seen[load]

    some, every = possible(keep, BOX, bounds), certain(keep, BOX, bounds)
    shape = (i0.numel(), j0.numel())
    runs, whole = (evaluated(x, scope, shape) for x in (some, every))
    return runs, whole & runs


def assert_sound(found: Tiles | None, exact: Tiles, of: Any = None) -> None:
    assert found is not None
    (runs, whole), (some, every) = found, exact
    assert not (some & ~runs).any(), f"a tile is skipped that has something to keep: {of}"
    assert not (whole & ~every).any(), f"a tile runs unmasked that has something to drop: {of}"


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
        st.tuples(inner, st.integers(2, 3)).map(lambda t: t[0] ** t[1]),
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
@given(predicates(), st.sampled_from(GRIDS))
def test_verdicts_of_a_random_predicate_are_sound(keep: Any, grid: Grid) -> None:
    keep = sympy.sympify(keep).xreplace({B: sympy.Integer(1), H: sympy.Integer(2)})
    assert_sound(verdicts(keep, *grid), brute_force(keep, grid))


W = sympy.Integer(4)
NEIGHBOURS = sympy.And(
    sympy.Le(sympy.Abs(FloorDiv(I, W) - FloorDiv(J, W)), 1),
    sympy.Le(sympy.Abs(PythonMod(I, W) - PythonMod(J, W)), 1),
)
LENGTH, DOCUMENT_I, DOCUMENT_J, TOKEN = Load(1, B), Load(0, B, I), Load(0, B, J), Load(2, B, J)
NAMED = {
    "causal": J <= I,
    "bottom-right": J <= I + 4,
    "bottom-right of more queries than keys": J <= I - 3,
    "strictly causal": J < I,
    "window": sympy.And(J <= I, J > I - 6),
    "window on both sides": sympy.Le(sympy.Abs(I - J), 3),
    "prefix": sympy.Or(J <= I, J < 7),
    "prefix alone": J < 7,
    "chunks": sympy.Eq(FloorDiv(I, 5), FloorDiv(J, 5)),
    "causal chunks": sympy.And(J <= I, sympy.Eq(FloorDiv(I, 8), FloorDiv(J, 8))),
    "dilated by 3": sympy.Eq(PythonMod(I - J, 3), 0),
    "dilated window": sympy.And(sympy.Eq(PythonMod(I - J, 2), 0), sympy.Le(sympy.Abs(I - J), 6)),
    "every fifth key": sympy.Eq(PythonMod(J, 5), 2),
    "every key but": sympy.Ne(J, 6),
    "neighbourhood on a grid of 4": NEIGHBOURS,
    "square of distances": (I - J) ** 2 <= 20,
    "up to a position": J <= 9,
}
DATED = {
    "prefix of each batch": sympy.Or(J <= I, J < LENGTH),
    "length of each batch": J < LENGTH,
    "causal from a position of each batch": J <= LENGTH + I,
    "documents": sympy.Eq(DOCUMENT_I, DOCUMENT_J),
    "causal documents": sympy.And(sympy.Eq(DOCUMENT_I, DOCUMENT_J), J <= I),
    "earlier documents": DOCUMENT_J < DOCUMENT_I,
    "all but the first document": sympy.Ne(DOCUMENT_J, 0),
    "key padding": sympy.Ne(TOKEN, 0),
}


@pytest.mark.parametrize("name", NAMED)
def test_verdicts_of_a_named_mask_and_of_its_negation_are_exact(name: str) -> None:
    for keep in (NAMED[name], sympy.Not(NAMED[name])):
        for grid in GRIDS:
            found, exact = verdicts(keep, *grid), brute_force(keep, grid)
            assert_sound(found, exact)
            assert found is not None
            assert all(torch.equal(*x) for x in zip(found, exact, strict=True)), grid


@pytest.mark.parametrize("name", DATED)
def test_verdicts_over_data_and_of_the_negation_are_exact_with_bounds_of_it(name: str) -> None:
    for keep in (DATED[name], sympy.Not(DATED[name])):
        for grid in GRIDS:
            found, exact = verdicts_over_data(keep, grid), brute_force(keep, grid)
            assert all(torch.equal(*x) for x in zip(found, exact, strict=True)), grid


COMPOSED = {
    "and": sympy.And,
    "or": sympy.Or,
    "and not": lambda a, b: sympy.And(a, sympy.Not(b)),
    "not either": lambda a, b: sympy.Not(sympy.Or(a, b)),
    "not both": lambda a, b: sympy.Not(sympy.And(a, b)),
    "where causal": lambda a, b: sympy.ITE(J <= I, a, b),
    "where the first": lambda a, b: sympy.Or(sympy.And(a, b), sympy.And(sympy.Not(a), J < 9)),
    "either alone": sympy.Xor,
}
PAIRS = list(combinations({**NAMED, **DATED}.items(), 2))


def composed_are_sound(pairs: list[Any]) -> None:
    for (first, a), (second, b) in pairs:
        for how, compose in COMPOSED.items():
            for grid in GRIDS[1:3]:
                keep = compose(a, b)
                assert_sound(verdicts_over_data(keep, grid), brute_force(keep, grid), (first, how, second, grid))


def test_verdicts_of_two_named_masks_together_are_sound() -> None:
    composed_are_sound(random.Random(0).sample(PAIRS, 24))


@pytest.mark.slow
def test_verdicts_of_all_named_masks_together_are_sound() -> None:
    composed_are_sound(PAIRS)


TOGETHER = {
    "causal and padding": sympy.And(J <= I, sympy.Ne(TOKEN, 0)),
    "causal and chunks": sympy.And(J <= I, NAMED["chunks"]),
    "bottom-right or prefix": sympy.Or(J <= I + 4, J < 7),
    "window and causal documents": sympy.And(NAMED["window"], DATED["causal documents"]),
    "sink and window": sympy.Or(J < 2, sympy.And(J <= I, J > I - 5)),
    "causal and length of each batch": sympy.And(J <= I, J < LENGTH),
    "not causal, or window on both sides": sympy.Or(J > I, NAMED["window on both sides"]),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_verdicts_of_usual_compositions_are_exact(name: str) -> None:
    """On square tiles; on others a tile may meet both parts of a mask, and not where they meet."""
    keep = TOGETHER[name]
    for grid in GRIDS[:2]:
        for ours, exact in zip(verdicts_over_data(keep, grid), brute_force(keep, grid), strict=True):
            assert torch.equal(ours, exact), grid


def test_of_data_nothing_is_known_without_bounds() -> None:
    found = verdicts(sympy.And(J <= I, sympy.Ne(Load(0, B, J), 0)), *GRIDS[0])
    assert found is not None
    runs, whole = found
    assert torch.equal(runs, brute_force(J <= I, GRIDS[0])[0])
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


def told(build: Any, queries: int = 256) -> str:
    """What the printed report says of a mask that a program makes of positions, documents, tokens and lengths."""

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *data: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(queries)[:, None], torch.arange(256)
        return (q @ k.mT).masked_fill(~build(i, j, *data), -torch.inf).softmax(-1) @ v

    documents = (torch.arange(256) // 50).expand(2, -1).clone()
    data = documents, torch.arange(256) < torch.tensor([[256], [200]]), torch.tensor([30, 99])
    outcome = check(masked, *tensors((2, 1, queries, 4), (2, 1, 256, 4), (2, 1, 256, 4)), *data)
    return Report(sites=outcome.sites).render(200)


SAID: dict[str, tuple[Any, str]] = {
    "causal": (lambda i, j, *_: j <= i, "causal, j < i + 1: 62% of 64x64 tiles run, 25% masked"),
    "window": (
        lambda i, j, *_: (j <= i) & (j > i - 64),
        "causal & window(64), i - 63 <= j < i + 1: 44% of 64x64 tiles run, 44% masked",
    ),
    "both sides": (
        lambda i, j, *_: (i - j).abs() <= 32, "window(±32), i - 32 <= j < i + 33: 62% of 64x64 tiles run, 62% masked",
    ),
    "prefix": (
        lambda i, j, *_: (j <= i) | (j < 64),
        "prefix(64)), j < Max(64, i + 1): 62% of 64x64 tiles run, 19% masked",
    ),
    "chunks": (
        lambda i, j, *_: i // 64 == j // 64,
        "chunks(64), 64*((i//64)) <= j < 64*((i//64)) + 64: 25% of 64x64 tiles run, 0% masked",
    ),
    "dilated": (
        lambda i, j, *_: ((i - j) % 2 == 0) & ((i - j).abs() <= 32),
        "dilated(2) & window(±32), i - 32 <= j < i + 33: 62% of 64x64 tiles run, 62% masked",
    ),
    "grid": (
        lambda i, j, *_: ((i // 16 - j // 16).abs() <= 2) & ((i % 16 - j % 16).abs() <= 2),
        "columns of 16 ±2 & rows of 16 ±2, 62% of 64x64 tiles run, 62% masked",
    ),
    "position": (lambda i, j, *_: j <= 200, "prefix(201), j < 201: 100% of 64x64 tiles run, 25% masked"),
    "documents": (
        lambda i, j, d, *_: (d[:, None, :, None] == d[:, None, None, :]) & (j <= i),
        "causal & documents, j < i + 1: at most 62% of 64x64 tiles run, 62% masked",
    ),
    "padding": (
        lambda i, j, d, m, *_: m[:, None, None, :] & (j <= i),
        "causal & key padding, j < i + 1: at most 62% of 64x64 tiles run, 62% masked",
    ),
    "prefix of each batch": (
        lambda i, j, d, m, n: (j <= i) | (j < n[:, None, None, None]),
        "prefix from data), at most 100% of 64x64 tiles run, 62% masked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_a_printed_report_names_the_mask_and_says_what_was_proved(name: str) -> None:
    build, words = SAID[name]
    (line,) = [x for x in told(build).splitlines() if "mask: " in x]
    assert line.strip().endswith(words)


def test_a_printed_report_of_a_causal_mask_to_the_bottom_right() -> None:
    words = "mask: causal (bottom-right), j < i + 129: 88% of 64x64 tiles run, 25% masked"
    assert words in told(lambda i, j, *_: j <= i + 128, queries=128)


FLOATS: dict[str, Any] = {
    "where": lambda keep: torch.where(keep, 0.0, -torch.inf),
    "where of tensors": lambda keep: torch.where(keep, torch.tensor(0.0), torch.tensor(torch.finfo(torch.float32).min)),
    "zeros, filled": lambda keep: torch.zeros(64, 64).masked_fill(~keep, -torch.inf),
    "zeros, filled in place": lambda keep: torch.zeros(64, 64).masked_fill_(keep.logical_not(), -torch.inf),
    "zeros like it": lambda keep: torch.zeros_like(keep, dtype=torch.float32).masked_fill_(~keep, -1e9),
    "1 - mask": lambda keep: (1.0 - keep.float()) * torch.finfo(torch.float32).min,
    "mask - 1": lambda keep: (keep.float() - 1) * 1e9,
    "not, times": lambda keep: (~keep) * -1e9,
    "full, times": lambda keep: torch.full((64, 64), torch.finfo(torch.float32).min) * (~keep),
    "two triangles": lambda keep: torch.full((64, 64), -torch.inf).triu(1) + torch.full((64, 64), -torch.inf).tril(-16),
    "rounded": lambda keep: torch.where(keep, 0.0, -1e9).bfloat16().float(),
    "expanded": lambda keep: torch.where(keep, 0.0, -torch.inf)[None, None].expand(1, 2, -1, -1).contiguous(),
    "padded and cut": lambda keep: F.pad(torch.where(keep, 0.0, -torch.inf), (0, 6))[:, :64],
    "logarithm": lambda keep: keep.float().log(),
}


@pytest.mark.parametrize("call", [False, True], ids=["written out", "SDPA"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_mask_of_0_and_a_fill_is_a_predicate(name: str, call: bool) -> None:
    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(64)[:, None], torch.arange(64)
        mask = FLOATS[name]((j <= i) & (j > i - 16))
        if call:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (q @ k.mT * 0.3 + mask).softmax(-1) @ v

    (site,) = check(masked, *tensors(*[(1, 2, 64, 4)] * 3)).sites
    assert (site.matched, site.mask) == (True, "causal & window(16)")
    assert str(site.tiles).startswith("i - 15 <= j < i + 1: ")
