"""Ratios between columns, their geometric means, and the goals that they are held to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xfcompile.bench import columns as c
from xfcompile.bench.results import Entry, Results

NO_SLOWER = 0.98
"""Times as fast as Inductor: what is below is a loss."""


def number(entry: Entry, column: str, what: str = "ms") -> float | None:
    """None where there is none, or another process was at work: then times are none."""
    if what == "ms" and "disturbed" in entry:
        return None
    found: float | None = entry["cells"].get(column, {}).get(what)
    return found


def ratio(entry: Entry, column: str, over: str, what: str = "ms") -> float | None:
    """How many times as fast as `over` a column is (`what`: or as small, or as quick to start); None where either has
    no number."""
    mine, theirs = number(entry, column, what), number(entry, over, what)
    return theirs / mine if mine and theirs else None


def measure_of(entry: Entry) -> str:
    """What is compared in a row: times, or the seconds of a cold start."""
    return "cold_s" if entry["mode"].startswith("start") else "ms"


def geometric_mean(numbers: Iterable[float]) -> float | None:
    logs = [math.log(x) for x in numbers]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


@dataclass(frozen=True)
class Goal:
    """text: what was meant to be reached. rows: of which it is asked. column: whose numbers, over those of `over`.

    least: the least ratio; of their geometric mean, or, with `each`, of every row.
    """

    text: str
    rows: Callable[[Entry], bool]
    over: str
    least: float
    column: str = c.XFORMERS
    each: bool = False
    what: str = "ms"


@dataclass(frozen=True)
class Outcome:
    """value: the geometric mean, or the least ratio; None without any. counted: rows with both numbers, of `asked`.

    behind: the rows that fall short, with their ratios; failed: those in which only our column has no number.
    """

    goal: Goal
    value: float | None
    counted: int
    asked: int
    behind: tuple[tuple[str, float], ...]
    failed: tuple[str, ...]

    @property
    def reached(self) -> bool | None:
        """None where nothing was measured. A column of ours that failed is no success."""
        if self.value is None:
            return False if self.failed else None
        return self.value >= self.goal.least and not self.failed

    def as_dict(self) -> dict[str, Any]:
        return {
            "goal": self.goal.text, "least": self.goal.least, "value": self.value, "reached": self.reached,
            "rows": self.counted, "of": self.asked, "behind": dict(self.behind), "failed": list(self.failed),
        }  # fmt: skip


def title(entry: Entry) -> str:
    from xfcompile.bench.job import Row

    return Row.of(entry).title


def outcome(goal: Goal, rows: Sequence[Entry]) -> Outcome:
    # A row that cannot be measured here at all (a library is missing) is nobody's failure; nor is a row in which only
    # the other column has a number because ours was not among those asked for.
    asked = [r for r in rows if goal.rows(r) and "skipped" not in r]
    ratios = {title(r): x for r in asked if (x := ratio(r, goal.column, goal.over, goal.what)) is not None}
    failed = tuple(
        title(r) for r in asked if number(r, goal.over, goal.what) and "failed" in r["cells"].get(goal.column, {})
    )
    value = min(ratios.values(), default=None) if goal.each else geometric_mean(ratios.values())
    behind = sorted(((name, x) for name, x in ratios.items() if x < goal.least), key=lambda pair: pair[1])
    return Outcome(goal, value, len(ratios), len(asked), tuple(behind), failed)


def _mode(*modes: str, variant: str | None = None) -> Callable[[Entry], bool]:
    return lambda r: r["mode"] in modes and (variant is None or r["variant"] == variant)


GOALS: dict[str, tuple[Goal, ...]] = {
    "attention": (
        Goal("forward: 8 times as fast as Inductor", _mode("forward"), c.INDUCTOR, 8.0),
        Goal("forward + backward: 4 times as fast as Inductor", _mode("forward+backward"), c.INDUCTOR, 4.0),
        Goal("forward: 1.25 times as fast as FlexAttention", _mode("forward"), c.FLEX, 1.25),
        Goal("forward + backward: 1.25 times as fast as FlexAttention", _mode("forward+backward"), c.FLEX, 1.25),
        Goal("none slower than Inductor", lambda r: True, c.INDUCTOR, NO_SLOWER, each=True),
    ),
    "gated-mlp": (Goal("none slower than Inductor", lambda r: True, c.INDUCTOR, NO_SLOWER, each=True),),
    "bias-act-dropout": (Goal("none slower than Inductor", lambda r: True, c.INDUCTOR, NO_SLOWER, each=True),),
    "decode": (Goal("none slower than Inductor", lambda r: True, c.INDUCTOR, NO_SLOWER, each=True),),
    "models": (
        Goal("eager attention, inference: 2.0 times Inductor", _mode("infer", variant="eager"), c.INDUCTOR, 2.0),
        Goal("eager attention, training: 1.7 times Inductor", _mode("train", variant="eager"), c.INDUCTOR, 1.7),
        Goal("default attention, inference: 1.5 times Inductor", _mode("infer", variant="sdpa"), c.INDUCTOR, 1.5),
        Goal("default attention, training: 1.4 times Inductor", _mode("train", variant="sdpa"), c.INDUCTOR, 1.4),
        Goal("none slower than Inductor", _mode("infer", "train", "decode"), c.INDUCTOR, NO_SLOWER, each=True),
        Goal("none slower than its own FlexAttention", _mode("infer", "train"), c.FLEX, 1.0, each=True),
        Goal("none slower than SDPA told by hand", _mode("infer", "train"), c.TOLD, 1.0, each=True),
        Goal("training: no more peak memory than Inductor", _mode("train"), c.INDUCTOR, 1.0, each=True, what="peak_gb"),
        Goal("cold start: at most 1.15 times Inductor's", _mode("start", "start with backward"), c.INDUCTOR, 1 / 1.15,
             each=True, what="cold_s"),
    ),
}  # fmt: skip


def outcomes(results: Results) -> list[Outcome]:
    return [outcome(goal, results.rows) for goal in GOALS.get(results.benchmark, ())]


@dataclass(frozen=True)
class Mean:
    """How many times as fast a column of ours is as another, over the rows of a mode and variant: the mean."""

    group: str
    column: str
    over: str
    value: float
    least: float
    most: float
    rows: int
    losses: int


def group(entry: Entry) -> str:
    """Rows that are one table."""
    return ", ".join(filter(None, [entry["mode"], entry["variant"]]))


def groups(rows: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in rows:
        found.setdefault(group(entry), []).append(entry)
    return found


def means(results: Results) -> list[Mean]:
    mine = [column for column in results.columns if c.ours(column)]
    others = [column for column in results.columns if not c.ours(column) and column != c.FLOOR]
    found = []
    for name, rows in groups(results.rows).items():
        for column, over in itertools.product(mine, others):
            ratios = [x for r in rows if (x := ratio(r, column, over, measure_of(r))) is not None]
            if ratios:
                mean = geometric_mean(ratios)
                assert mean is not None
                losses = sum(x < NO_SLOWER for x in ratios)
                found.append(Mean(name, column, over, mean, min(ratios), max(ratios), len(ratios), losses))
    return found


def summary(results: Results) -> dict[str, Any]:
    """What a file holds beside the rows, for those who read it without this package."""
    return {
        "goals": [found.as_dict() for found in outcomes(results)],
        "geometric_means": [vars(mean) for mean in means(results)],
    }
