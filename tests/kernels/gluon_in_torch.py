"""Runs kernels of a text in Gluon by torch, on CPUs: Triton's interpreter knows no Gluon.

The text is Python, whose functions are given torch's in Gluon's place. The warps of a program that load and those that
compute are two threads, which wait for each other at the program's own barriers. So the text's arithmetic is seen,
which tiles it visits, and which barriers wait for how many bytes; not its layouts, nor what happens later than it says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention.repeat import Launch

PATIENCE = 20.0
"""Seconds at a barrier, after which it is a deadlock."""


def run(launch: Launch, tensors: Sequence[Tensor], free: Sequence[Any] = ()) -> None:
    """The programs of a launch, one after the other."""
    described = [Descriptor(d.make(x)) for x, d in zip(tensors, launch.described, strict=False)]
    pointers = [Pointer.to(x) for x in tensors[len(described) :]]
    kernel = launch.kernel
    text = Path(kernel.fn.__code__.co_filename).read_text()
    constants = {name: launch.constants[name] for name in kernel.arg_names if name in launch.constants}
    for program in range(launch.grid[0]):
        made = scope(text, program)
        made[kernel.__name__](*described, *pointers, *launch.numbers, *free, **constants)


def scope(text: str, program: int) -> dict[str, Any]:
    """What a text defines, for a program of that number."""
    lines = text[text.index("\n@") :].splitlines()  # behind the imports
    functions = "\n".join(line for line in lines if not line.startswith("@"))
    for conversion in (".to(gl.int64)", ".to(tl.int64)"):  # of Python's numbers, and of torch's, which are wide already
        functions = functions.replace(conversion, "")
    language = _language(program)
    found: dict[str, Any] = {
        "gl": language,
        "tl": language,
        "mbarrier": Barrier,
        "tma": SimpleNamespace(async_copy_global_to_shared=_copy, store_wait=lambda n: None),
        "fence_async_shared": lambda: None,
        "warpgroup_mma": _multiply,
        "warpgroup_mma_wait": lambda n, deps: deps[0] if len(deps) == 1 else deps,
    }
    exec(functions, found)
    found["add_to_global"] = _add
    return found


# -- memory --------------------------------------------------------------------------------------------------------


class Pointer:
    """A place, or places, in a tensor's memory."""

    def __init__(self, memory: Tensor, place: int | Tensor) -> None:
        self.memory, self.place = memory, place
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @staticmethod
    def to(x: Tensor) -> Pointer:
        return Pointer(torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()), x.storage_offset())

    def __add__(self, n: int | Tensor) -> Pointer:
        return Pointer(self.memory, self.place + n)


def _load(pointer: Pointer, mask: bool | Tensor = True, other: float = 0.0) -> Any:
    place = pointer.place
    if not isinstance(place, Tensor):
        return pointer.memory[place].item() if mask else other
    place, inside = torch.broadcast_tensors(place, torch.as_tensor(mask))
    found = pointer.memory[place.where(inside, 0)]
    return found.where(inside, torch.tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, value: Tensor, mask: bool | Tensor = True) -> None:
    assert isinstance(pointer.place, Tensor)
    place, value, inside = torch.broadcast_tensors(pointer.place, value, torch.as_tensor(mask))
    pointer.memory[place[inside]] = value[inside].to(pointer.memory.dtype)


