"""How long calls take: medians of interleaved rounds, by events on a GPU. Tests put another timer in its place."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

Call = Callable[[], object]

Timer = Callable[[Mapping[str, Call], torch.device, bool], dict[str, float]]
"""(calls by their names, the device, whether a graph's replay will run them) -> ms of each."""

SECONDS = 0.2
"""So long each call is repeated, for at least `FEWEST` and at most `MOST` rounds."""
FEWEST, MOST = 5, 50

CYCLES = 2_000_000
"""About a millisecond of waiting on a GPU, in which what is called meanwhile queues up: then only kernels are timed."""


def timed(calls: Mapping[str, Call], device: torch.device, replayed: bool) -> dict[str, float]:
    """Medians in ms. All are called in turns, so that what slows the machine down meanwhile slows all of them down."""
    once = _cuda_ms if device.type == "cuda" else _cpu_ms
    first = {}
    for name, call in calls.items():
        call()  # what is made at the first call is made now
        first[name] = min(once(call, device, replayed) for _ in range(2))
    rounds = {name: min(MOST, max(FEWEST, int(1000 * SECONDS / max(ms, 1e-3)))) for name, ms in first.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(max(rounds.values(), default=0)):
        for name, call in calls.items():
            if k < rounds[name]:
                found[name].append(once(call, device, replayed))
    return {name: statistics.median(times) for name, times in found.items()}


def _cpu_ms(call: Call, device: torch.device, replayed: bool) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _cuda_ms(call: Call, device: torch.device, replayed: bool) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if replayed:
            torch.cuda._sleep(CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


_timer: ContextVar[Timer] = ContextVar("xfcompile_timer", default=timed)


def current() -> Timer:
    return _timer.get()


@contextmanager
def measured_by(timer: Timer) -> Iterator[None]:
    """Inside of the `with` block another timer is asked, in this thread: so that tests know what wins."""
    token = _timer.set(timer)
    try:
        yield
    finally:
        _timer.reset(token)
