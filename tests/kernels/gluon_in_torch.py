"""Runs kernels of a text in Gluon by torch, on CPUs: Triton's interpreter knows no Gluon.

The text is Python, whose functions are given torch's in Gluon's place. Each part of a program's warps is a thread; they
wait for each other at the program's own barriers. What the hardware does by itself happens as late as the text allows:
a copy by TMA lands when somebody waits for it, and a product of matrices, or a sum in memory, ends when it is waited
for. Until then its result is NaN, and so it stays if what it reads has been written to meanwhile, or is not behind a
fence. So the text's arithmetic is seen, which tiles it visits, which barriers wait for how many bytes, and what memory
is read too early or overwritten too early; not its layouts, nor what becomes of registers.
"""

from __future__ import annotations

import functools
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import in_turns
import ptx_in_torch
import torch
from torch import Tensor

from xfcompile.kernels.attention.repeat import Launch

AT_ONCE = 4
"""Programs that run side by side."""


def run(launch: Launch, tensors: Sequence[Tensor], free: Sequence[Any] = (), seed: int = 0) -> None:
    """The programs of a launch, some side by side. seed: of the order in which their warps come."""
    described = [Descriptor(d.make(x)) for x, d in zip(tensors, launch.described, strict=False)]
    pointers = [Pointer.to(x) for x in tensors[len(described) :]]
    kernel = launch.kernel
    path = kernel.fn.__code__.co_filename
    text = Path(path).read_text()
    given = [*launch.numbers, *(torch.tensor(x) if isinstance(x, float) else x for x in free)]
    constants = {name: launch.constants[name] for name in kernel.arg_names if name in launch.constants}
    programs = launch.grid[0]
    for first in range(0, programs, AT_ONCE):
        parts: list[Callable[[], None]] = []
        for program in range(first, min(first + AT_ONCE, programs)):
            made = scope(text, program, programs, parts, path)
            made[kernel.__name__](*described, *pointers, *given, **constants)
        in_turns.run(parts, path, seed + first)


def scope(
    text: str,
    program: int = 0,
    programs: int = 1,
    parts: list[Callable[[], None]] | None = None,
    path: str = "<text>",
) -> dict[str, Any]:
    """What a text defines, for a program of that number. What its warps are to do is added to `parts`."""
    language = _language(program, programs, [] if parts is None else parts)
    found: dict[str, Any] = {
        "gl": language,
        "tl": language,
        "mbarrier": Barrier,
        "tma": SimpleNamespace(
            async_copy_global_to_shared=_copy, async_copy_shared_to_global=_write, store_wait=_writes_waited_for
        ),
        "fence_async_shared": _fence,
        "warpgroup_mma": _multiply,
        "warpgroup_mma_wait": _products_waited_for,
    }
    exec(_compiled(text, path), found)
    found |= {
        "add_to_global": _add,
        # Python's own operators round down; the text's functions correct those that do not.
        "floor_div": lambda a, b: a // b,
        "remainder": lambda a, b: a % b,
        "rounded_to_bfloat16": lambda x: x.bfloat16().float(),
    }
    for name in {"column_factor"} & found.keys():
        found[name] = _tensor_of(found[name])
    return found


