"""Times of several calls, taken in turns: on a GPU between events, with an L2 cache that holds none of their data."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
FLUSHED = 256 * 2**20
"""Bytes that are read to empty an L2 cache (50 MB on an H100). Were they written, as `triton.testing.do_bench` does,
the call that is timed would have the last of them written back: 10 µs of its 78, where it reads 268 MB (an H200)."""

LONGEST = 0.01
"""Seconds that a GPU waits for its host at most; a call that takes its host longer is timed with it."""
CYCLES = 2e9
"""Of a GPU, in a second: no more than so many."""

PATIENCE = 30.0
"""Seconds."""
BURST = 10.0
"""Milliseconds of work that is compared with its parts: several slices of time."""
DISTURBED = 1.3
"""How much longer it takes, at least, beside another process; heat makes a tenth."""


@dataclass(frozen=True)
class Rounds:
    """How long is measured: `most` rounds, and fewer, but at least `least`, once `seconds` are over. A call that takes
    longer than that alone is warmed up once, and timed once."""

    warmup: int = 2
    least: int = 5
    most: int = 50
    seconds: float = 6.0


QUICK = Rounds(warmup=1, least=3, most=3, seconds=1.0)


@dataclass(frozen=True)
class Times:
    """Milliseconds: the median, the quartiles, the shortest and the longest of so many rounds."""

    ms: float
    low: float
    high: float
    least: float
    most: float
    rounds: int

    @staticmethod
    def of(times: list[float]) -> Times:
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        return Times(middle, low, high, min(times), max(times), len(times))


def interleaved(
    calls: Mapping[str, Call],
    device: str,
    rounds: Rounds = Rounds(),
    *,
    cold: bool = True,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Times]:
    """The times of each call, one after the other in each round, so that a slow moment of the machine meets all alike.

    Each round has an order of its own: a chip that the call before has heated is slower for the next one.

    cold: empty the L2 cache before each call, and keep a GPU busy until all of the call is launched: it is the GPU's
    time then, also of calls that take less than their launches. failed: is told of a call that raises, which then takes
    no further part; without it the error is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    running = dict(calls)
    order = random.Random(0)

    def attempt(step: Callable[[str, Call], None]) -> None:
        for name, call in order.sample(list(running.items()), len(running)):
            try:
                step(name, call)
            except Exception as error:
                if failed is None:
                    raise
                del running[name], times[name]
                failed(name, error)

    launching: dict[str, float] = {}
    slow: set[str] = set()

    def warm(name: str, call: Call) -> None:
        if name in slow:
            return
        start = time.perf_counter()
        launching[name] = wall(call) / 1e3
        if device == "cuda":
            torch.cuda.synchronize()
        if time.perf_counter() - start > rounds.seconds:
            slow.add(name)

    for _ in range(rounds.warmup):
        attempt(warm)
    end = time.perf_counter() + rounds.seconds
    for done in range(rounds.most):
        if done >= rounds.least and time.perf_counter() > end:
            break
        events: dict[str, tuple[Any, Any]] = {}

        def step(name: str, call: Call, events: dict[str, tuple[Any, Any]] = events) -> None:
            if device == "cuda":
                events[name] = _recorded(call, cold, launching.get(name, 0.0))
            else:
                times[name].append(wall(call))

        attempt(step)
        if device == "cuda":
            torch.cuda.synchronize()
            for name, (before, after) in events.items():
                if name in times:
                    times[name].append(before.elapsed_time(after))
        for name in slow:
            running.pop(name, None)
    return {name: Times.of(found) for name, found in times.items() if found}


def milliseconds(call: Call, device: str) -> float:
    """One call, from a device that does nothing to one that is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _recorded(call: Call, cold: bool, launching: float) -> tuple[Any, Any]:
    """The events around a call. launching: seconds that its host takes for it."""
    if cold:
        _flushed().sum()
        torch.cuda._sleep(int(min(1.5 * launching, LONGEST) * CYCLES))
    else:
        torch.cuda.synchronize()
    return _events(call)


def _events(call: Call) -> tuple[Any, Any]:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    return before, after


def wall(call: Call) -> float:
    """Milliseconds until it returns: on a GPU, until it is launched."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def wait_until_quiet(device: str, patience: float = PATIENCE) -> str | None:
    """Returns when no other process has the GPU compute, or after so many seconds; then what is wrong.

    What a stopped process has launched still runs, and a GPU gives its processes slices of some milliseconds in turns:
    a call that takes less may not notice, one that takes more takes twice as long.
    """
    if device != "cuda":
        return None
    end = time.perf_counter() + patience
    while (slower := _share()) > DISTURBED:
        if time.perf_counter() > end:
            return f"another process computes on the GPU: {slower:.1f} times as long for what lasts longer than a slice"
        time.sleep(0.1)
    return None


def _share() -> float:
    """How much longer products of matrices take together, for 10 ms, than each of them alone, which takes less than a
    slice of time."""
    x = _multiplied()
    alone = min(_between(lambda: x @ x) for _ in range(10))
    count = max(int(BURST / alone), 2)
    return min(_between(lambda: [x @ x for _ in range(count)]) for _ in range(2)) / (count * alone)


def _between(call: Call) -> float:
    """Milliseconds of a GPU that is kept busy until all is launched."""
    torch.cuda._sleep(int(1e-3 * CYCLES))
    before, after = _events(call)
    torch.cuda.synchronize()
    return float(before.elapsed_time(after))


@cache
def _multiplied() -> Tensor:
    return torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)


@cache
def _flushed() -> Tensor:
    return torch.zeros(FLUSHED // 4, dtype=torch.float32, device="cuda")


def captured(call: Call, device: str) -> Call:
    """The call as a CUDA graph's replay; on a CPU itself."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@cache
def copy_bandwidth(device: str, size: int) -> float:
    """GB/s that a copy on the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, Rounds(most=20))
    return 2 * size / times["copy"].ms / 1e6
