"""Linears with their activation by the product of matrices for Hopper: which tensors it takes, and their launches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from xfcompile.kernels import philox
from xfcompile.kernels.bias_act_dropout.formula import parse
from xfcompile.kernels.gemm import hopper, tiles
from xfcompile.kernels.gemm.hopper import Epilogue
from xfcompile.kernels.gemm.launch import Gemm, missing, multiprocessors, why_not

log = logging.getLogger(__name__)


@functools.cache
def epilogue(text: str, vectors: int, tensors: int, save: bool) -> Epilogue:
    return hopper.single(parse(text, vectors, tensors).value, vectors, tensors, saves=save)


def unavailable(text: str, vectors: int, tensors: int, save: bool = False) -> str | None:
    """Why there is no kernel of a formula here; None if there is one."""
    made = epilogue(text, vectors, tensors, save)
    return "not measured with dropout" if made.drops and not tiles.DROPPING else missing(made)


@dataclass(frozen=True)
class Operands:
    """Of `xfcompile::linear_act_dropout`; pre: where the product is saved, if it is. p: of dropout."""

    out: Tensor
    pre: Tensor | None
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    vectors: Sequence[Tensor]
    tensors: Sequence[Tensor]
    seed: Tensor | None = None
    stream: int = 0
    p: float = 0.0

    @property
    def outs(self) -> list[Tensor]:
        return [self.out] if self.pre is None else [self.out, self.pre]

    @property
    def across(self) -> bool:
        """Whether the weight [N, K] is in memory as [K, N]."""
        return self.weight.stride(0) == 1 and self.weight.stride(1) != 1

    @property
    def matrix(self) -> Tensor:
        """The weight as it is in memory."""
        return self.weight.t() if self.across else self.weight

    @property
    def layout(self) -> tuple[object, ...]:
        """All that a launch depends on but for where the tensors are."""
        given = (self.out, self.pre, self.x, self.weight, self.bias, *self.vectors, None, *self.tensors)
        return tuple(
            [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in given]
        )


def matrix(x: Tensor) -> Tensor:
    """[.., N] as [M, N]; RuntimeError where that is no view."""
    return x if x.ndim == 2 else x.view(-1, x.shape[-1])


def declines(given: Operands, text: str) -> str | None:
    """Why the kernel does not compute this; None if it does."""
    try:
        matrices = [matrix(m) for m in (given.x, *given.outs, *given.tensors)]
    except RuntimeError:
        return "rows at several distances"
    reason = why_not([*matrices, given.matrix], (given.bias, *given.vectors))
    return reason or unavailable(text, len(given.vectors), len(given.tensors), given.pre is not None)


MANY_CALLS = 1024
"""Layouts that are remembered; row counts that change at every call make new ones."""

_gemms: dict[object, Gemm | None] = {}
"""By formula and layout; None where the kernel does not take such tensors, or has failed."""


def linear(given: Operands, text: str) -> bool:
    """Fills `out` and, where it is there, `pre`, as `launch.linear` does; False if it does not."""
    key = (text, given.layout)
    gemm = _gemms.get(key)
    if gemm is not None:
        _run(gemm, given)
        return True
    if key in _gemms:
        return False
    if len(_gemms) >= MANY_CALLS:
        _gemms.clear()
    _gemms[key] = gemm = _first(given, text)
    return gemm is not None


def _first(given: Operands, text: str) -> Gemm | None:
    """The first launch with such tensors."""
    reason = declines(given, text)
    if reason is not None:
        log.debug("not by the kernel for Hopper: %s", reason)
        return None
    x, features = matrix(given.x), given.weight.shape[0]
    count = multiprocessors(x.device.index)
    made = epilogue(text, len(given.vectors), len(given.tensors), given.pre is not None)
    gemm = Gemm(
        made,
        tiles.choose(x.shape[0], features, 1, count, made.drops),
        x,
        [given.matrix],
        [given.bias],
        count,
        given.across,
    )
    try:
        _run(gemm, given)
    except Exception as error:
        log.warning("%s does not run (%s: %s): another kernel takes its place", gemm, type(error), error)
        return None
    return gemm


def _run(gemm: Gemm, given: Operands) -> None:
    outs, tensors = map(matrix, given.outs), map(matrix, given.tensors)
    random = [] if given.seed is None else [philox.threshold(given.p), float(philox.scale(given.p)), given.stream]
    gemm(matrix(given.x), [given.matrix], [*outs], [given.bias], given.vectors, [*tensors], given.seed, random)
