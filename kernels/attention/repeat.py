"""A launch of a Triton kernel, repeated at little cost: what Triton found out the first time is not asked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import fit

LARGEST = 2**31 - 1
"""Integers beyond this have another type in a kernel."""


class Launch:
    """Launches of a kernel with tensors that are laid out alike, and numbers that are the same but for `free` ones.

    programs: how many. constants: compile-time arguments, which are a kernel's last. options: Triton's own. blocks: of
    each tensor that is given as a TMA descriptor (the first ones), the block that is loaded.

    The compiled kernel is called by itself wherever Triton would come to the same one: where the same tensors as before
    start at multiples of 16 bytes, and free integers need no more bits.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
        blocks: Sequence[Sequence[int]] = (),
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.constants = constants
        self.options = options
        self.blocks = blocks
        self._runners: dict[tuple[bool, ...], Any] = {}
        self._last: tuple[Any, ...] = ()
        self._strides: list[tuple[int, ...]] = []
        self._failed: fit.Unavailable | None = None

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[Any], free: Sequence[Any] = ()) -> Any:
        """Returns the compiled kernel where Triton was asked for it, else None. Raises `fit.DoesNotCompile`."""
        device = tensors[0].device
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self(tensors, numbers, free)
        aligned = tuple([x.data_ptr() % 16 == 0 for x in tensors])
        runner = self._runners.get(aligned)
        if runner is None or any(type(x) is int and not -LARGEST <= x <= LARGEST for x in free):
            return self._first(tensors, numbers, free, aligned)
        n = len(self.blocks)
        described = [_Quick(x, strides) for x, strides in zip(tensors, self._strides, strict=False)]
        runner(*described, *tensors[n:], *numbers, *free, *self._last)
        return None

    def _first(
        self, tensors: Sequence[Tensor], numbers: Sequence[Any], free: Sequence[Any], aligned: tuple[bool, ...]
    ) -> Any:
        n = len(self.blocks)
        self._strides = [aligned_strides(x) for x in tensors[:n]]
        described = [
            _descriptor(x, strides, block)
            for x, strides, block in zip(tensors, self._strides, self.blocks, strict=False)
        ]
        arguments = (*described, *tensors[n:], *numbers, *free)
        if self._failed is not None:
            raise self._failed.again()
        try:
            fit.compile_first(self.kernel, self.grid, *arguments, **self.constants, **self.options)
        except fit.Unavailable as error:
            self._failed = error.again()
            raise
        with fit.alone(tensors[0].device):
            compiled = self.kernel[self.grid](*arguments, **self.constants, **self.options)
        if hasattr(compiled, "packed_metadata"):  # the interpreter compiles nothing
            names = self.kernel.arg_names
            self._last = tuple(self.constants[name] for name in names[len(names) - len(self.constants) :])
            self._runners[aligned] = compiled[self.grid]
        return compiled


class _Quick:
    """A tensor as Triton's launcher reads descriptors, without what it checks of a new one."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, x: Tensor, strides: tuple[int, ...]) -> None:
        self.base, self.shape, self.strides = x, x.shape, strides


def aligned_strides(x: Tensor) -> tuple[int, ...]:
    """The strides [.., L, D], but that of a dimension of size 1, which means nothing, is a multiple of 16 bytes where D
    is."""
    sizes = x.shape
    whole, last = sizes[-2] * sizes[-1], x.ndim - 1
    return tuple(whole if n == 1 and d < last else s for d, (n, s) in enumerate(zip(sizes, x.stride(), strict=True)))


def _descriptor(x: Tensor, strides: tuple[int, ...], block: Sequence[int]) -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = {2: gl.bfloat16}[x.dtype.itemsize]  # of the layout, for which the number of bits is all that counts
    layout = gl.NVMMASharedLayout.get_default_for(list(block), dtype)
    return TensorDescriptor(x, list(x.shape), list(strides), list(block), layout)
