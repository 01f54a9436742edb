"""Sums that several programs of a kernel left in parts: added up always in one order, and rounded once, by one kernel.

PyTorch takes a kernel for the sum and one more for another dtype, each some microseconds whatever they do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import cache
from xfcompile.kernels.attention.repeat import Blank, Launch
from xfcompile.kernels.attention.tiles import interpreting

TEXT = '''\
"""The sum of parts, by xfcompile."""

import triton
import triton.language as tl


@triton.jit
def total_of_parts(out_ptr, part_ptr, parts, n, PARTS: tl.constexpr, COLS: tl.constexpr):
    """Of [parts, n], over parts: COLS of the n sums a program, PARTS terms of each at a time."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.full([PARTS, COLS], 0.0, tl.float32)
    for first in tl.range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        offs = part.to(tl.int64)[:, None] * n + col[None, :]
        total += tl.load(part_ptr + offs, mask=(part < parts)[:, None] & (col < n)[None, :], other=0.0)
    total = tl.reduce(total, 0, tl.standard._sum_combine)
    tl.store(out_ptr + col, total.to(out_ptr.dtype.element_ty), mask=col < n)
'''

COLS = 16
"""Sums of a program: 64 bytes of a row of parts."""

MOST = 256
"""Parts at a time."""


@functools.cache
def total_of_parts(interpreted: bool) -> Any:
    """The kernel, compiled or interpreted: which, `triton.jit` decides at its import."""
    name = f"xfcompile_total_of_parts{'_interpreted' if interpreted else ''}"
    return cache.load(cache.store(TEXT, "total_of_parts_"), name).total_of_parts


class Total:
    """The sum [n], in `dtype`, of what programs leave in `parts`.

    blank: memory [parts, n] for these, in fp32; where there is one part, it is the sum itself, and of its dtype.
    """

    def __init__(self, parts: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.blank = Blank((parts, n), dtype if parts == 1 else torch.float32, device)
        self._launch: Launch | None = None
        if parts > 1:
            constants = {"PARTS": min(1 << (parts - 1).bit_length(), MOST), "COLS": COLS}
            options = {"num_warps": 4, "num_stages": 1}
            self._launch = Launch(total_of_parts(interpreting()), -(-n // COLS), [parts, n], constants, options)
        self._out = Blank((n,), dtype, device)

    def __call__(self, parts: Tensor) -> Tensor:
        if self._launch is None:
            return parts[0]
        out = self._out()
        self._launch([out, parts])
        return out
