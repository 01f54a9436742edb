"""Compiles the kernels for GPUs that need not be here, and shows registers, spills and shared memory."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bias_jobs
import gated_jobs
import gemm_jobs
import sympy
import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xfcompile.bench.programs import Sizes, programs
from xfcompile.kernels.attention import (
    backward_layout,
    blocks,
    cache,
    codegen,
    decode,
    hopper,
    hopper_backward,
    hopper_variant,
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
    generation,
)
from xfcompile.score import B, I, J, Load, S
from xfcompile.site import Band, Operand, ScoreSpec

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TRITON_DTYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


@dataclass(frozen=True)
class Job:
    """rows: query rows that share a head of k and v, in the kernels for few of them; of a gated MLP, all rows.

    dim: of a head. training: whether a gated MLP saves its projections. dropout: whether it drops out.
    """

    program: str
    dtype: torch.dtype
    dim: int
    target: str
    kernel: str = "attention_forward"
    rows: int = 4
    training: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Compiled:
    """What the compiler made. registers and spills (32-bit, a thread; bytes of stack on NVIDIA) and shared bytes.

    wide, narrow: instructions that read 16 bytes a thread from the device's memory, and that read fewer.
    """

    kernel: str
    program: str
    dtype: str
    dim: int
    target: str
    tiles: Tiles
    registers: int
    spills: int
    shared: int
    wgmma: bool
    wide: int
    narrow: int


def jobs(all_programs: bool) -> Iterator[Job]:
    """The main configurations; with all programs, everything that the benchmark runs and every dtype and head dim."""
    for target in TARGETS:
        for kernel in bias_jobs.KERNELS:
            for name in bias_jobs.PROGRAMS if all_programs else ("gelu, dropout",):
                for dtype in (torch.bfloat16, torch.float32) if all_programs else (torch.bfloat16,):
                    yield Job(name, dtype, 0, target, kernel)
        yield Job("causal", torch.bfloat16, 64, target)
        yield Job("causal", torch.bfloat16, 128, target)
        for name in ("documents", "causal from a buffer"):
            yield Job(name, torch.bfloat16, 64, target, "tile_verdicts")
        if target == "sm_90":
            for dim in (64, 128):
                yield Job("causal", torch.bfloat16, dim, target, "hopper")
                yield Job("key padding", torch.bfloat16, dim, target, "hopper")
                yield Job("causal", torch.bfloat16, dim, target, "hopper_backward")
        for dim in (64, 128):
            for kernel in BACKWARD:
                yield Job("soft-cap, causal", torch.bfloat16, dim, target, kernel)
            yield Job("dense bias", torch.bfloat16, dim, target, "load0")
        for dim in (64, 128):
            for program in ("plain", "growing cache", "mask of a cache"):
                yield Job(program, torch.bfloat16, dim, target, "decode_split")
            yield Job("plain", torch.bfloat16, dim, target, "decode_combine")
        yield from gated(target, all_programs)
        if target == "sm_90":
            for name in gemm_jobs.EPILOGUES if all_programs else ("SwiGLU", "gelu, dropout, saving"):
                yield Job(name, torch.bfloat16, 0, target, "gemm")
        if not all_programs:
            continue
        for kernel in BACKWARD:
            yield Job("causal", torch.float16, 256, target, kernel)
            yield Job("causal", torch.float32, 128, target, kernel)
            for program in programs(torch.bfloat16):
                if program.name != "soft-cap, causal":
                    yield Job(program.name, torch.bfloat16, 64, target, kernel)
                    yield Job(program.name, torch.bfloat16, 128, target, kernel)
        for dim in (64, 128):
            yield Job("T5 bias", torch.bfloat16, dim, target, "load0")
        yield Job("causal", torch.float16, 256, target)
        yield Job("causal", torch.float32, 64, target)
        yield Job("causal", torch.float32, 128, target)
        for program in programs(torch.bfloat16):
            if target == "sm_90" and program.name not in ("causal", "key padding"):
                for dim in (64, 128):
                    yield Job(program.name, torch.bfloat16, dim, target, "hopper")
                    yield Job(program.name, torch.bfloat16, dim, target, "hopper_backward")
            if program.name != "causal":
                yield Job(program.name, torch.bfloat16, 64, target)
                yield Job(program.name, torch.bfloat16, 128, target)
        for name in CACHES:
            for dim in (64, 128, 256):
                for rows in (4, 32, 64):
                    yield Job(name, torch.bfloat16, dim, target, "decode_split", rows)
                yield Job(name, torch.float32, dim, target, "decode_split")


def gated(target: str, all_programs: bool) -> Iterator[Job]:
    """The kernels of gated MLPs: for one row, few and many; with all programs, every formula, dtype and dropout."""
    if target == "sm_90":
        for program in gated_jobs.PROGRAMS if all_programs else ("SwiGLU",):
            for rows in (1, 16, 64, 128) if all_programs else (16, 128):
                for training in (False, True):
                    yield Job(program, torch.bfloat16, 0, target, "gated_few_hopper", rows, training)
    for program in gated_jobs.PROGRAMS if all_programs else ("SwiGLU",):
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if all_programs else (torch.bfloat16,):
            for kernel in gated_jobs.KERNELS:
                if not gated_jobs.exists(kernel, TARGETS[target], dtype):
                    continue
                for rows in (1, 16) if kernel == "gated_few" else (4096,):
                    yield Job(program, dtype, 0, target, kernel, rows)
                    if kernel.startswith("gated_forward"):
                        yield Job(program, dtype, 0, target, kernel, rows, training=True)
                    if all_programs:
                        yield Job(program, dtype, 0, target, kernel, rows, dropout=True)


BACKWARD = ("dq", "dkdv")


def compile_job(job: Job) -> Compiled | None:
    """None where the kernel is not the one for such a program."""
    target = TARGETS[job.target]
    if job.kernel in bias_jobs.KERNELS:
        tile = bias_jobs.tile_of(job.kernel, job.dtype)
        compiled = bias_jobs.compile_bias(job.program, job.kernel, job.dtype, target)
        return outcome(job, compiled, Tiles(tile.block_m, tile.block_n, tile.num_warps, tile.num_stages))
    if job.kernel == "gated_few_hopper":
        stream = gated_jobs.stream_of(job.rows)
        made = gated_jobs.compile_few_hopper(job.program, job.dtype, job.rows, stream, about=job.training)
        return outcome(job, made, Tiles(gated_jobs.tiles.columns(job.rows), 32 * stream.groups, 4, stream.stages))
    if job.kernel in gated_jobs.KERNELS:
        made = gated_jobs.compile_gated(
            job.program, job.kernel, job.dtype, target, job.rows, save=job.training, dropout=job.dropout
        )
        t = gated_jobs.tiles_of(job.kernel, target, job.dtype, job.rows, job.training)
        return outcome(job, made, Tiles(t.block_m, t.block_n, t.num_warps, t.num_stages))
    if job.kernel == "gemm":
        wide = gemm_jobs.WIDE.dropping if gemm_jobs.EPILOGUES[job.program].drops else gemm_jobs.WIDE
        made = gemm_jobs.compile_gemm(job.program, job.dtype, wide)
        return outcome(job, made, Tiles(gemm_jobs.BLOCK_M, wide.columns, 4, wide.stages))
    if job.kernel == "tile_verdicts":
        return outcome(job, compile_lists(mask_or_spec(job), target), Tiles(LISTED, LISTED, 4, 1))
    if job.kernel == "hopper":
        compiled, variant = compile_hopper(job), variant_of(job)
        tiles = Tiles(variant.rows, hopper.KEYS, 4, variant.stages)
        return None if compiled is None else outcome(job, compiled, tiles)
    if job.kernel == "hopper_backward":
        compiled = compile_hopper_backward(backward_of(job), job.dtype, job.dim)
        tiles = Tiles(
            hopper_backward.ROWS, hopper_backward.KEYS, hopper_backward.WARPS, hopper_backward.STAGES[job.dim]
        )
        return None if compiled is None else outcome(job, compiled, tiles)
    kind = generation(0 if target.backend == "hip" else int(target.arch) // 10, target.backend == "hip")
    if job.kernel in (*BACKWARD, "load0"):
        tiles = choose_backward(
            job.kernel, kind, job.dtype, job.dim, job.dim, backward_of(job).traits(job.kernel, None)
        )
        return outcome(job, compile_backward(job, target, tiles), tiles)
    if job.kernel == "attention_forward":
        sizes = Sizes(4, 32, 4096, job.dim)
        spec = next(p for p in programs(job.dtype) if p.name == job.program).spec(sizes)
        candidates = list(alternatives(choose(kind, job.dtype, job.dim, job.dim, sizes.length)))  # as a launch does
    else:
        spec = CACHES[job.program]
        candidates = list(decoding_alternatives(choose_decoding(kind, job.dtype, job.dim, job.dim, job.rows)))
    for tiles in candidates:
        compiled = compile_kernel(spec, job.dtype, job.dim, target, tiles, job.kernel)
        spills = resources(compiled)[1]
        crowded = tiles.num_warps == 4 and target.arch in (90, 100) and compiled.metadata.shared > 113 * 1024
        if spills <= 4 * FEW_SPILLS and not crowded:
            break
    return outcome(job, compiled, tiles)


LISTED = 64
"""Queries and keys of the tiles that verdicts are compiled for."""


def mask_or_spec(job: Job) -> ScoreSpec:
    if job.program == "causal from a buffer" and job.kernel == "tile_verdicts":
        return ScoreSpec(S, sympy.Ne(Load(0, 0, 0, I, J), 0), "nan", (Operand(torch.float32, 4),))
    sizes = Sizes(4, 32, 4096, job.dim)
    return next(p for p in programs(job.dtype) if p.name == job.program).spec(sizes)


def variant_of(job: Job) -> hopper_variant.Variant:
    spec = codegen.canonical(mask_or_spec(job))
    return hopper_variant.usual(spec, codegen.pieces(spec), job.dtype, job.dim)


def compile_hopper(job: Job) -> Any:
    """The kernel in Gluon, as a launch would; None where another one is launched."""
    from triton.experimental.gluon._runtime import GluonASTSource

    dtype, dim, variant = job.dtype, job.dim, variant_of(job)
    spec = codegen.canonical(mask_or_spec(job))
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
    return _compile(kernel, constants, types, dtype, spec, TARGETS["sm_90"], GluonASTSource)


def descriptor(block: list[int], dtype: torch.dtype) -> str:
    """The type of a TMA descriptor of such blocks."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float32 if dtype.itemsize == 4 else gl.bfloat16)
    return f"tensordesc<{TRITON_DTYPES[dtype]}{block},{layout!r}>"


