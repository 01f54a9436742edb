"""What was found in a program, what became of it and why: one entry a site, and a table of them."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from xfcompile.checks import Check
from xfcompile.checks import summary as summary_of_checks
from xfcompile.checks import table as table_of_checks
from xfcompile.source import RewriteError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from xfcompile.meaning import About

log = logging.getLogger(__name__)

LONGEST = 240
"""Characters of a formula that the table shows; `SiteReport` holds all of it."""


@dataclass(frozen=True)
class SiteReport:
    """One candidate.

    family: its name, "attention". route: what runs it ("triton", "sdpa", "inductor"), None where it is not matched.
    reason: why it is not matched, or why this route. source: the user's line, "file.py:123".
    expression: what was read, in sympy's notation. mask: what its mask was recognised as ("causal", "key padding").
    module: the module that it stands in, "layers.3.attention". tiles: what was proved of the mask, the bounds of the
    keys and the share of tiles: "i - 255 <= j < i + 1: 8% of 64x64 tiles run, 3% masked".
    about: what a page shows besides. It is no part of what makes two entries alike, nor of JSON.
    """

    family: str
    matched: bool
    route: str | None = None
    reason: str | None = None
    source: str | None = None
    expression: str | None = None
    mask: str | None = None
    module: str | None = None
    tiles: str | None = None
    about: About | None = field(default=None, compare=False, repr=False)

    @property
    def replaced(self) -> bool:
        """Whether something else stands in its place, or may: an SDPA call that stayed as it was counts too."""
        return self.matched and self.route != "inductor"

    @property
    def kind(self) -> SiteReport:
        """The same entry without the numbers in its module's name: alike for all layers of a model."""
        return replace(self, module=self.module and re.sub(r"\d+", "*", self.module))

    def to_dict(self) -> dict[str, Any]:
        """All but `about`, as JSON knows it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "about"}


@dataclass
class Report:
    """All candidates of the graphs that were read. `failures`: errors of our own; each left a site as it was.
    `checks`: the replaced sites that were run beside their originals (option `verify`). `calls`: what the graphs
    consist of when Inductor gets them, and how often."""

    sites: list[SiteReport] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    graphs: int = 0
    checks: list[Check] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, site: SiteReport) -> None:
        self.sites.append(site)

    def failed(self, doing: str, error: Exception, *, strict: bool = False) -> str:
        """Record an error of our own, or raise it if `strict`; the reason to be given for what is left as it was."""
        if isinstance(error, RewriteError) and isinstance(error.__cause__, Exception):
            doing, error = error.doing, error.__cause__
        words = f"{doing}: {type(error).__name__}: {error}"
        if strict:
            raise RewriteError(doing, error) from error
        log.debug("%s", words, exc_info=error)
        if words not in self.failures:  # of a checkpoint and of what is around it, say
            self.failures.append(words)
        return f"an error of xfcompile: {type(error).__name__}: {error}"

    def extend(self, other: Report) -> None:
        self.sites += [_later(site, self.graphs) for site in other.sites]
        self.failures += other.failures
        self.graphs += other.graphs
        self.checks += other.checks
        self.calls += other.calls

    def summary(self) -> str:
        """One line: "24 attention sites: 24 matched (24 sdpa)"."""
        if not self.sites:
            return f"no sites in {_count(self.graphs, 'graph')}"
        return "; ".join(self._summary(family) for family in dict.fromkeys(s.family for s in self.sites))

    def _summary(self, family: str) -> str:
        sites = [s for s in self.sites if s.family == family]
        matched = [s for s in sites if s.matched]
        routes = ", ".join(f"{n} {route}" for route, n in Counter(s.route or "no route" for s in matched).most_common())
        line = f"{_count(len(sites), f'{family} site')}: {len(matched)} matched"
        line += f" ({routes})" if matched else ""
        return line + (f", {len(sites) - len(matched)} not matched" if len(matched) < len(sites) else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON knows it."""
        return {
            "summary": self.summary(),
            "graphs": self.graphs,
            "sites": [site.to_dict() for site in self.sites],
            "failures": list(self.failures),
            "checks": [asdict(check) for check in self.checks],
        }

    def __str__(self) -> str:
        return self.render(shutil.get_terminal_size().columns)

    def render(self, width: int) -> str:
        """The table as plain text of at most `width` columns."""
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        Console(file=out, width=width, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        if self.sites:
            yield self._table(options.max_width)
        yield Text(self.summary(), style="bold")
        if self.checks:
            yield Text("")
            yield table_of_checks(self.checks, options.max_width)
            yield Text(summary_of_checks(self.checks), style="bold")
        for failure in self.failures:
            yield Text(f"error in xfcompile, left to Inductor: {failure}", style="red")

    def _table(self, width: int) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
        table = Table(box=box.SIMPLE_HEAD if unicode else box.ASCII2, show_edge=False, pad_edge=False)
        # A fold may not hide the line number at the end of a source, the part that one looks for.
        place = {"overflow": "fold", "max_width": max(18, width // 4)}
        table.add_column("sites", justify="right", no_wrap=True)
        table.add_column("family: where", **place)  # type: ignore[arg-type]
        table.add_column("route", no_wrap=True)
        table.add_column("what was read, and why", overflow="fold", ratio=1)
        for site, count in Counter(site.kind for site in self.sites).items():
            read = Text("\n").join(_read(site)) if _read(site) else Text("")
            where = Text("\n".join(filter(None, [site.family, site.source, site.module])))
            style = "green" if site.matched and site.route != "inductor" else "yellow"
            table.add_row(str(count), where, Text(site.route or "-", style=style), read)
        return table


def _later(site: SiteReport, graphs: int) -> SiteReport:
    """The same site behind those of so many graphs."""
    if site.about is None or not graphs:
        return site
    first, *rest = site.about.place
    return replace(site, about=replace(site.about, place=(first + graphs, *rest)))


def _read(site: SiteReport) -> list[Any]:
    from rich.text import Text

    lines = []
    if site.mask is not None or site.tiles is not None:
        lines.append(Text(f"mask: {', '.join(filter(None, [site.mask, site.tiles]))}"))
    if site.expression is not None:
        lines.append(Text(_elided(site.expression), style="cyan"))
    if site.reason is not None:
        lines.append(Text(site.reason if site.matched else f"not matched: {site.reason}", style="dim"))
    return lines


def _elided(text: str) -> str:
    """The beginning and the end of a long formula."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


_collecting: ContextVar[tuple[Report, ...]] = ContextVar("xfcompile_collecting", default=())


@contextmanager
def collect() -> Iterator[Report]:
    """Gathers what the backend reports of every graph that this thread compiles inside of the `with` block."""
    report = Report()
    token = _collecting.set((*_collecting.get(), report))
    try:
        yield report
    finally:
        _collecting.reset(token)


def publish(report: Report) -> None:
    """Hand one compilation's report to whoever collects."""
    for collecting in _collecting.get():
        collecting.extend(report)
