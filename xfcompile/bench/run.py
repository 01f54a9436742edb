"""Runs the rows of a benchmark one after the other, within a budget, and writes what is known after each."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xfcompile.bench import columns as c
from xfcompile.bench.job import Row
from xfcompile.bench.measure import OUT_OF_MEMORY
from xfcompile.bench.results import Entry, Results
from xfcompile.bench.summary import NO_SLOWER, measure_of, number, ratio, summary
from xfcompile.bench.worker import Announce, TimeUp


class Measuring(Protocol):
    """Measures a row; raises `TimeUp` where that would last longer than until `end` (of `time.monotonic`)."""

    def measure(self, row: Row, columns: Sequence[str], announce: Announce, end: float) -> Entry: ...


@dataclass(frozen=True)
class Plan:
    """rows and columns: what is measured. json: where results are kept. budget: seconds, for all of it; asked: what it
    was before other benchmarks took of it."""

    rows: Sequence[Row]
    columns: Sequence[str]
    json: Path | None = None
    budget: float = math.inf
    asked: float | None = None


def run(
    plan: Plan, results: Results, measuring: Sequence[Measuring], console: Console, clock: Callable[[], float]
) -> None:
    """Measures what `results` do not hold yet, and notes there what was not reached. The last one is always noted.

    measuring: one, or several that are at work at once, each on a row of its own.
    """
    begin = clock()
    left = [row for row in plan.rows if not results.done(row, plan.columns)]
    if len(left) < len(plan.rows):
        console.print(f"{len(plan.rows) - len(left)} of {len(plan.rows)} rows are there already", style="dim")
    _keep(plan, results, left, "not reached: the run was cut off")
    with _progress(console) as progress:
        work = _Work(plan, results, left, progress, clock, begin + plan.budget)
        if len(measuring) > 1:
            _at_once(work, measuring)
        work.go_on(measuring[0], alone=True)
    _keep(plan, results, left, f"the budget of {plan.asked or plan.budget:g} s was over")


class _Work:
    """The rows that are left, taken one after the other by whoever has time."""

    def __init__(
        self,
        plan: Plan,
        results: Results,
        left: list[Row],
        progress: Progress,
        clock: Callable[[], float],
        end: float,
    ) -> None:
        self.plan, self.results, self.left, self.progress = plan, results, left, progress
        self.clock, self.end = clock, end
        self.task = progress.add_task("", total=len(left), at="")
        self.over = False
        self._taken: set[Row] = set()
        self._again: set[Row] = set()
        self._lock = threading.Lock()

    def go_on(self, measuring: Measuring, *, alone: bool) -> None:
        """Measures rows until none is left, or the time is up. alone: nothing else is at work."""
        while (row := self._next(alone)) is not None:

            def announce(column: str, row: Row = row) -> None:
                self.progress.update(self.task, description=f"{row.title}: {column}")

            announce("starting")
            since = self.clock()
            try:
                entry = measuring.measure(row, self.plan.columns, announce, self.end)
            except TimeUp:
                self.over = True
                return
            self._done(row, entry, self.clock() - since, alone)

    def _next(self, alone: bool) -> Row | None:
        with self._lock:
            if self.over or self.clock() >= self.end:
                return None
            free = [row for row in self.left if row not in self._taken or (alone and row in self._again)]
            self._taken.update(free[:1])
            self._again.difference_update(free[:1])
            return free[0] if free else None

    def _done(self, row: Row, entry: Entry, seconds: float, alone: bool) -> None:
        with self._lock:
            failures = [entry.get("failed"), *[cell.get("failed") for cell in entry["cells"].values()]]
            if not alone and OUT_OF_MEMORY in failures:
                self._again.add(row)  # others had a part of the memory
                return
            self.results.add(entry)
            self.left.remove(row)
            _keep(self.plan, self.results, self.left, "not reached: the run was cut off")
            self.progress.advance(self.task)
            self.progress.console.print(line(entry, seconds), highlight=False)


def _at_once(work: _Work, measuring: Sequence[Measuring]) -> None:
    errors: list[BaseException] = []

    def go_on(one: Measuring) -> None:
        try:
            work.go_on(one, alone=False)
        except BaseException as error:
            errors.append(error)
            work.over = True

    threads = [threading.Thread(target=go_on, args=(one,), daemon=True) for one in measuring]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        work.over = work.over or any(thread.is_alive() for thread in threads)  # interrupted
    if errors:
        raise errors[0]


def _keep(plan: Plan, results: Results, left: Sequence[Row], reason: str) -> None:
    results.not_run = [{"row": row.title, "reason": reason} for row in left]
    if plan.json is not None:
        results.save(plan.json, summary(results))


def _progress(console: Console) -> Progress:
    parts = (TimeElapsedColumn(), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=False))
    return Progress(*parts, TextColumn("{task.description}"), console=console, transient=True)


def line(entry: Entry, seconds: float) -> str:
    """What a row has given, in one line of markup."""
    title = Row.of(entry).title
    for kind in ("failed", "skipped"):
        if kind in entry:
            return f"[red]{title}: {kind}: {_plain(entry[kind])}[/]"
    what = measure_of(entry)
    unit = "s" if what == "cold_s" else "ms"
    parts = []
    for column in entry["cells"]:
        mine = number(entry, column, what)
        if mine is None:
            if "failed" in entry["cells"][column]:
                parts.append(f"[red]{column} failed[/]")
            continue
        text = f"{column} {mine:.4g} {unit}"
        times = ratio(entry, c.XFORMERS, column, what)
        if not c.ours(column) and column != c.FLOOR and times is not None:
            text += f" [{'red' if times < NO_SLOWER else 'green'}]{times:.2f}×[/]"
        parts.append(text)
    return f"{title}: {', '.join(parts) or 'no numbers'} [dim]({seconds:.0f} s)[/]"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
