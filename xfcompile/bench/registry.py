"""The benchmarks by name; each is imported when it is asked for."""

from __future__ import annotations

import importlib

from xfcompile.bench.job import Benchmark

NAMES = ("attention", "gated-mlp", "bias-act-dropout", "models", "decode")


def benchmark(name: str) -> Benchmark:
    """One of ours, or the `BENCHMARK` of any module."""
    module = f"xfcompile.bench.{name.replace('-', '_')}" if name in NAMES else name
    made: Benchmark = importlib.import_module(module).BENCHMARK
    return made
