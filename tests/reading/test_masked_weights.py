"""Weights that are set to 0 once more, after the softmax, where their scores were masked, as speech models do, lest a row
that sees no key gives NaN or a mean."""

# ruff: noqa: E501 (one line a program, so that the table can be read as one)

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equivalence import Outcome, check, tensors
from test_dead_rows import added, assert_as_eager, causal, inputs, keep, number
from torch import Tensor

Program = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
ROUTES = ["sdpa", "triton"]
MIN = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def masked(q: Tensor, k: Tensor, m: Tensor, f: float) -> Tensor:
    """The weights of masked scores."""
    return (q @ k.mT * 0.5).masked_fill(~m, f).softmax(-1)


def in_place(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
    scores = q @ k.mT * 0.5
    scores.masked_fill_(~m, f)
    weights = scores.softmax(-1)
    weights = weights.masked_fill_(~m, 0.0)
    return weights @ v


def wenet(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
    """A mask of 0 and 1, compared with 0."""
    hidden = m.long().eq(0)
    scores = (q @ k.mT * 0.5).masked_fill(hidden, f)
    return F.dropout(torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0), 0.1, training=False) @ v


def cpm(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
    """The mask is compared anew each time."""
    scores = (q @ k.mT * 0.5).masked_fill(m == torch.tensor(False), torch.scalar_tensor(f))
    return scores.softmax(-1).masked_fill(m == torch.tensor(False), torch.scalar_tensor(0.0)) @ v


CHOSEN: dict[str, Program] = {
    "masked_fill": lambda q, k, v, m, f: masked(q, k, m, f).masked_fill(~m, 0.0) @ v,
    "in place": in_place,
    "where": lambda q, k, v, m, f: torch.where(m, torch.where(m, q @ k.mT * 0.5, f).softmax(-1), 0.0) @ v,
    "where not": lambda q, k, v, m, f: torch.where(~m, 0.0, masked(q, k, m, f)) @ v,
    "zeros": lambda q, k, v, m, f: torch.where(m, masked(q, k, m, f), torch.zeros_like(q @ k.mT)) @ v,
    "added": lambda q, k, v, m, f: (q @ k.mT * 0.5 + added(m, f, q)).softmax(-1).masked_fill(~m, 0) @ v,
    "softmax in fp32": lambda q, k, v, m, f: (
        F.softmax((q @ k.mT * 0.5).masked_fill(~m, f), dim=-1, dtype=torch.float32).masked_fill(~m, 0.0).to(q.dtype) @ v
    ),
    "a mask of 0 and 1": wenet,
    "compared with a tensor": cpm,
    "twice": lambda q, k, v, m, f: masked(q, k, m, f).masked_fill(~m, 0.0).masked_fill(~m, 0.0) @ v,
    "and nan_to_num": lambda q, k, v, m, f: masked(q, k, m, f).nan_to_num().masked_fill(~m, 0.0) @ v,
    "two masks, filled one by one": lambda q, k, v, m, f: (
        masked(q, k, m & causal(q.shape[2], k.shape[2]), f).masked_fill(~m, 0.0).masked_fill(
            ~causal(q.shape[2], k.shape[2]), 0.0
        ) @ v
    ),
    "chosen, then multiplied": lambda q, k, v, m, f: masked(q, k, m, f).masked_fill(~m, 0.0).mul(m) @ v,
    "heads flattened": lambda q, k, v, m, f: (
        torch.bmm(
            masked(q, k, m, f).masked_fill(~m, 0.0).flatten(0, 1), v.flatten(0, 1)
        ).unflatten(0, q.shape[:2])
    ),
}  # fmt: skip
MULTIPLIED: dict[str, Program] = {
    "by each of two masks": lambda q, k, v, m, f: (masked(q, k, m & causal(6, 8), f) * m * causal(6, 8)) @ v,
    "by booleans": lambda q, k, v, m, f: (masked(q, k, m, f) * m) @ v,
    "by numbers": lambda q, k, v, m, f: (masked(q, k, m, f) * m.to(q.dtype)) @ v,
    "by numbers, from the left": lambda q, k, v, m, f: (m.float() * masked(q, k, m, f)).to(q.dtype) @ v,
    "by one mask of all heads": lambda q, k, v, m, f: (masked(q, k, m, f) * m.squeeze(1)[:, None].expand_as(m)) @ v,
}
"""NaN times 0 is NaN, and 1 / n times 0 is 0."""
FILLS = {torch.float32: ("inf", "min", -1e9), torch.float16: ("min",)}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CHOSEN)
def test_rows_without_keys_are_0(name: str, route: str) -> None:
    for dtype, fills in FILLS.items():
        for fill in fills:
            x, m = inputs(dtype), keep()
            assert_as_eager(CHOSEN[name], x, m, number(fill, dtype), route)
    assert (CHOSEN[name](*inputs(torch.float32), keep(), MIN)[2] == 0).all(), "which is what ours were compared with"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MULTIPLIED)
