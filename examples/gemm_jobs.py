"""Compiles the product of matrices for Hopper where no GPU need be, as a launch would."""

from __future__ import annotations

from typing import Any

import torch
import triton
from gated_jobs import NAMES
from triton.backends.compiler import GPUTarget

from xfcompile import activation
from xfcompile.activation import GATE, KEEP, UP, Sigmoid, X, tensor, vector
from xfcompile.kernels.gemm import hopper, launch
from xfcompile.kernels.gemm.hopper import Epilogue
from xfcompile.kernels.gemm.tiles import BLOCK_M, DROPPING_VARIANTS, ROWS, VARIANTS, WIDE, Tile

__all__ = ["BLOCK_M", "DROPPING_VARIANTS", "EPILOGUES", "NAMES", "VARIANTS", "WIDE", "compile_gemm"]

EPILOGUES: dict[str, Epilogue] = {
    "identity": hopper.single(X),
    "gelu": hopper.single(activation.gelu(X, "none")),
    "gelu by tanh": hopper.single(activation.gelu(X, "tanh")),
    "scale, residual": hopper.single(vector(0) * activation.relu(X) + tensor(0), 1, 1),
    "gelu, dropout, saving": hopper.single(KEEP * activation.gelu(X, "none"), saves=True),
    "dropout, scale, residual": hopper.single(KEEP * vector(0) * X + tensor(0), 1, 1),
    "SwiGLU": hopper.gated(activation.silu(GATE) * UP),
    "SwiGLU, saving": hopper.gated(activation.silu(GATE) * UP, saves=True),
    "SwiGLU, dropout, saving": hopper.gated(activation.silu(GATE) * UP, saves=True, drops=True),
    "GEGLU": hopper.gated(activation.gelu(GATE, "none") * UP),
    "GPT-OSS": hopper.gated(
        (activation.clamp(UP, -7, 7) + 1)
        * activation.clamp(GATE, None, 7)
        * Sigmoid(activation.real(1.702) * activation.clamp(GATE, None, 7))
    ),
}


def compile_gemm(name: str, dtype: torch.dtype, tile: Tile, biased: bool = True, across: bool = False) -> Any:
    """With contiguous, aligned tensors."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    epilogue = EPILOGUES[name]
    kernel = launch.kernel(epilogue)
    kind = NAMES[dtype]
    part, buffers = tile.stored(len(epilogue.sums))

    def descriptor(*block: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
        return f"tensordesc<{kind}{list(block)},{layout!r}>"

    constants: dict[str, object] = {
        "STAGES": tile.stages, "PART": part, "BUFFERS": buffers,
        "GROUP": tile.group, "SKEW": tile.skew, "REGISTERS": tile.registers,
    }  # fmt: skip
    constants |= dict.fromkeys(hopper.flags(epilogue), biased) | {"ACROSS": across}
    rows = BLOCK_M if tile.joined else ROWS
    types = {"x_desc": descriptor(rows, tile.block_k), "out_desc": descriptor(rows, part)}
    types |= {f"{n}_out_desc": descriptor(rows, part) for n in epilogue.names}
    types |= {"seed_ptr": "*i64", "scale": "fp32", "r0_desc": descriptor(rows, part)}
    columns = tile.columns // len(epilogue.sums)
    types |= {f"{n}_desc": descriptor(columns, tile.block_k) for n in epilogue.names if n != "x"}
    if epilogue.names == ["x"]:
        types["weight_desc"] = descriptor(*((tile.block_k, columns) if across else (columns, tile.block_k)))
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        pointer = f"*{kind}" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(argument, pointer)
        if argument.endswith("_ptr"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": rows // 16})
