"""Times the lists of tiles alone, beside all of attention: what a mask that is not known beforehand costs once.

    python examples/bench_lists.py            # on a CUDA device, in ms
    python examples/bench_lists.py --quick    # tiny sizes on a CPU, without kernels: does it run

"read" is what the mask's tensors hold, over the time: a mask of a value for each score is read once at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import xfcompile.kernels.attention as kernels
from xfcompile.bench.programs import Sizes, programs, tensors
from xfcompile.bench.timing import Rounds, interleaved
from xfcompile.score import I, J, Load, S
from xfcompile.site import Operand, ScoreSpec

SIZES = [Sizes(4, 32, 4096, 64), Sizes(4, 16, 4096, 128)]
QUICK = [Sizes(1, 2, 64, 16)]


def boolean_mask(sizes: Sizes, device: torch.device) -> tuple[ScoreSpec, list[Tensor]]:
    """Causal, but given as a tensor of a byte for each score."""
    import sympy

    n = sizes.length
    mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=device).tril()
    spec = ScoreSpec(S / sizes.dim**0.5, sympy.Ne(Load(0, 0, 0, I, J), 0), "nan", (Operand(torch.bool, 4),))
    return spec, [mask]


def timed(spec: ScoreSpec, x: list[Tensor], operands: list[Tensor]) -> tuple[float, float, float] | None:
    """Times in ms of the lists, of attention with lists at hand, and of both; None where it takes no lists."""
    q, k, v = x[:3]
    key = kernels.prepare(spec)
    mask = kernels.mask_of(key)
    if mask is None:
        return None
    shape = [*q.shape[:3], k.shape[2]]
    sizes = kernels.tile_sizes(key, q.device, q.dtype, q.shape[3], v.shape[3], q.shape[2])
    chosen, ints, floats = kernels.mask_arguments(key, operands, [], [])

    def lists() -> Tensor:
        return kernels.attention_tiles(q, chosen, ints, floats, shape, *sizes, mask)

    def attention(tiles: Tensor) -> Tensor:
        return kernels.attention(q, k, v, operands, [], [], key, tiles, *sizes)[0]

    made = lists()
    calls: list[Callable[[], Tensor]] = [lists, lambda: attention(made), lambda: attention(lists())]
    times = interleaved({str(n): call for n, call in enumerate(calls)}, q.device.type, Rounds(seconds=0.5))
    return times["0"].ms, times["1"].ms, times["2"].ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.quick else "cuda")
    dtype = torch.float32 if options.quick else torch.bfloat16
    for sizes in QUICK if options.quick else SIZES:
        table = Table(title=str(sizes))
        for column in ("mask", "lists", "attention", "both", "read"):
            table.add_column(column, justify="left" if column == "mask" else "right")
        found: list[tuple[str, ScoreSpec, list[Tensor], list[Tensor]]] = []
        for program in programs(dtype):
            x = tensors(program, sizes, device, dtype)
            found.append((program.name, program.spec(sizes), x, program.operands(sizes, *x[3:])))
        spec, operands = boolean_mask(sizes, device)
        found.append(("causal from a boolean buffer", spec, found[0][2], operands))
        for name, spec, x, operands in found:
            times = timed(spec, x, operands)
            if times is not None:
                chosen = kernels.mask_arguments(kernels.prepare(spec), operands, [], [])[0]
                size = sum(t.numel() * t.element_size() for t in chosen)
                table.add_row(name, *(f"{t:.4f}" for t in times), f"{size / times[0] / 1e6:.0f} GB/s")
        Console().print(table)


if __name__ == "__main__":
    with torch.no_grad():
        main()
