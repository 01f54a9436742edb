"""Gated MLPs by the product of matrices for Hopper: which tensors it takes, and their launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import Tensor

from xfcompile.kernels.gated_mlp.operands import Operands
from xfcompile.kernels.gemm import hopper, tiles
from xfcompile.kernels.gemm.hopper import Epilogue
from xfcompile.kernels.gemm.launch import Gemm, missing, why_not
from xfcompile.measured import multiprocessors


def epilogue(formula: sympy.Expr, save: bool, drops: bool = False) -> Epilogue:
    return hopper.gated(formula, saves=save, drops=drops)


def unavailable(formula: sympy.Expr, save: bool = False) -> str | None:
    """Why there is no kernel of a formula here; None if there is one. save: that stores the projections too."""
    return missing(epilogue(formula, save))


def declines(
    formula: sympy.Expr, operands: Operands, out: Tensor, saved: Tensor | None, step: int, drops: bool
) -> str | None:
    """Why the kernel does not compute this; None if it does. step: between neighbours of a projection in `saved`.

    What is not stored has to have the same bits as what is: by the same kernel.
    """
    if operands.x.shape[0] != 1:
        return "experts"
    if drops and not tiles.DROPPING:
        return "not measured with dropout"
    if step != 1:
        return "features of gate and up in turns"
    matrices = [operands.x, operands.gate, operands.up, out, *([] if saved is None else [saved])]
    reason = why_not([m[0] for m in matrices], (operands.gate_bias, operands.up_bias))
    if reason is None and saved is not None and out.shape[2] % 8:
        reason = "projections that do not start at multiples of 16 bytes"
    return reason or missing(epilogue(formula, saved is not None, drops))


class Hopper:
    """Launches with tensors of one layout. starts: of gate's and up's features in what is saved, None if nothing is.
    dropping: threshold and scale of dropout, none without it."""

    def __init__(
        self, formula: sympy.Expr, operands: Operands, starts: Sequence[int] | None, dropping: Sequence[Any]
    ) -> None:
        _, rows, self.features, _ = operands.sizes
        drops = bool(dropping)
        self.starts, self.random = starts, [*dropping, 0] if drops else []
        count = multiprocessors(operands.x.device.index)
        self.gemm = Gemm(
            epilogue(formula, starts is not None, drops),
            tiles.choose(rows, self.features, 2, count, drops),
            operands.x[0],
            (operands.gate[0], operands.up[0]),
            (operands.gate_bias, operands.up_bias),
            count,
        )

    def __repr__(self) -> str:
        return "the gated MLP's kernel for Hopper"

    def __call__(self, tensors: list[Tensor]) -> None:
        x, gate, up, out, saved, gate_bias, up_bias, seed = tensors
        outs = [out[0]]
        if self.starts is not None:
            outs += [saved[0].narrow(1, start, self.features) for start in self.starts]
        random = (seed, self.random) if self.random else ()
        self.gemm(x[0], (gate[0], up[0]), outs, (gate_bias, up_bias), (), (), *random)

    def repeat(self, pointers: list[int]) -> Any:
        """The same with addresses; None, and nothing is done, if there was no such launch before."""
        x, gate, up, out, saved, gate_bias, up_bias, seed = pointers
        outs = [out] if self.starts is None else [out, *(saved + 2 * start for start in self.starts)]
        seeds = [seed] if self.random else []
        return self.gemm.repeat([x, gate, up, *outs, gate_bias, up_bias, *seeds], self.random)
