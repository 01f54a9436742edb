"""Attention's kernels with random sizes, dtypes, layouts and dropout, on this GPU, against fp64.

    python tests/gpu/fuzz.py --seconds 300 --processes 15 --seed 1
    TRITON_INTERPRET=1 python tests/gpu/fuzz.py --seconds 60      # on a CPU, interpreted, smaller

Each case of the kernels' tests is run forward and, where it has gradients, backward, as often with dropout as without.
Prints what failed, and a line to keep. `--only 17,203` runs these numbers again.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from queue import Empty
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import backward_cases
import dropout_cases
import torch
from attention_cases import CASES, Case, Inputs, Sizes, inputs
from attention_cases import check as check_forward

from xfcompile.kernels.attention import lists_sizes

DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("contiguous", "transposed", "transposed", "poisoned", "key_major", "expanded")
DIMS = (8, 16, 17, 24, 32, 32, 40, 64, 64, 64, 72, 80, 96, 128, 128, 160, 192, 256)
EDGES = (16, 32, 48, 64, 128, 144, 192, 256, 512)
MOST = 1100
"""Queries or keys."""
LEAST = 4.0
"""What gradients' largest is taken to be, at least: of a row that sees one key they are differences of the same."""


@dataclass(frozen=True)
class Trial:
    """listed: whether tiles are listed, however few there are. dropout: the rate, 0 for none."""

    case: Case
    sizes: Sizes
    dtype: torch.dtype
    layout: str
    tf32: bool
    listed: bool
    dropout: float

    def __str__(self) -> str:
        more = [name for name in ("tf32", "listed") if getattr(self, name)]
        words = [self.case.name, str(self.sizes), str(self.dtype), self.layout, *more]
        return ", ".join([*words, *([f"dropout {self.dropout}"] if self.dropout else [])])


def drawn(seed: int, number: int, small: bool) -> Trial:
    r = Random(f"{seed} {number}")
    dq = r.choice(DIMS)
    groups = r.choice((1, 1, 1, 2, 4))
    kv_heads = r.choice((1, 2, 3))
    lq = _length(r, small)
    sizes = Sizes(
        batch=r.choice((1, 2, 2, 3)), heads=groups * kv_heads, kv_heads=kv_heads, lq=lq,
        lk=lq if r.random() < 0.5 else _length(r, small), dq=dq, dv=dq if r.random() < 0.8 else r.choice(DIMS),
    )  # fmt: skip
    dtype = r.choice(DTYPES)
    return Trial(
        r.choice(CASES), sizes, dtype, r.choice(LAYOUTS), dtype == torch.float32 and r.random() < 0.25,
        r.random() < 0.5, r.choice((0.0, 0.0, 0.1, 0.5)),
    )  # fmt: skip


def _length(r: Random, small: bool) -> int:
    edge = r.choice(EDGES)
    n = r.choice((r.randint(1, 16), edge, edge + 1, edge - 1, r.randint(17, 400), r.randint(400, MOST)))
    return 1 + n % 90 if small else n


def outcome(trial: Trial, device: str) -> str:
    """ "right", or "not built" where the case has no such sizes; raises AssertionError where it is wrong."""
    try:
        x = inputs(trial.case, trial.dtype, trial.layout, trial.sizes)
    except (IndexError, RuntimeError, ValueError):
        return "not built"
    x = Inputs(*(y.to(device) for y in (x.q, x.k, x.v)), [y.to(device) for y in x.operands], x.ints, x.floats)
    differentiable = trial.case in backward_cases.DIFFERENTIABLE
    with _tf32(trial.tf32), _listed(trial.listed):
        if trial.dropout and differentiable:
            dropout_cases.check(trial.case, x, trial.dropout, least=LEAST)
            return "right, with dropout"
        check_forward(trial.case, x)
        if not differentiable:
            return "right, forward alone"
        backward_cases.check(trial.case, x, least=LEAST)
        return "right"


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if on else before
    try:
        yield
    finally:
        products.fp32_precision = before


@contextlib.contextmanager
def _listed(on: bool) -> Iterator[None]:
    before = lists_sizes.FEW_TILES
    lists_sizes.FEW_TILES = 0 if on else before
    try:
        yield
    finally:
        lists_sizes.FEW_TILES = before


def work(part: int, asked: argparse.Namespace, results: Any) -> None:
    """Trials of one process, until time is over."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end = time.time() + asked.seconds
    for number in asked.only or range(part, sys.maxsize, asked.processes):
        if time.time() > end:
            break
        trial = drawn(asked.seed, number, device == "cpu")
        try:
            results.put((number, outcome(trial, device), ""))
        except Exception as error:
            wrong = isinstance(error, AssertionError)
            text = str(error).strip() if wrong else traceback.format_exc(limit=-3).strip()
            results.put((number, "WRONG" if wrong else "FAILED", f"{trial}: {text[:600]}"))
    results.put((part, "done", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=lambda text: [int(n) for n in text.split(",")], help="numbers of trials")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asked.processes = 1 if asked.only else asked.processes
    start, found = time.time(), Counter[str]()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    running = [context.Process(target=work, args=(part, asked, results)) for part in range(asked.processes)]
    for process in running:
        process.start()
    ended = 0
    while ended < len(running):
        try:
            number, word, text = results.get(timeout=5)
        except Empty:
            if not any(process.is_alive() for process in running):
                break
            continue
        if word == "done":
            ended += 1
            continue
        found[word] += 1
        if text:
            print(f"{number}: {word}: {text}", flush=True)
    for process in running:
        process.join(10)
        process.kill()
    if ended < len(running):
        print(f"{len(running) - ended} processes died")
    counts = ", ".join(f"{n} {word}" for word, n in found.most_common())
    print(f"\n| {date.today()} | {torch.__version__} | seed {asked.seed} | {counts} | {time.time() - start:.0f} s |")
    sys.exit(1 if found["WRONG"] + found["FAILED"] or ended < len(running) else 0)


if __name__ == "__main__":
    main()
