"""Runs the rows of a benchmark one after the other, within a budget, and writes what is known after each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xfcompile.bench import columns as c
from xfcompile.bench.job import Row
from xfcompile.bench.results import Entry, Results
from xfcompile.bench.summary import NO_SLOWER, measure_of, number, ratio, summary
from xfcompile.bench.worker import Announce, TimeUp


class Measuring(Protocol):
    """Measures a row; raises `TimeUp` where that would last longer than until `end` (of `time.monotonic`)."""

    def measure(self, row: Row, columns: Sequence[str], announce: Announce, end: float) -> Entry: ...


@dataclass(frozen=True)
class Plan:
    """rows and columns: what is measured. json: where results are kept. budget: seconds, for all of it."""

    rows: Sequence[Row]
    columns: Sequence[str]
    json: Path | None = None
    budget: float = math.inf


def run(plan: Plan, results: Results, measuring: Measuring, console: Console, clock: Callable[[], float]) -> None:
    """Measures what `results` do not hold yet, and notes there what was not reached. The last one is always noted."""
    begin = clock()
    end = begin + plan.budget
    left = [row for row in plan.rows if not results.done(row, plan.columns)]
    if len(left) < len(plan.rows):
        console.print(f"{len(plan.rows) - len(left)} of {len(plan.rows)} rows are there already", style="dim")
    _keep(plan, results, left, "not reached: the run was cut off")
    with _progress(console) as progress:
        task = progress.add_task("", total=len(left), at="")
        while left:
            row = left[0]
            if clock() >= end:
                break

            def announce(column: str, row: Row = row) -> None:
                progress.update(task, description=f"{row.title}: {column}")

            announce("starting")
            since = clock()
            try:
                entry = measuring.measure(row, plan.columns, announce, end)
            except TimeUp:
                break
            results.add(entry)
            left = left[1:]
            _keep(plan, results, left, "not reached: the run was cut off")
            progress.advance(task)
            progress.console.print(line(entry, clock() - since), highlight=False)
    _keep(plan, results, left, f"the budget of {plan.budget:g} s was over")


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
