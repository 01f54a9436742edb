"""From tensors to one launch of a generated kernel: arguments, tile sizes, and smaller ones where they do not fit."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import cache, codegen, fit, launch_decode, reference
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
    """A generated kernel in this process: its spec, its file, and what was learned about tiles that fit."""

    key: str
    spec: ScoreSpec
    source: str
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
        _programs[key] = Program(key, spec, source)
    return key


def program(key: str) -> Program:
    """The prepared kernel; one that another process prepared is read back from the cache directory."""
    if key not in _programs:
        source = cache.find(key)
        if source is None:
            raise RuntimeError(
                f"xfcompile::attention: no kernel {key!r} was prepared in this process and none is stored in "
                f"{cache.directory()}; call xfcompile.kernels.attention.prepare(spec) first"
            )
        fields = cache.load(cache.store(source), f"xfcompile_attention_{key}_spec").SPEC
        _programs[key] = Program(key, cache.parse(fields), source)
    return _programs[key]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    key: str,
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
    arguments = (
        q, k, v, out, lse, *operands, *q.stride(), *k.stride(), *v.stride(),
        heads, heads // kv_heads, lq, lk, *strides, *scalars,
    )  # fmt: skip
    wide_q, wide_v = columns(dq, dv, interpreted=interpreted)
    constants = {
        "DQ": dq,
        "DV": dv,
        "BLOCK_DQ": wide_q,
        "BLOCK_DV": wide_v,
        "PRECISION": precision(q.dtype),
        # The interpreter's dot reads bf16 as integers.
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
    }

    if "FAST" in kernel.arg_names:
        constants["FAST"] = q.dtype.itemsize == 2

    if launch_decode.wanted(prepared.spec, q, k):
        named = functools.partial(prepared.kernel, interpreted)
        numbers = [*strides, *scalars]
        launch_decode.run(named, (q, k, v, out, lse), operands, numbers, constants, prepared.fitting)
        return out, lse

    def launch(tiles: Tiles) -> Any:
        return kernel[(batch * heads * -(-lq // tiles.block_m),)](
            *arguments,
            **constants,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    if interpreted:
        launch(INTERPRETED)
        return out, lse
    with torch.cuda.device(q.device):
        _launch_fitting(prepared, q, dv, launch)
    return out, lse


def _launch_fitting(prepared: Program, q: Tensor, dv: int, launch: Callable[[Tiles], Any]) -> None:
    kind = (q.device.index, q.dtype, q.shape[3], dv, padded(min(q.shape[2], 128)))
    if kind in prepared.fitting:
        launch(prepared.fitting[kind])
        return
    first = choose(device_generation(q.device), q.dtype, q.shape[3], dv, q.shape[2])
    prepared.fitting[kind] = fit.launch(launch, (alternatives(first), smaller(first)), q, dv)


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


def precision(dtype: torch.dtype) -> str:
    """What `tl.dot` may round fp32 to: what the user allowed matrix products to."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
