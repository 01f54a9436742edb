"""Predicates against brute force: what is proved, bounded or separated of a mask is true at every position."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Mod

from xfcompile.elementwise.choices import one_choice
from xfcompile.elementwise.rows import ROW, takes_off
from xfcompile.masking import adding, as_rounded, separate, without_row_shift
from xfcompile.masks import band, describe, has_live_key, is_causal, prove
from xfcompile.score import B, H, I, J, Load, Rounded, S, Where
from xfcompile.site import Band, Miss

ALWAYS = settings(max_examples=60, deadline=None, derandomize=True)
QUERIES, KEYS = 5, 7
RANGES = {I: sympy.Integer(QUERIES), J: sympy.Integer(KEYS), B: sympy.Integer(2), H: sympy.Integer(2)}


def comparisons() -> st.SearchStrategy[Any]:
    sides = st.tuples(st.integers(-1, 1), st.integers(-1, 1), st.integers(-6, 6)).map(
        lambda t: t[0] * I + t[1] * J + t[2]
    )
    relations = st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne])
    windows = st.integers(0, 4).map(lambda n: sympy.Le(sympy.Abs(I - J), n))
    chunks = st.integers(1, 4).map(lambda n: sympy.Eq(FloorDiv(I, n), FloorDiv(J, n)))
    prefixes = st.integers(0, 8).map(lambda n: sympy.Lt(J, n))
    return st.builds(lambda f, a, b: f(a, b), relations, sides, sides) | windows | chunks | prefixes


predicates = st.recursive(
    comparisons(),
    lambda inner: st.builds(sympy.And, inner, inner) | st.builds(sympy.Or, inner, inner) | inner.map(sympy.Not),
    max_leaves=4,
)


def table(keep: Any) -> list[list[bool]]:
    return [[bool(sympy.sympify(keep).subs({I: i, J: j})) for j in range(KEYS)] for i in range(QUERIES)]


@ALWAYS
@given(predicates)
def test_what_is_proved_is_the_same_predicate(keep: Any) -> None:
    assert table(prove(keep, RANGES)) == table(keep)


@ALWAYS
@given(predicates)
def test_a_band_holds_every_key_that_is_kept(keep: Any) -> None:
    if keep in (sympy.true, sympy.false):
        return
    bounds = band(keep)
    truth = table(keep)
    before: tuple[int, int] | None = None
    for i in range(QUERIES):
        lower = int(bounds.lower.subs({I: i})) if bounds.lower is not None else 0
        upper = int(bounds.upper.subs({I: i})) if bounds.upper is not None else KEYS
        inside = [lower <= j < upper for j in range(KEYS)]
        assert all(b or not k for b, k in zip(inside, truth[i], strict=True))
        assert not bounds.exact or inside == truth[i]
        if before is not None:
            assert lower >= before[0] and upper >= before[1], "bounds must not fall as i grows"
        before = (lower, upper)


@ALWAYS
@given(predicates)
def test_a_live_key_is_there(keep: Any) -> None:
    if has_live_key(keep, RANGES):
        assert all(any(row) for row in table(keep))


@ALWAYS
@given(predicates)
def test_only_causal_is_called_causal(keep: Any) -> None:
    proved = prove(keep, RANGES)
    if is_causal(proved):
        assert table(keep) == [[j <= i for j in range(KEYS)] for i in range(QUERIES)]
    assert isinstance(describe(proved, RANGES), str)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (sympy.true, "none"),
        (sympy.false, "nothing"),
        (J <= I, "causal"),
        (I - J >= 0, "causal"),
        (J < I + 1, "causal"),
        (J <= I + 2, "causal (bottom-right)"),
        (J <= I - 1, "causal (offset -1)"),
        ((J <= I) & (J > I - 3), "causal & window(3)"),
        (sympy.Abs(I - J) <= 2, "window(±2)"),
        (sympy.Eq(FloorDiv(I, 4), FloorDiv(J, 4)), "chunks(4)"),
        (sympy.Or(J <= I, J < 4), "(causal | prefix(4))"),
        (J < 4, "prefix(4)"),
        (J >= 4, "j >= 4"),
        (2 * J >= 7, "2*j >= 7"),
        (sympy.Ne(Load(0, B, J), 0), "key padding"),
        (sympy.Ne(Load(0, B, J), 0) & (J <= I), "causal & key padding"),
        (sympy.Eq(Load(0, B, I), Load(0, B, J)), "documents"),
        (sympy.Ne(Load(0, B, H, I, J), 0), "dense mask"),
        (Load(0, B) > J, "key padding"),
        (Where(sympy.Ne(Load(0, B), 0), 3, 5) > J, "limit from data"),
        (sympy.Ne(Load(0, B), 0), "mask from data"),
        (sympy.Or(J <= I, Load(0, B) > J), "(causal | prefix from data)"),
        (sympy.Or(J <= I, Load(0, B) > 3), "(causal | mask from data)"),
        (sympy.Or(J <= I, Load(0, B, I) > J), "(causal | positions from data)"),
        (I + Load(0, B) >= J, "positions from data"),
        (Load(0, B, I) >= Load(0, B, J), "positions from data"),
        (sympy.Or(sympy.And(J <= I, sympy.Ne(Load(0, B, J), 0)), J >= 4), "(causal & key padding | j >= 4)"),
        (sympy.Eq(I - J - 3 * FloorDiv(I - J, 3), 0), "dilated(3)"),
        (sympy.Le(sympy.Abs(FloorDiv(I, 4) - FloorDiv(J, 4)), 1), "rows of 4 ±1"),
        (sympy.Lt(sympy.Abs(Mod(I, 4) - Mod(J, 4)), 3), "columns of 4 ±2"),
        (sympy.Eq(Mod(I, 4), Mod(J, 4)), "same columns of 4"),
    ],
)
def test_masks_have_names(keep: Any, words: str) -> None:
    assert set(describe(keep, RANGES).strip("()").split(" | ")) == set(words.strip("()").split(" | "))


MIN = sympy.Float(torch.finfo(torch.float32).min)
KEEP, OTHER = J <= I, sympy.Ne(Load(0, B, J), 0)
FILL = sympy.Float(-1e9)
f32 = torch.float32


def parts(expr: Any, dtype: torch.dtype = f32) -> tuple[Any, Any, str]:
    masked = separate(expr, dtype)
    return masked.score, masked.keep, masked.dead() if masked.fills else ""


@pytest.mark.parametrize(
    ("expr", "score", "keep", "dead"),
    [
        (S / 2, S / 2, sympy.true, ""),
        (Where(KEEP, S, -sympy.oo), S, KEEP, "nan"),
        (Where(KEEP, -sympy.oo, S), S, sympy.Not(KEEP), "nan"),
        (S + Where(KEEP, 0, -sympy.oo), S, KEEP, "nan"),
        (Where(KEEP, S, MIN), S, KEEP, "mean"),
        (S + Where(KEEP, 0, MIN), S, KEEP, "mean"),
        (Where(KEEP, S, sympy.Float(-1e9)), S, KEEP, "mean"),
        (S + Where(KEEP, 0, sympy.Float(-1e9)), S, KEEP, "unknown"),
        (S + Where(KEEP, 0, MIN) + Where(OTHER, 0, MIN), S, KEEP & OTHER, "unknown"),
        (Where(KEEP, S, MIN) + Where(OTHER, 0, MIN), S, KEEP & OTHER, "unknown"),
        (Where(KEEP, Where(OTHER, S, MIN), MIN), S, KEEP & OTHER, "mean"),
        (Where(KEEP, Where(OTHER, S, sympy.Float(-1e9)), MIN), S, KEEP & OTHER, "unknown"),
        (S + Where(KEEP, FILL, Where(OTHER, MIN, 0)), S, ~KEEP & ~OTHER, "unknown"),
        (S + Where(KEEP, Where(OTHER, FILL, MIN), 0), S, ~KEEP, "unknown"),
        (S + Where(KEEP, 0, -100), S + Where(KEEP, 0, -100), sympy.true, ""),
        (S + Where(KEEP, 0, -10000), S + Where(KEEP, 0, -10000), sympy.true, ""),
        (Where(KEEP, S, MIN) / 2, S / 2, KEEP, "mean"),
        (Where(KEEP, S, MIN) * 2, S * 2, KEEP, "nan"),
        (Where(KEEP, S, 0), Where(KEEP, S, 0), sympy.true, ""),
        (Where(KEEP, S, sympy.oo), Where(KEEP, S, sympy.oo), sympy.true, ""),
        (S + Where(KEEP, Load(1, I, J), -sympy.oo), S + Load(1, I, J), KEEP, "nan"),
    ],
)
def test_a_score_is_separated_from_its_mask(expr: Any, score: Any, keep: Any, dead: str) -> None:
    assert parts(expr) == (score, keep, dead)


@pytest.mark.parametrize(
    ("expr", "one"),
    [
        (sympy.Min(Where(KEEP, 0, FILL), Where(OTHER, 0, FILL)), Where(KEEP & OTHER, 0, FILL)),
        (sympy.Max(Where(KEEP, 0, FILL), Where(OTHER, 0, FILL)), Where(KEEP | OTHER, 0, FILL)),
        (sympy.Max(Where(KEEP, 0, MIN) + Where(OTHER, 0, MIN), MIN), Where(KEEP & OTHER, 0, MIN)),
        (FILL * (1 - Where(KEEP, 1, 0) * Where(OTHER, 1, 0)), Where(KEEP & OTHER, 0, FILL)),
        (Where(KEEP, Where(OTHER, 0, FILL), FILL), Where(KEEP & OTHER, 0, FILL)),
        (Where(KEEP, 0, MIN) + Where(OTHER, 0, MIN), None),
    ],
)
def test_a_mask_that_is_made_of_masks_is_one(expr: Any, one: Any) -> None:
    found = one_choice(expr, f32)
    for a in (0, 1):
        for b in (0, 1):
            told = {KEEP: sympy.true if a else sympy.false, OTHER: sympy.true if b else sympy.false}
            exact = float(expr.xreplace(told))
            assert float(found.xreplace(told)) == (-float("inf") if exact < MIN else exact)
            assert one is None or float(one.xreplace(told)) == exact
    assert one is None or len(found.atoms(Where)) == 1


@pytest.mark.parametrize(
    ("expr", "added"),
    [
        (S - Where(KEEP, 0, -FILL), S + Where(KEEP, 0, FILL)),
        (-(Where(KEEP, 0, -FILL) - S), S + Where(KEEP, 0, FILL)),
        (-Where(KEEP, -S, -FILL), Where(KEEP, S, FILL)),
        (S - 2 * Where(KEEP, 0, -FILL), S + 2 * Where(KEEP, 0, FILL)),
        (S - sympy.Float(1.5) * Where(KEEP, 0, -MIN), S + Where(KEEP, 0, -sympy.oo)),
        (S * 2 + Where(KEEP, 0, FILL), S * 2 + Where(KEEP, 0, FILL)),
    ],
)
def test_a_mask_that_is_subtracted_is_added(expr: Any, added: Any) -> None:
    assert adding(expr, f32) == added


@pytest.mark.parametrize(
    ("score", "scores", "exact"),
    [
        (S - ROW, S, True),
        (4 * S - 4 * ROW, S, True),
        (S - 2 * ROW, S - ROW, True),
        (Where(KEEP, S, FILL) - ROW, Where(KEEP, S, FILL), True),
        (S - ROW / 2, S, False),
        (S + Where(KEEP, 0, FILL) - ROW, S, False),
        (ROW - S, S, False),
        (S, S, False),
    ],
)
def test_what_is_taken_off_is_the_maximum_of_these_scores(score: Any, scores: Any, exact: bool) -> None:
    assert takes_off(score, scores) == exact


def test_the_least_half_is_a_mask_of_half_scores_only() -> None:
    expr = Where(KEEP, S, -65504)
    assert parts(expr, torch.float16) == (S, KEEP, "mean")
    assert parts(expr, f32) == (expr, sympy.true, "")


def test_where_a_bias_is_chosen_the_large_number_alone_rounds() -> None:
    far = sympy.Float(-1e9)
    expr = S + Where(KEEP, Load(1, I, J), far)
    assert as_rounded(expr, f32, lambda _: False) == Where(KEEP, S + Load(1, I, J), Rounded(S + far, 24))


def test_a_shift_of_the_row_vanishes() -> None:
    assert without_row_shift(S / 2 - ROW) == S / 2
    assert sympy.expand(without_row_shift((S / 4 - ROW) * 4) - S) == 0


@pytest.mark.parametrize("expr", [S * ROW, S / ROW, sympy.tanh(S - ROW), ROW * J + S])
def test_a_row_statistic_that_does_more_is_refused(expr: Any) -> None:
    with pytest.raises(Miss):
        without_row_shift(expr)


BANDS = {
    "causal": (J <= I, Band(None, I + 1, True)),
    "prefix": (sympy.Or(J <= I, J < 7), Band(None, sympy.Max(I + 1, 7), True)),
    "causal or window": (
        sympy.Or(sympy.And(J <= I, J > I - 4), J < 3), Band(None, sympy.Max(I + 1, 3), False),
    ),
    "two windows": (
        sympy.Or(sympy.And(J <= I, J > I - 4), sympy.And(J <= I - 6, J > I - 9)), Band(I - 8, I + 1, False),
    ),
    "suffix or anti-causal": (sympy.Or(J >= I, J >= 5), Band(sympy.Min(I, 5), None, True)),
    "both sides": (sympy.Or(J >= I, J < 5), Band(None, None, False)),
    "causal prefix of a window": (
        sympy.And(sympy.Or(J <= I, J < 7), J > I - 9), Band(I - 8, sympy.Max(I + 1, 7), True),
    ),
    "even keys": (sympy.Eq(sympy.Mod(J, 2), 0), Band(None, None, False)),
    "causal even keys": (sympy.And(J <= I, sympy.Eq(sympy.Mod(J, 2), 0)), Band(None, I + 1, False)),
    "a window, the other way round": (sympy.Ge(3, sympy.Abs(I - J)), Band(I - 3, I + 4, True)),
    "keys and their halves": (J + FloorDiv(J, 2) <= I, Band()),
    "fewer keys for later queries": (J <= 9 - I, Band()),
    "more keys for later queries, at the front": (J >= 9 - I, Band()),
    "fewer keys for later queries, in steps": (9 - FloorDiv(I, 2) >= J, Band()),
    "a window as wide as its query": (sympy.Abs(I - J) <= FloorDiv(I, 2), Band()),
}  # fmt: skip


@pytest.mark.parametrize("name", BANDS)
def test_a_band_holds_what_is_kept(name: str) -> None:
    keep, expected = BANDS[name]
    found = band(keep)
    assert found == expected
    for i in range(12):
        kept = {j for j in range(12) if keep.xreplace({I: i, J: j}) == sympy.true}
        lower = 0 if found.lower is None else int(found.lower.xreplace({I: sympy.Integer(i)}))
        upper = 12 if found.upper is None else int(found.upper.xreplace({I: sympy.Integer(i)}))
        inside = {j for j in range(12) if lower <= j < upper}
        assert kept == inside if found.exact else kept <= inside


UNKNOWN = {
    "a diagonal for each head": J <= I + H,
    "a limit that data choose": Where(sympy.Ne(Load(0), 0), 3, 5) > J,
    "a window as wide as data say": sympy.Abs(I - J) <= Load(0),
    "a window for each head": sympy.Abs(I - J + H) <= 3,
    "a window around where data say": sympy.Abs(J - Load(0)) <= 3,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_band_is_of_what_all_heads_know_without_data(name: str) -> None:
    assert band(UNKNOWN[name]) == Band()
