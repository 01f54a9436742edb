"""`python -m xfcompile bench`: one command a benchmark, one for all of them, and one that shows earlier results."""

from __future__ import annotations

import difflib
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xfcompile.writable import why_not

if TYPE_CHECKING:
    from xfcompile.bench.job import Row

app = typer.Typer(
    help="Time this backend beside eager, Inductor, FlexAttention, SDPA and Liger, in one run on one machine.",
    no_args_is_help=True,
)

LIMIT = 300.0

Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run? On CPUs too.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results there, after each row.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a plot there (.png, .svg or .pdf).")]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backends", help="Columns, separated by commas; all without it. `--list` names them."),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        help='Only rows whose title has all of these words ("causal forward D64"); may be repeated, in that order.',
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the file of --json holds, if it is there.")]
Budget = Annotated[float, typer.Option("--budget", help="Seconds for all of it; what is not reached is listed.")]
Limit = Annotated[float, typer.Option("--limit", help="Seconds that one column of a row may take.")]
Jobs = Annotated[
    int,
    typer.Option("--jobs", help="Rows that are compiled at once, each by a process; one at a time is timed, alone."),
]
Seconds = Annotated[
    float | None, typer.Option("--seconds", help="How long the columns of a row are timed, in turns; 6 without it.")
]
NoErrors = Annotated[bool, typer.Option("--no-errors", help="Time only; do not compare with fp64.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Listing = Annotated[bool, typer.Option("--list", help="Only name the rows and the columns.")]
InProcess = Annotated[
    bool,
    typer.Option("--in-process", help="Measure in this process: what breaks it then ends the run.", hidden=True),
]


@dataclass(frozen=True)
class Asked:
    """The options that all benchmarks share."""

    quick: bool = False
    json: Path | None = None
    plot: Path | None = None
    backends: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    resume: bool = False
    budget: float = math.inf
    limit: float = LIMIT
    errors: bool = True
    device: str = "auto"
    listing: bool = False
    in_process: bool = False
    jobs: int = 1
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a file of results."""
        named = {
            "quick": self.quick, "backends": list(self.backends) or "all", "only": list(self.only) or "all",
            "budget": self.budget if math.isfinite(self.budget) else None, "errors": self.errors, "device": self.device,
            "limit": self.limit, "jobs": self.jobs, "seconds": self.seconds,
        }  # fmt: skip
        return named


def _register(name: str, text: str) -> None:
    def command(
        quick: Quick = False,
        json: Json = None,
        plot: Plot = None,
        backends: Backends = None,
        only: Only = None,
        resume: Resume = False,
        budget: Budget = math.inf,
        limit: Limit = LIMIT,
        jobs: Jobs = 1,
        seconds: Seconds = None,
        no_errors: NoErrors = False,
        device: Device = "auto",
        listing: Listing = False,
        in_process: InProcess = False,
    ) -> None:
        asked = Asked(
            quick, json, plot, _several(backends), tuple(only or ()), resume, budget, limit, not no_errors, device,
            listing, in_process, jobs, seconds,
        )  # fmt: skip
        _checked(asked)
        _benchmark(name, asked, begun=time.monotonic())

    command.__doc__ = text
    app.command(name)(command)


_register("attention", "Twelve attention programs in plain PyTorch, forward and with their backward, at three lengths.")
_register("gated-mlp", "Gated MLPs, packed and not, forward and with their backward.")
_register("bias-act-dropout", "Bias, activation and dropout: MLPs and a block of a GPT, inference and training.")
_register("models", "Whole models of transformers, diffusers and timm, and how long they take to compile.")
_register("decode", "Attention of one query to a cache that is filled wholly or in part.")


@app.command("all")
def everything(
    out: Annotated[Path, typer.Option("--out", help="The folder for a .json and a .png of each benchmark.")],
    quick: Quick = False,
    only: Only = None,
    backends: Backends = None,
    resume: Resume = False,
    budget: Budget = math.inf,
    limit: Limit = LIMIT,
    jobs: Jobs = 1,
    seconds: Seconds = None,
    no_errors: NoErrors = False,
    device: Device = "auto",
    in_process: InProcess = False,
) -> None:
    """All benchmarks, one after the other, within one budget; with --resume as often as it takes."""
    from xfcompile.bench import registry

    begun = time.monotonic()
    if out.exists() and not out.is_dir():
        _refuse(f"--out is a folder, and {out} is a file: give another name")
    wanted = _several(backends)
    known = {column for name in registry.NAMES for column in registry.benchmark(name).columns}
    _known("--backends", wanted, known)
    for name in registry.NAMES:
        has = registry.benchmark(name).columns
        chosen = tuple(column for column in wanted if column in has)
        if wanted and not chosen:
            continue
        there = out / f"{name}.json"
        asked = Asked(
            quick, there, out / f"{name}.png", chosen, tuple(only or ()), resume, budget, limit,
            not no_errors, device, False, in_process, jobs, seconds,
        )  # fmt: skip
        _checked(asked)
        _benchmark(name, asked, begun=begun, none_is_fine=bool(only), plot_is_needed=False)


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="Files that --json wrote, or that older scripts did.")],
    plot: Plot = None,
) -> None:
    """Tables, means and goals of earlier results, and their plot."""
    from xfcompile.bench.results import Unusable, load
    from xfcompile.bench.table import report

    if plot is not None and len(files) > 1:
        _refuse(f"--plot makes one picture of one file, and {len(files)} files were given: give one")
    for path in files:
        try:
            results = load(path)
        except Unusable as error:
            _refuse(str(error))
        _console().print(report(results))
        if plot is not None:
            _plotted(results, plot, needed=True)


# -- one benchmark ------------------------------------------------------------------------------------------------


def _benchmark(
    name: str, asked: Asked, *, begun: float, none_is_fine: bool = False, plot_is_needed: bool = True
) -> None:
    import torch

    from xfcompile.bench import registry
    from xfcompile.bench.job import Place
    from xfcompile.bench.measure import Settings
    from xfcompile.bench.results import Results, Unusable, continued
    from xfcompile.bench.run import Plan, run
    from xfcompile.bench.surroundings import surroundings
    from xfcompile.bench.table import report
    from xfcompile.bench.timing import QUICK, Rounds

    made = registry.benchmark(name)
    _known("--backends", asked.backends, made.columns)
    columns = [column for column in made.columns if not asked.backends or column in asked.backends]
    device = _device(asked.device)
    scale = "quick" if asked.quick else "gpu" if device == "cuda" else "cpu"
    rows = _chosen(made.rows(scale), asked.only)  # type: ignore[arg-type]
    if not rows and none_is_fine:
        return
    if not rows:
        some = "; ".join(row.title for row in made.rows(scale)[:4])  # type: ignore[arg-type]
        _refuse(
            f"--only {' --only '.join(map(repr, asked.only))} leaves no row of {name}; rows are called: {some}; ..."
        )
    if asked.listing:
        return _listed(made.columns, [row.title for row in rows])
    console = _console()
    here = surroundings(device) | {"arguments": asked.as_dict()}
    results = Results(name, made.title, list(columns), made.baseline)
    if asked.json is not None and asked.json.exists():
        if asked.resume:
            try:
                results = continued(asked.json, name, here)
            except Unusable as error:
                _refuse(f"--resume: {error}")
        else:
            kept = _set_aside(asked.json)
            console.print(f"{asked.json} was there, and is {kept.name} now; --resume goes on with it", style="yellow")
    results.runs.append(here)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rounds = QUICK if asked.quick else Rounds()
    if asked.seconds is not None:
        rounds = replace(rounds, seconds=asked.seconds)
    settings = Settings(Place(device, dtype, scale), rounds, asked.errors)  # type: ignore[arg-type]
    console.print(f"[bold]{made.title}[/]: {len(rows)} rows, {len(columns)} columns, {here['hardware']['device']}")
    measuring = _measuring(name, settings, asked)
    left = asked.budget - (time.monotonic() - begun)
    interrupted = False
    try:
        plan = Plan(rows, columns, asked.json, max(left, 0.0), asked.budget)
        run(plan, results, measuring, console, time.monotonic)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for one in measuring:
            one.close()
    results.forget_empty_run()
    console.print(report(results))
    if asked.json is not None:
        console.print(f"results: {asked.json}", style="dim")
    if asked.plot is not None:
        _plotted(results, asked.plot, needed=plot_is_needed)
    if interrupted:
        raise typer.Exit(130)


def _measuring(name: str, settings: Any, asked: Asked) -> list[Any]:
    from xfcompile.bench.turns import Turns
    from xfcompile.bench.worker import Apart, Here

    if asked.in_process:
        return [Here(name, settings)]
    turns = Turns()
    return [Apart(name, settings, asked.limit, turns) for _ in range(asked.jobs)]


def _plotted(results: Any, path: Path, *, needed: bool) -> None:
    from xfcompile.bench.plot import NoPlot, save

    try:
        save(results, path)
    except NoPlot as error:
        if needed:
            _refuse(str(error))
        _console().print(f"no plot: {error}", style="yellow")
        return
    _console().print(f"plot: {path}", style="dim")


def _listed(columns: Iterable[str], titles: Iterable[str]) -> None:
    from xfcompile.bench.columns import COLUMNS

    for column in columns:
        typer.echo(f"{column:24}{COLUMNS[column].what}")
    typer.echo()
    for title in titles:
        typer.echo(title)


# -- what was asked -----------------------------------------------------------------------------------------------


def _several(given: list[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for text in given or () for name in text.split(",") if name.strip())


def _chosen(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """Those that `only` names, in its order; all of them where it is empty."""

    def named(row: Row, text: str) -> bool:
        return all(word in row.title.lower() for word in text.lower().split())

    chosen = [row for text in only or ("",) for row in rows if named(row, text)]
    return list(dict.fromkeys(chosen))


def _known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            _refuse(f"{option}: there is no {name!r}{hint}; there are {', '.join(names)}")


def _checked(asked: Asked) -> None:
    """Refuse before anything is measured what would fail only in the end."""
    if asked.resume and asked.json is None:
        _refuse("--resume goes on with the file of --json, and none was given: give --json FILE too")
    for option, path in (("--json", asked.json), ("--plot", asked.plot)):
        reason = None if path is None or asked.listing else why_not(path)
        if reason is not None:
            _refuse(f"{option}: {reason}")
    if asked.json is not None and asked.json.exists() and not asked.resume and not asked.listing:
        _holds_results(asked.json)
    for option, seconds in (("--budget", asked.budget), ("--limit", asked.limit), ("--seconds", asked.seconds)):
        if seconds is not None and not seconds > 0:
            _refuse(f"{option} is a number of seconds above 0, not {seconds:g}")
    if asked.jobs < 1 or (asked.jobs > 1 and asked.in_process):
        _refuse(f"--jobs is a number of processes, at least 1, and more not with --in-process; not {asked.jobs}")
    if asked.plot is not None:
        from xfcompile.bench.plot import NoPlot, needs

        try:
            needs(asked.plot)
        except NoPlot as error:
            _refuse(str(error))


def _holds_results(path: Path) -> None:
    """What is something else is nobody's to move."""
    from xfcompile.bench.results import Unusable, load

    try:
        load(path)
    except Unusable as error:
        _refuse(f"--json: {path} is there and is no file of results ({error}): give another name, or remove it")


def _set_aside(path: Path) -> Path:
    """Keep what a file holds: a run that began anew by mistake must not cost hours of another."""
    names = (f"{path.name}.before{'' if n == 1 else f'-{n}'}" for n in itertools.count(1))
    kept = next(found for name in names if not (found := path.with_name(name)).exists())
    path.replace(kept)
    return kept


def _device(asked: str) -> str:
    import torch

    if asked not in ("auto", "cpu", "cuda"):
        _refuse(f"--device is auto, cpu or cuda, not {asked!r}")
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        _refuse("--device cuda: torch sees no CUDA device here; see `python -m xfcompile doctor`, or give --device cpu")
    return "cuda" if there and asked != "cpu" else "cpu"


def _refuse(text: str) -> Any:
    raise typer.BadParameter(text)


def _console() -> Any:
    """As wide as the terminal; where there is none, wide enough for the tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)
