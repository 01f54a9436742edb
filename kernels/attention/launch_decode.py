"""From tensors to the two launches of the decoding kernels: when they run, with how many splits, in what memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import decode, fit, template
from xfcompile.kernels.attention.programs import Program
from xfcompile.kernels.attention.repeat import Blank, Launch
from xfcompile.kernels.attention.tiles import (
    BLACKWELL,
    HOPPER,
    INTERPRETED_DECODING,
    Tiles,
    choose_decoding,
    decoding_alternatives,
    device_generation,
    neighbours,
    smaller,
)
from xfcompile.measured import multiprocessors
from xfcompile.site import ScoreSpec

FEW_ROWS = 64
"""Query rows that share a head of k and v, up to which one tile holds them all: k and v are then read once."""

FEW_QUERIES = 32
"""Fewer queries are split too however many heads share one of k and v (71 do in Falcon): several tiles then hold the
rows, which are still fewer than heads. `xfcompile.plan` has the same number."""

MANY_KEYS = 256
"""From here on keys are split: fewer are a matter of a few steps, in which a second kernel's launch is not won back."""

PROGRAMS = 2
"""Programs of each multiprocessor, at most: as many as run at a time. What they read then under way is enough (see
`tiles.STEP_BYTES`), and none begins when others have ended. On an H200, B8 H32 KV8 S8192 D128 without a mask, two took
68 µs and three 70; four, of which three run at a time, took 86 where three took 79."""

MOST_SPLITS = 128
"""One program adds the splits of a row up: beyond this, that takes as long as what is saved."""

FEW_SPLITS, COMBINED = 8, 32
"""Splits that are added up at once, by one warp and by four: of 256 columns 64 registers a thread. One warp has no
barriers, and is over sooner by 1 µs (an H200, as above)."""

INTERPRETED_MULTIPROCESSORS = 16
"""What the interpreter pretends to have: enough for several splits at the sizes of tests."""


def wanted(spec: ScoreSpec, q: Tensor, k: Tensor) -> bool:
    """Whether these kernels run such tensors, rather than the one that gives a block of queries all of its keys."""
    queries, keys = q.shape[2], k.shape[2]
    few = q.shape[1] // k.shape[1] * queries <= FEW_ROWS or queries < FEW_QUERIES
    return few and keys >= MANY_KEYS and decode.supports(spec)


def splits(q: Tensor, k: Tensor, tiles: Tiles, multiprocessors: int) -> int:
    """How many programs share the keys of a head: from shapes alone, as it has to be where a graph is captured."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    programs = k.shape[0] * k.shape[1] * -(-rows // tiles.block_m)
    keys = -(-k.shape[2] // tiles.block_n)
    return max(1, -(-keys // decode.MOST_TILES), min(PROGRAMS * multiprocessors // programs, keys, MOST_SPLITS))


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one that it waits for still runs (programmatic dependent launch)."""
    return device.type == "cuda" and device_generation(device) in (HOPPER, BLACKWELL)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return multiprocessors(device.index)


@dataclass(frozen=True)
class Pair:
    """Launches of both kernels, with so many splits, and the memory between them: of each split of a row a weighted sum
    of values (acc), and its greatest score and its sum of weights (a `row` each)."""

    splits: int
    split: Launch
    combine: Launch
    acc: Blank
    row: Blank

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
    ) -> Any:
        """Writes out and lse; returns what Triton made of the first kernel."""
        acc, m, l = self.acc(), self.row(), self.row()
        compiled = self.split([q, k, v, acc, m, l, *operands], scalars)
        self.combine([acc, m, l, v, out, lse, *operands], scalars)
        return compiled


class Decoding:
    """Calls with tensors of one layout. constants: as the other kernel has them."""

    def __init__(self, prepared: Program, constants: Mapping[str, object], interpreted: bool) -> None:
        self.prepared, self.constants = prepared, constants
        self.kernels = prepared.kernel(interpreted, "decode_split"), prepared.kernel(interpreted, "decode_combine")
        self.pair: Pair | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
    ) -> None:
        """Writes out and lse."""
        if self.pair is not None:
            self.pair(q, k, v, out, lse, operands, scalars)
            return
        pairs: dict[Tiles, Pair] = {}

        def launch(tiles: Tiles) -> Any:
            pairs[tiles] = self._pair(tiles, q, k, v, operands)
            return pairs[tiles](q, k, v, out, lse, operands, scalars)

        self.pair = pairs[self._fitting(launch, q, k, v)]

    def _fitting(self, launch: Callable[[Tiles], Any], q: Tensor, k: Tensor, v: Tensor) -> Tiles:
        """Launches with the tiles that fit, and returns them; at first, finds them by launching."""
        if q.device.type == "cpu":
            launch(INTERPRETED_DECODING)
            return INTERPRETED_DECODING
        rows, fitting = q.shape[1] // k.shape[1] * q.shape[2], self.prepared.fitting
        first = choose_decoding(device_generation(q.device), q.dtype, q.shape[3], v.shape[3], rows)
        kind = ("decode", q.device, q.dtype, self.constants["PRECISION"], q.shape[3], v.shape[3], first.block_m)
        candidates = fit.Candidates(decoding_alternatives(first), smaller(first), neighbours(first))
        return fit.remembered(fitting, kind, launch, lambda: candidates, q, v.shape[3], self.prepared.key)

    def _pair(self, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor]) -> Pair:
        batch, heads, lq, _ = q.shape
        kv_heads, lk, dv = k.shape[1], k.shape[2], v.shape[3]
        group, rows = heads // kv_heads, batch * heads * lq
        parts = splits(q, k, tiles, _multiprocessors(q.device))
        sizes = [heads, group, lq, lk, parts, *[stride for x in operands for stride in x.stride()]]
        few = parts <= FEW_SPLITS and not template.needs_mean(self.prepared.spec)
        dependent = has_dependent_launch(q.device)
        blocks = {
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_S": FEW_SPLITS if few else COMBINED,
            "DEPENDENT": dependent,
        }
        split_options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        combine_options = {"num_warps": 1 if few else 4} | ({"launch_pdl": True} if dependent else {})
        types = (q.device, q.dtype, *[x.dtype for x in operands])

        def launch(kernel: Any, programs: int, strided: Sequence[Tensor], options: dict[str, int]) -> Launch:
            known = {**self.constants, **blocks}
            constants = {name: known[name] for name in kernel.arg_names if name in known}
            # With each token there is one key more, and another layout: what Triton makes is the same.
            kind = ("decode", kernel, *constants.items(), *options.items(), *types)
            made = self.prepared.made.setdefault(kind, {})
            numbers = [*[stride for x in strided for stride in x.stride()], *sizes]
            return Launch(kernel, programs, numbers, constants, options, made=made)

        split, combine = self.kernels
        return Pair(
            parts,
            launch(split, batch * kv_heads * parts * -(-group * lq // tiles.block_m), (q, k, v), split_options),
            launch(combine, rows, (v,), combine_options),
            Blank((rows * parts * dv,), torch.float32, q.device),
            Blank((rows * parts,), torch.float32, q.device),
        )
