"""From tensors to one launch of the kernel for Hopper: which tensors it takes, and how often it is launched."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels import gluon
from xfcompile.kernels.attention import cache, codegen, hopper, hopper_variant, lists, template
from xfcompile.kernels.attention.hopper_variant import Variant
from xfcompile.kernels.attention.programs import Program, program
from xfcompile.kernels.attention.repeat import Launch, aligned_strides, described_for_gluon, has_aligned_rows
from xfcompile.kernels.attention.tiles import HOPPER, device_generation, padded
from xfcompile.measured import multiprocessors
from xfcompile.site import ScoreSpec

FEW_QUERIES = 64
"""Fewer than this, and most rows of a program are computed for nothing."""


def why_not(prepared: Program, device: torch.device, dtype: torch.dtype, dq: int, dv: int) -> str | None:
    """Why such a site is not computed by this kernel; None if it is."""
    if device.type != "cuda" or device_generation(device) != HOPPER:
        return "it is for Hopper"
    return _why_not(prepared.key, dtype, dq, dv) or _why_no_module(prepared.key, usual(prepared.key, dtype, dq))


@functools.cache
def _made_of(key: str) -> tuple[ScoreSpec, codegen.Pieces]:
    spec = program(key).spec
    return spec, codegen.pieces(spec)


@functools.cache
def _why_not(key: str, dtype: torch.dtype, dq: int, dv: int) -> str | None:
    return hopper.why_not(*_made_of(key), dtype, dq, dv)


@functools.cache
def usual(key: str, dtype: torch.dtype, dq: int) -> Variant:
    """How the kernel is written for a site that it takes."""
    return hopper_variant.usual(*_made_of(key), dtype, hopper.columns(dq))


@functools.cache
def _why_no_module(key: str, variant: Variant) -> str | None:
    return gluon.why_missing(lambda: _module(key, variant))


@functools.cache
def _module(key: str, variant: Variant) -> Any:
    text = hopper.module(*_made_of(key), variant)
    return cache.load(cache.store(text), f"xfcompile_attention_hopper_{cache.key_of(text)}")


def suits(
    prepared: Program, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], listed: tuple[int, int]
) -> bool:
    """Whether the kernel takes these tensors. listed: sizes of the tiles in lists, if there are any."""
    if q.shape[2] < FEW_QUERIES or why_not(prepared, q.device, q.dtype, q.shape[3], v.shape[3]) is not None:
        return False
    if prepared.mask is not None and listed != (hopper.ROWS, hopper.KEYS):
        return False
    n = _bias_in_tiles(prepared.key, usual(prepared.key, q.dtype, q.shape[3]), q.dtype)
    biases = [] if n is None else [seen(operands[n], q.shape[2], k.shape[2])]
    return all(described(x) for x in (q, k, v, *biases))


@functools.cache
def _bias_in_tiles(key: str, variant: Variant, dtype: torch.dtype) -> int | None:
    """Which operand is loaded by TMA, if one is."""
    bias = hopper_variant.tile_of(*_made_of(key), dtype) if variant.tiles else None
    return None if bias is None else int(bias.operand)


def seen(bias: Tensor, lq: int, lk: int) -> Tensor:
    """What of a bias is as large as the scores, in four dimensions: of a larger one nothing else is read."""
    return bias[(None,) * (4 - bias.ndim)][..., :lq, :lk]


def described(x: Tensor) -> bool:
    """Whether TMA reads a tensor: rows start at multiples of 16 bytes, and neighbours are neighbours in memory."""
    return all(s > 0 for s in aligned_strides(x)[:3]) and has_aligned_rows(x)


class Hopper:
    """Launches of the kernel with tensors of one layout."""

    def __init__(
        self,
        prepared: Program,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        strides: Sequence[int],
        flags: Mapping[str, Any],
        heads_first: bool,
        operands: Sequence[Tensor] = (),
        variant: Variant | None = None,
    ) -> None:
        variant = variant or hopper_variant.at_length(usual(prepared.key, q.dtype, q.shape[3]), k.shape[2])
        batch, heads, lq, dq = q.shape
        kv_heads, lk, dv = k.shape[1], k.shape[2], v.shape[3]
        blocks = -(-lq // variant.rows)
        total = batch * heads * blocks
        most = multiprocessors(q.device.index)
        if total <= most:  # each program has one piece of work
            variant = replace(variant, queued=False)
        self.variant = variant
        module = _module(prepared.key, variant)
        columns = hopper.columns(dq)
        constants: dict[str, Any] = {"ROWS": variant.rows, "KEYS": hopper.KEYS, "STAGES": variant.stages}
        constants |= {**flags, "DV": dv, "HEADS_FIRST": heads_first, "REGISTERS": variant.registers}
        numbers = [blocks, heads, lq, lk, total, heads // kv_heads, *strides]
        rows = variant.rows // variant.warpgroups
        loaded = [[1, 1, n, columns] for n in (rows, hopper.KEYS, hopper.KEYS)]
        described = [described_for_gluon(x, block) for x, block in zip((q, k, v), loaded, strict=True)]
        self.bias = _bias_in_tiles(prepared.key, variant, q.dtype)
        if self.bias is not None:
            described.append(described_for_gluon(seen(operands[self.bias], lq, lk), [1, 1, rows, hopper.KEYS]))
            constants["UNIT"] = 1.0  # scores are as the program has them
        programs = total
        if variant.queued:
            programs = most
        elif variant.persistent:
            # Those of equal sizes: where tiles are listed, of one sequence.
            pieces = total if prepared.mask is None else heads * blocks
            programs = most if pieces > most else total
        self.launch = Launch(module.attention_forward, programs, numbers, constants, {"num_warps": 4}, described)
        self.fill: Launch | None = None
        if template.needs_mean(prepared.spec):
            sizes = {"DV": dv, "BLOCK_DV": padded(dv), "BLOCK_M": 64, "BLOCK_N": 64, "HEADS_FIRST": heads_first}
            numbers = [*v.stride(), heads, heads // kv_heads, lq, lk]
            self.fill = Launch(module.fill_dead_rows, batch * heads * -(-lq // 64), numbers, sizes, {"num_warps": 4})

    def __repr__(self) -> str:
        return "the attention kernel for Hopper"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
        tiles: Tensor | None,
    ) -> None:
        bias = [] if self.bias is None else [operands[self.bias]]
        counter = [q.new_zeros((1,), dtype=torch.int32)] if self.variant.queued else []
        tensors, free = [q, k, v, *bias, out, lse, *counter, *operands], scalars
        if tiles is not None:
            tensors.append(tiles)
            free = [*free, *lists.steps(tiles)]
        self.launch(tensors, free)
        if self.fill is not None:
            self.fill([out, lse, v])
