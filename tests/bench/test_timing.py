"""Times of several calls, taken in turns."""

from __future__ import annotations

import time

import pytest

from xfcompile.bench.timing import Rounds, Times, interleaved


def test_calls_take_turns() -> None:
    order: list[str] = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", Rounds(1, 2, 3, 9.0))
    rounds = [order[i : i + 2] for i in range(0, 8, 2)]
    assert len(order) == 8 and all(sorted(each) == ["a", "b"] for each in rounds)
    assert found["a"].rounds == found["b"].rounds == 3


def test_no_call_comes_always_after_the_same() -> None:
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) for name in "abc"}, "cpu", Rounds(0, 20, 20, 9.0))
    assert {tuple(order[i : i + 3]) for i in range(0, 60, 3)} > {("a", "b", "c"), ("c", "b", "a")}


def test_rounds_end_with_the_time_but_not_before_the_least() -> None:
    found = interleaved({"a": lambda: time.sleep(0.01)}, "cpu", Rounds(0, 3, 1000, 0.05))
    assert 3 <= found["a"].rounds <= 10
    assert interleaved({"a": lambda: None}, "cpu", Rounds(0, 3, 1000, 0.0))["a"].rounds == 3


def test_a_median_has_its_quartiles() -> None:
    assert Times.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Times(3.0, 2.0, 4.0, 1.0, 5.0, 5)
    assert Times.of([2.0]) == Times(2.0, 2.0, 2.0, 2.0, 2.0, 1)


def test_a_call_that_fails_on_the_way_takes_no_further_part() -> None:
    calls, told = {"n": 0}, list[tuple[str, str]]()

    def fails() -> None:
        calls["n"] += 1
        if calls["n"] > 2:
            raise RuntimeError("now")

    found = interleaved(
        {"fails": fails, "runs": lambda: None}, "cpu", Rounds(1, 3, 5, 9.0),
        failed=lambda name, error: told.append((name, str(error))),
    )  # fmt: skip
    assert told == [("fails", "now")] and calls["n"] == 3
    assert list(found) == ["runs"] and found["runs"].rounds == 5
    with pytest.raises(RuntimeError, match="now"):
        interleaved({"fails": fails}, "cpu", Rounds(1, 3, 5, 9.0))
