"""From tensors to the two launches of the decoding kernels: when they run, with how many splits, in what memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import decode, fit
from xfcompile.kernels.attention.tiles import (
    INTERPRETED_DECODING,
    Tiles,
    choose_decoding,
    decoding_alternatives,
    device_generation,
    smaller,
)
from xfcompile.site import ScoreSpec

FEW_ROWS = 64
"""Query rows that share a head of k and v, up to which one tile holds them all: k and v are then read once."""

FEW_QUERIES = 32
"""Fewer queries are split too however many heads share one of k and v (71 do in Falcon): several tiles then hold the
rows, which are still fewer than heads. `xfcompile.plan` has the same number."""

MANY_KEYS = 256
"""From here on keys are split: fewer are a matter of a few steps, in which a second kernel's launch is not won back."""

PROGRAMS = 4
"""Programs that are aimed at for each multiprocessor. Two or three run at a time; more of them end at one time."""

MOST_SPLITS = 128
"""One program adds the splits of a row up: beyond this, that takes as long as what is saved."""

COMBINED = 32
"""Splits that are added up at once: of 256 columns 64 registers a thread."""

INTERPRETED_MULTIPROCESSORS = 8
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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def run(
    kernel: Callable[[str], Any],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    operands: Sequence[Tensor],
    numbers: Sequence[object],
    constants: Mapping[str, object],
    fitting: dict[Any, Tiles | fit.Unavailable],
) -> None:
    """Writes out and lse.

    kernel: by its name in the generated module. tensors: q, k, v, out, lse. numbers: strides of operands, and scalars.
    constants: as the other kernel has them. fitting: what is known of tiles that fit, and is learned here.
    """
    q, k, v = tensors[:3]
    split, combine = kernel("decode_split"), kernel("decode_combine")

    def launch(tiles: Tiles, first: bool = False) -> Any:
        return _launch(split, combine, tensors, operands, numbers, constants, tiles, first=first)

    if q.device.type == "cpu":
        launch(INTERPRETED_DECODING, first=True)
        return
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    first = choose_decoding(device_generation(q.device), q.dtype, q.shape[3], v.shape[3], rows)
    kind = ("decode", q.device.index, q.dtype, constants["PRECISION"], q.shape[3], v.shape[3], first.block_m)
    with torch.cuda.device(q.device):
        candidates = decoding_alternatives(first), smaller(first)
        first_launch = functools.partial(launch, first=True)
        fit.remembered(fitting, kind, launch, lambda: fit.launch(first_launch, candidates, q, v.shape[3]))


def _launch(
    split: Any,
    combine: Any,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    operands: Sequence[Tensor],
    numbers: Sequence[object],
    constants: Mapping[str, object],
    tiles: Tiles,
    *,
    first: bool = False,
) -> Any:
    """Both kernels; returns what Triton made of the first. first: such tensors have not been launched with yet."""
    q, k, v, out, lse = tensors
    batch, heads, lq, _ = q.shape
    kv_heads, lk, dv = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    parts = splits(q, k, tiles, _multiprocessors(q.device))
    # What each split has of a row: a weighted sum of values, the greatest score and the sum of weights.
    acc = q.new_empty((batch, heads, lq, parts, dv), dtype=torch.float32)
    # Both start at multiples of 16 bytes at any number of splits: Triton compiles anew where that changes.
    m, l = q.new_empty((2, -(-batch * heads * lq * parts // 4) * 4), dtype=torch.float32)
    sizes = (heads, group, lq, lk, parts)
    shared = {name: constants[name] for name in combine.arg_names if name in constants}
    constants = {name: x for name, x in constants.items() if name in split.arg_names}
    splitting = (q, k, v, acc, m, l, *operands, *q.stride(), *k.stride(), *v.stride(), *sizes, *numbers)
    constants |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    combining = (acc, m, l, v, out, lse, *operands, *v.stride(), *sizes, *numbers)
    shared |= {"BLOCK_N": tiles.block_n, "BLOCK_S": COMBINED}
    programs, rows = (batch * kv_heads * parts * -(-group * lq // tiles.block_m),), (batch * heads * lq,)
    if first:
        fit.compile_first(split, programs, *splitting, **constants, **options)
        fit.compile_first(combine, rows, *combining, **shared)
    with fit.alone(q.device):
        compiled = split[programs](*splitting, **constants, **options)
        combine[rows](*combining, **shared)
    return compiled
