"""The command line: `python -m xfcompile doctor` and `python -m xfcompile bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from xfcompile.bench.command import app as bench

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


if __name__ == "__main__":
    app(prog_name="python -m xfcompile")
