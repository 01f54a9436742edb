"""Where in the user's program a node comes from, and errors that say it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from torch import fx

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
"""Where no line is the user's: `explain` calls what it explains from here."""


class RewriteError(RuntimeError):
    """An error of this package, with what it was doing and at which line of the user's program; `strict` raises it."""

    def __init__(self, doing: str, error: Exception) -> None:
        super().__init__(f"{doing}: {type(error).__name__}: {error}")
        self.doing = doing


@dataclass(frozen=True)
class Frame:
    """One line of the user's program: its file, its number, the function that it stands in, and its text."""

    path: str
    line: int
    function: str = ""
    code: str = ""

    def __str__(self) -> str:
        return f"{self.path.rsplit('/', 1)[-1]}:{self.line}"


_FRAME = re.compile(r'^\s*File "(?P<path>.*)", line (?P<line>\d+)(?:, in (?P<function>.*))?$')


def frames_of(node: fx.Node) -> tuple[Frame, ...]:
    """The user's stack at a node, innermost last."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    found = [(k, match) for k, line in enumerate(lines) if (match := _FRAME.match(line))]
    frames = [
        Frame(
            match["path"],
            int(match["line"]),
            match["function"] or "",
            lines[k + 1].strip() if k + 1 < len(lines) else "",
        )
        for k, match in found
    ]
    return tuple(frame for frame in frames if not frame.path.startswith(_OWN))


def source_of(node: fx.Node) -> str | None:
    """The user's line: the innermost frame of the node's stack."""
    frames = frames_of(node)
    return str(frames[-1]) if frames else None
