"""Compiles the attention kernels in Triton for GPUs that need not be here, as a launch would."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import sympy
import torch
import triton
from gated_jobs import kind_of
from resources import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xfcompile.bench.programs import Sizes, programs
from xfcompile.kernels.attention import (
    backward_dead,
    backward_layout,
    blocks,
    cache,
    codegen,
    decode,
    launch_decode,
    lists,
    prepare,
    template,
)
from xfcompile.kernels.attention.programs import program as generated
from xfcompile.kernels.attention.tiles import (
    FEW_SPILLS,
    Tiles,
    alternatives,
    choose,
    choose_backward,
    choose_decoding,
    columns,
    decoding_alternatives,
    few_keys,
)
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import Band, Operand, ScoreSpec

NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
BACKWARD = ("dq", "dkdv")
LOAD = "load0"
"""The backward's kernel of the first tensor that a score loads."""
DQ_LOAD = "dq_load0"
"""That for dq where it writes the gradient of that tensor, too."""
DEAD = ("dead_rows", "dead_keys")

LENGTH = 4096
"""Of the programs that are compiled."""
LISTED = 64
"""Queries and keys of the tiles that verdicts are compiled for."""

WINDOW, WINDOW_DIM = "window", 32
"""Of kernels of windows what their names begin with; and the columns of their heads."""
WINDOW_KEYS = {"windows of 144": 144, "windows of 49": 49}

LENGTHS = sympy.symbols("lq lk", integer=True, positive=True)
CACHES = {
    "plain": ScoreSpec(S / 8),
    "growing cache": ScoreSpec(
        S / 8, I + LENGTHS[1] - LENGTHS[0] >= J, scalars=LENGTHS, band=Band(None, I + LENGTHS[1] - LENGTHS[0] + 1, True)
    ),
    "mask of a cache": ScoreSpec(S / 8, sympy.Ne(Load(0, B, 0, 0, J), 0), operands=(Operand(torch.bool, 4),)),
    "positions": ScoreSpec(S / 8, Load(0, I) >= J, operands=(Operand(torch.int64, 1),)),
    "mask of each row": ScoreSpec(S / 8, sympy.Ne(Load(0, B, 0, I, J), 0), operands=(Operand(torch.bool, 4),)),
}
"""What a step of decoding may keep: the kernels for few query rows are compiled for these."""

PADDED = ScoreSpec(S / 8, sympy.Ne(Load(0, B, J), 0), "mean", (Operand(torch.bool, 2),), leaks=True)
LEAKING = {
    "added padding": PADDED,
    "added padding, dropout": replace(PADDED, dropout=0.1),
    "added padding, soft-cap": replace(PADDED, score=50 * sympy.tanh(S / 400)),
}
"""Rows without keys that send gradients to q, k and v."""


def compile_attention(
    program: str, kernel: str, dtype: torch.dtype, dim: int, target: GPUTarget, rows: int
) -> tuple[Any, Tiles]:
    """A kernel, and the tiles that it was compiled with. dim: of a head; rows: that share one of k and v, where there
    are few of them."""
    if kernel == "tile_verdicts":
        return compile_lists(spec_of(program, kernel, dtype, dim), target), Tiles(LISTED, LISTED, 4, 1)
    kind = kind_of(target)
    if kernel.startswith(WINDOW):
        return compile_window(WINDOW_KEYS[program], kernel.removeprefix(f"{WINDOW}_"), dtype, target, kind)
    if kernel in (*BACKWARD, LOAD, DQ_LOAD, *DEAD):
        backward = backward_of(program, kernel, dtype, dim)
        name, writes = kernel.removesuffix("_load0"), kernel == DQ_LOAD
        tiles = choose_backward(name, kind, dtype, dim, dim, backward.traits(name, None))
        return compile_backward(backward, name, dtype, dim, target, tiles, writes), tiles
    if kernel == "attention_forward":
        spec = spec_of(program, kernel, dtype, dim)
        candidates = list(alternatives(choose(kind, dtype, dim, dim, LENGTH)))  # as a launch does
    else:
        spec = CACHES[program]
        candidates = list(decoding_alternatives(choose_decoding(kind, dtype, dim, dim, rows)))
    for tiles in candidates:
        compiled = compile_kernel(spec, dtype, dim, target, tiles, kernel)
        spills = resources(compiled)[1]
        crowded = tiles.num_warps == 4 and target.arch in (90, 100) and compiled.metadata.shared > 113 * 1024
        if spills <= 4 * FEW_SPILLS and not crowded:
            break
    return compiled, tiles


