"""Counts the instructions that the kernels of bias, activation and dropout take an element, without a GPU.

    python examples/count_instructions.py
    python examples/count_instructions.py --program "gelu, dropout" --dtype fp32

They are compiled for Hopper, and disassembled: what stands in the loop over rows, divided by the elements of a thread's
step. An H200 issues 132 * 128 * 1.755e9 = 29.6e12 instructions of a lane a second, and copies 4.2e12 bytes: a kernel
that reads and writes 4 bytes an element is bound by instructions from 28 an element on, and one that moves 6 from 42.
"alu" is half as fast as that (64 lanes), "multiply" of integers too, "special" an eighth.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter

import bias_jobs
import torch
from cross_compile import TARGETS
from resources import CUOBJDUMP, resources
from rich.console import Console
from rich.table import Table

from xfcompile import activation
from xfcompile.activation import FUNCTIONS, KEEP, X

ACTIVATIONS = {
    "gelu": activation.gelu(X, "none"),
    "gelu by tanh": activation.gelu(X, "tanh"),
    "silu": activation.silu(X),
    "relu": FUNCTIONS["relu"](X, {}),
}
KERNELS = ("bias_forward", "bias_backward")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLASSES = {
    "float": r"F(FMA|ADD|MUL)|HADD2|HMUL2|HFMA2",
    "multiply": r"IMAD",
    "special": r"MUFU",
    "alu": r"LOP3|I?ADD3|VIADD|ISETP|FSETP|FSEL|FMNMX|SEL|LEA|SHF|PRMT|MOV|F2FP|PLOP3|CS2R|P2R",
    "memory": r"LDG|STG|LDS|STS|LDGSTS|LDSM|STSM",
}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$", re.MULTILINE)


def disassembled(cubin: bytes) -> list[tuple[int, str, str]]:
    """Address, name and operands of each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(text)]


def loop(code: list[tuple[int, str, str]]) -> list[str]:
    """The names of the instructions from where the longest jump back goes to, up to that."""
    jumps = [
        (int(target[1], 16), address)
        for address, name, rest in code
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) < address
    ]
    if not jumps:
        raise RuntimeError("the compiler left no loop")
    first, last = max(jumps, key=lambda jump: jump[1] - jump[0])
    return [name for address, name, _ in code if first <= address <= last]


def count(program: str, kernel: str, dtype: torch.dtype) -> dict[str, float]:
    """Of an element: all instructions and those of each class; and a thread's registers."""
    compiled = bias_jobs.compile_bias(program, kernel, dtype, TARGETS["sm_90"])
    tile = bias_jobs.tile_of(kernel, dtype)
    each = tile.block_m * tile.block_n / (32 * tile.num_warps)
    names = loop(disassembled(compiled.asm["cubin"]))
    found: Counter[str] = Counter()
    for name in names:
        found[next((c for c, pattern in CLASSES.items() if re.match(pattern, name)), "other")] += 1
    kinds = {c: found[c] / each for c in (*CLASSES, "other")}
    return {"all": len(names) / each, **kinds, "registers": resources(compiled)[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="only this one")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    for name, formula in ACTIVATIONS.items():
        bias_jobs.PROGRAMS[name] = (formula, 0.0)
        bias_jobs.PROGRAMS[f"{name}, dropout"] = (KEEP * formula, 0.1)
    table = Table(title=f"instructions an element, {options.dtype}, sm_90")
    for column in ("program", "kernel", "all", *CLASSES, "other", "registers"):
        table.add_column(column, justify="left" if column in ("program", "kernel") else "right")
    for program in bias_jobs.PROGRAMS:
        for kernel in KERNELS:
            if options.program in (None, program):
                *each, registers = count(program, kernel, DTYPES[options.dtype]).values()
                table.add_row(program, kernel.split("_")[1], *(f"{x:.1f}" for x in each), str(registers))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
