"""What breaks costs one column of one row, and says why."""

from __future__ import annotations

import math
import time

import breaking
import pytest
import torch

from xfcompile.bench.job import Place
from xfcompile.bench.measure import Settings, measure
from xfcompile.bench.timing import QUICK
from xfcompile.bench.worker import Apart, TimeUp

SETTINGS = Settings(Place("cpu", torch.float32, "quick"), QUICK)
GOOD, ENDS = breaking.rows("quick")


def test_a_column_that_cannot_run_says_why_and_the_others_are_measured() -> None:
    found = measure(breaking.BENCHMARK, GOOD, breaking.COLUMNS, SETTINGS, lambda column: None)
    cells = found["cells"]
    assert cells["skips"] == {"skipped": "no way"}
    assert cells["full"]["failed"] == "out of memory"
    assert cells["runs"]["ms"] > 0 and cells["runs"]["rounds"] == 3
    assert cells["runs"]["error"] == 0 and cells["runs"]["error_by_eager"] == 0
    assert cells["wrong"]["error"] == pytest.approx((6 / 55) ** 0.5)
    assert cells["wrong"]["error_by_eager"] > 1e6  # eager is exact there


def test_a_process_that_dies_or_hangs_is_replaced_and_what_did_it_is_told() -> None:
    apart, seen = Apart("breaking", SETTINGS, limit=20.0), list[str]()
    try:
        found = apart.measure(ENDS, ("ends", "runs"), seen.append, math.inf)
        assert found["cells"]["ends"]["failed"].startswith("the process died (exit code 3)")
        assert found["cells"]["runs"]["ms"] > 0
        assert "ends" in seen and "runs" in seen
        apart.limit = 1.0
        hung = apart.measure(ENDS, ("hangs",), seen.append, math.inf)
        assert hung["cells"]["hangs"] == {"failed": "not done within 1 s"}
        with pytest.raises(TimeUp):
            apart.measure(ENDS, ("hangs",), seen.append, time.monotonic() + 0.5)
    finally:
        apart.close()
    assert not apart.log.exists()
