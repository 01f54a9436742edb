"""A program's share of the result, by kernel: tiles, and of kernels without a product the steps that share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xfcompile.kernels.attention.tiles import interpreting
from xfcompile.measured import Fact, Measured


@dataclass(frozen=True)
class Tile:
    """A program's share of the result. block_k: of the features that a product sums over, a step."""

    block_m: int
    block_n: int
    num_warps: int
    block_k: int = 0
    num_stages: int = 1


@dataclass(frozen=True)
class Share:
    """A program's share without a product: so many elements a step, in rows of `widest` columns at most. stages: steps
    that are read at a time. programs: about so many share all steps, where there are more."""

    elements: int
    widest: int
    num_warps: int
    stages: int
    programs: int


_MEASURED = Measured(
    "examples/bench_bias_bandwidth.py", "2026-11-29", "H200, torch 2.11, triton 3.6",
    "examples/results/bias_bandwidth_h200.json",
)  # fmt: skip

# The best on average over three formulas. A step is of 16 elements a thread, or 8, in loads of 16 bytes. Of a backward
# more programs would only leave more sums to be added up, each of its own rows.
POINTWISE = {
    "forward": Fact(Share(2048, 1024, 4, 3, 4096), _MEASURED),
    "backward": Fact(Share(1024, 128, 4, 3, 2048), _MEASURED),
}

# Not measured yet. By bytes of an element.
PRODUCT = {2: Fact(Tile(128, 128, 8, 64, 3)), 4: Fact(Tile(64, 64, 4, 32, 3))}
GROUP = 8
"""Blocks of rows that run beside each other, so that a weight's columns are read from cache."""

INTERPRETED = Tile(16, 32, 4, 32)


def pointwise(n: int, kernel: str) -> Tile:
    """Tiles of the kernels without a product."""
    if interpreting():
        return Tile(8, 32, 4)
    share = POINTWISE[kernel].value
    block_n = min(max(1 << (n - 1).bit_length(), 8), share.widest)
    return Tile(max(share.elements // block_n, 1), block_n, share.num_warps)


def loop(rows: int, n: int, tile: Tile, kernel: str) -> tuple[int, dict[str, Any]]:
    """How many parts rows are in, a program's each, and what the kernel's loop over these is compiled for."""
    share = POINTWISE[kernel].value
    count = -(-rows // tile.block_m)
    steps = max(1, count * -(-n // tile.block_n) // share.programs)
    steps = 1 << (steps - 1).bit_length()  # few kernels
    part = steps * tile.block_m
    even = rows % part == 0 and n % tile.block_n == 0
    return -(-rows // part), {"ROWS": part, "STAGES": min(share.stages, steps), "EVEN": even}
