"""From tensors to one launch of the kernel for Hopper."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import cache
from xfcompile.kernels.attention.repeat import Launch, aligned_strides, described_for_gluon
from xfcompile.kernels.gemm import hopper
from xfcompile.kernels.gemm.hopper import Epilogue
from xfcompile.kernels.gemm.tiles import BLOCK_M, ROWS, Tile

PREFIX = "gemm_"


@functools.cache
def source_of_kernel(epilogue: Epilogue) -> str:
    return hopper.module(epilogue)


@functools.cache
def kernel(epilogue: Epilogue) -> Any:
    """Raises whatever the import does where this Triton has no Gluon, or another one."""
    path = cache.store(source_of_kernel(epilogue), PREFIX)
    return cache.load(path, f"xfcompile_{path.stem}").gemm


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
    """Launches of the kernel with tensors of one layout: x [M, K], weights [N, K], out [M, N], of which `described` is
    true, and tensors [M, N] alike; biases [N] (or None) and vectors [N], whose elements are neighbours."""

    def __init__(
        self,
        epilogue: Epilogue,
        tile: Tile,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        multiprocessors: int,
    ) -> None:
        (rows, inner), features = x.shape, weights[0].shape[0]
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
        given = [b is not None for b in biases]
        self.constants |= dict(zip(hopper.flags(epilogue), given, strict=True))
        self.numbers = [rows, features, -(-inner // tile.block_k), tiles_m, tiles_n]
        self.blocks = [[ROWS, tile.block_k], *[[block_n, tile.block_k]] * len(weights), *[[ROWS, part]] * written]
        self.programs = min(multiprocessors, tiles_m * tiles_n)
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
            options = {"num_warps": 4}
            self.launch = Launch(self.kernel, self.programs, self.numbers, self.constants, options, described)
        return self.launch(given, dropout)
