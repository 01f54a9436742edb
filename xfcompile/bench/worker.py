"""The process that measures: what breaks it costs one column of one row."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from xfcompile.bench import registry
from xfcompile.bench.job import Row
from xfcompile.bench.measure import Broken, Settings, measure
from xfcompile.bench.results import Entry
from xfcompile.bench.turns import Turns, kill

STARTING = 120.0
"""Seconds that a process may take at least to begin, and to make a row's inputs."""
Announce = Callable[[str], None]


class TimeUp(Exception):
    """The budget ended while a row was measured."""


@dataclass(frozen=True)
class Lost:
    """A process that ended, or was ended, while a column was at work."""

    column: str
    reason: str


class Here:
    """Measures in this process: for programs that want no other."""

    def __init__(self, benchmark: str, settings: Settings) -> None:
        self.benchmark, self.settings = registry.benchmark(benchmark), settings

    def measure(self, row: Row, columns: Sequence[str], announce: Announce, end: float) -> Entry:
        return measure(self.benchmark, row, columns, self.settings, announce)

    def close(self) -> None:
        pass


class Apart:
    """Measures in a process of its own, which is replaced when it dies, hangs or has lost its device.

    limit: seconds that one column may take. What is done for all of them, timing above all, may take so long for each.
    turns: of the processes that are at work beside this one.
    """

    def __init__(self, benchmark: str, settings: Settings, limit: float, turns: Turns | None = None) -> None:
        self.benchmark, self.settings, self.limit = benchmark, settings, limit
        self.turns = turns or Turns()
        self.closed = False
        self.process: Any = None
        self.connection: Connection | None = None
        self.log = Path(tempfile.mkstemp(prefix="xfcompile-bench-", suffix=".log")[1])

    def measure(self, row: Row, columns: Sequence[str], announce: Announce, end: float) -> Entry:
        """Measures once more without a column that cost the process; what it died of stands in its cell."""
        lost: dict[str, str] = {}
        while True:
            left = [column for column in columns if column not in lost]
            found = self._attempt(row, left, announce, end) if left else {**row.as_dict(), "cells": {}}
            if isinstance(found, Lost):
                self._end()
                if found.column not in left:  # no column was at work: the row itself does it
                    return {**row.as_dict(), "cells": {}, "failed": f"{found.column}: {found.reason}"}
                lost[found.column] = found.reason
                continue
            cells = {column: found["cells"].get(column, {}) for column in columns}
            return found | {"cells": cells | {column: {"failed": reason} for column, reason in lost.items()}}

    def _attempt(self, row: Row, columns: Sequence[str], announce: Announce, end: float) -> Entry | Lost:
        if self.process is None or not self.process.is_alive():
            self._start()
        assert self.connection is not None
        self.connection.send((row, list(columns)))
        group, at, since = self.process.pid, "starting", self._now()
        while True:
            allowed = self.limit if at in columns else max(self.limit * len(columns), STARTING)
            wait = min(since + allowed - self._now(), end - time.monotonic())
            if wait > 0 and not self.connection.poll(min(wait, 5.0)):
                continue  # it may have been stopped meanwhile
            if wait <= 0:
                if time.monotonic() >= end:
                    self._end()
                    raise TimeUp
                return Lost(at, f"not done within {allowed:g} s")
            try:
                kind, content = self.connection.recv()
            except (EOFError, OSError):
                self.process.join(10)
                return Lost(at, f"the process died ({_died(self.process.exitcode)}){self._last_words()}")
            if kind == "at":
                at, since = _column_of(content, columns), self._now()
                announce(content)
            elif kind == "alone":
                announce("waiting for its turn")
                self.turns.take(group)
                self.connection.send("go")
                since = self._now()
            elif kind == "broken":
                return Lost(at, content)
            else:
                self.turns.give(group)
                return dict(content)

    def _now(self) -> float:
        """The time of a clock that stands still while the process is stopped."""
        return time.monotonic() - self.turns.stopped(self.process.pid)

    def _start(self) -> None:
        if self.closed:
            raise TimeUp
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.benchmark, self.settings, str(self.log)))
        self.process.start()
        theirs.close()
        self.turns.enter(self.process.pid)

    def _end(self, patience: float = 0.0) -> None:
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.join(patience)
            kill(self.process.pid)
            self.process.join()
            self.turns.leave(self.process.pid)
        self.process = self.connection = None

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1].strip()[:200]}" if lines else ""

    def close(self) -> None:
        self.closed = True
        self._end(patience=5.0)  # it sees that nothing more comes, unless it is at work
        self.log.unlink(missing_ok=True)


def _column_of(announced: str, columns: Sequence[str]) -> str:
    """Compile times announce "inductor, cold"."""
    name = announced.split(",")[0]
    return name if name in columns else announced


def _died(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def serve(connection: Connection, benchmark: str, settings: Settings, log: str) -> None:
    """Measure what comes, until nothing more does. What libraries print goes to the log."""
    with contextlib.suppress(PermissionError):  # it leads a group already
        os.setpgrp()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    made = registry.benchmark(benchmark)

    def alone() -> None:
        connection.send(("alone", None))
        connection.recv()

    while True:
        try:
            row, columns = connection.recv()
        except EOFError:
            return
        try:
            entry = measure(made, row, columns, settings, lambda column: connection.send(("at", column)), alone)
        except Broken as broken:
            connection.send(("broken", str(broken)))
            os._exit(1)
        connection.send(("row", entry))
