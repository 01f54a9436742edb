"""Attention's kernels with random sizes, dtypes, layouts and dropout, on this GPU, against fp64.

    python tests/gpu/fuzz.py --seconds 300 --processes 15 --seed 1
    TRITON_INTERPRET=1 python tests/gpu/fuzz.py --seconds 60      # on a CPU, interpreted, smaller

Each case of the kernels' tests is run forward and, where it has gradients, backward, as often with dropout as without.
Prints what failed, and a line to keep. `--only 17,203` runs these numbers again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
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
from torch import Tensor

from xfcompile.kernels.attention import backward_call, launch_blocks, launch_decode, lists_sizes
from xfcompile.kernels.attention.tiles import Tiles
from xfcompile.pretend import instead

DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("contiguous", "transposed", "transposed", "poisoned", "key_major", "expanded")
DIMS = (8, 16, 17, 24, 32, 32, 40, 64, 64, 64, 72, 80, 96, 128, 128, 160, 192, 256)
MOST = 1100
"""Queries or keys."""
LEAST = 8.0
"""What gradients' largest is taken to be, at least: of a row that sees one key they are differences of the same."""


TF32_BITS = 10
"""After the leading one: what tensor cores do not cut off."""


@dataclass(frozen=True)
class Trial:
    """listed: whether tiles are listed, however few there are. dropout: the rate, 0 for none. tile, parts: in the
    interpreter, the size of a kernel's square tiles, and how many of them, of queries and of keys, make one of a list.
    """

    case: Case
    sizes: Sizes
    dtype: torch.dtype
    layout: str
    tf32: bool
    listed: bool
    dropout: float
    tile: int
    parts: tuple[int, int]

    def __str__(self) -> str:
        more = [name for name in ("tf32", "listed") if getattr(self, name)]
        words = [self.case.name, str(self.sizes), str(self.dtype), self.layout, *more]
        words += [f"dropout {self.dropout}"] if self.dropout else []
        return ", ".join([*words, f"interpreted by {self.tile}, lists of {self.parts}"])


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
        r.random() < 0.5, r.choice((0.0, 0.0, 0.1, 0.5)), r.choice((16, 32)),
        (r.choice((1, 2, 4)), r.choice((1, 2, 4))),
    )  # fmt: skip


def _length(r: Random, small: bool) -> int:
    edge = 16 * r.randint(1, 8 if small else 40)
    return r.choice((r.randint(1, 16), edge, edge, edge + 1, edge - 1, r.randint(17, 140 if small else MOST)))


def exists(case: Case, z: Sizes) -> bool:
    """Whether a case's tensors have all that it loads."""
    if case.name == "unfolded_batch":
        return z.batch == 2 and z.heads % 2 == 0
    return case.name != "negative_indices" or max(z.lq, z.lk) < 440


def outcome(trial: Trial, device: str) -> str:
    """What was looked at and is right, or "not built" where the case has no such sizes. Raises AssertionError where it
    is wrong."""
    if not exists(trial.case, trial.sizes):
        return "not built"
    try:
        x = inputs(trial.case, trial.dtype, trial.layout, trial.sizes)
    except (IndexError, RuntimeError, ValueError):
        return "not built"
    x = Inputs(*(y.to(device) for y in (x.q, x.k, x.v)), [y.to(device) for y in x.operands], x.ints, x.floats)
    differentiable = trial.case in backward_cases.DIFFERENTIABLE
    if trial.tf32:  # q·k are exact then, in scores near 100 too; weights are cut in the kernel
        for y in (x.q, x.k, x.v):
            _cut(y)
    # Large scores of many columns.
    slack = 4.0 if not trial.tf32 else 2.0**-TF32_BITS / torch.finfo(torch.float32).eps
    with ExitStack() as stack:
        for setting in _settings(trial):
            stack.enter_context(setting)
        if trial.dropout and differentiable:
            dropout_cases.check(trial.case, x, trial.dropout, slack, LEAST)
            return "right, with dropout"
        check_forward(trial.case, x, slack)
        if not differentiable:
            return "right, forward alone"
        backward_cases.check(trial.case, x, slack, LEAST)
        return "right"


def _cut(x: Tensor) -> None:
    """To numbers of which tf32 has all, where they are; what lies between them, too."""
    bits = torch.empty(0, dtype=torch.int32, device=x.device).set_(x.untyped_storage())  # type: ignore[call-overload]
    bits &= -1 << (23 - TF32_BITS)


def _settings(trial: Trial) -> Iterator[AbstractContextManager[None]]:
    """What a trial asks for; in the interpreter also tiles as there are on GPUs, where those of a list are of several
    of a kernel's."""
    if trial.tf32:
        yield instead(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    if trial.listed:
        yield instead(lists_sizes, "FEW_TILES", 0)
    n, (rows, keys) = trial.tile, trial.parts
    for module in (launch_blocks, backward_call):
        yield instead(module, "INTERPRETED", Tiles(n, n, 4, 1))
    yield instead(lists_sizes, "INTERPRETED", Tiles(n * rows, n * keys, 4, 1))
    yield instead(launch_decode, "INTERPRETED_DECODING", Tiles(16 * rows, n * keys, 4, 1))


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
            text = str(error).strip() if wrong else traceback.format_exc(limit=-3).strip()[-600:]
            results.put((number, "WRONG" if wrong else "FAILED", f"{trial}: {text}"))
            if "CUDA error" in text:  # after which nothing runs in this process
                break
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
