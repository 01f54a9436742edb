"""Measures what the backward's tile sizes rest on: each kernel of it, with many tile sizes, for a few programs.

    python examples/bench_backward.py --compile 15    # fills Triton's cache, in so many processes
    python examples/bench_backward.py --out examples/results/backward.json

Needs a CUDA GPU. Times are medians in ms of the kernels alone, in bf16 (`triton.testing.do_bench`).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from xfcompile.bench.programs import Program, Sizes, programs, tensors
from xfcompile.kernels.attention import launch_backward, prepare
from xfcompile.kernels.attention.launch_backward import Needs
from xfcompile.kernels.attention.tiles import Tiles

SIZES = (Sizes(4, 32, 4096, 64), Sizes(4, 16, 4096, 128))
PROGRAMS = ("no mask", "soft-cap, causal")
CANDIDATES = {
    "dq": [
        Tiles(m, n, w, s)
        for m, n, w, s in (
            (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2),
            (128, 128, 8, 1), (64, 128, 4, 2), (128, 32, 8, 3), (64, 32, 4, 3),
        )
    ],
    "dkdv": [
        Tiles(m, n, w, s)
        for m, n, w, s in (
            (64, 128, 8, 3), (64, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 3),
            (32, 128, 4, 2), (128, 128, 8, 2), (128, 128, 8, 1), (128, 64, 8, 2), (32, 64, 4, 3),
        )
    ],
}  # fmt: skip
NEEDS = {"dq": Needs(True, False, False), "dkdv": Needs(False, True, True)}


class Case:
    """A program's tensors, its forward run once."""

    def __init__(self, program: Program, sizes: Sizes) -> None:
        q, k, v, *rest = tensors(program, sizes, torch.device("cuda"), torch.bfloat16)
        self.key, self.operands = prepare(program.spec(sizes)), program.operands(sizes, *rest)
        out, lse = torch.ops.xfcompile.attention(q, k, v, self.operands, [], [], self.key)
        self.tensors: tuple[Tensor, ...] = (torch.randn_like(q), q, k, v, out, lse)

    def run(self, kernel: str, sizes: Tiles) -> Any:
        """The backward with these tiles for one of its kernels."""
        backward = launch_backward.prepare(self.key, ())
        q, v = self.tensors[1], self.tensors[3]
        for name in ("dq", "dkdv"):
            kind = (name, q.device.index, q.dtype, q.shape[3], v.shape[3], None, NEEDS[kernel])
            backward.fitting[kind] = sizes if name == kernel else Tiles(64, 64, 4, 2)
        return launch_backward.run(*self.tensors, self.operands, [], [], self.key, NEEDS[kernel])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--compile", type=int, metavar="PROCESSES", help="only compile, in so many processes")
    parser.add_argument("--part", type=int, nargs=2, metavar=("N", "OF"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found")
    if options.compile:
        command = [sys.executable, __file__, "--part"]
        parts = [subprocess.Popen([*command, str(n), str(options.compile)]) for n in range(options.compile)]
        for part in parts:
            part.wait()
        return
    chosen = {p.name: p for p in programs(torch.bfloat16)}
    jobs = [
        (sizes, name, kernel, tiles)
        for sizes in SIZES
        for name in PROGRAMS
        for kernel, candidates in CANDIDATES.items()
        for tiles in candidates
    ]
    if options.part:
        jobs = jobs[options.part[0] :: options.part[1]]
    rows: list[dict[str, Any]] = []
    cases: dict[tuple[str, int], Case] = {}
    with torch.no_grad():
        for sizes, name, kernel, tiles in track(jobs, "kernels", disable=bool(options.part)):
            small = Sizes(1, 2, 256, sizes.dim) if options.part else sizes
            if (name, sizes.dim) not in cases:
                cases.clear()
                cases[name, sizes.dim] = Case(chosen[name], small)
            case = cases[name, sizes.dim]
            row: dict[str, Any] = {"program": name, "dim": sizes.dim, "kernel": kernel, "tiles": vars(tiles)}
            try:
                case.run(kernel, tiles)
                if not options.part:
                    row["ms"] = triton.testing.do_bench(
                        lambda case=case, kernel=kernel, tiles=tiles: case.run(kernel, tiles),
                        warmup=10, rep=40, return_mode="median",
                    )  # fmt: skip
            except Exception as error:  # tiles that do not fit are a result
                row["failed"] = f"{type(error).__name__}: {error}"[:120]
            rows.append(row)
            if options.out:
                found = {
                    "hardware": torch.cuda.get_device_name(), "python": platform.python_version(),
                    "torch": torch.__version__, "triton": triton.__version__, "rows": rows,
                }  # fmt: skip
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.part:
        return
    console = Console()
    for sizes in SIZES:
        for kernel in CANDIDATES:
            table = Table("tiles", *PROGRAMS, title=f"{kernel}, D{sizes.dim}: ms")
            for tiles in CANDIDATES[kernel]:
                mine = [r for r in rows if (r["dim"], r["kernel"], r["tiles"]) == (sizes.dim, kernel, vars(tiles))]
                cells = [f"{r['ms']:.3f}" if "ms" in r else r.get("failed", "") for r in mine]
                table.add_row(f"{tiles.block_m}x{tiles.block_n} w{tiles.num_warps} s{tiles.num_stages}", *cells)
            console.print(table)


if __name__ == "__main__":
    main()
