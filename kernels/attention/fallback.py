"""A launch, and another one that takes its place where it cannot be made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xfcompile.kernels.attention.repeat import aligned

log = logging.getLogger(__name__)


class FirstThatRuns:
    """A launch, and another one in its place if it fails the first time: what it is made with may not be there, or has
    too little of something."""

    def __init__(self, first: Callable[..., None], other: Callable[[], Callable[..., None]]) -> None:
        self.launch = first
        # None once it is known which of them it is: it may hold tensors.
        self.other: Callable[[], Callable[..., None]] | None = other

    def __call__(self, *arguments: Any) -> None:
        if self.other is None:
            self.launch(*arguments)
            return
        try:
            self.launch(*arguments)
        except Exception as error:
            other = self.other
            if other is not None:  # no other thread was here meanwhile
                log.warning("%s does not run (%s: %s): another kernel takes its place", self.launch, type(error), error)
                self.launch = other()
                self.other = None
            self.launch(*arguments)  # what this one raises is raised: nothing else is left
        self.other = None


class WhereAligned:
    """A launch for an operand that starts at a multiple of 16 bytes, and another one where it does not: of operands
    that is not part of a layout."""

    def __init__(self, launch: Callable[..., None], n: int, other: Callable[[], Callable[..., None]]) -> None:
        self.launch, self.n = launch, n
        self.make = other
        self.other: Callable[..., None] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, operands: Sequence[Tensor], *rest: Any
    ) -> None:
        if aligned(operands[self.n]):
            self.launch(q, k, v, out, lse, operands, *rest)
            return
        if self.other is None:
            self.other = self.make()
        self.other(q, k, v, out, lse, operands, *rest)