def compile_hopper_backward(backward: backward_layout.Program, dtype: torch.dtype, dim: int) -> Any:
    """The backward in Gluon, as a launch would; None where others are launched."""
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
        "stride_dd": 1, "stride_ed": 1,
    }  # fmt: skip
    constants |= {f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(spec.operands)}
    types = {f"{name}_desc": descriptor([1, 1, rows, dim], dtype) for name in ("q", "dout")}
    types |= {f"{name}_desc": descriptor([1, 1, keys, dim], dtype) for name in "kv"}
    types |= {f"{name}_desc": descriptor([1, rows], torch.float32) for name in ("top", "delta", "shift")}
    types["bias_desc"] = descriptor([1, 1, rows, keys], dtype)
    types["dq_desc"] = descriptor([1, 1, rows, dim], torch.float32)
    return _compile(kernel, constants, types, dtype, spec, TARGETS["sm_90"], GluonASTSource, hopper_backward.WARPS)


def compile_lists(spec: ScoreSpec, target: GPUTarget) -> Any:
    found = blocks.summary(codegen.canonical(spec))
    assert found is not None
    prepared = lists.program(lists.prepare(found.mask))
    constants: dict[str, object] = {"BLOCK_M": LISTED, "BLOCK_N": LISTED, "SPAN": 2 * LISTED}
    constants["TILES"] = 1 if prepared.single else lists.TILES_A_PROGRAM
    constants |= {f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(prepared.mask.operands)}
    kernel = cache.load(cache.store(prepared.source), f"lists_{prepared.key}").tile_verdicts
    masked = ScoreSpec(S, operands=prepared.mask.operands, scalars=prepared.mask.scalars)
    return _compile(kernel, constants, {"verdict_ptr": "*i8"}, torch.bfloat16, masked, target, ASTSource)


