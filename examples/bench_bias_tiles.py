"""Times the kernels of bias, activation and dropout alone, as they are and by tile sizes.

    python examples/bench_bias_tiles.py --out examples/results/bias_kernels.json
    python examples/bench_bias_tiles.py --sweep --out examples/results/bias_tiles.json

Needs a CUDA GPU (`--try`: tiny sizes on a CPU). Times are medians in ms, in bf16, with an empty L2 cache. `bandwidth`
is the share of a copy's that a kernel without a product reaches. Whole programs, beside Inductor and others, are timed
by `python -m xfcompile bench bias-act-dropout`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xfcompile.activation import KEEP, X, gelu, tensor
from xfcompile.bench.bias_act_dropout import SIZES, P
from xfcompile.bench.surroundings import surroundings
from xfcompile.bench.timing import Rounds, copy_bandwidth, interleaved
from xfcompile.kernels.bias_act_dropout import bias_act_dropout, calls, linear_act_dropout, text_of, tiles
from xfcompile.kernels.bias_act_dropout.tiles import Share, Tile
from xfcompile.measured import Fact


@dataclass(frozen=True)
class Run:
    """Where is measured; `scale` divides all sizes, to try this script where there is no GPU."""

    device: str
    scale: int = 1

    def ms(self, fn: Callable[[], Any]) -> float:
        return interleaved({"": fn}, self.device, Rounds(least=1, most=100 if self.scale == 1 else 1, seconds=0.3))[
            ""
        ].ms

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)


def sizes(run: Run) -> list[tuple[int, ...]]:
    """Rows, features in and out."""
    return [tuple(n // run.scale for n in size) for size in SIZES["gpu"]]


FORMULAS = {
    "gelu, dropout": KEEP * gelu(X, "none"),
    "gelu by tanh, dropout": KEEP * gelu(X, "tanh"),
    "dropout, residual": KEEP * X + tensor(0),
}


def kernel(run: Run, name: str, rows: int, k: int, n: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """The kernels of a formula, and the bytes that those without a product move."""
    seed, text = torch.tensor([12345], device=run.device), text_of(FORMULAS[name])
    x, h, w, b, dout = run.randn(rows, k), run.randn(rows, n), run.randn(n, k), run.randn(n), run.randn(rows, n)
    tensors = [run.randn(rows, n)] if tensor(0) in FORMULAS[name].free_symbols else []
    call = (b, [], tensors, seed, 0, text, P, torch.bfloat16)
    back = (dout, None if tensors else h, b, [], seed, 0, text, P, len(tensors), [True, True], ["bfloat16"] * 2)
    size = 2 * rows * n
    return {
        "forward": (lambda: bias_act_dropout(h, *call, False), size * (2 + len(tensors))),
        "backward": (lambda: torch.ops.xfcompile.bias_act_dropout_backward(*back), size * (2 if tensors else 3)),
        "linear": (lambda: linear_act_dropout(x, w, *call, False), 0),
        "linear, kept": (lambda: linear_act_dropout(x, w, *call, True), 0),
    }


def kernels(run: Run, copied: float, only: str = "") -> Iterable[dict[str, Any]]:
    """The kernels alone, without a graph around them."""
    for rows, k, n in sizes(run):
        for formula in FORMULAS:
            for name, (fn, moved) in kernel(run, formula, rows, k, n).items():
                row: dict[str, Any] = {"kernel": name, "formula": formula, "k": k, "n": n}
                if not name.startswith(only):
                    continue
                try:
                    row["ms"] = run.ms(fn)
                    row["bandwidth"] = moved / row["ms"] / 1e6 / copied if moved else None
                    row["tflops"] = 2e-9 * rows * n * k / row["ms"] if not moved else None
                except Exception as error:  # tiles that do not fit are a result
                    row["failed"] = f"{type(error).__name__}: {error}"[:120]
                yield row


PRODUCTS = [
    Tile(m, n, w, k, s)
    for m, n, w, k, s in (
        (128, 128, 8, 64, 3), (128, 128, 4, 64, 3), (128, 128, 8, 64, 4),
        (128, 256, 8, 64, 3), (128, 256, 8, 64, 4), (256, 128, 8, 64, 3), (64, 128, 4, 64, 4),
        (128, 64, 4, 64, 4), (128, 128, 8, 128, 2), (64, 256, 4, 64, 3), (128, 192, 8, 64, 3),
    ) if n & (n - 1) == 0
]  # fmt: skip
SHARES = [
    Share(elements, widest, warps, 3, 4096)
    for elements in (1024, 2048, 4096, 8192)
    for widest in (128, 256, 512, 1024, 2048)
    for warps in (4, 8)
]


def sweep(run: Run, copied: float) -> Iterable[dict[str, Any]]:
    """The kernels alone with other tile sizes."""
    usual, shares = tiles.PRODUCT[2], dict(tiles.POINTWISE)
    for tile in PRODUCTS:
        tiles.PRODUCT[2] = Fact(tile)
        calls.known.clear()  # which remember tiles
        yield from ({**row, "tile": str(tile)} for row in kernels(run, copied, "linear"))
    tiles.PRODUCT[2] = usual
    for name in ("forward", "backward"):
        for share in SHARES:
            tiles.POINTWISE[name] = Fact(share)
            calls.known.clear()
            yield from ({**row, "tile": str(share)} for row in kernels(run, copied, name))
        tiles.POINTWISE[name] = shares[name]


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=title)
    for row in rows:
        cells = [row.get(name) for name in columns]
        table.add_row(*("" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--sweep", action="store_true", help="with many tile sizes")
    parser.add_argument("--try", dest="trial", action="store_true", help="tiny sizes on a CPU: does this script run?")
    options = parser.parse_args()
    if not options.trial and not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found")
    run = Run("cpu", 128) if options.trial else Run("cuda")
    torch.manual_seed(0)
    copied = copy_bandwidth(run.device, 2**30 // run.scale)
    title = "sweep" if options.sweep else "kernels"
    found: dict[str, Any] = {**surroundings(run.device), "copy, GB/s": copied, title: []}
    for row in sweep(run, copied) if options.sweep else kernels(run, copied):
        found[title].append(row)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    show(Console(width=200), title, found[title])


if __name__ == "__main__":
    main()
