"""What is being timed, on a terminal while it is, or as lines of the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def progress(title: str, variants: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, which is gone afterwards; none where that is no terminal, or the log is read instead. Gives the
    function that is told of each variant before it is tried."""
    if not sys.stderr.isatty() or log.isEnabledFor(logging.INFO):
        yield lambda name: log.info("timing %s: %s", title, name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("xfcompile times {task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=variants)

        def told(name: str) -> None:
            bar.update(task, description=f"{title}: {name}", advance=1)

        yield told
