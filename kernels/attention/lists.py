"""Makes the lists of tiles under a mask: one launch for the verdicts, one for the lists, whatever the scores are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from xfcompile.kernels.attention import blocks, cache, fit, lists_reference, reference
from xfcompile.kernels.attention.repeat import Blank, Launch
from xfcompile.kernels.registration import Site
from xfcompile.score import B, H
from xfcompile.site import MaskSpec

log = logging.getLogger(__name__)

TILES_A_PROGRAM = 16
"""Verdicts that one program makes by interval arithmetic."""


@dataclass(frozen=True)
class MaskProgram:
    """Generated kernels in this process: what of, and their file; whether there are lists for each batch and head, and
    whether a program looks at one tile, element by element."""

    key: str
    mask: MaskSpec
    source: str
    by_batch: bool
    by_head: bool
    single: bool
    launches: dict[object, tuple[Launch, Launch, Blank, Blank]] = field(default_factory=dict)


def _program(key: str, mask: MaskSpec, source: str) -> MaskProgram:
    symbols = set().union(*(x.free_symbols for x in (mask.keep, *mask.even)))
    return MaskProgram(key, mask, source, B in symbols, H in symbols, blocks.elementwise(mask))


_programs: dict[str, MaskProgram] = {}


def prepare(mask: MaskSpec) -> str:
    """Generates the kernels of a mask and stores their source; returns the key that the op is called with.

    Raises evaluate.Unsupported where the mask has no Triton form.
    """
    mask = canonical(mask)
    source = blocks.generate(mask)
    key = cache.key_of(source)
    if key not in _programs:
        log.info("lists of tiles %s: keep %s", cache.store(source), mask.keep)
        _programs[key] = _program(key, mask, source)
    return key


def canonical(mask: MaskSpec) -> MaskSpec:
    """The same with scalars named n0, n1 … (integers) and a0, a1 … (reals)."""
    names = cache.canonical_names(mask.scalars)
    return replace(
        mask,
        keep=sympy.sympify(mask.keep).xreplace(names),
        even=tuple(x.xreplace(names) for x in mask.even),
        scalars=tuple(names.values()),
    )


def program(key: str) -> MaskProgram:
    """The prepared kernels; ones that another process prepared are read back from the cache directory."""
    if key not in _programs:
        source, mask = cache.read_back(key, "attention_tiles", "prepare_mask")
        assert isinstance(mask, MaskSpec)
        _programs[key] = _program(key, mask, source)
    return _programs[key]


@functools.cache
def _kernels(key: str, interpreted: bool) -> Any:
    name = f"xfcompile_tiles_{key}{'_interpreted' if interpreted else ''}"
    return cache.load(cache.store(program(key).source), name)


def output(
    like: Tensor, prepared: MaskProgram, shape: Sequence[Any], block_m: int, block_n: int, by_key: bool = False
) -> Tensor:
    """Lists [B', H', blocks of queries, 3 + tiles], int32: see `blocks.HEADER`. B' and H' are 1 where the lists are the
    same for all batches, or heads. by_key: [B', H', tiles, 3 + blocks of queries], for a block of keys each."""
    batch, heads, lq, lk = shape
    own = (batch if prepared.by_batch else 1, heads if prepared.by_head else 1)
    if by_key:
        return like.new_empty((*own, -(-lk // block_n), blocks.HEADER + -(-lq // block_m)), dtype=torch.int32)
    return like.new_empty((*own, -(-lq // block_m), blocks.HEADER + -(-lk // block_n)), dtype=torch.int32)


def steps(tiles: Tensor | None) -> list[int]:
    """By how many lists one batch is apart from the next, and one head: 0 where they share them, or there are none."""
    own_b, own_h = (0, 0) if tiles is None else tiles.shape[:2]
    return [own_h if own_b > 1 else 0, 1 if own_h > 1 else 0]


def run(
    like: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    shape: Sequence[int],
    block_m: int,
    block_n: int,
    key: str,
    by_key: bool = False,
    site: Site | None = None,
) -> Tensor:
    """The lists, on the device of `like`, by the kernels: on a GPU, or interpreted on a CPU."""
    prepared = _programs.get(key) or program(key)
    launches = None if site is None else site.found
    if launches is None:
        layout = (
            tuple(shape), block_m, block_n, by_key, like.device, *[(x.dtype, x.device, x.stride()) for x in operands],
        )  # fmt: skip
        launches = prepared.launches.get(layout)
        if launches is None:
            made = output(like, prepared, shape, block_m, block_n, by_key)
            if made.numel() == 0 or 0 in (shape[2], shape[3]):
                return made.zero_()
            if len(prepared.launches) >= MANY_LAYOUTS:
                prepared.launches.clear()
            launches = prepared.launches[layout] = _launches(prepared, made, operands, shape, block_m, block_n, by_key)
        if site is not None:
            site.found = launches
    verdict, listing, like_verdicts, like_made = launches
    made, verdicts = like_made(), like_verdicts()
    scalars: list[Any] = []
    if prepared.mask.scalars:
        scalars += reference.bind(prepared.mask.scalars, ints, [float(x) for x in floats]).values()
    try:
        verdict([verdicts, *operands], scalars)
        listing([made, verdicts])
    except fit.Unavailable as error:
        fit.give_way(error, key, "all tiles are visited")
        return lists_reference.every_tile(made)
    return made


MANY_LAYOUTS = 4096
"""Layouts that are remembered of a mask; lengths that change at every call make new ones."""


MANY_ELEMENTS = 64 * 64
"""A tile of more than this takes more registers than four warps have: examples/cross_compile.py."""


def _launches(
    prepared: MaskProgram,
    made: Tensor,
    operands: Sequence[Tensor],
    shape: Sequence[int],
    block_m: int,
    block_n: int,
    by_key: bool,
) -> tuple[Launch, Launch, Blank, Blank]:
    """The launch for verdicts and the one for lists, and the memory of both."""
    batch, heads = made.shape[:2]
    rows, tiles = -(-shape[2] // block_m), -(-shape[3] // block_n)
    strides = [stride for operand in operands for stride in operand.stride()]
    kernels = _kernels(prepared.key, made.device.type == "cpu")
    together = 1 if prepared.single else TILES_A_PROGRAM
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "TILES": together, "SPAN": _power(block_m + block_n)}
    programs = batch * heads * rows
    warps = 8 if prepared.single and block_m * block_n > MANY_ELEMENTS else 4
    numbers = [heads, *shape[2:], *strides]
    verdict = Launch(kernels.tile_verdicts, programs * -(-tiles // together), numbers, sizes, {"num_warps": warps})
    if by_key:
        chunk = {"CHUNK": min(256, _power(rows))}
        listing = Launch(kernels.tile_lists_by_key, batch * heads * tiles, [rows, tiles], chunk, {"num_warps": 1})
    else:
        chunk = {"CHUNK": min(256, _power(tiles))}
        listing = Launch(kernels.tile_lists, programs, [tiles], chunk, {"num_warps": 1})
    verdicts = Blank((made.numel(),), torch.int8, made.device)  # a few more than there are tiles
    return verdict, listing, verdicts, Blank.like(made)


def tightest(
    like: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    shape: Sequence[int],
    block_m: int,
    block_n: int,
    key: str,
    by_key: bool = False,
    site: Site | None = None,
) -> Tensor:
    """The same in plain PyTorch, with the tightest verdicts there are."""
    prepared = program(key)
    scalars = reference.bind(prepared.mask.scalars, ints, floats)
    own = (shape[0] if prepared.by_batch else 1, shape[1] if prepared.by_head else 1, shape[2], shape[3])
    if 0 in own:
        return output(like, prepared, shape, block_m, block_n, by_key).zero_()
    verdicts = lists_reference.reference(prepared.mask, operands, scalars, own, block_m, block_n)
    return lists_reference.lists(lists_reference.by_key(verdicts) if by_key else verdicts).to(like.device)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
