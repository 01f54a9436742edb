"""The command line: `python -m xfcompile doctor`, `explain` and `bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from xfcompile.bench.command import app as bench
from xfcompile.writable import why_not

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
# Its options alone: what measures is imported when a benchmark is asked for.
app.add_typer(bench, name="bench")


@app.callback()
def main() -> None:
    """Attention in plain PyTorch, compiled as fused calls."""


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Say what this machine can do, and exit with 1 if something is broken."""
    from rich.console import Console

    from xfcompile.doctor import as_dict, examine, healthy, table

    findings = examine()
    if as_json:
        typer.echo(json.dumps(as_dict(findings), indent=2))
    else:
        Console().print(table(findings))
    if not healthy(findings):
        raise typer.Exit(1)


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help="path/to/script.py, or module:function (or path/to/file.py:function).")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments, after --.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here, one file with nothing outside of it.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
    no_grad: Annotated[bool, typer.Option("--no-grad", help="Explain what a function returns in inference.")] = False,
) -> None:
    """Run a script or a function, and show what was found in all that it compiles with backend="xformers".

    A function is called without arguments; it compiles things itself, or returns (model, args) or
    (model, args, kwargs). The exit code is the program's own; 1 if it raised an error, or there is nothing to report.
    """
    from rich.console import Console

    from xfcompile.page import page
    from xfcompile.running import WrongTarget, run

    # Where they are now: a program may go to another folder.
    html, as_json = (_writable(option, path) for option, path in (("--html", html), ("--json", as_json)))
    try:
        ran = run(target, arguments or [], no_grad=no_grad)
    except WrongTarget as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    report = ran.report
    if ran.problem is not None:
        typer.echo(ran.problem, err=True)
        raise typer.Exit(ran.code)
    Console(legacy_windows=False).print(report)
    written = [
        _written(html, lambda: page(report, Path(target).name)),
        _written(as_json, lambda: json.dumps(report.to_dict(), indent=2)),
    ]
    if ran.code or not all(written):
        raise typer.Exit(ran.code or 1)


def _writable(option: str, path: Path | None) -> Path | None:
    if path is None:
        return None
    reason = why_not(path)
    if reason is not None:
        typer.echo(f"explain: {option}: {reason}.", err=True)
        raise typer.Exit(2)
    return path.absolute()


def _written(path: Path | None, text: Callable[[], str]) -> bool:
    """Write what was asked for; whether that went well."""
    if path is None:
        return True
    try:
        path.write_text(text(), encoding="utf-8")
    except OSError as error:
        typer.echo(f"explain: could not write {path}: {error.strerror}", err=True)
        return False
    typer.echo(f"explain: wrote {path}", err=True)
    return True


if __name__ == "__main__":
    app(prog_name="python -m xfcompile")
