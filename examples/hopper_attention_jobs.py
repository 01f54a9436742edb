"""Compiles the attention kernels for Hopper, in Gluon, where no GPU need be, as a launch would."""

from __future__ import annotations

from typing import Any

import torch
from attention_jobs import NAMES, backward_of, compiled_with, spec_of
from triton.backends.compiler import GPUTarget

from xfcompile.kernels.attention import (
    backward_layout,
    cache,
    codegen,
    hopper,
    hopper_backward,
    hopper_variant,
    template,
)
from xfcompile.kernels.attention.tiles import Tiles
from xfcompile.site import ScoreSpec

WRITING = "hopper_backward_load0"
"""The backward where it writes the gradient of a bias, too."""
KERNELS = ("hopper", "hopper_backward", WRITING)
TARGET = GPUTarget("cuda", 90, 32)


def compile_hopper(program: str, kernel: str, dtype: torch.dtype, dim: int) -> tuple[Any, Tiles] | None:
    """A kernel, and its tiles; None where another one is launched for such a program."""
    if kernel in ("hopper_backward", WRITING):
        compiled = compile_backward(backward_of(program, kernel, dtype, dim), dtype, dim)
        rows, keys = hopper_backward.ROWS, hopper_backward.KEYS
        tiles = Tiles(rows, keys, hopper_backward.WARPS, hopper_backward.STAGES[dim])
    else:
        spec = codegen.canonical(spec_of(program, kernel, dtype, dim))
        variant = hopper_variant.usual(spec, codegen.pieces(spec), dtype, dim)
        compiled = compile_forward(spec, variant, dtype, dim)
        tiles = Tiles(variant.rows, hopper.KEYS, 4, variant.stages)
    return None if compiled is None else (compiled, tiles)


def compile_forward(spec: ScoreSpec, variant: hopper_variant.Variant, dtype: torch.dtype, dim: int) -> Any:
    """Of a canonical score; None where another kernel is launched."""
    from triton.experimental.gluon._runtime import GluonASTSource

    pieces = codegen.pieces(spec)
    if hopper.why_not(spec, pieces, dtype, dim, dim) is not None:
        return None
    source = hopper.module(spec, pieces, variant)
    kernel = cache.load(cache.store(source), f"hopper_{cache.key_of(source)}").attention_forward

    constants: dict[str, object] = {
        "ROWS": variant.rows, "KEYS": hopper.KEYS, "STAGES": variant.stages, "DV": dim, "HEADS_FIRST": False,
        "REGISTERS": variant.registers, "UNIT": 1.0 if variant.tiles else template.unit(spec, dtype), "FAST": 2,
    }  # fmt: skip
    constants |= {f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(spec.operands)}
    rows = variant.rows // variant.warpgroups
    types = {
        "q_desc": descriptor([1, 1, rows, dim], dtype),
        "k_desc": descriptor([1, 1, hopper.KEYS, dim], dtype),
        "v_desc": descriptor([1, 1, hopper.KEYS, dim], dtype),
        "bias_desc": descriptor([1, 1, rows, hopper.KEYS], dtype),
    }
    return compiled_with(kernel, constants, types, dtype, spec, TARGET, GluonASTSource)


def compile_backward(backward: backward_layout.Program, dtype: torch.dtype, dim: int) -> Any:
    """None where others are launched."""
    from triton.experimental.gluon._runtime import GluonASTSource

    spec, found = backward.spec, backward.made.gradients
    if hopper_backward.why_not(spec, found, dtype, dim, dim) is not None:
        return None
    writer = hopper_backward.writer(spec, found, dtype)
    source = hopper_backward.module(writer)
    kernel = cache.load(cache.store(source), f"hopper_backward_{cache.key_of(source)}").attention_backward
    rows, keys = hopper_backward.ROWS, hopper_backward.KEYS
    constants: dict[str, object] = {
        "ROWS": rows, "KEYS": keys, "STAGES": hopper_backward.stages(writer, dim), "LISTED_ROWS": hopper.ROWS,
        "EACH_HEAD": writer.listed, "AHEAD": hopper_backward.AHEAD[dim], "LATER": hopper_backward.LATER[dim],
        "FAST": 2, "DQ": dim, "DV": dim, "PRODUCER_REGISTERS": hopper_backward.PRODUCER_REGISTERS,
        "stride_dd": 1, "stride_ed": 1, "WRITE": True,
    }  # fmt: skip
    constants |= {f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(spec.operands)}
    types = {f"{name}_desc": descriptor([1, 1, rows, dim], dtype) for name in ("q", "dout")}
    types |= {f"{name}_desc": descriptor([1, 1, keys, dim], dtype) for name in "kv"}
    types |= {f"{name}_desc": descriptor([1, rows], torch.float32) for name in ("top", "delta", "shift")}
    types |= {f"{name}_desc": descriptor([1, 1, rows, keys], dtype) for name in ("bias", "dbias")}
    types["dq_desc"] = descriptor([1, 1, rows, dim], torch.float32)
    return compiled_with(kernel, constants, types, dtype, spec, TARGET, GluonASTSource, hopper_backward.WARPS)


def descriptor(block: list[int], dtype: torch.dtype) -> str:
    """The type of a TMA descriptor of such blocks."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float32 if dtype.itemsize == 4 else gl.bfloat16)
    return f"tensordesc<{NAMES[dtype]}{block},{layout!r}>"
