"""Kernels that are compiled before they are launched: by Inductor's processes, while Inductor makes its own code.

Triton compiles a kernel at its first launch, 1 to 3 s, one after the other, and a model may have five. When Inductor
lowers a call of an op of ours, the layouts of its tensors are known. One of the processes in which Inductor compiles
its own kernels then calls the op's function on tensors that are nothing but layouts, on a GPU that is pretended; each
launch that it comes to is compiled and goes no further. What was made lies in Triton's cache, where the launch finds
it.

Nothing follows from this but time: what fails there, or was laid out otherwise, is compiled at its launch.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xfcompile.kernels.registration import KERNELS

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that a first launch waits for what is being compiled, at most."""


@dataclass(frozen=True)
class Outline:
    """All of a tensor on a GPU that a kernel depends on. offset: in elements, from where its memory begins."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Gpu:
    """What is asked of a kind of GPU before a kernel is launched there. target: Triton's."""

    target: Any
    capability: tuple[int, int]
    name: str
    properties: tuple[tuple[str, int], ...]

    @staticmethod
    @functools.cache
    def of(index: int) -> Gpu:
        from triton.runtime import driver

        found = torch.cuda.get_device_properties(index)
        names = ("multi_processor_count", "shared_memory_per_multiprocessor", "L2_cache_size", "total_memory")
        properties = tuple((name, int(getattr(found, name))) for name in names if hasattr(found, name))
        with torch.cuda.device(index):
            target = driver.active.get_current_target()
        return Gpu(target, torch.cuda.get_device_capability(index), found.name, properties)


@dataclass(frozen=True)
class Call:
    """A call of an op's function, with `Outline`s in the place of tensors. module: where the op is registered."""

    module: str
    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    gpu: Gpu


_lock = threading.Lock()
_asked: set[str] = set()
"""Calls that were submitted: the layers of a model make the same ones."""
_pending: list[Future[Any]] = []
MANY = 4096
"""Calls that are remembered."""


def lowered(kernel: Any) -> None:
    """Has what a call of an op needs compiled, if it runs on a GPU. kernel: Inductor's node of the call."""
    device = kernel.get_device()
    if device is not None and device.type == "cuda" and _wanted():
        submit(call_of(kernel, Gpu.of(torch.cuda.current_device() if device.index is None else device.index)))


def call_of(kernel: Any, gpu: Gpu) -> Call:
    """What Inductor's node of a call says of it."""
    args, kwargs = kernel.unflatten_args(kernel.inputs, kernel.constant_args)
    name = kernel.op_overload._opname
    named = tuple((k, _outlined(v)) for k, v in {**kwargs, **kernel.kwargs}.items())
    return Call(KERNELS[name]["cuda"].__module__, name, tuple(map(_outlined, args)), named, gpu)


def _wanted() -> bool:
    """Whether Inductor has processes that compile, and kernels are compiled at all."""
    from torch._inductor.async_compile import get_compile_threads

    from xfcompile.kernels.attention.tiles import interpreting

    return get_compile_threads() > 1 and not interpreting()


def _outlined(x: Any) -> Any:
    """An argument without Inductor's own objects: symbolic sizes are as large as they are at the first call."""
    import sympy
    from torch._inductor.ir import IRNode

    if isinstance(x, (list, tuple)):
        return tuple(map(_outlined, x))
    if isinstance(x, (sympy.Expr, torch.SymInt)):
        return _number(x)
    if not isinstance(x, IRNode):
        return x
    offset = x.get_layout().offset if x.maybe_get_layout() is not None else 0
    return Outline(
        tuple(map(_number, x.get_size())), tuple(map(_number, x.get_stride())), _number(offset), x.get_dtype()
    )


def _number(x: Any) -> int:
    from torch._inductor.virtualized import V

    try:
        return int(x)
    except (TypeError, ValueError):
        return int(V.graph.sizevars.optimization_hint(x))


def submit(call: Call) -> None:
    """Has another process compile what a call launches, if none was asked for the same before."""
    from torch._inductor.async_compile import AsyncCompile

    known = repr(call)
    with _lock:
        if known in _asked:
            return
        if len(_asked) >= MANY:
            _asked.clear()
        _asked.add(known)
    future = AsyncCompile.process_pool().submit(compile_call, call, _environment())
    with _lock:
        _pending.append(future)


def _environment() -> dict[str, str]:
    """What Triton's cache depends on, which Inductor's processes may have been started without."""
    import torch._inductor.runtime.compile_tasks as tasks

    # Inductor sets it once it compiles a kernel of its own.
    getattr(tasks, "_set_triton_libdevice_path", lambda: None)()
    return {k: v for k, v in os.environ.items() if _counts(k)}


