"""Measures one row: every column made ready, its memory and errors, and then all of them timed in turns."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from xfcompile.bench import errors
from xfcompile.bench.columns import ours
from xfcompile.bench.job import Benchmark, Call, Check, Place, Row, Skip, Start, Work
from xfcompile.bench.memory import peak_gb, release
from xfcompile.bench.timing import Rounds, captured, interleaved, milliseconds, wait_until_quiet

Cell = dict[str, Any]
Announce = Callable[[str], None]
RECOMPILE = 64
"""Compilations of one function that Dynamo allows: there is one for each column."""

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Settings:
    """What is measured of a row. errors: whether results are compared with fp64's."""

    place: Place
    rounds: Rounds
    errors: bool = True


class Broken(Exception):
    """The device does nothing any more in this process."""


def measure(
    benchmark: Benchmark,
    row: Row,
    columns: Sequence[str],
    settings: Settings,
    announce: Announce,
    alone: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The entry of a row: `cells` by column, and what holds for all of them.

    A cell has times, or `failed`, an error, or `skipped`, a reason. announce: is told which column is at work. alone:
    returns when no other process is at work; called before anything is timed. Raises `Broken` where the process has to
    be replaced.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    found: dict[str, Any] = {**row.as_dict(), "cells": {column: {} for column in columns}}
    announce("making the inputs")
    try:
        work = benchmark.prepare(row, settings.place)
    except Skip as reason:
        return found | {"skipped": str(reason)}
    except ImportError as missing:
        return found | {"skipped": f"cannot be imported here: {missing}"}
    except Exception as error:
        return found | {"failed": reason_of(error)}
    if isinstance(work, Start):
        from xfcompile.bench.startup import started

        alone()
        return found | started(work, columns, announce)
    try:
        with torch.set_grad_enabled(work.grad), torch._dynamo.config.patch(recompile_limit=RECOMPILE):
            found |= _measured(work, columns, settings, found["cells"], announce, alone)
    finally:
        del work
        torch._dynamo.reset()
        release(settings.place.device)
    return found


def _measured(
    work: Work,
    columns: Sequence[str],
    settings: Settings,
    cells: dict[str, Cell],
    announce: Announce,
    alone: Callable[[], None],
) -> dict[str, Any]:
    import xfcompile

    device, about = settings.place.device, dict[str, Any]()
    errs = _Errors(work, settings)
    calls: dict[str, Call] = {}
    for column in columns:
        announce(column)
        cell = cells[column]
        try:
            with xfcompile.collect() as report:
                call = work.way(column)
                cell["first_call_s"] = milliseconds(call, device) / 1e3
            if ours(column):
                cell["sites"], cell["failures"] = report.summary(), list(report.failures)
            work.clear()
            cell["peak_gb"] = peak_gb(call, device)
            work.clear()
            if column not in work.unchecked:
                cell |= errs.of(call)
            calls[column] = call
        except Exception as error:
            _failed(cell, error, device)
        finally:
            # A failure's traceback holds what the call had allocated. And whoever waits has nothing left to compute.
            work.clear()
            release(device)
    about |= errs.about
    if work.unchecked:
        about["unchecked"] = dict(work.unchecked)

    def failed(name: str, error: Exception) -> None:
        _failed(cells[name], error, device)
        work.clear()
        release(device)

    alone()
    announce("waiting for a quiet GPU")
    before = wait_until_quiet(device)
    announce("timing all in turns")
    timed = dict(calls)
    if work.graph and device == "cuda":
        for name, times in interleaved(calls, device, settings.rounds, cold=work.cold, failed=failed).items():
            cells[name]["call_ms"] = times.ms / work.per
        timed = {}
        for name, call in calls.items():
            try:
                timed[name] = captured(call, device)
            except Exception as error:
                failed(name, error)
        about["timed as"] = "replays of CUDA graphs"
    for name, times in interleaved(timed, device, settings.rounds, cold=work.cold, failed=failed).items():
        scaled = {key: x if key == "rounds" else x / work.per for key, x in asdict(times).items()}
        cells[name] |= scaled | work.facts(scaled["ms"])
    disturbed = before or wait_until_quiet(device, 0.0)
    if disturbed is not None:
        about["disturbed"] = disturbed
    return about


class _Errors:
    """The exact results of a row, made when the first column asks, and eager's distance from them."""

    def __init__(self, work: Work, settings: Settings) -> None:
        self.work, self.settings = work, settings
        self.about: dict[str, Any] = {}
        self.exact: list[torch.Tensor] = []
        self.eager: list[errors.Distance] = []
        if isinstance(work.check, str):
            self.about["errors"] = f"not compared: {work.check}"
        elif not settings.errors:
            self.about["errors"] = "not compared: not asked for"

    def of(self, call: Call) -> dict[str, float]:
        check = self.work.check
        if isinstance(check, str) or "errors" in self.about:
            return {}
        if not self.exact and not self._made(check):
            return {}
        found = errors.distances(check.seen(call()), self.exact)
        return errors.compared(found, self.eager, self.settings.place.dtype)

    def _made(self, check: Check) -> bool:
        """Whether the exact results could be had. They wait in the host's memory."""
        try:
            self.exact = [t.detach().cpu() for t in check.exact()]
            self.work.clear()
            release(self.settings.place.device)
            self.eager = errors.distances(check.eager(), self.exact)
        except Exception as error:
            self.exact = []
            self.about["errors"] = f"not compared: {reason_of(error)} (in the program itself, in fp64 or in eager)"
            return False
        finally:
            self.work.clear()
            release(self.settings.place.device)
        self.about["eager_error"] = errors.relative(self.eager)
        return True


def _failed(cell: Cell, error: Exception, device: str) -> None:
    """Note why a column has no numbers. Raises `Broken` where no other column will have any either."""
    if isinstance(error, Skip):
        cell["skipped"] = str(error)
        return
    cell["failed"] = reason_of(error)
    with contextlib.suppress(Exception):
        traceback.clear_frames(error.__traceback__)
    if device == "cuda" and not isinstance(error, torch.OutOfMemoryError):
        try:
            torch.cuda.synchronize()
        except Exception as poisoned:
            raise Broken(reason_of(error)) from poisoned


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(": ")
