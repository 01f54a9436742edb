"""Runs one small Triton kernel and exits with 0 if its result is right; a process of its own, for it may crash."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    total = tl.load(x_ptr + offs, mask=mask) + tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, total, mask=mask)


def main(device: str) -> None:
    x = torch.arange(100.0, device=device)
    out = torch.empty_like(x)
    add_kernel[(2,)](x, x, out, x.numel(), BLOCK=64)
    if not torch.equal(out, x + x):
        sys.exit(f"Triton added wrongly on {device}")


if __name__ == "__main__":
    main(sys.argv[1])
