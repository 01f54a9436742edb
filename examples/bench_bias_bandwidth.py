"""What share of a copy's bandwidth the kernels of bias, activation and dropout without a product reach, by tile sizes.

    python examples/bench_bias_bandwidth.py --budget 65 --json bias_bandwidth.json

Needs a CUDA GPU (`--try`: tiny sizes on a CPU). In bf16, of 16384 rows. Calls follow each other, each with tensors
that the last three calls did not use, and none with an emptied L2 cache, whose own writes would be counted: kernels and
copies are measured alike. "of a copy" is a kernel's bandwidth in that of a copy of as many bytes, read and written;
a backward's time is that of all it takes, the sum of its parts of the bias's gradient too, but where "no sums" is said.
Kernels are compiled before, by processes of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from xfcompile.activation import FUNCTIONS, KEEP, X, gelu, silu, tensor
from xfcompile.bench.surroundings import surroundings
from xfcompile.kernels.bias_act_dropout import bias_act_dropout, calls, text_of, tiles
from xfcompile.kernels.bias_act_dropout.tiles import Share
from xfcompile.measured import Fact

P = 0.1
ROWS = 16384
FEATURES = (3072, 4096, 16384)
SETS = 4
"""Of tensors, used in turns: three others are larger than any L2 cache."""

FORMULAS: dict[str, sympy.Expr] = {
    "gelu, dropout": KEEP * gelu(X, "none"),
    "gelu by tanh, dropout": KEEP * gelu(X, "tanh"),
    "silu, dropout": KEEP * silu(X),
    "relu, dropout": KEEP * FUNCTIONS["relu"](X, {}),
    "dropout, residual": KEEP * X + tensor(0),
    "gelu": gelu(X, "none"),
}
SHARES = {
    "forward": [
        Share(4096, 1024, 4, 1, 1 << 30),
        Share(2048, 256, 4, 3, 8192),
        Share(2048, 256, 4, 2, 4096),
        Share(1024, 256, 4, 3, 4096),
        Share(4096, 512, 4, 3, 4096),
        Share(2048, 256, 4, 3, 2048),
        Share(4096, 256, 8, 3, 4096),
        Share(2048, 512, 4, 1, 8192),
        Share(2048, 256, 4, 3, 4096),
    ],
    "backward": [
        Share(2048, 256, 4, 1, 2048),
        Share(2048, 256, 4, 3, 4096),
        Share(2048, 256, 4, 2, 2048),
        Share(1024, 256, 4, 3, 2048),
        Share(2048, 256, 4, 3, 2048),
        Share(1024, 256, 4, 2, 4096),
        Share(4096, 256, 8, 3, 1024),
        Share(2048, 512, 4, 3, 2048),
        Share(2048, 128, 4, 3, 2048),
    ],
}


@dataclass(frozen=True)
class Job:
    """A kernel of a formula, for rows of n features, with a tile; sums: whether the bias has a gradient."""

    formula: str
    kernel: str
    n: int
    share: Share
    sums: bool = True


def jobs() -> Iterator[Job]:
    """What says most first: what is usual, everywhere; then other tiles."""
    for kernel in SHARES:
        yield from (Job(formula, kernel, n, tiles.POINTWISE[kernel].value) for n in FEATURES for formula in FORMULAS)
    yield from (Job("gelu, dropout", "backward", n, tiles.POINTWISE["backward"].value, False) for n in FEATURES)
    for kernel, shares in SHARES.items():
        for formula, n in (("gelu, dropout", 4096), ("dropout, residual", 4096), ("gelu by tanh, dropout", 3072)):
            yield from (Job(formula, kernel, n, share) for share in shares)
        yield from (Job("gelu, dropout", kernel, n, share) for n in (3072, 16384) for share in shares[:5])


def make(job: Job, rows: int, device: str, count: int = SETS) -> tuple[Callable[[int], Any], int]:
    """A call by its number, and the bytes that it moves."""
    tiles.POINTWISE[job.kernel] = Fact(job.share)
    calls.known.clear()  # which remember tiles
    formula = FORMULAS[job.formula]
    seed, text = torch.tensor([12345], device=device), text_of(formula)
    added = tensor(0) in formula.free_symbols
    bias = torch.randn(job.n, device=device, dtype=torch.bfloat16)

    def sets() -> list[Tensor]:
        return [torch.randn(rows, job.n, device=device, dtype=torch.bfloat16) for _ in range(count)]

    drops = KEEP in formula.free_symbols
    size = 2 * rows * job.n
    outs: list[Any] = [None] * count  # kept, so that memory is not that of the call before
    if job.kernel == "forward":
        xs, rs = sets(), sets() if added else []

        def forward(k: int) -> None:
            k %= count
            more = [rs[k]] if added else []
            p = P if drops else 0.0
            outs[k] = bias_act_dropout(
                xs[k], bias, [], more, seed if drops else None, 0, text, p, torch.bfloat16, False
            )

        return forward, size * (3 if added else 2)
    hs, douts = [] if added else sets(), sets()

    def backward(k: int) -> None:
        k %= count
        h = None if added else hs[k]
        given = (douts[k], h, bias, [], seed if drops else None, 0, text, P if drops else 0.0, int(added))
        outs[k] = torch.ops.xfcompile.bias_act_dropout_backward(*given, [True, job.sums], ["bfloat16"] * 2)

    return backward, size * (2 if added else 3)


def compiled(job: Job) -> None:
    """Once, in a process of its own: what is compiled stays on disk."""
    call, _ = make(job, ROWS, "cuda", 1)
    call(0)
    torch.cuda.synchronize()


def milliseconds(call: Callable[[int], Any], device: str, calls: int = 12, rounds: int = 7) -> float:
    """Of one of many calls that follow each other: the median of some rounds."""
    found = []
    for k in range(3):
        call(k)
    for _ in range(rounds):
        if device != "cuda":
            start = time.perf_counter()
            call(0)
            found.append((time.perf_counter() - start) * 1e3)
            continue
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # 1 ms, in which the host gets ahead
        before.record()
        for k in range(calls):
            call(k)
        after.record()
        torch.cuda.synchronize()
        found.append(before.elapsed_time(after) / calls)
    return statistics.median(found)


def copying(moved: int, device: str) -> float:
    """GB/s of a copy that moves so many bytes."""
    source = [torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(SETS)]
    target = [torch.empty_like(x) for x in source]
    return moved / milliseconds(lambda k: target[k % SETS].copy_(source[k % SETS]), device) / 1e6


def measured(work: list[Job], rows: int, device: str, end: float) -> Iterator[dict[str, Any]]:
    """Until the time is over."""
    copies: dict[int, float] = {}
    for job in work:
        if time.perf_counter() > end:
            print("the time is over", flush=True)
            return
        about = {**dataclasses.asdict(job), "share": str(job.share)}
        try:
            call, moved = make(job, rows, device)
            if moved not in copies:
                copies[moved] = copying(moved, device)
                print(f"a copy of {moved / 1e6:.0f} MB: {copies[moved]:.0f} GB/s", flush=True)
            ms = milliseconds(call, device)
        except Exception as error:  # tiles that do not fit are a result
            print(f"{job}: {error}", flush=True)
            yield {**about, "failed": f"{type(error).__name__}: {error}"[:200]}
            continue
        share = moved / ms / 1e6 / copies[moved]
        s = job.share
        tile = f"{s.elements} by {s.widest}, {s.num_warps} warps, {s.stages} stages, {s.programs} programs"
        sums = "" if job.sums else ", no sums"
        print(f"{job.formula:22} {job.kernel}{sums} {job.n:6} {ms:7.4f} ms {share:6.1%} of a copy  {tile}", flush=True)
        yield {**about, "ms": ms, "copy_gb_s": copies[moved], "of_a_copy": share}


def compile_all(work: list[Job], processes: int, seconds: float) -> None:
    """At most for so long."""
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        waiting = [pool.apply_async(compiled, (job,)) for job in work]
        for one in waiting:
            try:
                one.get(max(seconds - (time.perf_counter() - start), 0.01))
            except multiprocessing.TimeoutError:
                break
            except Exception as error:  # is found again where it is timed
                print(error, flush=True)
        pool.terminate()
    print(f"compiled for {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--budget", type=float, default=65.0, help="seconds, of which compilation takes half at most")
    parser.add_argument("--only", default="", help="formulas that have this in their names")
    parser.add_argument("--try", dest="trial", action="store_true", help="tiny sizes on a CPU: does this script run?")
    options = parser.parse_args()
    start = time.perf_counter()
    if not options.trial and not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found")
    device = "cpu" if options.trial else "cuda"
    work = list(dict.fromkeys(job for job in jobs() if options.only in job.formula))
    if options.trial:
        work = [dataclasses.replace(job, n=job.n // 64) for job in work]
    else:
        compile_all(work, max(min(14, (os.cpu_count() or 2) - 1), 1), options.budget * 0.6)
    torch.manual_seed(0)
    found: dict[str, Any] = {**surroundings(device), "rows": ROWS, "bandwidth": []}
    for row in measured(work, 64 if options.trial else ROWS, device, start + options.budget):
        found["bandwidth"].append(row)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
