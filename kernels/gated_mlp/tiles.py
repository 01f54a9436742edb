"""Which devices run the kernels, with what tile sizes, and which kernel runs how many rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from xfcompile.kernels.attention.tiles import AMD, AMPERE, BLACKWELL, HOPPER
from xfcompile.measured import Fact, Measured


@dataclass(frozen=True)
class Tiles:
    """One program's share: block_m rows and block_n features (of gate, and of up), block_k of the sum a step.

    group: rows of tiles that are taken together. parts: into how many a tile is divided when it is stored. flatten: one
    loop of tiles and steps, where programs take several.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    parts: int = 1
    flatten: bool = False


# By (hardware, bits of an element). Hopper's: two sums of 128 x 128 are one of 128 x 256, the largest that eight warps
# hold, and what cuBLAS takes; four stages of 48 KiB fill its shared memory. None is measured yet:
# `examples/bench_gated_tiles.py` is what chooses. Registers and spills are examples/cross_compile.py's.
DUAL: dict[tuple[str, int], Fact[Tiles]] = {
    (HOPPER, 16): Fact(Tiles(128, 128, 64, 8, 4, parts=2)),
    (HOPPER, 32): Fact(Tiles(64, 64, 32, 8, 3)),
    (BLACKWELL, 16): Fact(Tiles(128, 128, 64, 8, 4, parts=2)),
    (BLACKWELL, 32): Fact(Tiles(64, 64, 32, 8, 3)),
    (AMPERE, 16): Fact(Tiles(128, 64, 64, 8, 3)),
    (AMPERE, 32): Fact(Tiles(64, 64, 32, 8, 2)),
    (AMD, 16): Fact(Tiles(128, 64, 64, 8, 1)),
    (AMD, 32): Fact(Tiles(64, 64, 32, 8, 1)),
}

FEW_ROWS = 16
"""Up to so many rows the time is that of reading the weights (on an H200 up to about 150): `gated_few` has all rows in
one tile of 16, which is what tensor cores take."""

# (one row or not, bits): a step reads 2 * block_n * block_k numbers of the weights: 16 KiB, three steps under way and
# two or three programs on a multiprocessor are above the 40 KiB each that an H200's bandwidth takes under way.
_FEW = Measured(
    "examples/bench_gated_few.py", "2026-11-29", "H200, torch 2.11, triton 3.6", "examples/results/gated_few_h200.json"
)

FEW: dict[tuple[bool, int], Fact[Tiles]] = {
    (True, 16): Fact(Tiles(1, 8, 256, 4, 4), _FEW),
    (True, 32): Fact(Tiles(1, 8, 256, 4, 3)),
    (False, 16): Fact(Tiles(16, 16, 256, 4, 3)),
    (False, 32): Fact(Tiles(16, 16, 128, 4, 3)),
}

ONE_LONG_ROW = Fact(Tiles(1, 2, 2048, 4, 3), _FEW)
"""Of 16-bit numbers where the sum is of no fewer than a step of it."""

HOPPER_LEAST_ROWS = 2
HOPPER_FEW_ROWS = 128
"""From so many to so many rows Hopper has a kernel of its own: `hopper_few`. One row is read by the other one at 0.84
and 0.88 of Inductor's time (4096 by 11008, and by 14336), by this one at 0.87 and 0.91."""

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on Hopper."""


@dataclass(frozen=True)
class Stream:
    """How `hopper_few` reads the weights: 32 features of each for each of `groups` warpgroups, in `stages` steps under
    way of 64 * parts of the sum. programs: on a multiprocessor."""

    groups: int = 1
    parts: int = 1
    stages: int = 12
    programs: int = 1

    def stage(self, columns: int) -> int:
        """Bytes of a step, where x has that many rows."""
        return (64 * self.groups + columns) * 64 * self.parts * 2

    def shared(self, columns: int) -> int:
        """Bytes of a program: beside the steps, sums of up to 16 rows on their way to other threads, and barriers."""
        return self.stages * self.stage(columns) + self.groups * 256 * min(columns, 16) + 16 * self.stages + 64


def columns(rows: int) -> int:
    """Of the tensor cores' instructions: a power of two, and no less than they take."""
    return max(8, 1 << (rows - 1).bit_length())


WIDEST = {1: 128, 2: 128, 3: 64, 4: 32}
"""Columns of sums that threads have registers for, by groups."""


