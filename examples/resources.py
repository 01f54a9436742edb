"""What a compiled kernel takes of a GPU: registers, spills, how wide its loads are; and products that are wrong."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


def shallow(text: str) -> list[str]:
    """Products of a kernel in Triton's intermediate language for GPUs that add up fewer numbers than the four threads
    of a tensor core's operand have neighbours: those take the same numbers twice (see `DEEP` of attention's tiles)."""
    operand = r"tensor<\d+x(\d+)x\w+, #ttg.dot_op<{opIdx = 0, parent = #\w+, kWidth = (\d+)}>>"
    found = re.finditer(rf"tt\.dot .*?{operand}", text)
    return [match[0] for match in found if int(match[1]) < 4 * int(match[2])]


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output:\n{text[:2000]}")
    return int(match[1])
