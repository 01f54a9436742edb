"""Processes that compile at once and time one at a time: the others stand still."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import breaking
import pytest
import torch

from xfcompile.bench.job import Place
from xfcompile.bench.measure import Settings
from xfcompile.bench.timing import QUICK
from xfcompile.bench.turns import Turns, kill
from xfcompile.bench.worker import Apart

COUNTING = """
import os, sys, time
os.setpgrp()
if os.fork() == 0:
    sys.argv[1] += ".child"
n = 0
while True:
    n += 1
    with open(sys.argv[1], "w") as file:
        file.write(str(n))
    time.sleep(0.01)
"""


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[tuple[int, list[Path]]]:
    """A process and its child, which count in files."""
    files = [tmp_path / "n", tmp_path / "n.child"]
    process = subprocess.Popen([sys.executable, "-c", COUNTING, str(files[0])])
    try:
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.01)
        yield process.pid, files
    finally:
        kill(process.pid)
        process.wait()


def stand_still(files: list[Path]) -> bool:
    time.sleep(0.1)  # a write that was under way
    before = [file.read_text() for file in files]
    time.sleep(0.3)
    return [file.read_text() for file in files] == before


def go_on(files: list[Path]) -> bool:
    before, end = [file.read_text() for file in files], time.monotonic() + 20
    while time.monotonic() < end:
        if all(file.read_text() != x for file, x in zip(files, before, strict=True)):
            return True
        time.sleep(0.01)
    return False


def test_whoever_has_no_turn_stands_still_and_so_does_its_clock(counting: tuple[int, list[Path]]) -> None:
    group, files = counting
    turns = Turns()
    turns.enter(group)
    assert go_on(files)
    turns.take(1 << 30)
    assert stand_still(files)
    stopped = turns.stopped(group)
    assert stopped >= 0.4 and turns.stopped(1 << 30) == 0
    turns.give(1 << 30)
    assert go_on(files)
    assert turns.stopped(group) >= stopped


def test_whoever_begins_while_another_times_waits(counting: tuple[int, list[Path]]) -> None:
    group, files = counting
    turns = Turns()
    turns.take(1 << 30)
    turns.enter(group)
    assert stand_still(files)
    turns.leave(1 << 30)  # it has died while it timed
    assert go_on(files)


def test_one_turn_after_the_other() -> None:
    turns, order = Turns(), list[str]()

    def second() -> None:
        turns.take((1 << 30) + 1)
        order.append("second")
        turns.give((1 << 30) + 1)

    turns.take(1 << 30)
    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.3)
    order.append("first")
    turns.give(1 << 30)
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.slow
def test_two_processes_measure_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    turns = Turns()
    both = [Apart("breaking", Settings(Place("cpu", torch.float32, "quick"), QUICK), 60.0, turns) for _ in range(2)]
    good, ends = breaking.rows("quick")
    found = {}

    def measured(apart: Apart, row: breaking.Row) -> None:
        found[row.name] = apart.measure(row, ("ends", "runs"), lambda column: None, math.inf)

    threads = [threading.Thread(target=measured, args=pair) for pair in zip(both, (good, ends), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for apart in both:
        apart.close()
    assert found["good"]["cells"]["runs"]["ms"] > 0 and found["good"]["cells"]["ends"]["ms"] > 0
    assert found["ends"]["cells"]["runs"]["ms"] > 0
    assert found["ends"]["cells"]["ends"]["failed"].startswith("the process died")
