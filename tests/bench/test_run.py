"""The rows of a run: one after the other, within a budget, kept as they come."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from entries import RUN, cell
from rich.console import Console

from xfcompile.bench.job import Row
from xfcompile.bench.results import Results, load
from xfcompile.bench.run import Plan, run
from xfcompile.bench.worker import Announce, TimeUp

ROWS = [Row(name, "forward", (("S", 64),)) for name in "abc"]
COLUMNS = ["inductor", "xformers"]


class Fake:
    """Measures nothing, in a second a row; `cut`: the row in which the time is up."""

    def __init__(self, cut: str = "", broken: str = "") -> None:
        self.measured: list[str] = []
        self.now, self.cut, self.broken = 0.0, cut, broken

    def clock(self) -> float:
        return self.now

    def measure(self, row: Row, columns: Sequence[str], announce: Announce, end: float) -> dict[str, Any]:
        if row.name == self.cut:
            raise TimeUp
        if row.name == self.broken:
            raise KeyboardInterrupt
        for column in columns:
            announce(column)
        self.measured.append(row.name)
        self.now += 1
        return {**row.as_dict(), "cells": {column: cell(1.0) for column in columns}}


def results() -> Results:
    return Results("attention", "what is tested", list(COLUMNS), runs=[dict(RUN)])


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_all_rows_are_measured_and_kept(tmp_path: Path) -> None:
    fake, made, path = Fake(), results(), tmp_path / "a.json"
    out = console()
    run(Plan(ROWS, COLUMNS, path), made, [fake], out, fake.clock)
    assert fake.measured == ["a", "b", "c"] and made.not_run == []
    assert load(path) == made
    stored = json.loads(path.read_text())
    assert stored["geometric_means"][0]["value"] == 1 and stored["goals"]
    assert "a, forward, S64: inductor 1 ms 1.00×, xformers 1 ms" in out.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("fake", [Fake(), Fake(cut="c")], ids=["between rows", "within a row"])
def test_a_budget_ends_the_run_and_what_was_not_run_is_listed(fake: Fake) -> None:
    fake.now, fake.measured = 0.0, []
    made = results()
    run(Plan(ROWS, COLUMNS, budget=2.0), made, [fake], console(), fake.clock)
    assert fake.measured == ["a", "b"]
    assert made.not_run == [{"row": "c, forward, S64", "reason": "the budget of 2 s was over"}]


def test_a_run_that_is_cut_off_leaves_what_it_has_and_is_gone_on_with(tmp_path: Path) -> None:
    path, made = tmp_path / "a.json", results()
    with pytest.raises(KeyboardInterrupt):
        run(Plan(ROWS, COLUMNS, path), made, [Fake(broken="b")], console(), lambda: 0.0)
    left = load(path)
    assert [row["name"] for row in left.rows] == ["a"]
    assert [entry["row"] for entry in left.not_run] == ["b, forward, S64", "c, forward, S64"]
    fake = Fake()
    run(Plan(ROWS, COLUMNS, path), left, [fake], console(), fake.clock)
    assert fake.measured == ["b", "c"]
    assert [row["name"] for row in load(path).rows] == ["a", "b", "c"] and load(path).not_run == []


def test_another_column_measures_a_row_anew(tmp_path: Path) -> None:
    fake, made = Fake(), results()
    run(Plan(ROWS, COLUMNS), made, [fake], console(), fake.clock)
    run(Plan(ROWS, [*COLUMNS, "flex"]), made, [fake], console(), fake.clock)
    assert fake.measured == ["a", "b", "c"] * 2
    assert len(made.rows) == 3 and "flex" in made.columns


class Together(Fake):
    """Waits in its first row until the other one is at work too. `full`: the row that is out of memory unless alone.
    whole: before any of its columns is at work."""

    def __init__(self, barrier: threading.Barrier, full: str = "", whole: bool = False) -> None:
        super().__init__()
        self.barrier, self.full, self.whole = barrier, full, whole
        self.asked: list[str] = []

    def measure(self, row: Row, columns: Sequence[str], announce: Announce, end: float) -> dict[str, Any]:
        self.asked.append(row.name)
        found = super().measure(row, columns, announce, end)
        if len(self.asked) == 1:
            self.barrier.wait(10)
        if row.name == self.full and self.asked.count(row.name) == 1:
            if self.whole:
                return {**row.as_dict(), "cells": {}, "failed": "out of memory"}
            found["cells"]["xformers"] = {"failed": "out of memory"}
        return found


def test_several_measure_at_once_and_each_row_once() -> None:
    barrier, made = threading.Barrier(2), results()
    first, second = Together(barrier), Together(barrier)
    run(Plan(ROWS, COLUMNS), made, [first, second], console(), lambda: 0.0)
    assert sorted(first.asked + second.asked) == ["a", "b", "c"] and first.asked and second.asked
    assert sorted(row["name"] for row in made.rows) == ["a", "b", "c"] and made.not_run == []


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_out_of_memory_beside_others_is_measured_again_alone(whole: bool) -> None:
    barrier, made = threading.Barrier(2), results()
    both = Together(barrier, "a", whole), Together(barrier, "a", whole)
    run(Plan(ROWS, COLUMNS), made, both, console(), lambda: 0.0)
    assert [*both[0].asked, *both[1].asked].count("a") in (2, 3)  # the first time of either is full
    assert sorted(row["name"] for row in made.rows) == ["a", "b", "c"]
    (row,) = (row for row in made.rows if row["name"] == "a")
    alone = both[0].asked.count("a") == 2
    full = {} if whole else {"xformers": {"failed": "out of memory"}}
    assert row["cells"].get("xformers") == (cell(1.0) if alone else full.get("xformers"))
    assert row.get("failed") == ("out of memory" if whole and not alone else None)


def test_an_error_in_one_of_several_ends_the_run() -> None:
    made = results()
    with pytest.raises(KeyboardInterrupt):
        run(Plan(ROWS, COLUMNS), made, [Fake(broken="b"), Fake(broken="b")], console(), lambda: 0.0)
    assert "b, forward, S64" in [entry["row"] for entry in made.not_run]
