"""Where in the user's program a node comes from, and errors that say it."""

from __future__ import annotations

import os

from torch import fx

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
"""Where no line is the user's: `explain` calls what it explains from here."""


class RewriteError(RuntimeError):
    """An error of this package, with what it was doing and at which line of the user's program; `strict` raises it."""

    def __init__(self, doing: str, error: Exception) -> None:
        super().__init__(f"{doing}: {type(error).__name__}: {error}")
        self.doing = doing


def source_of(node: fx.Node) -> str | None:
    """The user's line: the innermost frame of the node's stack."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    frames = [frame for frame in frames if not frame.startswith(f'File "{_OWN}')]
    if not frames:
        return None
    path, _, rest = frames[-1].removeprefix('File "').partition('"')
    line = rest.split("line ")[-1].split(",")[0]
    return f"{path.rsplit('/', 1)[-1]}:{line}"
