"""Compiles the attention kernel for GPUs that need not be here, and shows registers, spills and shared memory."""

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

import torch
import triton
from attention_programs import Sizes, programs
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xfcompile.kernels.attention import launch, prepare
from xfcompile.kernels.attention.tiles import FEW_SPILLS, Tiles, alternatives, choose, columns, generation
from xfcompile.site import ScoreSpec

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TRITON_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Job:
    program: str
    dtype: torch.dtype
    dim: int
    target: str


@dataclass(frozen=True)
class Compiled:
    """What the compiler made. registers and spills (32-bit, a thread; bytes of stack on NVIDIA) and shared bytes."""

    program: str
    dtype: str
    dim: int
    target: str
    tiles: Tiles
    registers: int
    spills: int
    shared: int
    wgmma: bool


def jobs(all_programs: bool) -> Iterator[Job]:
    """The main configurations; with all programs, everything that the benchmark runs and every dtype and head dim."""
    for target in TARGETS:
        yield Job("causal", torch.bfloat16, 64, target)
        yield Job("causal", torch.bfloat16, 128, target)
        if not all_programs:
            continue
        yield Job("causal", torch.float16, 256, target)
        yield Job("causal", torch.float32, 64, target)
        yield Job("causal", torch.float32, 128, target)
        for program in programs(torch.bfloat16):
            if program.name != "causal":
                yield Job(program.name, torch.bfloat16, 64, target)
                yield Job(program.name, torch.bfloat16, 128, target)


def compile_job(job: Job) -> Compiled:
    sizes = Sizes(4, 32, 4096, job.dim)
    spec = next(p for p in programs(job.dtype) if p.name == job.program).spec(sizes)
    target = TARGETS[job.target]
    kind = generation(0 if target.backend == "hip" else int(target.arch) // 10, target.backend == "hip")
    for tiles in alternatives(choose(kind, job.dtype, job.dim, job.dim, sizes.length)):  # as a launch does
        compiled = compile_kernel(spec, job.dtype, job.dim, target, tiles)
        registers, spills = resources(compiled)
        crowded = tiles.num_warps == 4 and target.arch in (90, 100) and compiled.metadata.shared > 113 * 1024
        if spills <= 4 * FEW_SPILLS and not crowded:
            break
    return Compiled(
        job.program,
        TRITON_DTYPES[job.dtype],
        job.dim,
        job.target,
        tiles,
        registers,
        spills,
        compiled.metadata.shared,
        "wgmma" in compiled.asm.get("ptx", ""),
    )


def compile_kernel(spec: ScoreSpec, dtype: torch.dtype, dim: int, target: GPUTarget, tiles: Tiles) -> Any:
    """As a launch would with contiguous, aligned tensors [B, L, H, D]."""
    prepared = launch.program(prepare(spec))
    kernel = prepared.kernel(False)
    constants: dict[str, object] = {
        "DQ": dim,
        "DV": dim,
        "BLOCK_DQ": columns(dim, dim)[0],
        "BLOCK_DV": columns(dim, dim)[1],
        "PRECISION": "ieee",
        "UPCAST": False,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }
    if "FAST" in kernel.arg_names:
        constants["FAST"] = (
            (2 if prepared.spec.coarse and target.backend == "cuda" else 1) if dtype.itemsize == 2 else 0
        )
    for name in kernel.arg_names:  # last dimensions are contiguous: Triton makes a stride of 1 a constant
        if name in ("stride_qd", "stride_kd", "stride_vd"):
            constants[name] = 1
    if prepared.mask is not None:
        constants |= {"LISTED": True, "PARTS_M": 1, "PARTS_N": 1}
    constants |= {f"t{n}_stride{operand.ndim - 1}": 1 for n, operand in enumerate(prepared.spec.operands)}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = _type(name, dtype, prepared.spec) if name not in constants else "constexpr"
        unaligned = ("group", "list_b", "list_h", *(x.name for x in prepared.spec.scalars))
        if name not in constants and name not in unaligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def _type(name: str, dtype: torch.dtype, spec: ScoreSpec) -> str:
    if name == "lse_ptr":
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


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output:\n{text[:2000]}")
    return int(match[1])


def show(results: list[Compiled]) -> Table:
    table = Table(title=f"attention forward, triton {triton.__version__}")
    for column in ("program", "dtype", "target"):
        table.add_column(column)
    for column in ("D", "tiles, warps, stages", "registers", "spills", "shared KiB", "wgmma"):
        table.add_column(column, justify="right")
    for r in results:
        tiles = f"{r.tiles.block_m}x{r.tiles.block_n}, {r.tiles.num_warps}, {r.tiles.num_stages}"
        spills = f"[red]{r.spills}[/]" if r.spills else "0"
        shared = f"{r.shared / 1024:.0f}"
        wgmma = "yes" if r.wgmma else ""
        table.add_row(r.program, r.dtype, r.target, str(r.dim), tiles, str(r.registers), spills, shared, wgmma)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every program, dtype and head dim (minutes on one core)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only these targets")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    chosen = [job for job in jobs(options.all) if not options.target or job.target in options.target]
    console = Console()
    results = [compile_job(job) for job in track(chosen, "compiling", console=console, transient=True)]
    console.print(show(results))
    if options.json:
        found = {"triton": triton.__version__, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
