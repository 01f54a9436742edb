"""A thousand and more random programs, the same each time: each equals eager, or was declined. Each time an eighth of
them runs, and all of them with `-m "slow or not slow"`.

`--hypothesis-seed=N` runs others; `tests/fuzz/run.py` runs as many as one likes.
"""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from outcome import TALLY, fate
from strategies import STRATEGIES
from writer import Program

PROGRAMS = {
    ("attention", "default"): 150, ("attention", "triton"): 180,
    ("gated_mlp", "default"): 30, ("gated_mlp", "triton"): 240,
    ("bias-act-dropout", "default"): 90, ("bias-act-dropout", "triton"): 270,
    ("blocks", "default"): 30, ("blocks", "triton"): 30,
}  # fmt: skip
"""How many programs of each kind run: by the routes that are chosen on a CPU, and by our kernels in the interpreter."""

PART = 20
"""Programs of one test: several processes share them."""

PARTS = [
    (family, route, start, min(PART, count - start))
    for (family, route), count in PROGRAMS.items()
    for start in range(0, count, PART)
]


def test_these_are_a_thousand() -> None:
    assert sum(count for *_, count in PARTS) >= 1000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, route, start, count", PARTS)
def test_random_programs_equal_eager(
    family: str, route: str, start: int, count: int, pytestconfig: pytest.Config
) -> None:
    seed = int(pytestconfig.getoption("--hypothesis-seed") or 0)
    fused: list[str] = []

    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @hypothesis.seed(seed * 1_000_000 + start)
    @given(STRATEGIES[family])
    def each(program: Program) -> None:
        try:
            word, _ = fate(program, "triton" if route == "triton" else None)
        except Exception as error:
            error.add_note(str(program))
            raise
        fused.append(word)

    each()
    if route == "triton":
        assert fused.count("fused") > count // 10, f"programs of which next to none is matched say nothing: {fused}"
    assert TALLY.likely, f"{TALLY.kept} elements of {TALLY.elements} are kept, not {TALLY.expected:.0f}"