def _counts(variable: str) -> bool:
    return variable.startswith("TRITON_") or variable == "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def _environment_of(other: dict[str, str]) -> Iterator[None]:
    """As if this were that process: Inductor's have another assembler (TRITON_PTXAS_PATH), whose version is part of the
    names that Triton's cache has."""
    own = {k: v for k, v in os.environ.items() if not _counts(k)}
    with mock.patch.dict(os.environ, {**own, **other}, clear=True):
        _forget_versions()
        try:
            yield
        finally:
            _forget_versions()


def _forget_versions() -> None:
    from triton.backends import backends

    for backend in backends.values():
        for x in vars(sys.modules[backend.compiler.__module__]).values():
            getattr(x, "cache_clear", lambda: None)()


def settle() -> None:
    """Returns when nothing is being compiled any more that was submitted, or after `PATIENCE`."""
    if not _pending:
        return
    end = time.monotonic() + PATIENCE
    while True:
        with _lock:
            if not _pending:
                return
            future = _pending[0]
        try:
            made = future.result(max(end - time.monotonic(), 0.0))
            log.debug("compiled ahead: %s", made)
        except FutureTimeout:
            log.warning("kernels were not compiled ahead within %g s", PATIENCE)
            with _lock:
                _pending.clear()
            return
        except (Exception, CancelledError) as error:  # the other process's, whatever it is: told where it matters
            log.debug("not compiled ahead: %s", error)
        with _lock:
            if future in _pending:
                _pending.remove(future)


def compile_call(call: Call, environment: dict[str, str]) -> list[str]:
    """Compiles what a call of an op's function launches, in this process, which must not launch anything itself
    meanwhile. environment: as `_environment` says it of the process that will. Returns the kernels' names."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from xfcompile.kernels.attention.repeat import Launch

    importlib.import_module(call.module)
    made: list[str] = []
    with ExitStack() as stack:
        modes = (Launch.compiling_only(made.append), torch.no_grad(), FakeTensorMode(), _Addresses())
        for context in (_environment_of(environment), _pretended(call.gpu), *modes):
            stack.enter_context(context)

        def laid_out(x: Any) -> Any:
            if not isinstance(x, Outline):
                return x
            size = x.offset + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True))
            whole = torch.empty(max(size, x.offset), dtype=x.dtype, device=PRETENDED)
            return whole.as_strided(x.shape, x.strides, x.offset)

        def listed(x: Any) -> Any:
            return [listed(y) for y in x] if isinstance(x, tuple) else laid_out(x)

        args, kwargs = [listed(x) for x in call.args], {k: listed(v) for k, v in call.kwargs}
        KERNELS[call.op]["cuda"](*args, **kwargs)
    return made


PRETENDED = "cuda:0"
"""Any other would be initialised where there are several, by what PyTorch does before an operation."""


class _Addresses(TorchFunctionMode):
    """Tensors without memory start where they would if all memory began at 0."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.data_ptr:
            return args[0].storage_offset() * args[0].element_size()
        if func is Tensor.__getitem__:  # makes its device the current one first, which takes a build with CUDA
            x, index = args
            like = torch.empty_strided(x.shape, x.stride(), device="meta")[index]
            return x.as_strided(like.shape, like.stride(), x.storage_offset() + like.storage_offset())
        return func(*args, **(kwargs or {}))


_kind: Gpu | None = None


@contextmanager
def _pretended(gpu: Gpu) -> Iterator[None]:
    """As if there were such a GPU, and no memory on it. A process remembers too much of it to pretend another one."""
    global _kind
    import torch._subclasses.fake_tensor as fake_tensor
    from triton.runtime import driver

    from xfcompile.kernels.attention import repeat

    _kind = _kind or gpu
    if _kind != gpu:
        raise RuntimeError(f"this process compiles for {_kind.name}, not for {gpu.name}")
    properties = SimpleNamespace(name=gpu.name, **dict(gpu.properties))
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_capability", lambda device=None: gpu.capability),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_name", lambda device=None: gpu.name),
            (torch.cuda, "is_available", lambda: False),  # what asks would use it
            (fake_tensor, "init_gpu_context", lambda device: None),
            (repeat, "_empty_strided_cuda", None),
            (repeat, "_current_device", lambda: -1),
            (driver, "_active", _Driver(gpu)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class _Driver:
    """What Triton asks of a device to compile for it."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def get_current_target(self) -> Any:
        return self.gpu.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
