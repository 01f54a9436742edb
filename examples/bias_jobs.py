"""Cross-compilation of the kernels for bias, activation and dropout, as launches of bf16 or fp32 would compile them."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xfcompile import activation
from xfcompile.activation import KEEP, X, tensor, vector
from xfcompile.kernels.bias_act_dropout import text_of, tiles
from xfcompile.kernels.bias_act_dropout.programs import kernel as kernel_of
from xfcompile.kernels.parts import COLS, total_of_parts

FEATURES, K = 4096, 1024

PROGRAMS: dict[str, tuple[sympy.Expr, float]] = {
    "gelu": (activation.gelu(X, "none"), 0.0),
    "gelu, dropout": (KEEP * activation.gelu(X, "none"), 0.1),
    "gelu by tanh, dropout": (KEEP * activation.gelu(X, "tanh"), 0.1),
    "dropout, scale, residual": (KEEP * vector(0) * X + tensor(0), 0.1),
    "mish, dropout": (KEEP * activation.mish(X), 0.1),
}
KERNELS = {"bias_forward": "forward", "bias_linear": "linear", "bias_backward": "backward"}
TOTAL = "bias_total"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def tile_of(kernel: str, dtype: torch.dtype) -> tiles.Tile:
    if kernel == "bias_linear":
        return tiles.PRODUCT[dtype.itemsize].value
    return tiles.pointwise(FEATURES, KERNELS[kernel])


def compile_bias(program: str, kernel: str, dtype: torch.dtype, target: GPUTarget) -> Any:
    """Contiguous, aligned tensors, everything needed; a weight [N, K]."""
    formula, p = PROGRAMS[program]
    vectors = int(vector(0) in formula.free_symbols)
    tensors = int(tensor(0) in formula.free_symbols)
    function = kernel_of(KERNELS[kernel], text_of(formula), vectors, tensors, p)
    tile = tile_of(kernel, dtype)
    constants: dict[str, Any] = {
        "N": FEATURES, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SPLIT": False, "GROUPED": True, "FEW": True,
        "STAGES": 3, "EVEN": True,
        "FAST": 0 if dtype.itemsize == 4 else 2 if target.backend == "cuda" else 1, "BIASED": True,
        "BLOCK_K": tile.block_k, "GROUP": tiles.GROUP,
        "EVEN_K": True, "SAVE": True, "PRECISION": "ieee", "UPCAST": False, "ROWS": 64 * tile.block_m, "NEED_X": True,
        "NEED_BIAS": True, "NEED_V0": True,
    }  # fmt: skip
    constants |= {name: 1 for name in function.arg_names if name.endswith("_col")}  # a stride of 1 is a constant
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, attributes = {}, {}
    sums = {"dbias_ptr", "dv0_ptr"}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = "*i64" if name == "seed_ptr" else "*fp32" if name in sums else f"*{TYPES[dtype]}"
        signature[name] = pointer if name.endswith("_ptr") else "i32"
        if name != "stream":
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(ASTSource(function, signature, constants, attributes), target=target, options=options)


def compile_total(dtype: torch.dtype, target: GPUTarget) -> Any:
    """The sum of 64 parts."""
    constants = {"PARTS": 64, "COLS": COLS}
    signature = {"out_ptr": f"*{TYPES[dtype]}", "part_ptr": "*fp32", "parts": "i32", "n": "i32"}
    attributes: Any = {(position,): [["tt.divisibility", 16]] for position in range(len(signature))}
    signature |= dict.fromkeys(constants, "constexpr")
    return triton.compile(ASTSource(total_of_parts(False), signature, constants, attributes), target=target)
