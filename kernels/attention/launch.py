"""From tensors to one launch of a generated kernel: arguments, tile sizes, and smaller ones where they do not fit."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import cache, codegen, fit, launch_decode, lists, reference
from xfcompile.kernels.attention.blocks import Summary, summary
from xfcompile.kernels.attention.tiles import (
    INTERPRETED,
    Tiles,
    alternatives,
    choose,
    columns,
    device_generation,
    padded,
    smaller,
)
from xfcompile.site import ScoreSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """A generated kernel in this process: its spec, its file, what lists of tiles it takes (of the mask that
    `lists.program(mask)` has), and what was learned about tiles that fit."""

    key: str
    spec: ScoreSpec
    source: str
    summary: Summary | None
    mask: str | None
    fitting: dict[tuple[object, ...], Tiles] = field(default_factory=dict)

    def kernel(self, interpreted: bool, name: str = "attention_forward") -> Any:
        """The Triton function, compiled or interpreted: which one `triton.jit` decides when the file is imported."""
        return getattr(_module(self.key, interpreted), name)


_programs: dict[str, Program] = {}


@functools.cache
def _module(key: str, interpreted: bool) -> ModuleType:
    path = cache.store(_programs[key].source)
    name = f"xfcompile_attention_{key}{'_interpreted' if interpreted else ''}"
    return cache.load(path, name)


def prepare(spec: ScoreSpec) -> str:
    """Generates the kernel of a spec and stores its source; returns the key that the op is called with.

    Raises printer.Unsupported where the score has no Triton form.
    """
    spec = codegen.canonical(spec)
    source = codegen.generate(spec)
    key = cache.key_of(source)
    if key not in _programs:
        log.info("attention kernel %s: score %s, keep %s", cache.store(source), spec.score, spec.keep)
        _programs[key] = _program(key, spec, source)
    return key


def _program(key: str, spec: ScoreSpec, source: str) -> Program:
    found = summary(spec)
    return Program(key, spec, source, found, None if found is None else lists.prepare(found.mask))


def program(key: str) -> Program:
    """The prepared kernel; one that another process prepared is read back from the cache directory."""
    if key not in _programs:
        source, spec = cache.read_back(key, "attention", "prepare")
        assert isinstance(spec, ScoreSpec)
        _programs[key] = _program(key, spec, source)
    return _programs[key]


FEW_TILES = 4
"""So many tiles a row are visited without a list: making one takes as long."""


def tile_sizes(device: torch.device, dtype: torch.dtype, dq: int, dv: int, lq: int) -> tuple[int, int]:
    """Queries and keys of the tiles that lists are made of."""
    if device.type == "cpu":
        return INTERPRETED.block_m, INTERPRETED.block_n
    tiles = choose(device_generation(device), dtype, dq, dv, lq)
    return tiles.block_m, tiles.block_n


def mask_of(key: str) -> str | None:
    """The key of the lists of tiles that a kernel takes."""
    return program(key).mask


def mask_arguments(
    key: str, operands: Sequence[Any], ints: Sequence[Any], floats: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Of the operands and the numbers of a score, those that its mask has."""
    prepared = program(key)
    found = prepared.summary
    assert found is not None
    numbers = reference.bind(prepared.spec.scalars, ints, floats)
    chosen = [(x, numbers[x]) for x in found.scalars]
    whole, real = ([n for x, n in chosen if bool(x.is_integer) == integer] for integer in (True, False))
    return [operands[n] for n in found.operands], whole, real


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    key: str,
    tiles: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
) -> tuple[Tensor, Tensor]:
    """The kernel on a GPU, or interpreted on a CPU."""
    prepared = program(key)
    batch, heads, lq, dq = q.shape
    kv_heads, lk, dv = k.shape[1], k.shape[2], v.shape[3]
    out, lse = outputs(q, v)
    if out.numel() == 0:
        return out, lse.fill_(-math.inf)
    if lk == 0:
        return no_keys(prepared.spec, q, k, v, operands, ints, floats, out, lse)

    interpreted = q.device.type == "cpu"
    kernel = prepared.kernel(interpreted)
    strides = [stride for operand in operands for stride in operand.stride()]
    scalars = reference.bind(prepared.spec.scalars, ints, floats).values()
    arguments = [
        q, k, v, out, lse, *operands, *q.stride(), *k.stride(), *v.stride(),
        heads, heads // kv_heads, lq, lk, *strides, *scalars,
    ]  # fmt: skip
    wide_q, wide_v = columns(dq, dv, interpreted=interpreted)
    constants: dict[str, Any] = {
        "DQ": dq,
        "DV": dv,
        "BLOCK_DQ": wide_q,
        "BLOCK_DV": wide_v,
        "PRECISION": precision(q.dtype),
        # The interpreter's dot reads bf16 as integers.
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
    }
    if "FAST" in kernel.arg_names:
        constants["FAST"] = speed(prepared.spec, q)
    if launch_decode.wanted(prepared.spec, q, k):
        named = functools.partial(prepared.kernel, interpreted)
        launch_decode.run(named, (q, k, v, out, lse), operands, [*strides, *scalars], constants, prepared.fitting)
        return out, lse

    if prepared.mask is not None:
        if tiles is None:
            block_m, block_n = tile_sizes(q.device, q.dtype, dq, dv, lq)
            if -(-lk // block_n) > FEW_TILES:
                shape = (batch, heads, lq, lk)
                found = mask_arguments(key, operands, ints, floats)
                tiles = lists.run(q, *found, shape, block_m, block_n, prepared.mask)
        constants["LISTED"] = tiles is not None
        listed = q if tiles is None else tiles  # a pointer that is not looked at
        own_b, own_h = (0, 0) if tiles is None else tiles.shape[:2]
        arguments += [listed, own_h if own_b > 1 else 0, 1 if own_h > 1 else 0]

    def launch(sizes: Tiles) -> Any:
        parts = {}
        if prepared.mask is not None:
            parts = {"PARTS_M": max(block_m // sizes.block_m, 1), "PARTS_N": max(block_n // sizes.block_n, 1)}
        return kernel[(batch * heads * -(-lq // sizes.block_m),)](
            *arguments,
            **constants,
            **parts,
            BLOCK_M=sizes.block_m,
            BLOCK_N=sizes.block_n,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )

    if interpreted:
        launch(INTERPRETED if tiles is None else replace(INTERPRETED, block_m=block_m, block_n=block_n))
        return out, lse
    with torch.cuda.device(q.device):
        _launch_fitting(prepared, q, dv, launch, (block_m, block_n) if tiles is not None else None)
    return out, lse


def _launch_fitting(
    prepared: Program, q: Tensor, dv: int, launch: Callable[[Tiles], Any], listed: tuple[int, int] | None
) -> None:
    """Launches with the tiles that this kernel was found to fit in; at first, finds them by launching.

    listed: the sizes of the tiles in a list, which those of the kernel must divide.
    """
    kind = (q.device.index, q.dtype, q.shape[3], dv, padded(min(q.shape[2], 128)), listed)
    if kind in prepared.fitting:
        launch(prepared.fitting[kind])
        return
    first = choose(device_generation(q.device), q.dtype, q.shape[3], dv, q.shape[2])
    if listed is not None:
        first = replace(first, block_m=min(first.block_m, listed[0]), block_n=min(first.block_n, listed[1]))

    def divides(tiles: Tiles) -> bool:
        return listed is None or not (listed[0] % tiles.block_m or listed[1] % tiles.block_n)

    tried = (filter(divides, alternatives(first)), filter(divides, smaller(first)))
    prepared.fitting[kind] = fit.launch(launch, tried, q, dv)


def outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] with memory in the order [B, Lq, Hq, Dv], which the next projection reads as it is; lse."""
    batch, heads, lq, _ = q.shape
    out = q.new_empty((batch, lq, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, lq), dtype=torch.float32)


def no_keys(
    spec: ScoreSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """A sum over nothing is 0, whatever the rule for rows whose keys are all masked."""
    lse.fill_(-math.inf)
    if spec.sink is not None:
        lse.copy_(reference.attention(spec, q, k, v, operands, ints, floats)[1])
    return out.zero_(), lse


def speed(spec: ScoreSpec, q: Tensor) -> int:
    """Which tanh is exact enough: see the template's."""
    if q.dtype.itemsize != 2:
        return 0
    return 2 if spec.coarse and q.dtype == torch.bfloat16 and q.is_cuda and torch.version.hip is None else 1


def precision(dtype: torch.dtype) -> str:
    """What `tl.dot` may round fp32 to: what the user allowed matrix products to."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
