"""A launch of a Triton kernel, repeated at little cost: what Triton found out the first time is not asked again."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xfcompile import ahead
from xfcompile.kernels.attention import fit
from xfcompile.kernels.attention.tiles import FewKeys, few_keys

LARGEST = 2**31 - 1
"""Integers beyond this have another type in a kernel."""

ALIGNED = 16
"""Bytes: of pointers and integers Triton's kernels know whether they are a multiple of this, and nothing else."""

# What torch.cuda.current_device and Triton's driver call, and as Inductor's launches do.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_empty_strided_cuda: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
_data_ptr = Tensor.data_ptr


@dataclass(frozen=True)
class Described:
    """A tensor that a kernel is given as a TMA descriptor: what of it there is to see. make: the descriptor as Triton
    checks it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    make: Callable[[Tensor], Any]


class Launch:
    """Launches of a kernel with tensors that are laid out alike, on one device, and numbers that are the same but for
    `free` ones, which the kernel is not specialised on.

    programs: how many. numbers: arguments after the tensors. constants: compile-time arguments, which are a kernel's
    last. options: Triton's own. described: the first tensors, where they are given as TMA descriptors. made: kernels
    that launches with other numbers have in common, if these differ in numbers and programs only.

    The compiled kernel is called by itself wherever Triton would come to the same one: where the same tensors as before
    start at multiples of 16 bytes, and free integers need no more bits. Of numbers Triton asks whether they are 1, how
    many bits they need, and whether they are multiples of 16.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: Sequence[Any],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
        described: Sequence[Described] = (),
        made: dict[object, Any] | None = None,
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.numbers = tuple(numbers)
        self.constants = constants
        self.options = options
        self.described = described
        self._made: dict[object, Any] = {} if made is None else made
        self._device = -1
        self._last: tuple[Any, ...] = ()
        # By which of the pointers are aligned; and, asked first, where all are.
        self._compiled: dict[tuple[bool, ...], Any] = {}
        self._usual: Any = None
        self._descriptors: dict[tuple[int, int], _Quick] = {}
        self._failed: fit.Unavailable | None = None

    _compiled_for: Callable[[Any], None] | None = None

    @classmethod
    @contextmanager
    def compiling_only(cls, made: Callable[[Any], None]) -> Iterator[None]:
        """Meanwhile no launch of this process is one: its kernel is compiled, and given to `made`. Only for launches
        that are made meanwhile, of tensors that may have no memory: see `xfcompile.pretend`."""
        cls._compiled_for = staticmethod(made)
        try:
            yield
        finally:
            cls._compiled_for = None

    def __call__(self, tensors: Sequence[Tensor], free: Sequence[Any] = ()) -> Any:
        """Returns the compiled kernel; of the interpreter, nothing that means anything. Raises `fit.DoesNotCompile`."""
        pointers = [*map(_data_ptr, tensors)]
        compiled = self.repeat(pointers, free)
        return self._first(tensors, pointers, free) if compiled is None else compiled

    def repeat(self, pointers: Sequence[int], free: Sequence[Any] = ()) -> Any:
        """Launches the kernel at these addresses, and returns it, if it was compiled for such before; else None."""
        if functools.reduce(operator.or_, pointers) % ALIGNED == 0:
            compiled = self._usual
        else:
            compiled = self._compiled.get(_aligned(pointers))
        if compiled is None or _current_device() != self._device or (free and not _ordinary(free)):
            return None
        if _hooked():  # they are told of tensors, by Triton
            return None
        arguments: Sequence[Any] = pointers
        if self.described:
            n = len(self.described)
            arguments = [*map(self._described_at, range(n), pointers), *pointers[n:]]
        compiled.run(
            *self.grid, _stream(self._device), compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *self.numbers, *free, *self._last,
        )  # fmt: skip
        return compiled

    def _described_at(self, n: int, pointer: int) -> _Quick:
        """A descriptor: tensors come back at the addresses that they had."""
        found = self._descriptors.get((n, pointer))
        if found is None:
            if len(self._descriptors) >= MANY_DESCRIPTORS:
                self._descriptors.clear()
            found = self._descriptors[n, pointer] = _Quick(pointer, self.described[n])
        return found

    def _first(self, tensors: Sequence[Tensor], pointers: Sequence[int], free: Sequence[Any]) -> Any:
        if self._compiled_for is not None:
            return self._compile(tensors, free)
        device = tensors[0].device
        if device.type == "cuda" and _current_device() != device.index:
            with torch.cuda.device(device):
                return self(tensors, free)
        ordinary = _ordinary(free)
        key = (device, _aligned(pointers), *map(_class_of, self.numbers), *_sizes(tensors))
        if ordinary and not _hooked() and key in self._made:
            self._remember(device, pointers, self._made[key])
            return self.repeat(pointers, free)
        self._check(len(tensors), free)
        arguments = self._arguments(tensors, free)
        if self._failed is not None:
            raise self._failed.again()
        if device.type == "cuda":
            ahead.settle()
        try:
            fit.compile_first(self.kernel, self.grid, *arguments, **self.constants, **self.options)
        except fit.Unavailable as error:
            self._failed = error.again()
            raise
        with fit.alone(device):
            compiled = self.kernel[self.grid](*arguments, **self.constants, **self.options)
        if ordinary and hasattr(compiled, "packed_metadata"):  # the interpreter compiles nothing
            self._made[key] = compiled
            self._remember(device, pointers, compiled)
        return compiled

    def _arguments(self, tensors: Sequence[Tensor], free: Sequence[Any]) -> tuple[Any, ...]:
        described = [d.make(x) for x, d in zip(tensors, self.described, strict=False)]
        return (*described, *tensors[len(described) :], *self.numbers, *free)

    def _compile(self, tensors: Sequence[Tensor], free: Sequence[Any]) -> Any:
        """What is known of a kernel that is compiled, and on no GPU."""
        assert self._compiled_for is not None
        compiled = fit.compile_first(
            self.kernel, self.grid, *self._arguments(tensors, free), **self.constants, **self.options
        )
        self._compiled_for(compiled)
        return SimpleNamespace(n_spills=0, metadata=compiled.metadata)

    def _check(self, tensors: int, free: Sequence[Any]) -> None:
        """What is free must not be what Triton compiles anew for."""
        start = tensors + len(self.numbers)
        for x, of in zip(free, getattr(self.kernel, "params", ())[start:], strict=False):
            assert of.do_not_specialize or not isinstance(x, int), f"{of.name} of {self.kernel} is specialised on"

    def _remember(self, device: torch.device, pointers: Sequence[int], compiled: Any) -> None:
        names = self.kernel.arg_names
        self._last = tuple(self.constants[name] for name in names[len(names) - len(self.constants) :])
        self._device = -1 if device.index is None else device.index
        aligned = _aligned(pointers)
        self._compiled[aligned] = compiled
        if all(aligned):
            self._usual = compiled
        if self.described:
            encode_once(compiled.run)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all tensors that are there start at multiples of 16 bytes."""
    start = 0
    for x in tensors:
        if x is not None:
            start |= _data_ptr(x)
    return start % ALIGNED == 0


def _aligned(pointers: Sequence[int]) -> tuple[bool, ...]:
    return tuple([x % ALIGNED == 0 for x in pointers])


def _ordinary(free: Sequence[Any]) -> bool:
    """Whether no integer has another type than most."""
    for x in free:  # noqa: SIM110 (a generator takes twice the time)
        if type(x) is int and not -LARGEST <= x <= LARGEST:
            return False
    return True


def _class_of(x: Any) -> object:
    """What a compiled kernel knows of a number: one that is of the same class, it computes with as well."""
    if type(x) is not int:
        return type(x)
    return x if x == 1 else (x % ALIGNED == 0, -LARGEST <= x <= LARGEST, x < 2**63)


def _sizes(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    """On AMD's GPUs Triton asks besides which tensors are in memory of less than 2 GiB."""
    if torch.version.hip is None:
        return ()
    return tuple(x.untyped_storage().nbytes() <= LARGEST for x in tensors)


