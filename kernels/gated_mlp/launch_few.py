"""Gated MLPs of few rows by the kernel for Hopper: which tensors it takes, and their launches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sympy
from torch import Tensor

from xfcompile.kernels import gluon
from xfcompile.kernels.attention import cache
from xfcompile.kernels.attention.repeat import Described, Launch, described_for_gluon
from xfcompile.kernels.gated_mlp import hopper_few, tiles
from xfcompile.kernels.gated_mlp.operands import Operands
from xfcompile.kernels.gated_mlp.tiles import Stream
from xfcompile.kernels.gemm import hopper
from xfcompile.kernels.gemm.launch import described
from xfcompile.measured import multiprocessors

PREFIX = "gated_few_"
DEPTH = 64
"""Numbers of 16 bits that stand together in shared memory: 128 bytes."""


@functools.cache
def source_of_kernel(formula: sympy.Expr) -> str:
    return hopper_few.module(hopper.gated(formula))


@functools.cache
def kernel(formula: sympy.Expr) -> Any:
    """Raises whatever the import does where this Triton has no Gluon, or another one."""
    path = cache.store(source_of_kernel(formula), PREFIX)
    return cache.load(path, f"xfcompile_{path.stem}").gated_few_hopper


@functools.cache
def missing(formula: sympy.Expr) -> str | None:
    """Why there is no kernel of a formula here; None if there is one."""
    return hopper.why_not(hopper.gated(formula)) or gluon.why_missing(lambda: kernel(formula))


def declines(formula: sympy.Expr, operands: Operands, out: Tensor, drops: bool) -> str | None:
    """Why the kernel does not compute this; None if it does."""
    if operands.x.shape[0] != 1:
        return "experts"
    if not tiles.HOPPER_LEAST_ROWS <= operands.x.shape[1] <= tiles.HOPPER_FEW_ROWS:
        return f"it is for {tiles.HOPPER_LEAST_ROWS} to {tiles.HOPPER_FEW_ROWS} rows"
    if drops:
        return "dropout"
    if out.dtype.itemsize != 2:
        return "its functions are exact to 16 bits"
    if not all(described(t[0]) for t in (operands.x, operands.gate, operands.up)):
        return "TMA reads 16-bit numbers that are neighbours, in rows that start at multiples of 16 bytes"
    return missing(formula)


def options(stream: Stream) -> dict[str, int]:
    """Triton's own. Programs that share a multiprocessor share its registers, else one has them all."""
    if stream.programs == 1:
        return {"num_warps": 4}
    return {"num_warps": 4, "maxnreg": 65536 // (128 * (stream.groups + 1) * stream.programs)}


class Few:
    """Launches with tensors of one layout. starts: of gate's and up's features in what is saved, and the step between
    neighbours; save: whether it is."""

    def __init__(
        self,
        formula: sympy.Expr,
        operands: Operands,
        starts: Sequence[int],
        save: bool,
        stream: Stream | None = None,
    ) -> None:
        _, rows, features, inner = operands.sizes
        gate_start, up_start, step = starts
        count = multiprocessors(operands.x.device.index)
        stream = stream or tiles.stream(rows, features, count)
        steps, total = -(-inner // (DEPTH * stream.parts)), -(-features // (hopper_few.FEATURES * stream.groups))
        strides = [0 if b is None else b.stride(-1) for b in (operands.gate_bias, operands.up_bias)]
        constants = {
            "GATE_BIAS": operands.gate_bias is not None,
            "UP_BIAS": operands.up_bias is not None,
            "SAVE": save,
            "STEP": step,
            "STAGES": stream.stages,
            "GROUPS": stream.groups,
            "PARTS": stream.parts,
        }
        heights = (tiles.columns(rows), hopper_few.FEATURES, hopper_few.FEATURES)
        of_x, *of_weights = (
            _described(t, [height, DEPTH])
            for t, height in zip((operands.x, operands.gate, operands.up), heights, strict=True)
        )
        self.launch = Launch(
            kernel(formula),
            min(stream.programs * count, total),
            [rows, features, steps, total, *strides, gate_start, up_start],
            constants,
            options(stream),
            [of_x, *of_weights],
        )

    def __repr__(self) -> str:
        return "the kernel for Hopper of gated MLPs of few rows"

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        self.launch(tensors)


def _described(x: Tensor, block: Sequence[int]) -> Described:
    """Of the one matrix of [1, M, K], of which such blocks are loaded."""
    inner = described_for_gluon(x[0], block)
    return Described(inner.shape, inner.strides, lambda x: inner.make(x[0]))
