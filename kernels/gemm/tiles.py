"""Tile sizes of the kernel for Hopper, and which of them a problem gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xfcompile.measured import Fact, Measured

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
    the other stores. registers: of a thread that computes. joined: both warpgroups run the same code, in step.
    """

    columns: int = 256
    block_k: int = 64
    stages: int = 4
    part: int = 64
    buffers: int = 2
    group: int = 8
    skew: int = 0
    registers: int = 240
    joined: bool = False

    def stored(self, products: int) -> tuple[int, int]:
        """Columns of what is stored at once, and pieces of shared memory for it: no more than a tile has of either."""
        columns = self.columns // products
        part = min(self.part, columns)
        return part, min(self.buffers, columns // part)

    def shared(self, products: int, drops: bool = False) -> int:
        """Bytes, without barriers; those of what dropout keeps are of two tiles, a bit an element."""
        part, buffers = self.stored(products)
        stage = (BLOCK_M + self.columns) * self.block_k
        bits = 2 * BLOCK_M * (self.columns // products) // 8
        return 2 * (self.stages * stage + BLOCK_M * part * buffers) + bits * drops

    @property
    def dropping(self) -> Tile:
        """The tile where random numbers are drawn beside it, which takes shared memory and registers."""
        return replace(self, stages=self.stages - 1, registers=232, skew=0)


MEASURED = Measured(
    "examples/bench_hopper_gemm.py",
    "2026-11-28",
    "H200, torch 2.11, triton 3.6",
    "examples/results/hopper_gemm_h200.json",
)

WIDE = Tile()
"""The largest sums that two warpgroups hold, of which each number that is loaded serves most products."""

NARROW = Tile(columns=128, stages=6, skew=2)
"""Where wide tiles would leave multiprocessors without work."""

USUAL: dict[str, Fact[Tile]] = {"wide": Fact(WIDE, MEASURED), "narrow": Fact(NARROW, MEASURED)}

COST = 1.08
"""Of two narrow tiles, in wide ones: at 256 x 4096 x 11008 three rounds of narrow tiles took 0.82 of the time of two
rounds of wide ones."""

FEWEST_ROWS = 256
"""Fewer were not measured: a tile has 128."""

SHORTEST = 512
"""Features, of the input and of the result, from which on it was measured, about."""


DROPPING = False
"""Whether the kernel is taken for what drops out: not measured since random numbers are drawn by warps of their own."""


def choose(rows: int, features: int, products: int, multiprocessors: int, drops: bool = False) -> Tile:
    """The tile of a problem: the narrow one where its rounds are shorter."""

    def rounds(tile: Tile) -> int:
        return -(-(-(-rows // BLOCK_M) * -(-features // (tile.columns // products))) // multiprocessors)

    wide, narrow = USUAL["wide"].value, USUAL["narrow"].value
    tile = narrow if COST * rounds(narrow) < 2 * rounds(wide) else wide
    return tile.dropping if drops else tile


VARIANTS = {
    "wide": WIDE,
    "skew 2": replace(WIDE, skew=2),
    "3 stages": replace(WIDE, stages=3, buffers=4),
    "narrow": NARROW,
    "joined": replace(WIDE, joined=True),
    "joined, 3 stages": replace(WIDE, stages=3, buffers=4, joined=True),
}
DROPPING_VARIANTS = {
    "wide": WIDE.dropping,
    "4 buffers": replace(WIDE, buffers=4).dropping,
    "narrow": NARROW.dropping,
    "joined": replace(WIDE, joined=True).dropping,
}
"""What `examples/bench_hopper_gemm.py` compares, the latter where something drops out."""