def _hooked() -> bool:
    """Whether a profiler of Triton's wants to know of launches."""
    runtime = _runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # An empty chain is none; older versions of Triton have no chains, and None.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def _stream(device: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device))


class _Quick:
    """A tensor as Triton's launcher reads descriptors, without what it checks of a new one. It is its own base.

    encoded: what the launcher makes of it, once it has: of the same tensor with the same blocks it is the same.
    """

    __slots__ = ("base", "encoded", "pointer", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, pointer: int, like: Described) -> None:
        self.base, self.pointer, self.shape, self.strides = self, pointer, like.shape, like.strides
        self.encoded: list[Any] | None = None

    def data_ptr(self) -> int:
        return self.pointer


MANY_DESCRIPTORS = 1024
"""That a launch remembers: of a backward seven a layer, as layers share their launches."""

ENCODE = "make_tensordesc_arg"
"""Triton's function that makes arguments of a descriptor, as its launchers call it by name."""


def encode_once(launcher: Any) -> None:
    """Has a launcher of Triton's make arguments of each of our descriptors once, and not at each launch.

    Its function `launch` is replaced by one of the same code, in whose globals `ENCODE` remembers. A launcher that is
    made otherwise stays as it is.
    """
    launch = getattr(launcher, "launch", None)
    if not isinstance(launch, FunctionType) or ENCODE not in launch.__code__.co_names:
        return
    encode = launch.__globals__.get(ENCODE)
    if encode is None or getattr(encode, "remembers", False):
        return

    def remembering(descriptor: Any, *about: Any) -> Any:
        if type(descriptor) is not _Quick:
            return encode(descriptor, *about)
        found = descriptor.encoded
        if found is None:
            found = descriptor.encoded = encode(descriptor, *about)
        return found

    remembering.remembers = True  # type: ignore[attr-defined]
    names = {**launch.__globals__, ENCODE: remembering}
    launcher.launch = FunctionType(launch.__code__, names, launch.__name__, launch.__defaults__, launch.__closure__)


