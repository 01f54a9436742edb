"""What was timed of a site: its routes with their times, and from these the one that runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MARGIN = 0.02
"""By how much of its time a route must be faster than the usual one: less is not told from noise."""


@dataclass(frozen=True)
class Trial:
    """What became of a route: its time in ms, or why it was dropped. Neither: there was no time for it."""

    route: str
    ms: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Timings:
    """All trials of a site, the usual route first. complete: whether none was left out for the budget.

    about: what is to be said of the inputs that it was timed with.
    """

    trials: tuple[Trial, ...]
    complete: bool = True
    about: str = ""

    @property
    def usual(self) -> str:
        return self.trials[0].route

    def winner(self) -> str:
        """The fastest, unless the usual one is about as fast, or was not timed for want of time. Where that was dropped
        and no other was timed the program is left to Inductor as it is."""
        timed = {t.route: t.ms for t in self.trials if t.ms is not None}
        first = self.trials[0]
        if first.ms is None and first.reason is None:
            return self.usual
        if not timed:
            return "inductor"
        best = min(timed, key=lambda v: timed[v])
        if first.ms is not None and timed[best] >= (1 - MARGIN) * first.ms:
            return self.usual
        return best

    def words(self, before: bool = False) -> str:
        """For the report: "timed: triton 0.31 ms, sdpa 0.52, inductor 1.9". before: whether another run did it."""
        timed = sorted(((t.ms, t.route) for t in self.trials if t.ms is not None), key=lambda x: x[0])
        if not timed:
            line = "nothing was timed"
        else:
            named = [f"{name} {ms:.0f}" if ms >= 100 else f"{name} {ms:.2g}" for ms, name in timed]
            named[0] += " ms"
            line = f"timed{' before' if before else ''}: {', '.join(named)}"
        if self.about:
            line += f" ({self.about})"
        dropped = [f"{t.route}: {t.reason}" for t in self.trials if t.reason is not None]
        left = [t.route for t in self.trials if t.ms is None and t.reason is None]
        if dropped:
            line += f"; dropped: {'; '.join(dropped)}"
        if left:
            line += f"; not timed, for the budget was spent: {', '.join(left)}"
        return line

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(found: Mapping[str, Any]) -> Timings:
        """From what `to_dict` gave. Raises ValueError, KeyError or TypeError for anything else."""
        trials = tuple(_trial(t) for t in found["trials"])
        if not trials or not isinstance(found["complete"], bool) or not isinstance(found["about"], str):
            raise ValueError("no timings")
        return Timings(trials, found["complete"], found["about"])


def _trial(found: Mapping[str, Any]) -> Trial:
    route, ms, reason = found["route"], found["ms"], found["reason"]
    if not isinstance(route, str) or not (reason is None or isinstance(reason, str)):
        raise ValueError("no trial")
    if ms is not None and not (isinstance(ms, float) and math.isfinite(ms) and ms >= 0):
        raise ValueError(f"no time: {ms!r}")
    return Trial(route, ms, reason)
