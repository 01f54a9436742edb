"""The backward for Hopper, as far as a CPU shows it: what it is launched with, what it visits, what it declines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gluon_in_torch
import hopper_in_torch
import in_turns
import pytest
import sympy
import torch
from attention_cases import CASES, Case, Inputs, Sizes, inputs, named
from backward_cases import CAPPED, check, floating
from hopper_cases import dense
from torch import Tensor

from xfcompile.kernels.attention import (
    backward_layout,
    blocks,
    fit,
    hopper_backward,
    launch_hopper_backward,
    lists,
    lists_sizes,
    prepare,
    programs,
)
from xfcompile.kernels.attention.arguments import mask_values
from xfcompile.kernels.attention.backward_writer import Writer
from xfcompile.kernels.attention.gradient import gradients, why_not
from xfcompile.kernels.attention.repeat import Launch
from xfcompile.score import I, J, Load, S, Where
from xfcompile.site import Band, Operand, ScoreSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = named("plain").spec.score
ROWS, KEYS = hopper_backward.ROWS, hopper_backward.KEYS


def reason(case: Case, dtype: torch.dtype = torch.bfloat16, dim: int = 64, needed: Sequence[int] = ()) -> str | None:
    made = backward_layout.prepare(prepare(case.spec), tuple(needed))
    return hopper_backward.why_not(made.spec, made.made.gradients, dtype, dim, dim)


def window(width: int) -> Case:
    band = Band(I - width + 1, I + 1, exact=True)
    return Case(f"window of {width}", ScoreSpec(SCALE, sympy.And(J <= I, I - width < J), band=band))


def written(spec: ScoreSpec) -> Writer:
    return hopper_backward.writer(spec, gradients(spec, ()), torch.bfloat16)


TAKEN = [case for case in CASES if why_not(case.spec) is None and reason(case) is None]


def test_what_it_takes() -> None:
    names = {case.name for case in TAKEN}
    assert {"plain", "causal", "padding_mean", "sink", "additive_padding", "far_number"} <= names
    assert {"soft_cap", "soft_cap_causal"} <= names
    assert [reason(case) for case in CAPPED] == [None] * len(CAPPED)
    assert "bias_hij" not in names and "t5" not in names and "no_dot_product" not in names
    assert reason(named("plain"), torch.float32) == "it multiplies numbers of 16 bits"
    assert reason(named("plain"), dim=36) == "head dims"
    assert reason(named("plain"), dim=256) == "head dims"
    assert (
        reason(named("additive_padding"), needed=(0,))
        == "what is added has a gradient that is a sum over keys or queries"
    )
    assert reason(named("sink"), needed=(0,)) is None
    assert reason(named("window")) == "a narrow band is visited in smaller tiles"
    for dim, width in hopper_backward.NARROW.items():
        assert reason(window(width - 1), dim=dim) is not None and reason(window(width), dim=dim) is None
    assert reason(named("functions")) == "a slope that may not be finite where a weight is 0"


@pytest.mark.parametrize(
    ("slope", "bounded"),
    [
        (1 - sympy.tanh(S / 50) ** 2, True),
        (sympy.tanh(3 - S) - sympy.tanh(S) ** 3 / 2, True),
        (S, False),
        (S * sympy.tanh(S), False),
        (1 / (1 + S**2), False),  # which is, but as a quotient of infinities it is NaN
        (1 / sympy.tanh(S), False),
        (sympy.tanh(S**2 - S), False),  # NaN of infinity
        (sympy.tanh(S / (I - J)), False),  # NaN of 0 by 0
        (sympy.tanh(S * Load(0, J)), False),
        (sympy.exp(-(S**2)), False),
        (Where(S > 1, S, 0), False),
    ],
)
def test_slopes_by_which_weights_of_0_stay_0(slope: sympy.Expr, bounded: bool) -> None:
    assert hopper_backward.is_bounded(slope, ()) == bounded


def test_a_slope_for_each_head_may_be_infinite() -> None:
    spec = ScoreSpec(S * Load(0, 0), operands=(Operand(torch.float32, 1),))
    assert reason(Case("a scale that is learned", spec)) == "a slope that may not be finite where a weight is 0"


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_kernels_are_given_what_they_take(case: Case, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument by its place: tensors, numbers and what is free, then the constants by their names."""
    seen: list[str] = []

    def launched(self: Launch, tensors: Sequence[Tensor], free: Sequence[Any] = ()) -> None:
        names, constants = self.kernel.arg_names, list(self.constants)
        given = len(tensors) + len(self.numbers) + len(free)
        assert sorted(names[given:]) == sorted(constants), self.kernel
        pointers = [name for name in names if name.endswith(("_ptr", "_desc"))]
        assert names[: len(tensors)] == pointers
        assert [name for name in names if name.endswith("_desc")] == names[: len(self.described)]
        for tensor, described in zip(tensors, self.described, strict=False):
            assert tuple(tensor.shape) == described.shape or tensor.ndim == len(described.shape)
        seen.append(self.kernel.__name__)

    monkeypatch.setattr(Launch, "__call__", launched)
    monkeypatch.setattr(launch_hopper_backward, "_why_not_these", lambda call: None)
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    monkeypatch.setattr(lists_sizes, "tile_sizes", lambda *about: (128, KEYS))
    monkeypatch.setattr(lists, "run", lists.tightest)
    z = case.sizes
    x = inputs(case, torch.bfloat16, "contiguous", Sizes(2, 4, 2, z.lq, z.lk, 64, 64))
    backward(case, x)
    paired = reason(case) is None and (case.spec.sink is not None or written(case.spec).exact)
    main = [name for name in seen if "_dead_" not in name]
    assert main[-3:] == ["prepare_rows", "attention_backward", "finish_dq"]
    assert ("attention_backward_dq" in seen) == paired


