"""A fixed hundred of the random programs; `tests/fuzz/run.py` runs as many as one likes."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings
from outcome import fate
from programs import Program, programs


@settings(
    max_examples=120,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(programs())
def test_a_random_program_equals_eager(program: Program) -> None:
    fate(program)
