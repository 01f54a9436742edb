"""What all kernels of a formula are launched with: constants, and tensors where some are not there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention.repeat import Launch
from xfcompile.kernels.attention.tiles import interpreting
from xfcompile.kernels.bias_act_dropout.programs import kernel
from xfcompile.kernels.bias_act_dropout.rows import Rows
from xfcompile.kernels.bias_act_dropout.tiles import Tile

HALF = (torch.float16, torch.bfloat16)

MANY = 8 << 32
"""Elements; groups of eight of no more than these have numbers of 32 bits."""


def launch_of(
    name: str,
    program: tuple[str, int, int, float],
    programs: int,
    numbers: Sequence[int],
    constants: dict[str, Any],
    tile: Tile,
) -> Launch:
    """Of one kernel; program: a formula's text, how many vectors and tensors it reads, and p."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Launch(kernel(name, *program), programs, numbers, constants, options)


def constants_of(n: int, tile: Tile, rows: Rows, dtype: torch.dtype, bias: Tensor | None) -> dict[str, Any]:
    """What all kernels are compiled for."""
    return {
        "N": n,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SPLIT": rows.split,
        "GROUPED": n % 8 == 0,
        "FEW": rows.count * n <= MANY,
        "FAST": fast(dtype),
        "BIASED": bias is not None,
    }


def fast(dtype: torch.dtype) -> int:
    """See `xfcompile.kernels.pointwise`."""
    if dtype not in HALF:
        return 0
    return 1 if interpreting() or torch.version.hip is not None else 2


def dense(v: Tensor) -> Tensor:
    """A vector, which is small, with its elements beside each other."""
    return v if v.stride(0) == 1 else v.contiguous()


def present(x: Tensor | None, other: Tensor) -> Tensor:
    """In place of a tensor that is not there, one that the kernel does not look at."""
    return other if x is None else dense(x) if x.ndim == 1 else x
