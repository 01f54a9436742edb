"""Times of several calls, taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from xfcompile.bench import timing
from xfcompile.bench.timing import Rounds, Times, interleaved, wait_until_quiet


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


def test_what_takes_longer_than_all_rounds_is_timed_once() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.06)

    found = interleaved({"slow": slow, "fast": lambda: calls.append("fast")}, "cpu", Rounds(2, 5, 50, 0.05))
    assert calls.count("slow") == 2 and found["slow"].rounds == 1 and found["slow"].ms >= 60
    assert found["fast"].rounds >= 5


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


class Shared:
    """A GPU on which a product takes 0.2 ms, and what lasts longer than a slice of time as often as long as there are
    processes."""

    def __init__(self, processes: list[int]) -> None:
        self.processes, self.asked = processes, 0

    def __call__(self, call: timing.Call) -> float:
        products = call()
        if not isinstance(products, list):
            return 0.2
        self.asked += 1
        return 0.2 * len(products) * self.processes[min((self.asked - 1) // 2, len(self.processes) - 1)]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shared]:
    def made(*processes: int) -> Shared:
        gpu = Shared([*processes])
        monkeypatch.setattr(timing, "_between", gpu)
        monkeypatch.setattr(timing, "_multiplied", lambda: torch.ones(1, 1))
        return gpu

    return made


def test_a_gpu_that_others_use_is_waited_for(shared: Callable[..., Shared]) -> None:
    gpu = shared(2, 3, 1)
    assert wait_until_quiet("cuda") is None
    assert gpu.asked == 6


def test_a_gpu_that_others_go_on_using_is_told_of(shared: Callable[..., Shared]) -> None:
    shared(2)
    reason = wait_until_quiet("cuda", 0.0)
    assert reason is not None and "another process computes on the GPU: 2.0 times as long" in reason
    assert wait_until_quiet("cpu") is None