def compile_window(keys: int, kernel: str, dtype: torch.dtype, target: GPUTarget, kind: str) -> tuple[Any, Tiles]:
    """Of a site with a bias of each head that is learned, and a mask of each window."""
    dim, half = WINDOW_DIM, Operand(dtype, 4)
    few = few_keys(dim, dim, keys)
    assert few is not None
    spec = ScoreSpec(S * dim**-0.5 + Load(0, 0, H, I, J) + Load(1, B, 0, I, J), operands=(half, half))
    if kernel == "forward":
        tiles = choose(kind, dtype, dim, dim, keys, few)
        return compile_kernel(spec, dtype, dim, target, tiles), tiles
    backward = backward_layout.prepare(prepare(spec), (0,))
    tiles = choose_backward(kernel, kind, dtype, dim, dim, [few, *backward.traits(kernel, None)])
    return compile_backward(backward, kernel, dtype, dim, target, tiles), tiles


def spec_of(program: str, kernel: str, dtype: torch.dtype, dim: int) -> ScoreSpec:
    if program == "causal from a buffer" and kernel == "tile_verdicts":
        return ScoreSpec(S, sympy.Ne(Load(0, 0, 0, I, J), 0), "nan", (Operand(torch.float32, 4),))
    if program in LEAKING:
        return LEAKING[program]
    return next(p for p in programs(dtype) if p.name == program).spec(Sizes(4, 32, LENGTH, dim))


def compile_kernel(
    spec: ScoreSpec,
    dtype: torch.dtype,
    dim: int,
    target: GPUTarget,
    tiles: Tiles,
    function: str = "attention_forward",
) -> Any:
    """As a launch would with contiguous, aligned tensors [B, L, H, D]."""
    prepared = generated(prepare(spec))
    kernel = prepared.kernel(False, function)
    constants: dict[str, object] = {
        "DQ": dim,
        "DV": dim,
        "BLOCK_DQ": columns(dim, dim, narrow=dim == WINDOW_DIM)[0],
        "BLOCK_DV": columns(dim, dim, narrow=dim == WINDOW_DIM)[1],
        "PRECISION": "ieee",
        "UPCAST": False,
        "HEADS_FIRST": False,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_S": launch_decode.COMBINED,
        "DEPENDENT": target.backend == "cuda" and target.arch >= 90,
        "FAST": int(dtype.itemsize == 2),
        "UNIT": template.unit(prepared.spec, dtype),
    }
    if prepared.spec.coarse and target.backend == "cuda" and dtype == torch.bfloat16:
        constants["FAST"] = 2
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    for name in kernel.arg_names:  # last dimensions are contiguous: Triton makes a stride of 1 a constant
        if name in ("stride_qd", "stride_kd", "stride_vd"):
            constants[name] = 1
    if "LISTED" in kernel.arg_names:
        constants |= {"LISTED": True, "PARTS_M": 1, "PARTS_N": 1}
    constants |= {f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(prepared.spec.operands)}
    signature, attributes = {}, {}
    any_number = {"group", "list_b", "list_h", *(x.name for x in prepared.spec.scalars)}
    if function != "attention_forward":
        any_number |= {"heads", *decode.LENGTHS}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = type_of(name, dtype, prepared.spec) if name not in constants else "constexpr"
        if name not in constants and name not in any_number:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def backward_of(program: str, kernel: str, dtype: torch.dtype, dim: int) -> backward_layout.Program:
    """Gradients of operands are wanted where the kernel writes that of a load."""
    spec = spec_of(program, kernel, dtype, dim)
    needed = tuple(range(len(spec.operands))) if kernel.endswith(LOAD) else ()
    return backward_layout.prepare(prepare(spec), needed)