class Shared:
    """A part of shared memory. What nobody has written to is NaN."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def index(self, n: int) -> Shared:
        return Shared(self.x[n])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.x.view(shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.x.permute(order))

    def load(self, layout: None) -> Tensor:
        return self.x.clone()

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.dtype
        self.x.copy_(x)


class Descriptor:
    """A tensor of which TMA reads blocks, and adds to."""

    def __init__(self, made: Any) -> None:
        base = made.base
        self.x = base.as_strided(made.shape, made.strides, base.storage_offset())
        self.dtype, self.layout, self.block_type = base.dtype, None, SimpleNamespace(shape=made.block_shape)

    def inside(self, at: Sequence[int]) -> Tensor:
        """What of the block that starts there is part of the tensor."""
        sizes = zip(at, self.block_type.shape, strict=True)
        return self.x[tuple(slice(start, start + n) for start, n in sizes)]


def _copy(source: Descriptor, at: Sequence[int], barrier: Barrier, made: Shared) -> None:
    inside = source.inside(at)
    made.x.zero_()
    made.x[tuple(slice(n) for n in inside.shape)] = inside
    barrier.moved(made.x.numel() * made.x.itemsize)


def _add(target: Descriptor, at: Sequence[int], block: Shared) -> None:
    inside = target.inside(at)
    inside += block.x[tuple(slice(n) for n in inside.shape)]


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: None) -> Shared | Barrier:
    return Shared(torch.full(shape, torch.nan, dtype=dtype)) if dtype.is_floating_point else Barrier()


# -- threads -------------------------------------------------------------------------------------------------------


class Barrier:
    """A barrier, or several of them, as the hardware has them: a phase ends when all have arrived, and all bytes."""

    turned = threading.Condition()

    def __init__(self) -> None:
        self.parts: dict[int, Barrier] = {}

    @staticmethod
    def MBarrierLayout() -> None:
        return None

    def index(self, n: int) -> Barrier:
        return self.parts.setdefault(n, Barrier())

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.phase = self.bytes = 0

    def expect(self, nbytes: int) -> None:
        self.moved(-nbytes)
        self.arrive(1)

    def moved(self, nbytes: int) -> None:
        with self.turned:
            self.bytes -= nbytes
            self._turn()

    def arrive(self, count: int) -> None:
        with self.turned:
            self.missing -= count
            self._turn()

    def _turn(self) -> None:
        assert self.missing >= 0 and self.bytes >= 0
        if self.missing == self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count
            self.turned.notify_all()

    def wait(self, phase: int, pred: bool = True) -> None:
        """For the end of the last phase of that parity."""
        with self.turned:
            if pred and not self.turned.wait_for(lambda: self.phase != phase, PATIENCE):
                raise TimeoutError("a deadlock")


def _specialize(parts: Sequence[tuple[Callable[..., None], Sequence[Any]]], warps: object, registers: object) -> None:
    (first, given), *others = parts
    failed: list[Exception] = []

    def guarded(part: Callable[..., None], given: Sequence[Any]) -> None:
        try:
            part(*given)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=other, daemon=True) for other in others]
    for thread in threads:
        thread.start()
    guarded(first, given)
    for thread in threads:
        thread.join()
    for error in failed:
        raise error


# -- arithmetic ----------------------------------------------------------------------------------------------------


def _multiply(a: Tensor | Shared, b: Shared, total: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    left = a.x if isinstance(a, Shared) else a
    assert left.dtype == b.dtype
    product = left.float() @ b.x.float()
    return total + product if use_acc else product


def _of(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function of tensors, or of Python's numbers, as numbers."""

    def call(*given: Any) -> Any:
        found = function(*map(torch.as_tensor, given))
        return found if any(isinstance(x, Tensor) for x in given) else found.item()

    return call


def _where(condition: bool | Tensor, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype)
    return float(x) if dtype.is_floating_point else int(x)


def _language(program: int) -> SimpleNamespace:
    layouts = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "NVMMASharedLayout")
    dtypes = ("int32", "int64", "float16", "bfloat16", "float32")
    functions = ("minimum", "maximum", "exp2", "log2", "rsqrt", "sqrt", "abs")
    return SimpleNamespace(
        **{name: lambda *about: None for name in layouts},
        **{name: getattr(torch, name) for name in dtypes},
        **{name: _of(getattr(torch, name)) for name in functions},
        constexpr=lambda x: x,
        program_id=lambda axis: program,
        num_warps=lambda: 8,
        static_range=range,
        arange=lambda start, end, layout=None: torch.arange(start, end),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        full=lambda shape, x, dtype, layout=None: torch.full(shape, x, dtype=dtype),
        fma=lambda a, b, c: a * b + c,
        reduce=lambda x, axis, combine: x.sum(axis),
        standard=SimpleNamespace(_sum_combine=None),
        where=_where,
        cast=_cast,
        load=_load,
        store=_store,
        convert_layout=lambda x, layout: x,
        allocate_shared_memory=_allocate,
        warp_specialize=_specialize,
    )
