"""Compiles the kernels of gated MLPs for GPUs that need not be here, as a launch would."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xfcompile import activation
from xfcompile.activation import GATE, UP, Sigmoid
from xfcompile.kernels.attention.tiles import AMD, BLACKWELL, HOPPER, generation
from xfcompile.kernels.gated_mlp import hopper_few, launch_few, prepare, tiles
from xfcompile.kernels.gated_mlp.programs import program as prepared
from xfcompile.kernels.gated_mlp.tiles import Stream, Tiles

KERNELS = ("gated_forward", "gated_forward_tma", "gated_few", "gated_product", "gated_backward")

PROGRAMS: dict[str, sympy.Expr] = {
    "SwiGLU": activation.silu(GATE) * UP,
    "GEGLU": activation.gelu(GATE, "none") * UP,
    "GEGLU tanh": activation.gelu(GATE, "tanh") * UP,
    "GPT-OSS": (activation.clamp(UP, -7, 7) + 1)
    * activation.clamp(GATE, None, 7)
    * Sigmoid(activation.real(1.702) * activation.clamp(GATE, None, 7)),
}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def kind_of(target: GPUTarget) -> str:
    return generation(0 if target.backend == "hip" else int(target.arch) // 10, target.backend == "hip")


def exists(kernel: str, target: GPUTarget, dtype: torch.dtype) -> bool:
    """Whether there is such a kernel for a target: descriptors are for Hopper and later ones, and 16-bit numbers."""
    return kernel != "gated_forward_tma" or (kind_of(target) in (HOPPER, BLACKWELL) and dtype.itemsize == 2)


def tiles_of(kernel: str, target: GPUTarget, dtype: torch.dtype, rows: int, save: bool = False) -> Tiles:
    if kernel == "gated_few":
        return tiles.few(dtype, rows, 4096)
    if kernel.startswith("gated_forward"):
        return tiles.dual(kind_of(target), dtype, rows, save)
    m, n, warps = tiles.POINTWISE
    return Tiles(m, n, 1, warps, 1)


def compile_gated(
    program: str,
    kernel: str,
    dtype: torch.dtype,
    target: GPUTarget,
    rows: int,
    *,
    save: bool = False,
    dropout: bool = False,
    sizes: Tiles | None = None,
) -> Any:
    """With contiguous, aligned tensors; rows: how many, by which tiles are chosen."""
    function = prepared(prepare(PROGRAMS[program])).kernel(kernel, False)
    t = sizes or tiles_of(kernel, target, dtype, rows, save)
    constants: dict[str, object] = {
        "GATE_BIAS": False, "UP_BIAS": False, "SAVE": save, "STEP": 1, "DROPOUT": dropout, "ALIGNED": True,
        "EVEN_K": True, "PRECISION": "ieee", "UPCAST": False, "ONE": rows == 1, "PRODUCT": True,
        "BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_K": t.block_k, "GROUP": t.group, "FLATTEN": t.flatten,
        "PARTS": t.parts, "STAGES": t.num_stages,
        "stride_xk": 1, "stride_gk": 1, "stride_uk": 1, "stride_dn": 1,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else _type(name, NAMES[dtype], t)
        if name not in constants and not name.endswith("_desc") and name not in ("threshold", "scale", "rows"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages}
    if kind_of(target) == AMD:
        options["num_stages"] = max(t.num_stages, 1)
    return triton.compile(ASTSource(function, signature, constants, attributes), target=target, options=options)


def stream_of(rows: int) -> Stream:
    """On an H200, of 11008 features."""
    return tiles.stream(rows, 11008, 132)


def compile_few_hopper(program: str, dtype: torch.dtype, rows: int, s: Stream, *, about: bool = False) -> Any:
    """about: with biases, and with projections that are saved."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    function = launch_few.kernel(PROGRAMS[program])

    def descriptor(height: int) -> str:
        block = [height, launch_few.DEPTH]
        return f"tensordesc<{NAMES[dtype]}{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"

    constants = {
        "GATE_BIAS": about, "UP_BIAS": about, "SAVE": about, "STEP": 1,
        "STAGES": s.stages, "GROUPS": s.groups, "PARTS": s.parts,
    }  # fmt: skip
    types = {f"{name}_desc": descriptor(hopper_few.FEATURES) for name in ("gate", "up")}
    types |= {"x_desc": descriptor(tiles.columns(rows)), "seed_ptr": "*i64"}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        pointer = f"*{NAMES[dtype]}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, pointer)
        if name.endswith("_ptr"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch_few.options(s))


def _type(name: str, dtype: str, t: Tiles) -> str:
    if name.endswith("_desc"):
        rows = t.block_m if name == "x_desc" else t.block_n
        return f"tensordesc<{dtype}[{rows}, {t.block_k}]>"
    if name == "seed_ptr":
        return "*i64"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name == "scale" else "i32"
