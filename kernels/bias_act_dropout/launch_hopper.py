"""Linears with their activation by the product of matrices for Hopper: which tensors it takes, and their launches."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Sequence

from torch import Tensor

from xfcompile.kernels import philox
from xfcompile.kernels.attention.repeat import Blank
from xfcompile.kernels.bias_act_dropout.formula import parse
from xfcompile.kernels.gemm import hopper, tiles
from xfcompile.kernels.gemm.hopper import Epilogue
from xfcompile.kernels.gemm.launch import Gemm, missing, why_not
from xfcompile.measured import multiprocessors

log = logging.getLogger(__name__)


@functools.cache
def epilogue(text: str, vectors: int, tensors: int, save: bool) -> Epilogue:
    return hopper.single(parse(text, vectors, tensors).value, vectors, tensors, saves=save)


def unavailable(text: str, vectors: int, tensors: int, save: bool = False) -> str | None:
    """Why there is no kernel of a formula here; None if there is one."""
    made = epilogue(text, vectors, tensors, save)
    return "not measured with dropout" if made.drops and not tiles.DROPPING else missing(made)


Outputs = tuple[Tensor, Tensor]
"""The result, and the product with its bias, or nothing."""


def matrix(x: Tensor) -> Tensor:
    """[.., N] as [M, N]; RuntimeError where that is no view."""
    return x if x.ndim == 2 else x.view(-1, x.shape[-1])


def lies_across(weight: Tensor) -> bool:
    """Whether a weight [N, K] is in memory as [K, N]."""
    return weight.stride(0) == 1 and weight.stride(1) != 1


def declines(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    text: str,
    outputs: Outputs,
    save: bool,
) -> str | None:
    """Why the kernel does not compute this; None if it does."""
    try:
        matrices = [matrix(m) for m in (x, *outputs[: 1 + save], *tensors)]
    except RuntimeError:
        return "rows at several distances"
    reason = why_not([*matrices, weight.t() if lies_across(weight) else weight], (bias, *vectors))
    return reason or unavailable(text, len(vectors), len(tensors), save)


class Linear:
    """Calls with tensors of one layout, of which `declines` has nothing to say; by others where one of them starts at
    no multiple of 16 bytes, and from the first call on if that fails."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vectors: Sequence[Tensor],
        tensors: Sequence[Tensor],
        text: str,
        p: float,
        outputs: Outputs,
        save: bool,
        other: Callable[..., Outputs],
    ) -> None:
        rows, features = matrix(x).shape[0], weight.shape[0]
        self.across, self.save = lies_across(weight), save
        self.blanks = [Blank.like(t) for t in outputs]
        made = epilogue(text, len(vectors), len(tensors), save)
        self.random = [philox.threshold(p), float(philox.scale(p))] if made.drops else []
        count = multiprocessors(x.device.index)
        tile = tiles.choose(rows, features, 1, count, made.drops)
        self.gemm: Gemm | None = Gemm(made, tile, matrix(x), [self._in_memory(weight)], [bias], count, self.across)
        self.other, self.ran = other, False

    def _in_memory(self, weight: Tensor) -> Tensor:
        return weight.t() if self.across else weight

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vectors: Sequence[Tensor],
        tensors: Sequence[Tensor],
        seed: Tensor | None,
        stream: int,
    ) -> Outputs:
        out, pre = (blank() for blank in self.blanks)
        start = x.data_ptr()
        described = [start, weight.data_ptr(), out.data_ptr()]
        if self.save:
            described.append(pre.data_ptr())
        described += [r.data_ptr() for r in tensors]
        if functools.reduce(operator.or_, described) % 16 != 0 or self.gemm is None:
            return self.other(x, weight, bias, vectors, tensors, seed, stream)
        random = [*self.random, stream] if self.random else []
        pointers = [*described, start if bias is None else bias.data_ptr(), *(v.data_ptr() for v in vectors)]
        if random:
            assert seed is not None
            pointers.append(seed.data_ptr())
        if self.gemm.repeat(pointers, random) is not None:
            return out, pre
        outs = [matrix(t) for t in (out, pre)[: 1 + self.save]]
        try:
            self.gemm(
                matrix(x), [self._in_memory(weight)], outs, [bias], vectors, [matrix(r) for r in tensors],
                seed if random else None, random,
            )  # fmt: skip
        except Exception as error:
            if self.ran:
                raise
            log.warning("%s does not run (%s: %s): another kernel takes its place", self.gemm, type(error), error)
            self.gemm = None
            return self.other(x, weight, bias, vectors, tensors, seed, stream)
        self.ran = True
        return out, pre
