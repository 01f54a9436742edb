"""The backward for Hopper on one: against fp64 and eager's own error, and that it is this kernel that ran."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from attention_cases import CASES, Case, Inputs, Sizes, call, inputs, named
from backward_cases import CAPPED, DIFFERENTIABLE, check, floating
from bias_cases import AXES, MASKS, biased

from xfcompile.kernels.attention import launch_backward, launch_hopper_backward, lists_sizes, prepare
from xfcompile.kernels.attention.backward_layout import Needs
from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Band, Operand, ScoreSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

HALVES = [torch.float16, torch.bfloat16]
SCALE = named("plain").spec.score

Ran = list[bool]
Written = list[list[int]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Whether each backward was this kernel's, which is for larger tensors than these."""
    return _noted(monkeypatch, lambda loads: loads is not None)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """The loads whose gradients it wrote, of each backward that was its own."""
    return _noted(monkeypatch, lambda loads: ["not its own"] if loads is None else [*loads])


def _noted(monkeypatch: pytest.MonkeyPatch, what: Callable[[Sequence[int] | None], Any]) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(launch_hopper_backward, "multiprocessors", lambda device: 0)
    run = launch_hopper_backward.run

    def noting(*about: Any) -> Sequence[int] | None:
        loads = run(*about)
        found.append(what(loads))
        return loads

    monkeypatch.setattr(launch_backward.launch_hopper_backward, "run", noting)
    return found


def on_gpu(x: Inputs) -> Inputs:
    return Inputs(x.q.cuda(), x.k.cuda(), x.v.cuda(), [y.cuda() for y in x.operands], x.ints, x.floats)


def frozen(x: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradients by operands."""
    monkeypatch.setattr("backward_cases.floating", lambda x: [])


SURE = {"plain", "causal", "bottom_right", "padding_mean", "padding_zero", "sink", "soft_cap", "soft_cap_causal"}
SURE |= {case.name for case in CAPPED}
"""Cases that this kernel has to take."""


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*DIFFERENTIABLE, *CAPPED], ids=lambda case: case.name)
def test_without_gradients_of_what_is_added(
    case: Case, dtype: torch.dtype, dim: int, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    x = on_gpu(inputs(case, dtype, "transposed", Sizes(2, 4, 2, 330, 330, dim, dim)))
    frozen(x, monkeypatch)
    check(case, x)
    assert ran[0] or case.name not in SURE


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("size", [1e7, 1e12, 3e30])
@pytest.mark.parametrize("sign", [-1, 1])
def test_slopes_that_leave_one_key_each(
    sign: int, size: float, dim: int, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kernels that round such a score differently are apart by more than any weight."""
    slopes = sign * size * torch.tensor([1.0, 1.1, 1.3, 1.7])
    spec = ScoreSpec(SCALE + Load(0, H) * (J - I), operands=(Operand(torch.float32, 1),), far=True)
    case = Case("slopes", spec, lambda z: [slopes])
    x = on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, 4, 2, 1000, 1000, dim, dim)))
    frozen(x, monkeypatch)
    check(case, x)
    assert ran == [True]


@pytest.mark.parametrize(("lq", "lk"), [(257, 64), (256, 1000), (1000, 129), (640, 640)])
@pytest.mark.parametrize(("dq", "dv"), [(40, 64), (64, 64), (72, 128), (128, 96)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("name", ["plain", "bottom_right", "padding_mean", "sink", "soft_cap_causal"])
def test_lengths_and_head_dims(
    name: str, heads: tuple[int, int], dq: int, dv: int, lq: int, lk: int, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    case = named(name)
    x = on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, *heads, lq, lk, dq, dv)))
    check(case, x)
    assert ran == [True]


@pytest.mark.parametrize(("width", "dim"), [(512, 64), (700, 64), (256, 128), (300, 128), (700, 128)])
def test_wide_windows(width: int, dim: int, ran: Ran) -> None:
    band = Band(I - width + 1, I + 1, exact=True)
    case = Case("window", ScoreSpec(SCALE, sympy.And(J <= I, I - width < J), band=band))
    check(case, on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, 4, 2, 1000, 1000, dim, dim))))
    assert ran == [True]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (B, 0), (0, H), (B, H)])
def test_a_learned_bias_of_each_score(
    place: tuple[object, object], dtype: torch.dtype, dim: int, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    spec = ScoreSpec(SCALE + Load(0, *place, I, J), operands=(Operand(dtype, 4),))
    sizes = Sizes(2, 4, 4, 320, 384, dim, dim)
    shape = (2 if place[0] is B else 1, 4 if place[1] is H else 1, 320, 384)
    case = Case("bias", spec, lambda z: [torch.randn(shape, generator=torch.Generator().manual_seed(3))])
    x = on_gpu(inputs(case, dtype, "transposed", sizes))
    x = dataclasses.replace(x, operands=[x.operands[0].to(dtype)])
    check(case, x)
    assert ran == [True]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("mask", [mask for mask in MASKS if "window" not in mask])
def test_a_learned_bias_beside_a_mask(
    mask: str, axes: str, dtype: torch.dtype, dim: int, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has an element for each score, or is added up by a kernel of its own; of more tiles than stages."""
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    case = biased(mask, axes, dtype)
    for batch, heads, lengths in ((2, (4, 2), (330, 264)), (1, (2, 2), (1000, 712))):
        x = inputs(case, dtype, "transposed", Sizes(batch, *heads, *lengths, dim, dim))
        check(case, on_gpu(x))
    number = len(case.spec.operands) - 1
    alone = [axes == "each", axes in ("each", "of heads")]
    listed = mask in ("documents", "padding_mean")  # in smaller tiles, maybe
    assert listed or written == [[number] if own else [] for own in alone]


def test_it_gives_way_to_kernels_with_the_same_numbers_every_time(ran: Ran) -> None:
    case = named("causal")
    x = on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, 4, 4, 700, 700, 64, 64)))
    out, lse = call(case.spec, x)
    dout = torch.randn(out.shape, device="cuda", dtype=out.dtype)

    def gradients() -> list[torch.Tensor]:
        found = launch_backward.run(
            dout, x.q, x.k, x.v, out, lse, x.operands, x.ints, x.floats, prepare(case.spec), Needs(True, True, True)
        )
        return list(found[:3])

    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran == [False, False]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = gradients()
    assert ran[-1]
    for a, b in zip(first, other, strict=True):
        assert (a.float() - b.float()).abs().max() <= 0.02 * a.float().abs().max()


@pytest.mark.parametrize(
    "change",
    [lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), lambda x: x.expand(2, 4, -1, -1)],
    ids=["features apart", "one for all"],
)
def test_strides_that_tma_does_not_take_are_left_to_the_others(
    change: Callable[[torch.Tensor], torch.Tensor], ran: Ran
) -> None:
    case = named("causal")
    x = on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, 4, 4, 300, 300, 64, 64)))
    x = dataclasses.replace(x, q=change(x.q[:1, :1] if "expand" in str(change.__code__.co_names) else x.q))
    check(case, x)
    assert ran == [False]


assert {case.name for case in (*CASES, *CAPPED)} >= SURE and floating is not None
