"""Times our gated kernels of Triton's alone by tile sizes: what `kernels/gated_mlp/tiles.py` is chosen by.

    python examples/bench_gated_tiles.py --json examples/results/gated_tiles.json
    python examples/bench_gated_tiles.py --rows 1 16    # some sizes

Needs a CUDA GPU. Times are medians in ms, in bf16, with an empty L2 cache; up to 1023 rows those of a CUDA graph.
Kernels for Hopper are timed by `bench_gated_few.py` and `bench_hopper_gemm.py`; whole programs, beside Inductor and
others, by `python -m xfcompile bench gated-mlp`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from xfcompile import activation
from xfcompile.activation import GATE, UP
from xfcompile.bench.gated_mlp import FEW, SIZES
from xfcompile.bench.surroundings import surroundings
from xfcompile.bench.timing import Rounds, captured, interleaved
from xfcompile.kernels.gated_mlp import gated_mlp, launch, prepare, tiles
from xfcompile.kernels.gated_mlp.programs import program
from xfcompile.measured import Fact


def candidates(rows: int, inner: int) -> Iterator[tuple[str, tiles.Tiles]]:
    """The kernel's name in the tables of tiles, and the tiles to try for it."""
    if rows <= tiles.FEW_ROWS:
        first = tiles.few(torch.bfloat16, rows, inner)
        for n, k, warps, stages in itertools.product((4, 8, 16, 32, 64), (64, 128, 256, 512, 1024), (4, 8), (2, 3, 4)):
            if 2048 <= n * k <= 16384 and (rows == 1 or n >= 16):
                yield "few", replace(first, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        return
    first = tiles.dual(tiles.HOPPER, torch.bfloat16, rows)
    shapes = (
        (128, 128, 64, 8),
        (256, 64, 64, 8),
        (128, 64, 64, 8),
        (128, 64, 64, 4),
        (64, 128, 64, 4),
        (128, 128, 128, 8),
    )
    for (m, n, k, warps), stages, group, parts, flatten in itertools.product(
        shapes, (2, 3, 4), (4, 8, 16), (1, 2), (False, True)
    ):
        if stages * k * (m + 2 * n) * 2 <= 227 * 1024 and (rows >= m or m == 64):
            more = {"num_warps": warps, "num_stages": stages, "group": group, "parts": parts, "flatten": flatten}
            yield "dual", replace(first, block_m=m, block_n=n, block_k=k, **more)


def sweep(size: tuple[int, int, int], console: Console) -> list[dict[str, Any]]:
    """Our kernel alone, by tile sizes, the fastest first."""
    rows, width, features = size
    torch.manual_seed(0)
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    gate, up = (torch.randn(features, width, device="cuda", dtype=torch.bfloat16) / math.sqrt(width) for _ in range(2))
    key = prepare(activation.silu(GATE) * UP)
    found = []
    for kind, t in track(list(candidates(rows, size[1])), f"tiles of {size}", console=console, transient=True):
        table: dict[Any, Fact[tiles.Tiles]] = tiles.FEW if kind == "few" else tiles.DUAL
        place = (rows == 1, 16) if kind == "few" else (tiles.HOPPER, 16)
        usual = table[place]
        table[place] = Fact(t)
        program(key).calls.clear()

        def call() -> Any:
            return gated_mlp(x, gate, up, None, None, key, "separate", "dual", False, torch.bfloat16)

        try:
            run = captured(call, "cuda") if rows < FEW else call
            times = interleaved({"": run}, "cuda", Rounds(most=100, seconds=0.2))
            found.append({"size": size, "tiles": asdict(t), "ms": times[""].ms})
        except Exception as failure:
            found.append({"size": size, "tiles": asdict(t), "failed": f"{type(failure).__name__}: {failure}"[:200]})
        table[place] = usual
    program(key).calls.clear()
    return sorted(found, key=lambda r: r.get("ms", math.inf))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, help="only sizes with so many rows")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found")
    launch.launch_few.declines = launch.launch_hopper.declines = lambda *about: "not timed here"
    console = Console()
    results: list[dict[str, Any]] = []
    for size in SIZES["gpu"]:
        if options.rows and size[0] not in options.rows:
            continue
        found = sweep(size, console)
        results += found
        for r in found[:8]:
            console.print(r)
        if options.json:
            options.json.write_text(json.dumps({**surroundings("cuda"), "tiles": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
