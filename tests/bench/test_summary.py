"""Ratios, means and goals."""

from __future__ import annotations

import pytest
from entries import cell, entry, results

from xfcompile.bench.summary import Goal, geometric_mean, means, outcome, outcomes, ratio

GOAL = Goal("twice as fast", lambda r: r["mode"] == "forward", "inductor", 2.0)
EACH = Goal("none slower", lambda r: True, "inductor", 0.98, each=True)


def test_a_ratio_is_how_many_times_as_fast() -> None:
    row = entry("a", inductor=8.0, xformers=2.0, flex={"failed": "x"})
    assert ratio(row, "xformers", "inductor") == 4
    assert ratio(row, "inductor", "xformers") == 0.25
    assert ratio(row, "xformers", "flex") is None
    assert ratio(row, "xformers", "sdpa") is None


def test_times_beside_another_process_are_none_and_memory_is_what_it_is() -> None:
    row = {**entry("a", inductor=cell(8.0, peak_gb=4.0), xformers=cell(2.0, peak_gb=1.0)), "disturbed": "another ..."}
    assert ratio(row, "xformers", "inductor") is None
    assert ratio(row, "xformers", "inductor", "peak_gb") == 4


def test_the_mean_is_geometric() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2)
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1)
    assert geometric_mean([]) is None


def test_a_goal_counts_the_rows_that_have_both_numbers() -> None:
    rows = [
        entry("a", inductor=8.0, xformers=1.0),
        entry("b", inductor=2.0, xformers=2.0),
        entry("c", inductor={"failed": "out of memory"}, xformers=1.0),
        entry("d", "forward+backward", inductor=9.0, xformers=1.0),
        {**entry("e"), "skipped": "no library"},
    ]
    found = outcome(GOAL, rows)
    assert found.value == pytest.approx(8**0.5) and found.reached
    assert (found.counted, found.asked) == (2, 3)
    assert found.behind == (("b, forward, S1024", 1.0),)


def test_a_column_of_ours_that_failed_reaches_no_goal() -> None:
    rows = [entry("a", inductor=8.0, xformers=1.0), entry("b", inductor=2.0, xformers={"failed": "wrong"})]
    found = outcome(GOAL, rows)
    assert found.value == pytest.approx(8) and found.reached is False and found.failed == ("b, forward, S1024",)
    assert outcome(GOAL, rows[1:]).reached is False
    assert outcome(GOAL, []).reached is None


def test_of_a_goal_for_each_row_the_worst_is_told() -> None:
    rows = [entry("a", inductor=8.0, xformers=1.0), entry("b", inductor=0.97, xformers=1.0)]
    found = outcome(EACH, rows)
    assert found.value == pytest.approx(0.97) and found.reached is False
    assert found.behind == (("b, forward, S1024", pytest.approx(0.97)),)


def test_memory_and_starts_are_held_to_goals_too() -> None:
    rows = [
        entry("a", "train", "eager", inductor=cell(2.0, peak_gb=4.0), xformers=cell(1.0, peak_gb=5.0)),
        entry("a", "start with backward", "eager", inductor={"cold_s": 10.0}, xformers={"cold_s": 11.4}),
        entry("b", "start with backward", "eager", inductor={"cold_s": 10.0}, xformers={"cold_s": 11.6}),
    ]
    found = {o.goal.text: o for o in outcomes(results(*rows, benchmark="models"))}
    memory = found["training: no more peak memory than Inductor"]
    assert memory.value == pytest.approx(0.8) and memory.reached is False
    start = found["cold start: at most 1.15 times Inductor's"]
    assert [name for name, _ in start.behind] == ["b, start with backward, eager, S1024"]


def test_means_say_how_many_rows_are_losses() -> None:
    rows = [
        entry("a", inductor=4.0, flex=2.0, xformers=1.0, xformers_triton=1.0),
        entry("b", inductor=0.5, flex=2.0, xformers=1.0),
    ]
    found = {(m.column, m.over): m for m in means(results(*rows))}
    inductor = found["xformers", "inductor"]
    assert inductor.value == pytest.approx(2**0.5)
    assert (inductor.least, inductor.most, inductor.rows, inductor.losses) == (0.5, 4.0, 2, 1)
    assert found["xformers", "flex"].losses == 0
    assert found["xformers-triton", "inductor"].rows == 1
    assert ("xformers", "xformers-triton") not in found
