"""Who may time: one process at a time, while all others are stopped."""

from __future__ import annotations

import os
import signal
import threading
import time


class Turns:
    """The turns of processes that compile at once and time one after the other.

    Each leads a process group of its own, in which its compiler's processes are too. On a GPU what a stopped process
    has launched still runs to its end, which whoever times has to wait for: `timing.wait_until_quiet`.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._groups: set[int] = set()
        self._timing: int | None = None
        self._stopped, self._since = 0.0, 0.0

    def enter(self, group: int) -> None:
        """A process begins; it is stopped at once if another one is timing."""
        with self._lock:
            self._groups.add(group)
            if self._timing is not None:
                _send(group, signal.SIGSTOP)

    def leave(self, group: int) -> None:
        """A process has ended."""
        with self._lock:
            self._groups.discard(group)
        self.give(group)

    def take(self, group: int) -> None:
        """Waits for the turn of a process and stops the others."""
        self._turn.acquire()
        with self._lock:
            self._timing, self._since = group, time.monotonic()
            for other in self._groups - {group}:
                _send(other, signal.SIGSTOP)
        time.sleep(SETTLING)

    def give(self, group: int) -> None:
        """Ends the turn of a process, if it has it."""
        with self._lock:
            if self._timing != group:
                return
            self._timing = None
            self._stopped += time.monotonic() - self._since
            for other in self._groups - {group}:
                _send(other, signal.SIGCONT)
        self._turn.release()

    def stopped(self, group: int) -> float:
        """Seconds for which processes were stopped so far, which do not count as theirs; but not of the one that is
        timing."""
        with self._lock:
            running = time.monotonic() - self._since if self._timing not in (None, group) else 0.0
            return self._stopped + running


SETTLING = 0.1
"""Seconds."""


def kill(group: int) -> None:
    """Ends a process and those that it has begun, stopped or not."""
    _send(group, signal.SIGKILL)


def _send(group: int, what: signal.Signals) -> None:
    """To all processes of a group; to the first one alone, as long as it does not lead a group yet."""
    for send in (os.killpg, os.kill):
        try:
            return send(group, what)
        except ProcessLookupError:
            continue
