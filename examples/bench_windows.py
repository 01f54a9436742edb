"""Times the backward of sliding windows by the kernel for Hopper and by the others: what `hopper_backward.NARROW` is.

    python examples/bench_windows.py --out examples/results/windows.json

Needs a Hopper GPU. Times are a profiler's, in ms, of all that is launched for dq, dk and dv, in bf16, the median of a
few; beside them stands how far both lie apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bench_backward import ALL_AT_ONCE, DEFAULT, ONE, Trial, times
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from xfcompile.bench import attention, columns
from xfcompile.bench.surroundings import surroundings
from xfcompile.kernels.attention import hopper_backward

HEADS = 16
WINDOWS = ((256, 4096, 64), (256, 4096, 128), (1024, 8192, 64), (1024, 8192, 128), (4096, 8192, 128))
"""Keys of a window, length, head dim."""


def measured(width: int, length: int, dim: int, trial: Trial) -> dict[str, Any]:
    def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(length, device=q.device)
        keep = (i <= i[:, None]) & (i > i[:, None] - width)
        return (q @ k.mT / dim**0.5).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    torch.manual_seed(0)
    shape = (1, length, HEADS, dim)
    x = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]
    fn = columns.compiled(window, "xformers-triton", attention.FAMILY, dynamic=False)
    dout = torch.randn_like(x[0])

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fn(*x), x, dout)

    trial.number = ALL_AT_ONCE
    ours, one = call(), times(call)[ONE]
    trial.number = DEFAULT
    theirs, others = call(), sum(times(call).values())
    apart = max((a.float() - b.float()).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return {"window": width, "length": length, "dim": dim, "one": one, "others": others, "apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers, versions and hardware there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found")
    hopper_backward.NARROW = 0
    trial = Trial()
    trial.install()
    rows = [measured(*each, trial) for each in track(WINDOWS, "windows")]
    table = Table("window", "length", "D", "one kernel, ms", "the others, ms", "apart")
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console().print(table)
    if options.out:
        options.out.write_text(json.dumps({**surroundings("cuda"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