def _compile(
    kernel: Any,
    constants: dict[str, object],
    types: dict[str, str],
    dtype: torch.dtype,
    spec: ScoreSpec,
    target: GPUTarget,
    source: Any,
    warps: int = 4,
) -> Any:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name) or _type(name, dtype, spec)
        if name.endswith("_ptr") or (
            re.fullmatch(r"t\d+_stride\d+|stride_[de].|padded", name) and name not in constants
        ):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(source(kernel, signature, constants, attributes), target=target, options={"num_warps": warps})


def outcome(job: Job, compiled: Any, tiles: Tiles) -> Compiled:
    registers, spills = resources(compiled)
    wide, narrow = loads(compiled)
    return Compiled(
        job.kernel,
        job.program,
        TRITON_DTYPES[job.dtype],
        job.dim,
        job.target,
        tiles,
        registers,
        spills,
        compiled.metadata.shared,
        "wgmma" in compiled.asm.get("ptx", ""),
        wide,
        narrow,
    )


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
        "BLOCK_DQ": columns(dim, dim)[0],
        "BLOCK_DV": columns(dim, dim)[1],
        "PRECISION": "ieee",
        "UPCAST": False,
        "HEADS_FIRST": False,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_S": launch_decode.COMBINED,
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
        signature[name] = _type(name, dtype, prepared.spec) if name not in constants else "constexpr"
        if name not in constants and name not in any_number:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def backward_of(job: Job) -> backward_layout.Program:
    """Gradients of operands are wanted where the job is of the kernel of a load."""
    program = next(p for p in programs(job.dtype) if p.name == job.program)
    spec = program.spec(Sizes(4, 32, 4096, job.dim))
    needed = tuple(range(len(spec.operands))) if job.kernel == "load0" else ()
    return backward_layout.prepare(prepare(spec), needed)


