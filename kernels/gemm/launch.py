"""From tensors to one launch of the kernel for Hopper."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels import gluon
from xfcompile.kernels.attention import cache
from xfcompile.kernels.attention.repeat import Launch, aligned_strides, described_for_gluon
from xfcompile.kernels.gemm import hopper
from xfcompile.kernels.gemm.hopper import Epilogue
from xfcompile.kernels.gemm.tiles import BLOCK_M, FEWEST_ROWS, ROWS, Tile

PREFIX = "gemm_"


@functools.cache
def source_of_kernel(epilogue: Epilogue) -> str:
    return hopper.module(epilogue)


@functools.cache
def kernel(epilogue: Epilogue) -> Any:
    """Raises whatever the import does where this Triton has no Gluon, or another one."""
    path = cache.store(source_of_kernel(epilogue), PREFIX)
    return cache.load(path, f"xfcompile_{path.stem}").gemm


@functools.cache
def missing(epilogue: Epilogue) -> str | None:
    """Why there is no kernel of an epilogue here; None if there is one."""
    return hopper.why_not(epilogue) or gluon.why_missing(lambda: kernel(epilogue))


def why_not(matrices: Sequence[Tensor], vectors: Sequence[Tensor | None]) -> str | None:
    """Why the kernel does not take such tensors: x [M, K] first, weights, results and what is added; biases and
    vectors. None if it does."""
    x = matrices[0]
    if x.shape[0] < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows"
    if any(m.dtype != x.dtype for m in matrices):
        return "one dtype for all that is loaded and stored"
    if not all(map(described, matrices)):
        return "TMA reads 16-bit numbers that are neighbours, in rows that start at multiples of 16 bytes"
    if any(v is not None and v.stride(-1) != 1 for v in vectors):
        return "vectors of neighbours"
    return None


def described(x: Tensor) -> bool:
    """Whether TMA reads or writes a matrix: rows start at multiples of 16 bytes, neighbours are side by side."""
    strides = aligned_strides(x)
    return (
        x.ndim == 2
        and x.dtype in (torch.float16, torch.bfloat16)
        and min(x.shape) > 0
        and strides[1] == 1
        and strides[0] >= x.shape[1]
        and strides[0] % 8 == 0
        and x.data_ptr() % 16 == 0
    )


class Gemm:
    """Launches of the kernel with tensors of one layout: x [M, K], weights [N, K] (across: one, [K, N]), out [M, N], of
    which `described` is true, and tensors [M, N] alike; biases [N] (or None) and vectors [N], whose elements are
    neighbours."""

    def __init__(
        self,
        epilogue: Epilogue,
        tile: Tile,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        multiprocessors: int,
        across: bool = False,
    ) -> None:
        (rows, inner), features = x.shape, weights[0].shape[1 if across else 0]
        block_n = tile.columns // len(weights)
        tiles_m, tiles_n = -(-rows // BLOCK_M), -(-features // block_n)
        written = epilogue.stores + epilogue.tensors  # or read where it will be written
        part, buffers = tile.stored(len(weights))
        self.constants: dict[str, Any] = {
            "STAGES": tile.stages,
            "PART": part,
            "BUFFERS": buffers,
            "GROUP": tile.group,
            "SKEW": tile.skew,
            "REGISTERS": tile.registers,
        }
        given = [*(b is not None for b in biases), across]
        self.constants |= dict(zip(hopper.flags(epilogue), given, strict=True))
        self.numbers = [rows, features, -(-inner // tile.block_k), tiles_m, tiles_n]
        weight = [tile.block_k, block_n] if across else [block_n, tile.block_k]
        height = BLOCK_M if tile.joined else ROWS
        self.blocks = [[height, tile.block_k], *[weight] * len(weights), *[[height, part]] * written]
        self.programs = min(multiprocessors, tiles_m * tiles_n)
        self.options = {"num_warps": height // 16}
        self.kernel = kernel(epilogue)
        self.launch: Launch | None = None

    def __repr__(self) -> str:
        return "the product of matrices for Hopper"

    def __call__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        outs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        vectors: Sequence[Tensor] = (),
        tensors: Sequence[Tensor] = (),
        seed: Tensor | None = None,
        dropout: Sequence[Any] = (),
    ) -> Any:
        """outs: the result, and what is saved of each product. dropout: threshold, scale and stream.

        Returns the compiled kernel.
        """
        there = [x if b is None else b for b in biases]
        seeds = [] if seed is None else [seed]
        given = [x, *weights, *outs, *tensors, *there, *vectors, *seeds]
        if self.launch is None:
            described = [described_for_gluon(y, block) for y, block in zip(given, self.blocks, strict=False)]
            self.launch = Launch(self.kernel, self.programs, self.numbers, self.constants, self.options, described)
        return self.launch(given, dropout)

    def repeat(self, pointers: Sequence[int], dropout: Sequence[Any] = ()) -> Any:
        """The same with addresses, in the order x, weights, outs, tensors, biases (or any other), vectors, seed; None,
        and nothing is done, if there was no such launch before."""
        return None if self.launch is None else self.launch.repeat(pointers, dropout)
