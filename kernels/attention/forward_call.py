"""How tensors of one layout are computed with: which kernel, and all that it is given but the tensors themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import launch_decode, launch_hopper, lists, lists_sizes, reference, template
from xfcompile.kernels.attention.arguments import mask_values, split
from xfcompile.kernels.attention.exactness import precision, speed
from xfcompile.kernels.attention.fallback import FirstThatRuns, WhereAligned
from xfcompile.kernels.attention.launch_blocks import Blocks
from xfcompile.kernels.attention.programs import Call, Program, program
from xfcompile.kernels.attention.repeat import Blank, windows
from xfcompile.kernels.attention.tiles import columns
from xfcompile.kernels.registration import Site
from xfcompile.site import ScoreSpec


def call_of(
    prepared: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    listed: bool,
    sizes: tuple[int, int],
    heads_first: bool,
) -> Call:
    """How such tensors are computed with, from now on."""
    batch, heads, lq, dq = q.shape
    kv_heads, lk, dv = k.shape[1], k.shape[2], v.shape[3]
    spec, interpreted = prepared.spec, q.device.type == "cpu"
    if 0 in (batch, heads, lq, dv):
        return lambda q, k, v, *rest: _filled(outputs(q, v, heads_first))
    if lk == 0:
        return lambda q, k, v, operands, scalars, tiles, *random: no_keys(
            spec, q, k, v, operands, scalars, *outputs(q, v, heads_first)
        )
    strides = [stride for operand in operands for stride in operand.stride()]
    decodes = launch_decode.wanted(spec, q, k)
    few = None if decodes else windows(spec.dropout, q, k, v)
    wide_q, wide_v = columns(dq, dv, interpreted=interpreted, narrow=few is not None)
    constants: dict[str, Any] = {
        "DQ": dq,
        "DV": dv,
        "BLOCK_DQ": wide_q,
        "BLOCK_DV": wide_v,
        "PRECISION": precision(q.dtype),
        # The interpreter's dot reads bf16 as integers.
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
        "HEADS_FIRST": heads_first,
        "UNIT": _unit(prepared.key, q.dtype),
    }
    kernel = prepared.kernel(interpreted)
    if "FAST" in kernel.arg_names:
        constants["FAST"] = speed(spec, q)
    blank_out, blank_lse = (Blank.like(x) for x in outputs(q, v, heads_first))
    if decodes:
        decoding = launch_decode.Decoding(prepared, constants, interpreted)

        def decode(
            q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], scalars: Sequence[Any], tiles: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            out, lse = blank_out(), blank_lse()
            decoding(q, k, v, out, lse, operands, scalars)
            return out, lse

        return decode

    key, mask = prepared.key, prepared.mask
    block_m, block_n = sizes if listed else lists_sizes.tile_sizes(key, q.device, q.dtype, dq, dv, lq)
    fast = not interpreted and launch_hopper.suits(prepared, q, k, v, operands, (block_m, block_n))
    made = mask is not None and not listed and (fast or -(-lk // block_n) > lists_sizes.FEW_TILES)
    shape, listing = (batch, heads, lq, lk), Site()

    def for_any_hardware() -> Blocks:
        numbers = [*q.stride(), *k.stride(), *v.stride(), heads, heads // kv_heads, lq, lk, *strides]
        types = (q.device, q.dtype, *[x.dtype for x in operands])
        return Blocks(
            prepared, kernel, numbers, constants, (block_m, block_n) if listed or made else None, types, q, dv, few
        )

    launch: Callable[..., None]
    if fast:
        flags: dict[str, Any] = {name: constants[name] for name in ("UNIT", "FAST") if name in constants}
        first = launch_hopper.Hopper(prepared, q, k, v, strides, flags, heads_first, operands)
        launch = FirstThatRuns(first, for_any_hardware)
        if first.bias is not None:
            launch = WhereAligned(launch, first.bias, for_any_hardware)
    else:
        launch = for_any_hardware()

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
        tiles: Tensor | None,
        *random: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = blank_out(), blank_lse()
        if made:
            assert mask is not None
            values = mask_values(prepared, operands, scalars)
            tiles = lists.run(q, *values, shape, block_m, block_n, mask, site=listing)
        launch(q, k, v, out, lse, operands, scalars, tiles, *random)
        return out, lse

    return call


@functools.cache
def _unit(key: str, dtype: torch.dtype) -> float:
    return template.unit(program(key).spec, dtype)


def by_definition(spec: ScoreSpec, heads_first: bool) -> Call:
    """For what no kernel can be launched for."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
        tiles: Tensor | None,
        *random: Any,
    ) -> tuple[Tensor, Tensor]:
        ints, floats = split(spec, scalars)
        dtype = torch.promote_types(q.dtype, torch.float32)
        made = outputs(q, v, heads_first)
        for x, value in zip(
            made, reference.attention(spec, q, k, v, operands, ints, floats, dtype, *random), strict=True
        ):
            x.copy_(value)
        return made

    return call


def no_keys(
    spec: ScoreSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    scalars: Sequence[Any],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """A sum over nothing is 0, whatever the rule for rows whose keys are all masked."""
    lse.fill_(-math.inf)
    if spec.sink is not None:
        ints, floats = split(spec, scalars)
        lse.copy_(reference.attention(spec, q, k, v, operands, ints, floats)[1])
    return out.zero_(), lse


def _filled(made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    made[1].fill_(-math.inf)
    return made


def outputs(q: Tensor, v: Tensor, heads_first: bool = False) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] with memory in the order [B, Lq, Hq, Dv], which the next projection reads as it is, or as
    its dimensions are with `heads_first`; lse."""
    batch, heads, lq, _ = q.shape
    if heads_first:
        return q.new_empty((batch, heads, lq, v.shape[3])), q.new_empty((batch, heads, lq), dtype=torch.float32)
    out = q.new_empty((batch, lq, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, lq), dtype=torch.float32)
