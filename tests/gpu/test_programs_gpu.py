"""Whole programs on a CUDA device, by the routes that are chosen there: equal to eager, or declined."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from equivalence import check
from hypothesis import HealthCheck, Phase, given, settings
from outcome import fate
from programs import Program, programs
from test_far_masks import KINDS, PROGRAMS, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _on_gpu() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.device("cuda"):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("route", [None, "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_far_mask(name: str, dtype: torch.dtype, route: str | None) -> None:
    for kind in KINDS:
        if name != "in a call of SDPA":  # there torch's own kernels do not agree
            check(PROGRAMS[name], *inputs(kind, dtype), routes={"attention": route} if route else None)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_far_mask_in_training(name: str) -> None:
    for kind in KINDS:
        if name != "in a call of SDPA":
            check(PROGRAMS[name], *inputs(kind, torch.float32, grad=True), grad=True)


@pytest.mark.parametrize("seed", range(16))
def test_random_programs_equal_eager(seed: int) -> None:
    @settings(
        max_examples=25, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @hypothesis.seed(seed)
    @given(programs())
    def each(program: Program) -> None:
        fate(program)

    each()