def _tensor_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Also where it returns a number of the text."""
    return lambda *given: torch.as_tensor(function(*given))


SPELLINGS = {
    # of Python's numbers, and of torch's, which are wide already
    ".to(gl.int64)": "",
    ".to(tl.int64)": "",
    ".split()": ".unbind(-1)",
    "l.type.layout": "None",
}
"""What tensors are asked for in another way here."""


@functools.cache
def _compiled(text: str, path: str) -> CodeType:
    """The functions of a text, in the lines that they are in there."""
    start = text.index("\n@") + 1  # behind the imports
    lines = ["" if line.startswith("@") else line for line in text[start:].split("\n")]
    functions = "\n" * text[:start].count("\n") + "\n".join(lines)
    for spelling, here in SPELLINGS.items():
        functions = functions.replace(spelling, here)
    return compile(functions, path, "exec")


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
        found = pointer.memory[place] if mask else torch.tensor(other, dtype=pointer.memory.dtype)
        return found if found.is_floating_point() else found.item()
    place, inside = torch.broadcast_tensors(place, torch.as_tensor(mask))
    found = pointer.memory[place.where(inside, 0)]
    return found.where(inside, torch.tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, value: Tensor, mask: bool | Tensor = True) -> None:
    assert isinstance(pointer.place, Tensor)
    place, value, inside = torch.broadcast_tensors(pointer.place, value, torch.as_tensor(mask))
    pointer.memory[place[inside]] = value[inside].to(pointer.memory.dtype)


def _atomic_add(pointer: Pointer, n: int, sem: str) -> int:
    before = int(pointer.memory[pointer.place])
    pointer.memory[pointer.place] += n
    return before


class Stage:
    """What is known of a part of shared memory: how often it was written to, and whether TMA and the tensor cores see
    all of that."""

    def __init__(self) -> None:
        self.writes, self.fenced = 0, True


class Shared:
    """A part of shared memory. What nobody has written to is NaN."""

    def __init__(self, x: Tensor, stages: Sequence[Stage]) -> None:
        self.x, self.stages, self.shape, self.dtype = x, stages, x.shape, x.dtype

    def index(self, n: int) -> Shared:
        return Shared(self.x[n], self.stages[n : n + 1])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.x.view(shape), self.stages)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.x.permute(order), self.stages)

    def load(self, layout: None) -> Tensor:
        return self.x.clone()

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.dtype
        self.write(x)
        for stage in self.stages:
            stage.fenced = False
            _own.unfenced.append(stage)

    def write(self, x: Tensor) -> None:
        self.x.copy_(x)
        for stage in self.stages:
            stage.writes += 1

    def seen(self) -> Tensor:
        """As TMA and the tensor cores see it."""
        return self.x if all(stage.fenced for stage in self.stages) else _unknown(self.shape, self.dtype)

    def writes(self) -> list[int]:
        return [stage.writes for stage in self.stages]


def _unknown(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)


def _fence() -> None:
    for stage in _own.unfenced:
        stage.fenced = True
    _own.unfenced.clear()


def _allocate(
    dtype: torch.dtype, shape: Sequence[int], layout: object, value: Tensor | None = None
) -> Shared | Barrier:
    if layout is Barrier:
        return Barrier(shape[0] if len(shape) > 1 else 0)
    made = Shared(_unknown(shape, dtype), [Stage() for _ in range(shape[0])])
    if value is not None:
        made.store(value)
    return made


class Descriptor:
    """A tensor of which TMA reads blocks, and writes or adds to."""

    def __init__(self, made: Any) -> None:
        base = made.base
        self.x = base.as_strided(made.shape, made.strides, base.storage_offset())
        self.dtype, self.layout, self.block_type = base.dtype, None, SimpleNamespace(shape=made.block_shape)

    def inside(self, at: Sequence[int]) -> Tensor:
        """What of the block that starts there is part of the tensor."""
        sizes = zip(at, self.block_type.shape, strict=True)
        return self.x[tuple(slice(start, start + n) for start, n in sizes)]


def _copy(source: Descriptor, at: Sequence[int], barrier: Barrier, made: Shared, pred: bool = True) -> None:
    if pred:
        assert list(made.shape) == list(source.block_type.shape) and made.dtype == source.dtype
        made.write(_unknown(made.shape, made.dtype))
        barrier.coming.append((source.inside(at), made))


class Write:
    """What TMA writes to a tensor, or adds to it."""

    def __init__(self, target: Tensor, block: Shared, add: bool) -> None:
        self.target, self.block, self.x, self.writes = target, block, block.seen().clone(), block.writes()
        self.add = add

    def end(self) -> None:
        x = self.x[tuple(slice(n) for n in self.target.shape)]
        if self.writes != self.block.writes():
            x = torch.full_like(x, torch.nan)
        self.target.copy_(self.target + x if self.add else x)


def _add(target: Descriptor, at: Sequence[int], block: Shared) -> None:
    _own.writes.append(Write(target.inside(at), block, add=True))


def _write(target: Descriptor, at: Sequence[int], block: Shared) -> None:
    assert list(block.shape) == list(target.block_type.shape) and block.dtype == target.dtype
    _own.writes.append(Write(target.inside(at), block, add=False))


def _writes_waited_for(n: int) -> None:
    while len(_own.writes) > n:
        _own.writes.popleft().end()


# -- threads -------------------------------------------------------------------------------------------------------


class _Own(threading.local):
    """What a thread has begun: products, what TMA writes, and what it wrote to shared memory without a fence since."""

    def __init__(self) -> None:
        self.products: deque[Product] = deque()
        self.writes: deque[Write] = deque()
        self.unfenced: list[Stage] = []


_own = _Own()


class Barrier:
    """A barrier, or several of them, as the hardware has them: a phase ends when all have arrived, and all bytes."""

    def __init__(self, parts: int) -> None:
        self.parts = [Barrier(0) for _ in range(parts)]
        self.coming: deque[tuple[Tensor, Shared]] = deque()

    @staticmethod
    def MBarrierLayout() -> object:
        return Barrier

    def index(self, n: int) -> Barrier:
        return self.parts[n]

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.phase = self.bytes = 0

    def expect(self, nbytes: int, pred: bool = True) -> None:
        if pred:
            self.bytes += nbytes
            self._arrived(1)

    def arrive(self, count: int) -> None:
        self._arrived(count)
        in_turns.wait()

    def _arrived(self, count: int) -> None:
        self.missing -= count
        assert self.missing >= 0, "more have arrived than a phase has"
        self._turn()

    def _turn(self) -> None:
        if self.missing == self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count

    def _land(self) -> None:
        while self.coming:
            inside, made = self.coming.popleft()
            whole = torch.zeros(made.shape, dtype=made.dtype)
            whole[tuple(slice(n) for n in inside.shape)] = inside
            made.write(whole)
            self.bytes -= whole.numel() * whole.itemsize
            assert self.bytes >= 0, "more bytes have come than were expected"
            self._turn()

    def wait(self, phase: int, pred: bool = True) -> None:
        """For the end of the last phase of that parity."""

        def is_over() -> bool:
            self._land()
            return self.phase != phase

        if pred:
            in_turns.wait(is_over)


# -- arithmetic ----------------------------------------------------------------------------------------------------


class Product:
    """Of matrices, which is there when it has been waited for."""

    def __init__(self, x: Tensor, read: Sequence[tuple[Shared, list[int]]]) -> None:
        self.x, self.read, self.ended = x, read, False

    def end(self) -> None:
        self.ended = True
        if any(shared.writes() != writes for shared, writes in self.read):
            self.x = torch.full_like(self.x, torch.nan)


def _multiply(
    a: Tensor | Shared, b: Shared, total: Tensor | Product, use_acc: bool = True, is_async: bool = False
) -> Tensor | Product:
    left = a.seen() if isinstance(a, Shared) else a
    assert left.dtype == b.dtype
    x = left.float() @ b.seen().float()
    read = [(shared, shared.writes()) for shared in (a, b) if isinstance(shared, Shared)]
    if use_acc:
        x += total.x if isinstance(total, Product) else total
        read += total.read if isinstance(total, Product) else []
    product = Product(x, read)
    _own.products.append(product)
    return product if is_async else _products_waited_for(0, [product])


def _products_waited_for(n: int, deps: Sequence[Tensor | Product]) -> Any:
    """All but the last n."""
    while len(_own.products) > n:
        _own.products.popleft().end()
    assert all(x.ended for x in deps if isinstance(x, Product)), "a product that is not waited for"
    found = [x.x if isinstance(x, Product) else x for x in deps]
    return found[0] if len(found) == 1 else found


def _assembly(text: str, constraints: str, given: Sequence[Tensor], dtype: Any, is_pure: bool, pack: int) -> Any:
    """Pairs of 16 bits, the first of which are a word's lower ones; an approximation; and several numbers of a thread,
    for which neighbours of a row stand here."""
    halves = re.fullmatch(r"cvt\.rn\.(bf16|f16)x2\.f32 \$0, \$([12]), \$([12]);", text)
    if halves is not None:
        kind = {"bf16": torch.bfloat16, "f16": torch.float16}[halves[1]]
        upper, lower = (given[int(n) - 1] for n in halves.group(2, 3))
        return torch.stack([lower.to(kind), upper.to(kind)], -1).view(torch.int32)[..., 0]
    if text == "mov.b32 {$0, $1}, $2;":
        kind, same = dtype
        assert kind == same
        return given[0][..., None].view(kind).unbind(-1)
    if text == "tanh.approx.f32 $0, $1;":
        return torch.tanh(given[0])
    (x,) = given
    return torch.stack(ptx_in_torch.run(text, x.unflatten(-1, (-1, pack)).unbind(-1), pack), -1).flatten(-2)


def _of(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function of tensors and numbers; of Python's integers, as one. NaN stays, for it stands for anything."""

    def call(*given: Any, propagate_nan: object = None) -> Any:
        found = function(*map(torch.as_tensor, given))
        return found if found.is_floating_point() or any(isinstance(x, Tensor) for x in given) else found.item()

    return call