def aligned_strides(x: Tensor) -> tuple[int, ...]:
    """The strides [.., L, D], but that of a dimension of size 1, which means nothing, is a multiple of 16 bytes where D
    is."""
    sizes = x.shape
    whole, last = sizes[-2] * sizes[-1], x.ndim - 1
    return tuple(whole if n == 1 and d < last else s for d, (n, s) in enumerate(zip(sizes, x.stride(), strict=True)))


def has_aligned_rows(x: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes, and numbers of a row are neighbours."""
    *strides, last = aligned_strides(x)
    return last == 1 and all(s * x.dtype.itemsize % ALIGNED == 0 for s in strides) and aligned(x)


def windows(dropout: float, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> FewKeys | None:
    """What `few_keys` says of tensors [b, h, length, dim] whose rows all start at multiples of 16 bytes; None of
    others, and where weights are dropped out, which nobody has measured there (Swin drops none out)."""
    if dropout:
        return None
    few = few_keys(q.shape[3], v.shape[3], k.shape[2])
    return few if few is not None and all(map(has_aligned_rows, (q, k, v, *others))) else None


def described_for_gluon(x: Tensor, block: Sequence[int]) -> Described:
    """A tensor of 16 or 32 bits an element, of which such blocks are loaded or stored."""
    shape, strides, itemsize = tuple(x.shape), aligned_strides(x), x.dtype.itemsize

    def make(x: Tensor) -> Any:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        dtype = {2: gl.bfloat16, 4: gl.float32}[
            itemsize
        ]  # of the layout, for which the number of bits is all that counts
        layout = gl.NVMMASharedLayout.get_default_for(list(block), dtype)
        return TensorDescriptor(x, list(shape), list(strides), list(block), layout)

    return Described(shape, strides, make)


class Blank:
    """Memory for tensors of one layout, without what PyTorch's functions do to find that layout out."""

    __slots__ = ("device", "dtype", "index", "shape", "strides")

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
    ) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.strides = tuple(torch.empty(self.shape, device="meta").stride() if strides is None else strides)
        self.index = device.index if device.type == "cuda" and _empty_strided_cuda is not None else None

    @staticmethod
    def like(x: Tensor) -> Blank:
        return Blank(x.shape, x.dtype, x.device, x.stride())

    def __call__(self) -> Tensor:
        if self.index is not None and self.index == _current_device():
            return _empty_strided_cuda(self.shape, self.strides, self.dtype)  # type: ignore[misc]
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
