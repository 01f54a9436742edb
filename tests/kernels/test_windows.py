"""Few keys and many batches that share a bias, as Swin's windows: in which order they are computed, and into how many
parts the sum of the bias's gradients over them is divided."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Inputs, check, inputs
from backward_cases import BIAS, BOTH
from backward_cases import check as check_backward

from xfcompile.kernels.attention import (
    backward_call,
    backward_layout,
    backward_loads,
    forward_call,
    launch,
    launch_backward,
    prepare,
    template,
    tiles,
)
from xfcompile.kernels.attention.backward_layout import Needs
from xfcompile.site import ScoreSpec

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize("large", [0, template.LARGE], ids=["batches follow each other", "heads do"])
@pytest.mark.parametrize("case", [BIAS, BOTH], ids=lambda case: case.name)
def test_both_orders_of_batches_and_heads(case: Case, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "LARGE", large)
    check(case, inputs(case, torch.float32))
    check_backward(case, inputs(case, torch.float32))


def bias_gradient(x: Inputs, case: Case) -> torch.Tensor:
    with torch.no_grad():
        key = prepare(case.spec)
        out, lse = launch.run(x.q, x.k, x.v, x.operands, x.ints, x.floats, key)
        dout = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1))
        more = (x.operands, x.ints, x.floats, key, Needs(False, False, False, (0,)))
        return launch_backward.run(dout, x.q, x.k, x.v, out, lse, *more)[3][0]


@pytest.mark.parametrize("wanted", [1, 9, 26, 1000])
def test_the_sum_over_batches_is_that_of_its_parts(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 batches and 2 x 2 x 2 tiles: one part, two of 3 and 2 batches, four of which the last has none, five."""
    x = inputs(BIAS, torch.float32)
    whole = bias_gradient(x, BIAS)
    found: list[int] = []
    parts = backward_loads._parts

    def counted(*about: object) -> int:
        found.append(parts(*about))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(backward_loads, "_parts", counted)
    monkeypatch.setattr(backward_loads, "PROGRAMS", wanted)
    monkeypatch.setattr(backward_loads, "MULTIPROCESSORS", 1)
    other = ScoreSpec(
        BIAS.spec.score * (1 + wanted / 2000), operands=BIAS.spec.operands
    )  # of which nothing is remembered
    case = Case(BIAS.name, other, BIAS.operands, sizes=BIAS.sizes)
    first, again = bias_gradient(x, case), bias_gradient(x, case)
    assert found == [{1: 1, 9: 2, 26: 4, 1000: 5}[wanted]]  # asked once, remembered then
    assert torch.equal(first, again), "parts are added up in one order"
    check_backward(case, x)
    assert whole.shape == first.shape


@pytest.mark.parametrize(
    ("narrow", "layout", "sizes"),
    [
        (True, "transposed", {}),
        (True, "contiguous", {}),
        (False, "poisoned", {}),  # rows that start anywhere
        (False, "transposed", {"dq": 24, "dv": 24}),
        (False, "transposed", {"dv": 16}),
        (False, "contiguous", {"lq": 33, "lk": 257}),
    ],
    ids=str,
)
def test_which_have_narrow_tiles(
    narrow: bool, layout: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose rows start at multiples of 16 bytes; the same in both directions."""
    z = replace(BIAS.sizes, **{"batch": 1, "dq": 32, "dv": 32, **sizes})
    case = Case(BIAS.name, ScoreSpec(BIAS.spec.score * 1.25, operands=BIAS.spec.operands), BIAS.operands, sizes=z)
    seen: list[bool] = []

    def columns(*about: int, narrow: bool, **more: bool) -> tuple[int, int]:
        seen.append(narrow)
        return tiles.columns(*about, narrow=narrow, **more)

    monkeypatch.setattr(forward_call, "columns", columns)
    monkeypatch.setattr(backward_call, "columns", columns)
    bias_gradient(inputs(case, torch.float32, layout), case)
    assert len(seen) >= 2 and set(seen) == {narrow}, seen


def test_the_same_layout_elsewhere_in_memory_is_another() -> None:
    """A tensor that starts 4 bytes later is computed with by what takes rows that start anywhere."""
    z = replace(BIAS.sizes, batch=2, dq=32, dv=32)
    case = Case(BIAS.name, ScoreSpec(BIAS.spec.score * 1.5, operands=BIAS.spec.operands), BIAS.operands, sizes=z)
    x = inputs(case, torch.float32, "contiguous")
    memory = torch.empty(x.k.numel() + 1)[1:].view(x.k.shape).copy_(x.k)
    moved = replace(x, k=memory)
    found = backward_layout.prepare(prepare(case.spec), (0,)).layouts
    found.clear()
    assert torch.equal(bias_gradient(x, case), bias_gradient(moved, case))
    assert [layout.few is not None for layout in found.values()] == [True, False]
