"""A benchmark whose columns fail, end their process, hang, or run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from xfcompile.bench.job import Benchmark, Check, Place, Row, Scale, Skip, Work


def rows(scale: Scale) -> list[Row]:
    return [Row("good", "run"), Row("ends", "run")]


def prepare(row: Row, place: Place) -> Work:
    x = torch.arange(6.0)

    def way(column: str) -> Callable[[], Any]:
        if column == "skips":
            raise Skip("no way")
        if row.name == "ends" and column == "ends":
            return lambda: os._exit(3)
        if row.name == "ends" and column == "hangs":
            return lambda: time.sleep(600)
        if column == "full":

            def full() -> None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

            return full
        if column == "wrong":
            return lambda: x + 1
        return lambda: x * 1

    return Work(way, Check(lambda: [x.double()], lambda: [x], lambda outcome: [outcome]))


COLUMNS = ("skips", "full", "ends", "hangs", "wrong", "runs")
BENCHMARK = Benchmark("breaking", "what breaks", COLUMNS, rows, prepare, baseline="runs")
