"""Times attention with heads of 256 columns (Gemma's) with many tile sizes, forward and backward: what `tiles.TABLE`
and `tiles.BACKWARD` rest on there.

    python examples/bench_wide_heads.py --out examples/results/wide_heads.json --processes 15

Needs a CUDA GPU (`--try`: tiny sizes, Triton's interpreter on a CPU, no times). As `bench_few_keys.py`, whose forward
and backward these are: in bf16, two sequences of 4096 with 8 heads and 4 of keys and values; times are a profiler's, in
µs, of each kernel alone. A forward's tiles that spill registers give way to others, as a user's do. Beside them stand
Inductor's own, of the same program as it is written.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_backward import in_parts
from bench_few_keys import DEFAULT, Trial, device_of, measured, parser_of, times
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from xfcompile.bench.surroundings import surroundings

BATCH, HEADS, KV_HEADS, LENGTH, DIM, CAP = 2, 8, 4, 4096, 256, 50.0
KERNELS = ("forward", "dq", "dkdv")
CANDIDATES = {
    "forward": [
        (128, 64, 8, 3), (128, 64, 8, 1), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 3),
        (64, 32, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3), (128, 128, 8, 1),
    ],
    "dq": [
        (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 8, 2),
        (128, 32, 8, 1), (128, 64, 8, 1), (128, 32, 8, 2), (32, 64, 4, 1),
    ],
    "dkdv": [
        (64, 64, 8, 1), (64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 1), (32, 64, 4, 2), (64, 32, 4, 1),
        (32, 128, 8, 1), (32, 128, 8, 2), (64, 128, 8, 1), (16, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 1),
        (64, 128, 8, 2), (32, 64, 8, 2), (128, 64, 8, 1), (16, 128, 8, 2),
    ],
}  # fmt: skip
"""Queries and keys of a tile, warps and stages."""
NUMBERS = range(max(map(len, CANDIDATES.values())))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / math.sqrt(q.shape[-1])


def weighted(score: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(score, -1, torch.float32).to(v.dtype)
    return weights @ v.repeat_interleave(score.shape[1] // v.shape[1], 1)


def distances(x: Tensor) -> Tensor:
    position = torch.arange(x.shape[-1], device=x.device)
    return position[:, None] - position[None, :]


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma-2's."""
    score = CAP * torch.tanh(scores(q, k) / CAP)
    return weighted(score.masked_fill(distances(score) < 0, -math.inf), v)


def capped_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = CAP * torch.tanh(scores(q, k) / CAP)
    distance = distances(score)
    return weighted(score.masked_fill((distance < 0) | (distance >= 1024), -math.inf), v)


def sloped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ALiBi."""
    score = scores(q, k)
    slopes = 2.0 ** -torch.arange(1, score.shape[1] + 1, device=q.device)
    distance = distances(score)
    return weighted((score - slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf), v)


PROGRAMS = {"soft-cap, causal": capped, "soft-cap, window": capped_window, "ALiBi": sloped}


def tensors(device: str) -> list[Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    length = LENGTH if device == "cuda" else 40
    torch.manual_seed(0)
    shapes = [(BATCH, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def prepared(program: Callable[..., Tensor], trial: Trial, device: str) -> None:
    from xfcompile.backend import xformers

    trial.number = DEFAULT
    torch._dynamo.reset()
    options = {"routes": {"attention": "triton"}, "patterns": ["attention"], "strict": True}
    out = torch.compile(program, backend=xformers, dynamic=False, options=options)(*tensors(device))
    out.backward(torch.randn_like(out))


def inductor(program: Callable[..., Tensor]) -> dict[str, float]:
    """Microseconds of a forward alone, and with its backward."""
    torch._dynamo.reset()
    x, fn = tensors("cuda"), torch.compile(program, dynamic=False)
    with torch.no_grad():
        dout = torch.randn_like(fn(*x))

    def forward() -> None:
        with torch.no_grad():
            fn(*x)

    return {
        "forward": sum(times(forward).values()),
        "both": sum(times(lambda: torch.autograd.grad(fn(*x), x, dout)).values()),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=PROGRAMS, action="append", help="a program; may be repeated")
    options = parser.parse_args()
    device = device_of(options, parser)
    chosen = options.only or list(PROGRAMS)
    if options.processes > 1 and not options.part:
        more = [word for name in chosen for word in ("--only", name)] + ["--usual"] * options.usual
        in_parts([sys.executable, __file__, *more, "--part"], options.processes)
    trial = Trial(CANDIDATES)
    trial.install()
    timed = device == "cuda" and not options.part
    rows: list[dict[str, Any]] = []
    about = surroundings(device)
    for name in track(chosen, "programs", disable=bool(options.part)):
        prepared(PROGRAMS[name], trial, device)
        for number in (DEFAULT,) if options.usual else (DEFAULT, *NUMBERS):
            if options.part and number % options.part[1] != options.part[0]:
                continue
            trial.number = number
            rows += [{"program": name, **row} for row in measured(trial, timed)]
        if timed:
            rows.append({"program": name, "kernel": "Inductor", **inductor(PROGRAMS[name])})
        if options.out and not options.part:
            options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if not options.part:
        show(rows, chosen)


def show(rows: list[dict[str, Any]], names: list[str]) -> None:
    console = Console()
    for kernel in KERNELS:
        table = Table("tiles", *names, title=f"{kernel}: µs")
        for tiles in (None, *CANDIDATES[kernel]):
            wanted = tiles and list(tiles)
            cells = []
            for name in names:
                of = [r for r in rows if (r["program"], r["kernel"]) == (name, kernel) and "us" in r]
                cells.append(next((f"{r['us']:.0f}" for r in of if r["tiles"] == wanted), "-"))
            table.add_row("{}x{} w{} s{}".format(*tiles) if tiles else "the default", *cells)
        console.print(table)
    for r in rows:
        if r["kernel"] == "Inductor":
            console.print(f"Inductor, {r['program']}: forward {r['forward']:.0f} µs, with its backward {r['both']:.0f}")
        if "failed" in r:
            console.print(f"failed: {r}")


if __name__ == "__main__":
    main()
