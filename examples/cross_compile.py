"""Compiles the kernels for GPUs that need not be here, and shows registers, spills and shared memory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import attention_jobs
import bias_jobs
import gated_jobs
import gemm_jobs
import hopper_attention_jobs
import torch
import triton
from attention_jobs import BACKWARD, CACHES, DEAD, DQ_LOAD, LEAKING, LOAD, NAMES, WINDOW, WINDOW_DIM, WINDOW_KEYS
from resources import loads, resources, shallow
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget

from xfcompile.bench.programs import programs
from xfcompile.kernels.attention.tiles import Tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


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
    repeating: products that take numbers twice, which are wrong.
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
    matrix: str
    wide: int
    narrow: int
    repeating: int


def jobs(all_programs: bool) -> Iterator[Job]:
    """The main configurations; with all programs, everything that the benchmark runs and every dtype and head dim."""
    for target in TARGETS:
        for kernel in bias_jobs.KERNELS:
            for name in bias_jobs.PROGRAMS if all_programs else ("gelu, dropout",):
                for dtype in (torch.bfloat16, torch.float32) if all_programs else (torch.bfloat16,):
                    yield Job(name, dtype, 0, target, kernel)
        yield Job("the sum of parts", torch.bfloat16, 0, target, bias_jobs.TOTAL)
        yield Job("causal", torch.bfloat16, 64, target)
        yield Job("causal", torch.bfloat16, 128, target)
        for name in ("documents", "causal from a buffer"):
            yield Job(name, torch.bfloat16, 64, target, "tile_verdicts")
        if target == "sm_90":
            for program in WINDOW_KEYS if all_programs else list(WINDOW_KEYS)[:1]:
                for kernel in ("forward", *BACKWARD, LOAD):
                    yield Job(program, torch.bfloat16, WINDOW_DIM, target, f"{WINDOW}_{kernel}")
            for dim in (64, 128):
                yield Job("causal", torch.bfloat16, dim, target, "hopper")
                yield Job("key padding", torch.bfloat16, dim, target, "hopper")
                yield Job("causal", torch.bfloat16, dim, target, "hopper_backward")
                yield Job("dense bias", torch.bfloat16, dim, target, hopper_attention_jobs.WRITING)
                if all_programs:
                    yield Job("key padding", torch.bfloat16, dim, target, "hopper_backward")
        for dim in (64, 128):
            for kernel in BACKWARD:
                yield Job("soft-cap, causal", torch.bfloat16, dim, target, kernel)
            yield Job("dense bias", torch.bfloat16, dim, target, LOAD)
            if all_programs or dim == 64:
                yield Job("dense bias", torch.bfloat16, dim, target, DQ_LOAD)
        for kernel in DEAD if all_programs or target in ("sm_90", "gfx942") else ():
            yield Job("added padding, dropout", torch.bfloat16, 64, target, kernel)
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
            yield Job("T5 bias", torch.bfloat16, dim, target, LOAD)
        for kernel in ("attention_forward", *DEAD):
            for name in LEAKING:
                yield Job(name, torch.bfloat16, 128, target, kernel)
                yield Job(name, torch.float32, 64, target, kernel)
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


def compile_job(job: Job) -> Compiled | None:
    """None where the kernel is not the one for such a program."""
    target = TARGETS[job.target]
    if job.kernel in bias_jobs.KERNELS:
        tile = bias_jobs.tile_of(job.kernel, job.dtype)
        compiled = bias_jobs.compile_bias(job.program, job.kernel, job.dtype, target)
        return outcome(job, compiled, Tiles(tile.block_m, tile.block_n, tile.num_warps, tile.num_stages))
    if job.kernel == bias_jobs.TOTAL:
        return outcome(job, bias_jobs.compile_total(job.dtype, target), Tiles(64, bias_jobs.COLS, 4, 1))
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
    if job.kernel in hopper_attention_jobs.KERNELS:
        found = hopper_attention_jobs.compile_hopper(job.program, job.kernel, job.dtype, job.dim)
        return None if found is None else outcome(job, *found)
    about = (job.program, job.kernel, job.dtype, job.dim, target, job.rows)
    return outcome(job, *attention_jobs.compile_attention(*about))


def outcome(job: Job, compiled: Any, tiles: Tiles) -> Compiled:
    registers, spills = resources(compiled)
    wide, narrow = loads(compiled)
    return Compiled(
        job.kernel,
        job.program,
        NAMES[job.dtype],
        job.dim,
        job.target,
        tiles,
        registers,
        spills,
        compiled.metadata.shared,
        matrix_instruction(compiled),
        wide,
        narrow,
        len(shallow(compiled.asm["ttgir"])),
    )


MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")


def matrix_instruction(compiled: Any) -> str:
    """What the tensor cores are given products of matrices by; "" where they are not."""
    text = compiled.asm.get("ptx") or compiled.asm.get("amdgcn", "")
    return next((name for name in MATRIX_INSTRUCTIONS if name in text), "")


def show(results: list[Compiled]) -> Table:
    table = Table(title=f"triton {triton.__version__}")
    for column in ("kernel", "program", "dtype", "target"):
        table.add_column(column)
    for column in (
        "D",
        "tiles, warps, stages",
        "registers",
        "spills",
        "shared KiB",
        "tensor cores",
        "16-byte loads, others",
    ):
        table.add_column(column, justify="right")
    for r in results:
        tiles = f"{r.tiles.block_m}x{r.tiles.block_n}, {r.tiles.num_warps}, {r.tiles.num_stages}"
        spills = f"[red]{r.spills}[/]" if r.spills else "0"
        matrix = f"[red]{r.matrix}, wrong[/]" if r.repeating else r.matrix
        shared = f"{r.shared / 1024:.0f}"
        cells = (str(r.dim), tiles, str(r.registers), spills, shared, matrix, f"{r.wide}, {r.narrow}")
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
