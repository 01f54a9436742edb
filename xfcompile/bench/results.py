"""A file of results: written as they come, read again to go on or to be shown."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xfcompile.bench.job import Row

FORMAT = 1
Entry = dict[str, Any]


class Unusable(Exception):
    """A file of results that cannot be read, or not be continued: said to the user."""


@dataclass
class Results:
    """What was measured: `rows`, each with its run's number, and of each run where, when and by which arguments.

    not_run: the rows that were asked for and not measured, with the reasons. baseline: what speed-ups are over.
    """

    benchmark: str
    title: str
    columns: list[str]
    baseline: str = "inductor"
    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Entry] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """An entry of the latest run; one of the same row gives way."""
        same = Row.of(entry)
        self.rows = [r for r in self.rows if Row.of(r) != same] + [{**entry, "run": len(self.runs) - 1}]
        self.columns += [column for column in entry["cells"] if column not in self.columns]

    def forget_empty_run(self) -> None:
        """Of a run that measured nothing nothing needs to be said."""
        if self.runs and all(row["run"] != len(self.runs) - 1 for row in self.rows):
            self.runs.pop()

    def done(self, row: Row, columns: Sequence[str]) -> bool:
        """Whether a row has been measured in all of these columns (that it failed or was skipped is a result),
        and nothing disturbed it."""
        for entry in self.rows:
            if Row.of(entry) == row and "disturbed" not in entry:
                whole = "skipped" in entry or "failed" in entry
                return whole or all(entry["cells"].get(column) for column in columns)
        return False

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "benchmark": self.benchmark, "title": self.title, "baseline": self.baseline,
            "columns": self.columns, "runs": self.runs, "rows": self.rows, "not_run": self.not_run,
        }  # fmt: skip

    def save(self, path: Path, more: Mapping[str, Any] | None = None) -> None:
        """In one step: who reads meanwhile, or is left with it after a crash, has a whole file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict() | dict(more or {}), indent=1) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)


def load(path: Path) -> Results:
    """Also of files that older scripts wrote."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise Unusable(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise Unusable(f"{path} is not JSON: {error}") from None
    if isinstance(found, dict) and found.get("format") == FORMAT:
        names = ("benchmark", "title", "columns", "baseline", "runs", "rows", "not_run")
        if missing := [name for name in names if name not in found]:
            raise Unusable(f"{path} is of format {FORMAT}, but has no {', '.join(missing)}: is it whole?")
        return Results(**{name: found[name] for name in names})
    from xfcompile.bench.history import of_old

    old = of_old(found, path.name) if isinstance(found, dict) else None
    if old is None:
        raise Unusable(f"{path} is no file of results: expected what `python -m xfcompile bench ... --json` writes")
    return old


def continued(path: Path, benchmark: str, run: Mapping[str, Any]) -> Results:
    """The results of a file, to be gone on with on this machine."""
    found = load(path)
    if found.benchmark != benchmark:
        raise Unusable(f"{path} holds results of {found.benchmark!r}, not of {benchmark!r}: give another --json")
    for before in found.runs:
        differing = [
            f"{name} {_at(before, place, name)} there, {_at(run, place, name)} here"
            for place, name in (("hardware", "device"), ("versions", "torch"), ("versions", "triton"))
            if _at(before, place, name) != _at(run, place, name)
        ]
        if differing:
            raise Unusable(
                f"{path} was measured elsewhere ({'; '.join(differing)}): give another --json, or no --resume"
            )
    return found


def _at(run: Mapping[str, Any], place: str, name: str) -> Any:
    return run.get(place, {}).get(name)