def compile_backward(
    backward: backward_layout.Program,
    name: str,
    dtype: torch.dtype,
    dim: int,
    target: GPUTarget,
    tiles: Tiles,
    writes: bool = False,
) -> Any:
    """As a launch would. writes: whether what computes dq writes what each score has of its own."""
    kernel = backward.kernel(name, False)
    wide_q, wide_v = columns(dim, dim, narrow=dim == WINDOW_DIM)
    constants: dict[str, object] = {
        "DQ": dim, "DV": dim, "BLOCK_DQ": wide_q, "BLOCK_DV": wide_v, "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n, "PRECISION": "ieee", "UPCAST": False, "EXACT": dtype == torch.float32,
        "FAST": 2 if backward.spec.coarse and target.backend == "cuda" else int(dtype.itemsize == 2),
        "LISTED": True, "PARTS_M": 1, "PARTS_N": 1, "LOOP": True, "ALWAYS": False, "EDGE_M": False, "EDGE_N": False,
        "CHUNK": backward_dead.CHUNK, "MARKED": backward_dead.MARKED,
        **dict.fromkeys(("NEED_DQ", "NEED_DK", "NEED_DV", "NEED_DX"), True),
        **{name: 1 for name in kernel.arg_names if re.fullmatch(r"stride_([a-z]d|l\d*n)", name)},
        **{name: writes for name in kernel.arg_names if name.startswith("WRITE")},
        **{f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(backward.spec.operands)},
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    any_number = {"group", "heads", "batch", "list_b", "list_h", *(x.name for x in backward.spec.scalars)}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = (
            "*fp32"
            if name in ("pair_ptr", "inverse_ptr", "delta_ptr", "dload_ptr")
            else type_of(name, dtype, backward.spec)
        )
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and name not in any_number:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def compile_lists(spec: ScoreSpec, target: GPUTarget) -> Any:
    """The verdicts of a score's mask."""
    found = blocks.summary(codegen.canonical(spec))
    assert found is not None
    prepared = lists.program(lists.prepare(found.mask))
    constants: dict[str, object] = {"BLOCK_M": LISTED, "BLOCK_N": LISTED, "SPAN": 2 * LISTED}
    constants["TILES"] = 1 if prepared.single else lists.TILES_A_PROGRAM
    constants |= {f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(prepared.mask.operands)}
    kernel = cache.load(cache.store(prepared.source), f"lists_{prepared.key}").tile_verdicts
    masked = ScoreSpec(S, operands=prepared.mask.operands, scalars=prepared.mask.scalars)
    return compiled_with(kernel, constants, {"verdict_ptr": "*i8"}, torch.bfloat16, masked, target, ASTSource)


def compiled_with(
    kernel: Any,
    constants: dict[str, object],
    types: dict[str, str],
    dtype: torch.dtype,
    spec: ScoreSpec,
    target: GPUTarget,
    source: Any,
    warps: int = 4,
) -> Any:
    """source: in Triton or in Gluon. types: of arguments that are not of their name's usual one."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name) or type_of(name, dtype, spec)
        if name.endswith("_ptr") or (
            re.fullmatch(r"t\d+_stride\d+|stride_[de].|padded", name) and name not in constants
        ):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(source(kernel, signature, constants, attributes), target=target, options={"num_warps": warps})


def type_of(name: str, dtype: torch.dtype, spec: ScoreSpec) -> str:
    """Of a kernel's argument, by its name."""
    if name in ("lse_ptr", "acc_ptr", "m_ptr", "l_ptr"):
        return "*fp32"
    if name in ("list_ptr", "mark_ptr", "counter_ptr"):
        return "*i32"
    if name == "seed_ptr":
        return "*i64"
    if match := re.fullmatch(r"t(\d+)_ptr", name):
        return f"*{NAMES[spec.operands[int(match[1])].dtype]}"
    if name.endswith("_ptr"):
        return f"*{NAMES[dtype]}"
    real = any(x.name == name and not x.is_integer for x in spec.scalars)
    return "fp32" if real else "i32"
