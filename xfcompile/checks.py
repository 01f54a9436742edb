"""What a check of a replaced site found: its error against fp64, beside that of the program as it was written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


class VerificationError(RuntimeError):
    """A replaced site is further from fp64 than rounding makes the program itself."""


@dataclass(frozen=True)
class Difference:
    """The largest absolute errors of one result ("out", "grad of k") against the original in fp64.

    error: the replacement's. eager: the program's own. bound: what the replacement's may be: four ulps of the largest
    number of the result, and twice eager's (both are samples of the same noise) or, if that is more, twice what it
    makes in fp64 to move each operand by one rounding: no order of operations is asked to be better than that. Of a
    gradient, also twice what the roundings of a fused backward make (see rounding.py).
    """

    what: str
    error: float
    eager: float
    bound: float

    @property
    def ratio(self) -> float:
        """The replacement's error in units of eager's own; 1 where neither has any."""
        if self.error == self.eager:
            return 1.0
        return self.error / self.eager if self.eager else math.inf

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.2g}, eager's {self.eager:.2g}, ratio {self.ratio:.2g}"


@dataclass(frozen=True)
class Check:
    """One replaced site, run once beside its original. reason: why it was not compared, if it was not."""

    family: str
    route: str
    source: str | None = None
    module: str | None = None
    differences: tuple[Difference, ...] = ()
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the replacement; a site that was not compared is not ok."""
        return self.reason is None and all(d.ok for d in self.differences)

    @property
    def wrong(self) -> bool:
        return not all(d.ok for d in self.differences)

    @property
    def worst(self) -> Difference | None:
        """The difference that is the most, in units of what is allowed."""
        return max(self.differences, key=lambda d: (not d.ok, d.error / d.bound if d.bound else 0), default=None)

    def __str__(self) -> str:
        where = " ".join(filter(None, [self.family, "at", self.source or "?", self.module and f"({self.module})"]))
        if self.reason is not None:
            return f"{where}: not compared: {self.reason}"
        return f"{where}: " + "; ".join(map(str, self.differences))


def summary(checks: Sequence[Check]) -> str:
    """One line: "3 sites verified, 1 not compared, 1 wrong"."""
    compared = [c for c in checks if c.reason is None]
    wrong, skipped = sum(c.wrong for c in checks), len(checks) - len(compared)
    line = f"{len(compared)} site{'' if len(compared) == 1 else 's'} verified"
    return line + (f", {skipped} not compared" if skipped else "") + (f", {wrong} wrong" if wrong else "")


def table(checks: Sequence[Check], width: int) -> Table:
    """One row a site: its result with the largest error, and what else is to be said."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.ASCII2, show_edge=False, pad_edge=False)
    made.add_column("verified", overflow="fold", max_width=max(18, width // 3))
    for name in ("result", "error", "eager's", "ratio"):
        made.add_column(name, overflow="fold", justify="left" if name == "result" else "right")
    for check in checks:
        where = Text("\n".join(filter(None, [f"{check.family}: {check.route}", check.source, check.module])))
        worst = check.worst
        if check.reason is not None or worst is None:
            made.add_row(where, Text(f"not compared: {check.reason}", style="yellow"))
            continue
        numbers = [f"{x:.2g}" for x in (worst.error, worst.eager, worst.ratio)]
        style = "red" if check.wrong else "green"
        result = worst.what + (f" (and {len(check.differences) - 1} more)" if len(check.differences) > 1 else "")
        made.add_row(where, Text(result), *[Text(n, style=style) for n in numbers])
    return made
