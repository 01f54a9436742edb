"""Results as tables: a line a row, a cell a column, losses as plain as wins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xfcompile.bench import columns as c
from xfcompile.bench.job import Row
from xfcompile.bench.results import Entry, Results
from xfcompile.bench.summary import NO_SLOWER, groups, means, outcomes, ratio, title

LEGEND = "ms ± spread and how many times as fast xformers is; peak GB, error by eager's"
WORSE = 2.0
"""Times eager's own error: what is beyond is shown in red."""


def report(results: Results) -> Group:
    """All of it: a table a mode, the means, the goals, and what has no number and why."""
    parts: list[RenderableType] = [where(results)]
    for name, rows in groups(results.rows).items():
        parts.append(table(results, name, rows))
    parts += [means_table(results), goals_table(results), *reasons(results)]
    return Group(*parts)


def where(results: Results) -> Text:
    lines = []
    for n, run in enumerate(results.runs):
        versions = ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items() if k in ("torch", "triton"))
        device = run.get("hardware", {}).get("device", "unknown hardware")
        parts = [
            device,
            versions,
            run.get("revision") and f"revision {run['revision']}",
            run.get("date"),
            run.get("note"),
        ]
        number = f"run {n}: " if len(results.runs) > 1 else ""
        lines.append(number + "; ".join(filter(None, parts)))
    return Text("\n".join(lines), style="dim")


def table(results: Results, name: str, rows: Sequence[Entry]) -> Group:
    """Of one mode. In a cell: the median, the half of the quartiles' distance in %, and how many times as fast xformers
    is; then memory and the error in units of eager's own."""
    columns = [column for column in results.columns if any(r["cells"].get(column) for r in rows)]
    starts = rows[0]["mode"].startswith("start")
    unit = "seconds cold, warm; xformers' by these" if starts else LEGEND
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(f"{name}")
    for column in columns:
        made.add_column(_label(column), justify="right")
    for entry in sorted(rows, key=_order(rows)):
        made.add_row(_name(entry), *(_cell(entry, column) for column in columns))
    return Group(Text(f"\n{results.title}: {name} ", style="bold") + Text(f"({unit})", style="dim not bold"), made)


def _order(rows: Sequence[Entry]) -> Any:
    """By size; within one in the order in which the rows were measured."""
    places = {title(r): n for n, r in enumerate(rows)}
    return lambda r: (*(r["sizes"].get(letter, 0) for letter in ("D", "S", "K")), places[title(r)])


def _name(entry: Entry) -> Text:
    row = Row.of(entry)
    shape = " ".join(f"{letter}{number}" for letter, number in row.sizes)
    return Text(row.name) + Text(f"\n{shape}" if shape else "", style="dim")


def _cell(entry: Entry, column: str) -> Text:
    cell = entry["cells"].get(column, {})
    if "failed" in cell:
        return Text("out of memory" if cell["failed"] == "out of memory" else "failed", style="red")
    if "cold_s" in cell:
        return _start(entry, column, cell)
    if "ms" not in cell:
        return Text("–", style="dim")
    made = Text(_ms(cell["ms"]))
    if "low" in cell and cell["ms"]:
        made.append(f" ±{(cell['high'] - cell['low']) / 2 / cell['ms']:.0%}", style="dim")
    if not c.ours(column) and (times := ratio(entry, c.XFORMERS, column)) is not None:
        made.append(f" {times:.2f}×", style="dim" if column == c.FLOOR else colour(times))  # nobody is below the floor
    notes = Text("\n")
    if cell.get("peak_gb") is not None:
        notes.append(f"{cell['peak_gb']:.1f} GB ", style="dim")
    if cell.get("error_by_eager") is not None:
        wrong = cell["error_by_eager"] > WORSE
        notes.append(f"err {cell['error_by_eager']:.2g}", style="bold red" if wrong else "dim")
    if "of_copy" in cell:
        notes.append(f" {cell['of_copy']:.0%} of a copy", style="dim")
    return made + notes if len(notes) > 1 else made