def backward(case: Case, x: Inputs) -> None:
    """The launches of a backward whose kernels write nothing."""
    from xfcompile.kernels.attention import launch_backward
    from xfcompile.kernels.attention.backward_layout import Needs

    needed = tuple(floating(x)) if case.spec.sink is not None else ()
    needs = Needs(True, True, True, needed)
    out = torch.zeros(x.q.shape[:3] + x.v.shape[3:], dtype=x.q.dtype)
    lse = torch.zeros(x.q.shape[:3])
    launch_backward.run(out, x.q, x.k, x.v, out, lse, x.operands, x.ints, x.floats, prepare(case.spec), needs)


OTHERS = ["plain", "bottom_right_dead_rows", "padding_mean", "documents", "sink", "alibi", "far_keys", "negative_scale"]


@pytest.mark.parametrize(
    ("case", "dim"),
    [
        *[(named(name), 64) for name in OTHERS],
        *[(named("soft_cap"), 64), (named("soft_cap"), 128), (named("soft_cap_causal"), 96)],
        *[(case, 48) for case in CAPPED],
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_text_says_what_gradients_are(
    case: Case, dim: int, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ragged blocks and tiles, for heads that share keys."""
    ran = hopper_in_torch.backward(monkeypatch)
    monkeypatch.setattr("backward_cases.floating", floating if case.spec.sink is not None else lambda x: [])
    check(case, inputs(case, torch.float16, "contiguous", Sizes(2, 2, 1, 150, 200, dim, dim)))
    assert ran == ["prepare_rows", "attention_backward", "finish_dq"]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", [named("causal"), window(300), dense(torch.float16, "b", None)], ids=lambda x: x.name)
def test_the_text_of_more_tiles_than_stages(
    case: Case, dim: int, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = hopper_in_torch.backward(monkeypatch)
    monkeypatch.setattr(hopper_backward, "NARROW", {64: 256, 128: 256})
    monkeypatch.setattr("backward_cases.floating", lambda x: [])
    check(case, inputs(case, torch.float16, "contiguous", Sizes(1, 2, 2, 400, 416, dim, dim)))
    assert ran == ["prepare_rows", "attention_backward", "finish_dq"]


@pytest.mark.parametrize("slope", [200.0, 1.3e4, 1.3e7])
@pytest.mark.parametrize("hopper", [False, True], ids=["triton", "gluon"])
def test_weights_of_far_slopes_below_a_diagonal(
    slope: float, hopper: bool, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward has lse as a sum of the block's first row's and what its own row has more, which may both be far from
    0 where lse is not."""
    if hopper:
        hopper_in_torch.backward(monkeypatch)
    monkeypatch.setattr("backward_cases.floating", lambda x: [])
    score = SCALE + Load(0, 0) * (J - I)
    spec = ScoreSpec(score, J <= I, operands=(Operand(torch.float32, 1),), band=Band(None, I + 1, True), far=True)
    case = Case("steep", spec, lambda z: [torch.tensor([slope])])
    check(case, inputs(case, torch.float16, "contiguous", Sizes(1, 1, 1, 64, 64, 64, 64)), least=0.1)


WAITS, TWICE, NONE, IN_FLIGHT = "all that is left waits", "more have arrived", "d[qkv]: nan > ", "not waited for"

MISTAKES = {
    "a stage is filled while it is read": ("mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)", "pass", TWICE),
    "a stage is never given back": ("mbarrier.arrive(empty.index(at), count=1)", "pass", WAITS),
    "a stage is read too early": ("(step + 1) // STAGES & 1, pred=t + 1 < n)", "0, pred=False)", WAITS),
    "keys are read too early": ("mbarrier.wait(own, 0)", "pass", NONE),
    "too few bytes": ("* (D + DIM_V) * 2 + ROWS * 8", "* (D + DIM_V) * 2", "more bytes"),
    "weights are read behind no fence": ("ds_smem.store(ds_)\n    fence_async_shared()", "ds_smem.store(ds_)", NONE),
    "a product is read too early": (
        "warpgroup_mma_wait(2, deps=[dp_])",
        "warpgroup_mma_wait(3, deps=[dp_])",
        IN_FLIGHT,
    ),
    "what is added is overwritten": ("tma.store_wait(1 if LATER else 0)", "tma.store_wait(2)", NONE),
    "the last is not added": ("tma.store_wait(0)", "pass", "dq: "),
}
"""What is wrong, what of the text is replaced, and by what is told."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_the_text_are_found(mistake: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, told = MISTAKES[mistake]
    hopper_in_torch.backward(monkeypatch, (right, wrong))
    case = named("causal")
    lk = 200 + list(MISTAKES).index(mistake)  # of its own: launches are remembered by sizes
    with pytest.raises((AssertionError, in_turns.Deadlock), match=told):
        check(case, inputs(case, torch.float16, "contiguous", Sizes(1, 1, 1, 400, lk, 64, 64)))


def test_where_it_does_not_run_the_other_kernels_do(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("causal")
    tried = []

    def fails(*about: Any) -> None:
        tried.append(about)
        raise fit.DoesNotCompile("no such instruction")

    monkeypatch.setattr(launch_hopper_backward, "_why_not_these", lambda call: None)
    monkeypatch.setattr(launch_hopper_backward.HopperBackward, "__call__", fails)
    x = inputs(case, torch.float16, "contiguous", Sizes(1, 2, 2, 60, 60, 64, 64))
    check(case, x)
    check(case, x)
    assert len(tried) == 1  # and is not tried again


def test_sums_in_any_order_are_not_for_those_who_ask_for_the_same_numbers(
    interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(launch_hopper_backward, "_why_not_these", lambda call: tried.append(call))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check(named("causal"), inputs(named("causal"), torch.float16, "contiguous", Sizes(1, 2, 2, 60, 60, 64, 64)))
    assert not tried


# -- which tiles ---------------------------------------------------------------------------------------------------


BANDS = ["plain", "causal", "causal_more_rows", "bottom_right", "dead_blocks_mean"]
LISTED = ["chunks", "padding_mean", "padding_zero", "some_rows_mean", "nothing_kept"]


@pytest.mark.parametrize("lengths", [(300, 300), (64, 700), (700, 64), (257, 130), (1000, 1000)])
@pytest.mark.parametrize("case", [*map(named, [*BANDS, *LISTED]), window(256), window(300)], ids=lambda case: case.name)
def test_each_tile_that_keeps_something_is_visited_once(case: Case, lengths: tuple[int, int]) -> None:
    lq, lk = lengths
    x = inputs(case, torch.float32, "contiguous", Sizes(2, 2, 2, lq, lk, 64, 64))
    prepared = programs.program(prepare(case.spec))
    spec = prepared.spec
    scalars = dict(zip((s.name for s in spec.scalars), (*x.ints, *x.floats), strict=True))
    listed = None
    if prepared.mask is not None:
        values = mask_values(prepared, x.operands, prepared.numbers(x.ints, x.floats))
        listed = lists.tightest(x.q, *values, (2, 2, lq, lk), 128, KEYS, prepared.mask, by_key=True)
    scope = gluon_in_torch.scope(hopper_backward.module(written(spec)))
    keep = kept(spec, x, (2, 2, lq, lk))
    step = lists.steps(listed)
    more = [] if listed is None else [gluon_in_torch.Pointer.to(listed), *step]
    for b in range(2):
        for block in range(-(-lk // KEYS)):
            n, masked, *which = scope["bounds"](b, 1, block, lq, lk, *scalars.values(), *more, ROWS, KEYS, 128)
            starts = [scope["tile"](t, n, masked, *which, *more[:1], ROWS, 128) for t in range(n)]
            assert len(set(starts)) == n >= 1
            keys = keep[b, 1, :, block * KEYS : (block + 1) * KEYS]
            for start in range(0, lq, ROWS):
                if keys[start : start + ROWS].any():
                    assert start in starts
            for start in starts[masked:]:
                assert keys[start : start + ROWS].all() and (block + 1) * KEYS <= lk
            tall = 128 if listed is not None else ROWS  # `padded` of the launch
            assert all(0 <= start < -(-lq // tall) * tall and start % ROWS == 0 for start in starts)


def kept(spec: Any, x: Inputs, shape: tuple[int, int, int, int]) -> Tensor:
    from xfcompile.kernels.attention import reference

    evaluate = reference.evaluator(spec, shape, x.operands, x.ints, x.floats, torch.float32, x.q.device)
    return torch.as_tensor(evaluate(spec.keep)).bool().expand(shape)


assert blocks.HEADER == 3  # numbers before a list's tiles: the text counts on it
