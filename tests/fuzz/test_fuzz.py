"""A fixed few of the random programs; `tests/fuzz/run.py` runs as many as one likes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from outcome import fate
from programs import Program, programs

FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@settings(FIXED, max_examples=120)
@given(programs())
def test_a_random_program_equals_eager(program: Program) -> None:
    fate(program)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(FIXED, max_examples=60)
@given(programs())
def test_a_random_program_equals_eager_in_our_kernel(program: Program) -> None:
    fate(program, "triton")