def compile_backward(job: Job, target: GPUTarget, tiles: Tiles) -> Any:
    """As a launch would."""
    backward = backward_of(job)
    kernel = backward.kernel(job.kernel, False)
    wide_q, wide_v = columns(job.dim, job.dim)
    constants: dict[str, object] = {
        "DQ": job.dim, "DV": job.dim, "BLOCK_DQ": wide_q, "BLOCK_DV": wide_v, "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n, "PRECISION": "ieee", "UPCAST": False, "EXACT": job.dtype == torch.float32,
        "FAST": 2 if backward.spec.coarse and target.backend == "cuda" else int(job.dtype.itemsize == 2),
        "LISTED": True, "PARTS_M": 1, "PARTS_N": 1, "LOOP": True, "ALWAYS": False, "EDGE_M": False, "EDGE_N": False,
        **dict.fromkeys(("NEED_DQ", "NEED_DK", "NEED_DV", "NEED_DX"), True),
        **{name: 1 for name in kernel.arg_names if re.fullmatch(r"stride_([a-z]d|ln)", name)},
        **{f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(backward.spec.operands)},
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    any_number = {"group", "heads", "batch", "list_b", "list_h", *(x.name for x in backward.spec.scalars)}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = "*fp32" if name in ("pair_ptr", "inverse_ptr", "dload_ptr") else _type(name, job.dtype, backward.spec)
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and name not in any_number:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def _type(name: str, dtype: torch.dtype, spec: ScoreSpec) -> str:
    if name in ("lse_ptr", "acc_ptr", "m_ptr", "l_ptr"):
        return "*fp32"
    if name == "list_ptr":
        return "*i32"
    if match := re.fullmatch(r"t(\d+)_ptr", name):
        return f"*{TRITON_DTYPES[spec.operands[int(match[1])].dtype]}"
    if name.endswith("_ptr"):
        return f"*{TRITON_DTYPES[dtype]}"
    real = any(x.name == name and not x.is_integer for x in spec.scalars)
    return "fp32" if real else "i32"


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and spills a thread: from the cubin, or from what AMD's assembler says of itself."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # A spilled register lives on the stack, which nothing else in these kernels uses.
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def loads(compiled: Any) -> tuple[int, int]:
    """Instructions that read 16 bytes a thread from the device's memory, and those that read fewer."""
    if "amdgcn" in compiled.asm:
        found = re.findall(r"\b(?:global|buffer)_load_(\w+)", compiled.asm["amdgcn"])
        wide = [x for x in found if x.startswith("dwordx4")]
    else:
        text = compiled.asm["ptx"]
        found = re.findall(r"ld\.global([.\w:]*)", text)
        found += re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", text)
        wide = [x for x in found if x.endswith((".v4.b32", ".v2.b64", "0x10"))]
    return len(wide), len(found) - len(wide)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output:\n{text[:2000]}")
    return int(match[1])


def show(results: list[Compiled]) -> Table:
    table = Table(title=f"triton {triton.__version__}")
    for column in ("kernel", "program", "dtype", "target"):
        table.add_column(column)
    for column in ("D", "tiles, warps, stages", "registers", "spills", "shared KiB", "wgmma", "16-byte loads, others"):
        table.add_column(column, justify="right")
    for r in results:
        tiles = f"{r.tiles.block_m}x{r.tiles.block_n}, {r.tiles.num_warps}, {r.tiles.num_stages}"
        spills = f"[red]{r.spills}[/]" if r.spills else "0"
        shared = f"{r.shared / 1024:.0f}"
        wgmma = "yes" if r.wgmma else ""
        cells = (str(r.dim), tiles, str(r.registers), spills, shared, wgmma, f"{r.wide}, {r.narrow}")
        table.add_row(r.kernel, r.program, r.dtype, r.target, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every program, dtype and head dim (minutes on one core)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only these targets")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    chosen = [job for job in jobs(options.all) if not options.target or job.target in options.target]
    console = Console()
    made = [compile_job(job) for job in track(chosen, "compiling", console=console, transient=True)]
    results = [r for r in made if r is not None]
    console.print(show(results))
    if options.json:
        found = {"triton": triton.__version__, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
