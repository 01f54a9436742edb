"""Tile sizes of the kernel for Hopper, and which of them a problem gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on Hopper."""

ROWS = 64
"""Of a warpgroup: what one instruction of the tensor cores multiplies."""

BLOCK_M = 2 * ROWS


@dataclass(frozen=True)
class Tile:
    """A program's share: ROWS rows for each of two warpgroups, `columns` columns of sums (both products' together), and
    block_k a step.

    part: columns that are stored at once, through one of `buffers` pieces of shared memory a warpgroup. group: rows of
    tiles that are taken together. skew: steps that a warpgroup is ahead of the next one, so that one multiplies while
    the other stores. registers: of a thread that computes.
    """

    columns: int = 256
    block_k: int = 64
    stages: int = 4
    part: int = 64
    buffers: int = 2
    group: int = 8
    skew: int = 2
    registers: int = 240

    def stored(self, products: int) -> tuple[int, int]:
        """Columns of what is stored at once, and pieces of shared memory for it: no more than a tile has of either."""
        columns = self.columns // products
        part = min(self.part, columns)
        return part, min(self.buffers, columns // part)

    @property
    def shared(self) -> int:
        """Bytes, without barriers."""
        stage = (BLOCK_M + self.columns) * self.block_k
        return 2 * (self.stages * stage + BLOCK_M * self.part * self.buffers)


WIDE = Tile()
"""The largest sums that two warpgroups hold, of which each number that is loaded serves most products."""

NARROW = Tile(columns=128, stages=6)
"""Where wide tiles would leave multiprocessors without work."""

VARIANTS = {
    "wide": WIDE,
    "skew 0": replace(WIDE, skew=0),
    "skew 3": replace(WIDE, skew=3),
    "groups of 16": replace(WIDE, group=16),
    "groups of 4": replace(WIDE, group=4),
    "parts of 32": replace(WIDE, part=32, buffers=4),
    "3 stages": replace(WIDE, stages=3, buffers=4),
    "deep": replace(WIDE, block_k=128, stages=2, skew=1),
    "narrow": NARROW,
}
"""What `examples/bench_hopper_gemm.py` compares."""