def test_weights_times_a_mask(name: str, route: str) -> None:
    for fill in FILLS[torch.float32]:
        assert_as_eager(MULTIPLIED[name], inputs(torch.float32), keep(), number(fill, torch.float32), route)
    rows = [MULTIPLIED[name](*inputs(torch.float32), keep(), fill)[2] for fill in (-math.inf, MIN)]
    assert rows[0].isnan().all()
    assert (rows[1] == 0).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("name", "fill"),
    [
        *((name, fill) for name in ("masked_fill", "a mask of 0 and 1") for fill in ("inf", "min")),
        *((name, "min") for name in ("added", "by numbers")),  # else eager's own are NaN
    ],
)
def test_gradients(name: str, fill: str, route: str) -> None:
    """Of rows without keys nothing comes back, whatever their scores were masked by."""
    program, f = (CHOSEN | MULTIPLIED)[name], number(fill, torch.float32)
    q, k, v = inputs(torch.float32)
    q[:, 1] /= 16
    x = [y.requires_grad_() for y in (q, k, v)]
    outcome = check(lambda q, k, v, m: program(q, k, v, m, f), *x, keep(), grad=True, routes={"attention": route})
    assert [(s.matched, s.route) for s in outcome.sites] == [(True, route)], outcome.reasons


def test_where_no_row_is_without_keys_the_mask_of_weights_may_be_a_part() -> None:
    """What is causal is hidden by the scores already."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        i, j = torch.arange(n)[:, None], torch.arange(n)
        scores = (q @ k.mT * 0.5).masked_fill((j > i) | (j < i - 2), -math.inf)
        return scores.softmax(-1).masked_fill(j > i, 0.0) @ v

    outcome = check(program, *tensors((2, 2, 8, 4), (2, 2, 8, 4), (2, 2, 8, 4), grad=True), grad=True)
    assert [(s.matched, s.mask) for s in outcome.sites] == [(True, "causal & window(3)")], outcome.reasons


def test_weights_that_are_returned_are_not_lost() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        weights = masked(q, k, m, -math.inf).masked_fill(~m, 0.0)
        return weights @ v, weights

    check(program, *inputs(torch.float32), keep())


def test_dropped_out_before_or_after() -> None:
    """Both are dropout of what is left; a rate of 0 at inference."""
    for program in (
        lambda q, k, v, m: F.dropout(masked(q, k, m, -math.inf).masked_fill(~m, 0.0), 0.3, training=False) @ v,
        lambda q, k, v, m: F.dropout(masked(q, k, m, -math.inf), 0.3, training=False).masked_fill(~m, 0.0) @ v,
    ):
        outcome = check(program, *inputs(torch.float32), keep())
        assert [s.matched for s in outcome.sites] == [True], outcome.reasons


def sink(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
    scores = (q @ k.mT * 0.5).masked_fill(~m, f)
    extra = torch.ones_like(scores[..., :1])
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1].masked_fill(~m, 0.0) @ v


@pytest.mark.parametrize("route", ROUTES)
def test_beside_a_sink(route: str) -> None:
    for fill in (-math.inf, MIN):
        outcome = check(
            lambda q, k, v, m, fill=fill: sink(q, k, v, m, fill),
            *inputs(torch.float32), keep(), routes={"attention": route},
        )  # fmt: skip
        assert [s.matched for s in outcome.sites] == [True], outcome.reasons


# -- what is left alone ------------------------------------------------------------------------------------------------


def far_bias(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor) -> Tensor:
    """What is kept may score as low as what is masked."""
    return (q @ k.mT + b * 1e30).masked_fill(~m, -1e9).softmax(-1).masked_fill(~m, 0.0) @ v


NEAR_MISSES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "another mask": ("do not add up", lambda q, k, v, m, b: masked(q, k, m, MIN).masked_fill(b > 0, 0.0) @ v),
    "a stricter mask": ("do not add up", lambda q, k, v, m, b: masked(q, k, m, MIN).masked_fill(~m | (b > 0), 0.0) @ v),
    "the opposite": ("do not add up", lambda q, k, v, m, b: masked(q, k, m, MIN).masked_fill(m, 0.0) @ v),
    "no mask of the scores": ("do not add up", lambda q, k, v, m, b: (q @ k.mT).softmax(-1).masked_fill(~m, 0.0) @ v),
    "scores that are masked a little": ("do not add up", lambda q, k, v, m, b: masked(q, k, m, -100.0).masked_fill(~m, 0.0) @ v),
    "another number": ("not by 0", lambda q, k, v, m, b: masked(q, k, m, MIN).masked_fill(~m, 0.5) @ v),
    "another tensor": ("not by 0", lambda q, k, v, m, b: torch.where(m, masked(q, k, m, MIN), b) @ v),
    "NaN": ("NaN", lambda q, k, v, m, b: masked(q, k, m, MIN).masked_fill(~m, math.nan) @ v),
    "small weights": ("", lambda q, k, v, m, b: F.threshold(masked(q, k, m, MIN), 0.2, 0.0) @ v),
    "weights by their own size": ("depends on them", lambda q, k, v, m, b: (lambda w: torch.where(w > 0.2, w, 0.0))(masked(q, k, m, MIN)) @ v),
    "times their own size": ("depends on them", lambda q, k, v, m, b: (lambda w: w * (w > 0.2))(masked(q, k, m, MIN)) @ v),
    "times numbers": ("not multiplied with values", lambda q, k, v, m, b: (masked(q, k, m, MIN) * b) @ v),
    "times 1 less what is hidden": (
        "not multiplied with values",
        lambda q, k, v, m, b: (masked(q, k, m, MIN) * (1.0 - (~m).float())) @ v,
    ),
    "times 2 where they are kept": ("", lambda q, k, v, m, b: (masked(q, k, m, MIN) * (m.float() * 2)) @ v),
    "only a part, and rows without keys": (
        "some of its weights are left",
        lambda q, k, v, m, b: masked(q, k, m & (b > 0), MIN).masked_fill(~m, 0.0) @ v,
    ),
    "one of two fills, times the mask": (
        "which of its weights are NaN",
        lambda q, k, v, m, b: ((q @ k.mT).masked_fill(b > 0, -math.inf).masked_fill(~m, MIN).softmax(-1) * (m & ~(b > 0))) @ v,
    ),
    "a part is chosen, all are multiplied": (
        "which of its weights are NaN",
        lambda q, k, v, m, b: (masked(q, k, m & (b > 0), -math.inf).masked_fill(~m, 0.0) * (m & (b > 0))) @ v,
    ),
    "scores that may be as low as masked ones": ("as low as", far_bias),
    "a mask of rows": ("do not add up", lambda q, k, v, m, b: masked(q, k, m, MIN).masked_fill(~m.any(-1, keepdim=True), 0.0) @ v),
}  # fmt: skip


def left(program: Callable[..., Tensor], grad: bool) -> Outcome:
    generator = torch.Generator().manual_seed(1)
    m = torch.rand(2, 1, 6, 8, generator=generator) > 0.4
    m[1, 0, 3] = False
    q, k, v = tensors((2, 2, 6, 4), (2, 2, 8, 4), (2, 2, 8, 4), grad=grad)
    b = torch.randn(2, 2, 6, 8, generator=generator)
    return check(program, q, k, v, m, b, grad=grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str, grad: bool) -> None:
    why, program = NEAR_MISSES[name]
    outcome = left(program, grad)
    assert not any(site.matched for site in outcome.sites)
    assert why in outcome.reasons, outcome.reasons


def test_two_fills_where_all_that_is_masked_is_set_to_0() -> None:
    """Whatever rows without keys had, they have 0 then."""
    outcome = left(
        lambda q, k, v, m, b: (
            (q @ k.mT).masked_fill(b > 0, -math.inf).masked_fill(~m, MIN).softmax(-1).masked_fill(~m | (b > 0), 0.0) @ v
        ),
        False,
    )
    assert [s.matched for s in outcome.sites] == [True], outcome.reasons
