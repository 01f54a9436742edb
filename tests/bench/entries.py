"""Results that nobody measured, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from xfcompile.bench.results import Results

RUN: dict[str, Any] = {
    "date": "2026-01-01T00:00:00+00:00",
    "hardware": {"device": "NVIDIA H200"},
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "revision": "0123456789ab",
    "arguments": {"quick": False},
}


def cell(ms: float, **more: Any) -> dict[str, Any]:
    return {"ms": ms, "low": 0.9 * ms, "high": 1.1 * ms, "least": 0.8 * ms, "most": 2 * ms, "rounds": 5, **more}


def entry(name: str, mode: str = "forward", variant: str = "", length: int = 1024, **cells: Any) -> dict[str, Any]:
    """cells: times in ms, or whole cells; an underscore in a column's name stands for a hyphen."""
    made = {k.replace("_", "-"): v if isinstance(v, dict) else cell(v) for k, v in cells.items()}
    return {"name": name, "mode": mode, "variant": variant, "sizes": {"S": length}, "cells": made, "run": 0}


def results(*rows: dict[str, Any], benchmark: str = "attention") -> Results:
    columns = list(dict.fromkeys(column for row in rows for column in row["cells"]))
    return Results(benchmark, "what is tested", columns, runs=[RUN], rows=list(rows))
