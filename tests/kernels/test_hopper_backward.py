"""The backward for Hopper, as far as a CPU shows it: what it is launched with, what it visits, what it declines."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from attention_cases import CASES, Case, Inputs, Sizes, inputs, named
from backward_cases import check, floating
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
from xfcompile.score import I, J
from xfcompile.site import Band, ScoreSpec

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
    assert reason(window(511)) is not None and reason(window(512)) is None
    assert reason(named("soft_cap")) == "a slope of its own for each score takes registers that are not left"


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_kernels_are_given_what_they_take(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(lists, "run", lambda *about: lists.tightest(*about[:9]))
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


class Numbers(types.SimpleNamespace):
    """What the text's functions on whole numbers need of `triton.language` and Gluon's, for one number at a time."""

    constexpr = int
    int64 = int32 = int

    @staticmethod
    def where(condition: bool, a: int, b: int) -> int:
        return a if condition else b

    minimum, maximum = staticmethod(min), staticmethod(max)

    @staticmethod
    def cast(x: Any, dtype: type) -> int:
        return int(x)


class Number(int):
    def to(self, dtype: type) -> int:
        return int(self)


def functions(case: Case, listed: Tensor | None) -> dict[str, Any]:
    """`bounds` and `tile` of the text, as Python computes them."""
    spec = case.spec
    text = hopper_backward.module(written(spec))
    wanted = ("lower", "upper", "first_row_lower", "first_row_upper", "bounds", "tile")
    parts = [part for part in text.split("\n\n\n") if part.split("def ")[-1].split("(")[0].strip() in wanted]
    source = "\n\n\n".join(parts) or ""
    numbers = Numbers()
    if listed is not None:
        flat = listed.flatten().tolist()
        numbers.load = lambda at, mask=True, other=0: flat[at] if mask else other
    scope: dict[str, Any] = {"gl": numbers, "tl": numbers, "list_ptr": 0}
    for decorator in ("@triton.jit", "@gluon.jit"):
        source = source.replace(decorator, "")
    exec(source.replace(".to(gl.int64)", ""), scope)
    return scope


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
    scope = functions(Case(case.name, spec), listed)
    keep = kept(spec, x, (2, 2, lq, lk))
    step = lists.steps(listed)
    more = [] if listed is None else [0, *step]
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