def _start(entry: Entry, column: str, cell: dict[str, Any]) -> Text:
    made = Text(f"{cell['cold_s']:.1f}, {cell['warm_s']:.1f}" if "warm_s" in cell else f"{cell['cold_s']:.1f}")
    if not c.ours(column):
        for what in ("cold_s", "warm_s"):
            if (times := ratio(entry, c.XFORMERS, column, what)) is not None:
                made.append(f" {1 / times:.2f}×", style="red" if times < 1 / 1.15 else "green" if times >= 1 else "")
    return made


def _ms(ms: float) -> str:
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 10 else f"{ms:.3f}" if ms >= 0.1 else f"{ms:.4f}"


def colour(times: float) -> str:
    return "bold red" if times < NO_SLOWER else "green" if times > 1.02 else ""


def means_table(results: Results) -> RenderableType:
    found = means(results)
    if not found:
        return Text("")
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "times as fast as", "mean", "least", "most", "rows", "losses"):
        made.add_column(name, justify="left" if name in ("", "times as fast as") else "right")
    last = None
    for mean in found:
        head = f"{mean.group}: {_label(mean.column)}"
        numbers = [Text(f"{x:.2f}", style=colour(x)) for x in (mean.value, mean.least, mean.most)]
        losses = Text(str(mean.losses), style="bold red" if mean.losses else "")
        made.add_row(head if head != last else "", _label(mean.over), *numbers, str(mean.rows), losses)
        last = head
    return Group(Text("\ngeometric means", style="bold"), made)


def _label(column: str) -> str:
    return c.COLUMNS[column].label if column in c.COLUMNS else column


def goals_table(results: Results) -> RenderableType:
    found = outcomes(results)
    if not found:
        return Text("")
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("goal", "asked", "found", "rows", ""):
        made.add_column(name, justify="right" if name in ("asked", "found", "rows") else "left")
    for o in found:
        word = {True: "[green]reached", False: "[bold red]not reached", None: "[dim]not measured"}[o.reached]
        behind = "; ".join(f"{name} {x:.3f}" for name, x in o.behind) if o.goal.each else ""
        failed = f"failed: {'; '.join(o.failed)}" if o.failed else ""
        why = "\n".join(filter(None, [behind, failed]))
        made.add_row(
            o.goal.text, f"{o.goal.least:.2f}", "–" if o.value is None else _told_apart(o.value, o.goal.least),
            f"{o.counted} of {o.asked}",
            word + (f"[/]\n[dim]{escape(why)}" if why else ""),
        )  # fmt: skip
    return Group(Text("\ngoals", style="bold"), made)


def _told_apart(value: float, least: float) -> str:
    """With as many digits as it takes to see which is more."""
    return next((text for n in (2, 3, 4) if (text := f"{value:.{n}f}") != f"{least:.{n}f}"), f"{value:.2f}")


def reasons(results: Results) -> Iterator[Text]:
    """Why there is no number where there is none."""
    failed, skipped = dict[str, list[str]](), dict[str, list[str]]()
    for entry in results.rows:
        for kind, found in (("failed", failed), ("skipped", skipped)):
            if kind in entry:
                found.setdefault(entry[kind], []).append(title(entry))
            for column, cell in entry["cells"].items():
                if kind in cell:
                    found.setdefault(f"{column}: {cell[kind]}", []).append(title(entry))
        if "errors" in entry:
            skipped.setdefault(f"errors {entry['errors']}", []).append(title(entry))
        if "disturbed" in entry:
            failed.setdefault(f"timed while {entry['disturbed']}", []).append(title(entry))
        for column, cell in entry["cells"].items():
            for failure in cell.get("failures") or ():
                failed.setdefault(f"{column}, an error of this package: {failure}", []).append(title(entry))
    for head, found, style in (("failed", failed, "red"), ("not measured", skipped, "dim")):
        for reason, rows in found.items():
            yield Text(f"{head}: {reason} ({_some(rows)})", style=style)
    if results.not_run:
        yield Text(f"not run: {len(results.not_run)} rows", style="bold yellow")
        for entry in results.not_run:
            yield Text(f"  {entry['row']}: {entry['reason']}", style="yellow")


def _some(rows: Sequence[str], most: int = 3) -> str:
    return "; ".join(rows[:most]) + (f"; and {len(rows) - most} more" if len(rows) > most else "")