def stream(rows: int, features: int, multiprocessors: int) -> Stream:
    """What a problem gets: the groups by which the busiest multiprocessor reads the least, of equals the more of them,
    and the most stages that fit, but no more than 6 of one group, which the first tiles wait for."""

    def read(groups: int) -> int:
        return -(-features // (32 * groups * multiprocessors)) * groups

    wide = columns(rows)
    groups = min((groups for groups in (3, 2, 1, 4) if wide <= WIDEST[groups]), key=read)
    made = Stream(groups, 2, 1)
    most = 6 if groups == 1 else 12
    return max(
        (replace(made, stages=n) for n in range(2, most + 1) if replace(made, stages=n).shared(wide) <= SHARED),
        key=lambda s: s.stages,
    )


POINTWISE = (1, 1024, 4)
"""Rows, columns and warps of a tile of the kernels that do not multiply: 16 bytes a thread of 16-bit numbers."""

# The interpreter's time is a matter of how many programs there are; small enough for several tiles and steps in tests.
INTERPRETED = Tiles(32, 32, 32, 4, 1, parts=2)
INTERPRETED_FEW = Tiles(16, 16, 32, 4, 1)
INTERPRETED_POINTWISE = (16, 32, 4)


def padded(rows: int) -> int:
    """A power of two, and no less than tensor cores take."""
    return max(16, 1 << (rows - 1).bit_length())


def dual(kind: str, dtype: torch.dtype, rows: int, save: bool = False) -> Tiles:
    """The tiles of the dual GEMM; few rows get short ones, for rows that are not there are computed all the same.

    save: whether both projections are stored too, which takes registers that a smaller part of a tile leaves.
    """
    tiles = DUAL[kind, 8 * dtype.itemsize].value
    if save and tiles.parts > 1:
        tiles = replace(tiles, parts=2 * tiles.parts)
    if rows >= tiles.block_m:
        return tiles
    short = padded(rows)
    return replace(tiles, block_m=short, num_warps=4 if short <= 64 else tiles.num_warps)


def few(dtype: torch.dtype, rows: int, inner: int) -> Tiles:
    if rows == 1 and dtype.itemsize == 2 and inner >= ONE_LONG_ROW.value.block_k:
        return ONE_LONG_ROW.value
    return FEW[rows == 1, 8 * dtype.itemsize].value


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """What is timed beside these where it is asked for: one step away in each direction."""
    made = [
        replace(tiles, block_m=tiles.block_m * 2),
        replace(tiles, block_m=tiles.block_m // 2),
        replace(tiles, block_m=tiles.block_m // 2, num_warps=tiles.num_warps // 2),
        replace(tiles, block_n=tiles.block_n * 2),
        replace(tiles, block_n=tiles.block_n // 2),
        replace(tiles, block_n=tiles.block_n // 2, num_stages=tiles.num_stages + 1),
        replace(tiles, block_k=tiles.block_k * 2, num_stages=max(tiles.num_stages - 1, 1)),
        replace(tiles, block_k=tiles.block_k // 2, num_stages=tiles.num_stages + 1),
        replace(tiles, num_warps=tiles.num_warps * 2),
        replace(tiles, num_warps=tiles.num_warps // 2),
        replace(tiles, num_stages=tiles.num_stages + 1),
        replace(tiles, num_stages=tiles.num_stages - 1),
        replace(tiles, group=1),
    ]
    one = tiles.block_m == 1  # no tensor core multiplies a row: what it takes at least says nothing
    for t in made:
        rows = t.block_m == 1 if one else 16 <= t.block_m <= 256
        features = (2 if one else 16 if t.block_m <= 16 else 32) <= t.block_n // t.parts and t.block_n <= 128
        if rows and features and 32 <= t.block_k <= 2048 and 1 <= t.num_warps <= 8 and 1 <= t.num_stages <= 6:
            yield t


def smaller(tiles: Tiles) -> Iterator[Tiles]:
    """What to try, in order, where the device has too little shared memory: fewer stages, then shorter steps."""
    while tiles.num_stages > 1:
        tiles = replace(tiles, num_stages=tiles.num_stages - 1)
        yield tiles
    while tiles.block_k > 32:
        tiles = replace(tiles, block_k=tiles.block_k // 2)
        yield tiles
