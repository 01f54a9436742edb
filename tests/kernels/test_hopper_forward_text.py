"""What the text of the attention kernel for Hopper says, run by torch: against fp64, and that no stage is waited for in
vain, read too early or overwritten too early."""

from __future__ import annotations

from dataclasses import replace

import hopper_in_torch
import in_turns
import pytest
import torch
from attention_cases import CASES, Case, Sizes, check, inputs, named
from hopper_cases import ALIBI, CAUSAL, CLASSES, FLOAT, dense, is_taken, of_class, usual

from xfcompile.kernels.attention import hopper_variant
from xfcompile.site import ScoreSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = Sizes(2, 2, 1, 430, 700)
"""Ragged blocks of rows, and more tiles than stages, for heads that share keys."""


def checked(
    case: Case,
    sizes: Sizes,
    dim: int,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.bfloat16,
    **about: object,
) -> None:
    """The text's results against the definition. about: how it is launched."""
    monkeypatch.setattr("attention_cases.call", lambda spec, x: hopper_in_torch.attention(spec, x, **about))
    check(case, inputs(case, dtype, "transposed", replace(sizes, dq=dim, dv=dim)))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CLASSES)
def test_each_class_of_sites(name: str, dim: int, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = of_class(name)
    assert usual(case, torch.bfloat16, dim) == hopper_variant.USUAL[*CLASSES[name], dim].value
    checked(case, SIZES, dim, monkeypatch)


@pytest.mark.parametrize("case", [case for case in CASES if is_taken(case)], ids=lambda case: case.name)
def test_each_case(case: Case, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(case, Sizes(2, 2, 2, 150, 200), 64, monkeypatch, torch.float16)


WAYS = {
    "neither": {},
    "persistent": {"persistent": True},
    "queued": {"queued": True},
    "in turns": {"turns": True, "queued": True},
    "three in turns": {"turns": True, "queued": True, "warpgroups": 3},
    "two stages": {"stages": 2, "persistent": True},
    "polynomials": {"polynomials": 3, "persistent": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["causal", "padding_mean", "alibi, causal"])
def test_ways_to_hand_out_work(name: str, way: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By programs of which one has it all, by some that share it, and by more than there are pieces."""
    case = of_class(name)
    if "warpgroups" in WAYS[way] and CLASSES[name][1] == "some":
        name = "plain"  # lists are of 128 rows
        case = named(name)
    plain = {"persistent": False, "queued": False, "turns": False, "warpgroups": 2, "stages": 4, "polynomials": 0}
    variant = replace(usual(case, torch.bfloat16, 64), **(plain | WAYS[way]))
    for multiprocessors in (1, 3):
        checked(case, Sizes(1, 2, 1, 333, 600), 64, monkeypatch, variant=variant, multiprocessors=multiprocessors)
    if way != "neither":  # whose programs have a piece each
        for batch, lq in ((1, 70), (2, 333)):
            sizes = Sizes(batch, 2, 2, lq, 300)
            checked(case, sizes, 64, monkeypatch, variant=variant, multiprocessors=1, more=4)


@pytest.mark.parametrize("name", ["causal", "plain"])
@pytest.mark.parametrize("seed", [1, 2])
def test_warps_in_other_orders(seed: int, name: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(named(name), SIZES, 64, monkeypatch, seed=seed)


LENGTHS = [(1, 1), (65, 64), (64, 513), (129, 127), (385, 128), (257, 641)]
HEADS = [Sizes(1, 3, 1, dq=64), Sizes(1, 4, 2, dq=40), Sizes(2, 1, 1, dq=72)]


@pytest.mark.parametrize(("lq", "lk"), LENGTHS)
@pytest.mark.parametrize(
    "name", ["plain", "bottom_right_dead_rows", "padding_mean", "alibi, causal", "soft_cap_causal"]
)
def test_lengths(name: str, lq: int, lk: int, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with heads that share keys, and head dims that are padded."""
    heads = HEADS[(LENGTHS.index((lq, lk)) + len(name)) % len(HEADS)]
    sizes = replace(heads, lq=lq, lk=lk)
    checked(of_class(name), sizes, heads.dq, monkeypatch, heads_first=lq % 2 == 0, multiprocessors=2)


@pytest.mark.parametrize("shared", ["", "b"])
@pytest.mark.parametrize("masked", [None, float(torch.finfo(torch.bfloat16).min), -torch.inf], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_of_each_score(
    causal: bool, masked: float | None, shared: str, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dense(torch.bfloat16, shared, masked)
    case = replace(case, spec=replace(case.spec, **CAUSAL)) if causal else case
    variant = usual(case, torch.bfloat16, 128)
    assert variant.tiles and variant.queued != causal
    checked(case, Sizes(2, 2, 1, 300, 424), 128, monkeypatch)
    checked(case, Sizes(1, 2, 2, 200, 264), 128, monkeypatch, variant=replace(variant, queued=causal))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("size", [1e7, 1e12, 3e30])
def test_slopes_that_leave_one_key_each(
    size: float, dim: int, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sign in (-1, 1):
        slopes = sign * size * torch.tensor([1.0, 1.3])
        case = Case("slopes", ScoreSpec(ALIBI, operands=(FLOAT,), far=True), lambda z, slopes=slopes: [slopes])
        assert usual(case, torch.bfloat16, dim).columns
        checked(case, Sizes(1, 2, 1, 300, 500), dim, monkeypatch)


_LEAVE = "    mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)\n"
_LAST = "acc = warpgroup_mma_wait(0, deps=[acc_])\n", "mbarrier.arrive(empty.index(at), count=1)\n"
_NEXT = "mbarrier.wait(full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=t + 1 < n)"
WAITS, TWICE, NONE, IN_FLIGHT = "all that is left waits", "more have arrived", "nan > ", "not waited for"

MISTAKES = {
    "a stage is filled while it is read": ("mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)", "pass", TWICE),
    "a stage is given back by one for both": ("init(empty.index(n), count=2)", "init(empty.index(n), count=1)", WAITS),
    "a stage is never given back": (f"{_LEAVE}    acc = ", "    acc = ", WAITS),
    "a stage is given back while it is read": ("empty.index((step - 1) % STAGES)", "empty.index(step % STAGES)", WAITS),
    "values are given back too early": (f"{_LAST[0]}        {_LAST[1]}", f"{_LAST[1]}        {_LAST[0]}", NONE),
    "a stage is read before it is full": (_NEXT, "pass", TWICE),
    "the first is read before it is full": (
        "mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)",
        "pass",
        TWICE,
    ),
    "the last is read before it is full": ("mbarrier.wait(full.index(at), step // STAGES & 1)", "pass", TWICE),
    "a stage is of the other parity": (_NEXT, _NEXT.replace("& 1", "& 1 ^ 1"), WAITS),
    "too few bytes": ("K_BYTES + V_BYTES", "K_BYTES", "more bytes"),
    "too many bytes": ("K_BYTES + V_BYTES", "K_BYTES + V_BYTES + 16", WAITS),
    "scores are read too early": ("warpgroup_mma_wait(1, deps=[s_])", "warpgroup_mma_wait(2, deps=[s_])", IN_FLIGHT),
    "sums are read too early": ("mma_wait(0, deps=[acc_, p])", "mma_wait(1, deps=[acc_, p])", IN_FLIGHT),
    "queries are never given back": ("mbarrier.arrive(q_empty.index(w), count=1)", "pass", WAITS),
    "queries are read too early": ("mbarrier.wait(q_full.index(w), turn & 1)", "pass", TWICE),
    "queries are overwritten": ("mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)", "pass", TWICE),
    "one place for two pieces of work": ("queue.index(turn & 1)", "queue.index(0)", WAITS),
    "a piece of work is left out": ("gl.num_programs(0)", "gl.num_programs(0) + 1", NONE),
}
"""What is wrong, what of the text is replaced, and by what is told."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that is right but for that."""
    right, wrong, told = MISTAKES[mistake]
    with pytest.raises((AssertionError, in_turns.Deadlock), match=told):
        checked(named("causal"), SIZES, 64, monkeypatch, changed=(right, wrong))
