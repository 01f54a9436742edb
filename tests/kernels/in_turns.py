"""Threads of which one runs at a time, and another whenever it waits or lets others go on: the same way every time."""

from __future__ import annotations

import linecache
import random
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType


class Deadlock(Exception):
    """All that is left waits for what nobody will do."""


class _Stopped(Exception):
    """Another thread has failed."""


def run(parts: Sequence[Callable[[], None]], where: str, seed: int = 0) -> None:
    """Runs them all, each a thread. Raises what the first that fails raises, or `Deadlock`, which says what line of
    the file `where` each waits in. seed: of who comes next."""
    turns = _Turns(len(parts), where, random.Random(seed))
    threads = [
        threading.Thread(target=turns.part, args=(number, part), daemon=True) for number, part in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    turns.start()
    for thread in threads:
        thread.join()
    if turns.error is not None:
        raise turns.error


def wait(until: Callable[[], bool] = lambda: True) -> None:
    """Lets another thread run, if one can, and then waits until something is so. Alone, it has to be so already."""
    turns = getattr(_own, "turns", None)
    if turns is not None:
        turns.wait(_own.number, until)
    elif not until():
        raise Deadlock("nobody else is there")


_own = threading.local()


class _Turns:
    def __init__(self, parts: int, where: str, order: random.Random) -> None:
        self.where, self.order = where, order
        self.locks = [threading.Semaphore(0) for _ in range(parts)]
        self.until: dict[int, Callable[[], bool]] = {number: lambda: True for number in range(parts)}
        self.frames: dict[int, FrameType] = {}
        self.error: Exception | None = None

    def part(self, number: int, function: Callable[[], None]) -> None:
        _own.turns, _own.number = self, number
        self.locks[number].acquire()
        try:
            if self.error is None:
                function()
        except _Stopped:
            pass
        except Exception as error:
            self.error = self.error or error
        del self.until[number]
        self.start()

    def start(self) -> None:
        """Whoever comes next."""
        ready = sorted(number for number, so in self.until.items() if self.error is not None or so())
        if not ready and self.until:
            waiting = "; ".join(f"{number} in {self._line(self.frames[number])}" for number in sorted(self.until))
            self.error = Deadlock(f"all that is left waits: {waiting}")
            ready = sorted(self.until)
        if ready:
            self.locks[self.order.choice(ready)].release()

    def wait(self, number: int, until: Callable[[], bool]) -> None:
        self.until[number], self.frames[number] = until, sys._getframe(1)
        self.start()
        self.locks[number].acquire()
        if self.error is not None:
            raise _Stopped

    def _line(self, frame: FrameType | None) -> str:
        while frame is not None and frame.f_code.co_filename != self.where:
            frame = frame.f_back
        if frame is None:
            return "no line"
        line = linecache.getline(self.where, frame.f_lineno).strip()
        return f"`{line}`, line {frame.f_lineno} of {frame.f_code.co_name}"
