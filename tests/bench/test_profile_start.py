"""Where a first call spends its time, in the example that shows it."""

from __future__ import annotations

import io
import json
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import profile_start


def test_the_table_has_all_that_was_found() -> None:
    found: dict[str, Any] = {
        "total_s": 12.34,
        "processes": [{"what": "answer", "at_s": 2.2}],
        "readings": [{"what": "78 nodes", "took_s": 0.41, "at_s": 3.0}],
        "ahead": [
            {"what": "attention", "at_s": 3.1, "done_s": 6.6, "made": "attention_forward"},
            {"what": "gated_mlp", "at_s": 3.2},  # not done by then
        ],
        "waits": [{"what": "for kernels", "took_s": 0.5, "at_s": 9.0}],
        "first launches": [{"what": "attention_forward", "took_s": 0.01, "at_s": 9.1}],
    }
    out = io.StringIO()
    profile_start.show("cold", found, Console(file=out, width=120))
    lines = [line for line in out.getvalue().splitlines() if ":" in line]
    assert lines[0].strip() == "cold: 12.3 s"
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines[1:]]
    assert cells.pop(0)[:3] == ["processes: answer", "2.2", "nan"]
    assert cells[0][:3] == ["readings: 78 nodes", "3.0", "0.41"]
    assert cells[1] == ["ahead: attention", "3.1", "3.50", "attention_forward"]
    assert cells[2][:3] == ["ahead: gated_mlp", "3.2", "nan"]
    assert [row[0] for row in cells[3:]] == ["waits: for kernels", "first launches: attention_forward"]


def test_what_became_of_a_call() -> None:
    done: Future[list[str]] = Future()
    done.set_result(["tile_verdicts", "tile_lists"])
    broken: Future[list[str]] = Future()
    broken.set_exception(RuntimeError("Traceback:\nKeyError: 'x'"))
    assert profile_start._outcome(done) == "tile_verdicts, tile_lists"
    assert profile_start._outcome(broken) == "failed: KeyError: 'x'"


@pytest.mark.slow
def test_a_model_cold_and_warm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "start.json"
    assert profile_start.main(["GPT-2", "--scale", "quick", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["cold"]["total_s"] > found["warm"]["total_s"] > 0
    assert len(found["cold"]["readings"]) == 1 and "readings: " in capsys.readouterr().out