def _where(condition: bool | Tensor, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype)
    return torch.tensor(x, dtype=dtype) if dtype.is_floating_point else int(x)


def _language(program: int, programs: int, parts: list[Callable[[], None]]) -> SimpleNamespace:
    layouts = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout")
    dtypes = ("int32", "int64", "float16", "bfloat16", "float32")
    functions = ("minimum", "maximum", "exp2", "log2", "rsqrt", "sqrt", "abs", "floor", "ceil", "exp", "log", "erf")

    def shared_layout(*about: object) -> None:
        return None

    shared_layout.get_default_for = lambda *about: None  # type: ignore[attr-defined]

    def specialize(
        given: Sequence[tuple[Callable[..., None], Sequence[Any]]], warps: object, registers: object
    ) -> None:
        parts.extend(functools.partial(function, *arguments) for function, arguments in given)

    return SimpleNamespace(
        **{name: lambda *about: None for name in layouts},
        **{name: getattr(torch, name) for name in dtypes},
        **{name: _of(getattr(torch, name)) for name in functions},
        NVMMASharedLayout=shared_layout,
        PropagateNan=SimpleNamespace(ALL=None),
        constexpr=lambda x: x,
        program_id=lambda axis: program,
        num_programs=lambda axis: programs,
        num_warps=lambda: 8,
        static_range=range,
        range=range,
        arange=lambda start, end, layout=None: torch.arange(start, end),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        full=lambda shape, x, dtype, layout=None: torch.full(shape, x, dtype=dtype),
        fma=lambda a, b, c: a * b + c,
        reduce=lambda x, axis, combine: combine(x, axis),
        standard=SimpleNamespace(_sum_combine=torch.sum, _elementwise_max=torch.amax),
        sum=torch.sum,
        max=torch.amax,
        join=lambda a, b: torch.stack([a, b], -1),
        where=_where,
        cast=_cast,
        load=_load,
        store=_store,
        atomic_add=_atomic_add,
        inline_asm_elementwise=_assembly,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        allocate_shared_memory=_allocate,
        warp_specialize=specialize,
    )
