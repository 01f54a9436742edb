"""Kernels that are compiled before they are launched: by Inductor's processes, while Inductor makes its own code.

Triton compiles a kernel at its first launch, 1 to 3 s, one after the other, and a model may have five. What a kernel is
compiled for is known much earlier: a call of one of our ops has been put into a graph, and its tensors' layouts stand
there. One of the processes in which Inductor compiles its own kernels is then asked to go through that call
(`pretend.py`), and what it makes lies in Triton's cache, where the launch finds it. Gradients' calls are known when
Inductor lowers them, and so are calls whose tensors it lays out otherwise.

Nothing follows from this but time: what fails there, or is laid out otherwise, is compiled at its launch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from xfcompile.example import example_of
from xfcompile.kernels.registration import KERNELS

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that a first launch waits for what is being compiled, at most."""
ALIGNED = 16
"""Bytes: of where a tensor begins kernels know whether it is a multiple of this."""


@dataclass(frozen=True)
class Outline:
    """All of a tensor on a GPU that a kernel depends on. offset: of its first element from a multiple of 16 bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @staticmethod
    def of(shape: Any, strides: Any, offset: int, dtype: torch.dtype) -> Outline:
        return Outline(tuple(shape), tuple(strides), offset % max(ALIGNED // dtype.itemsize, 1), dtype)


@dataclass(frozen=True)
class Gpu:
    """What is asked of a kind of GPU before a kernel is launched there. target: Triton's. compiler: what Triton's cache
    calls its compiler by."""

    target: Any
    capability: tuple[int, int]
    name: str
    properties: tuple[tuple[str, int], ...]
    compiler: str

    @staticmethod
    @functools.cache
    def of(index: int) -> Gpu:
        import torch._inductor.runtime.compile_tasks as tasks
        from triton.runtime import driver

        # Which assembler Triton runs is part of what its cache calls a kernel by. Inductor decides on PyTorch's own, if
        # it is there, when it compiles in this process, which may be after a kernel is asked for and before its launch.
        getattr(tasks, "_set_triton_ptxas_path", lambda: None)()
        found = torch.cuda.get_device_properties(index)
        names = ("multi_processor_count", "shared_memory_per_multiprocessor", "L2_cache_size", "total_memory")
        properties = tuple((name, int(getattr(found, name))) for name in names if hasattr(found, name))
        with torch.cuda.device(index):
            target = driver.active.get_current_target()
        return Gpu(target, torch.cuda.get_device_capability(index), found.name, properties, compiler_of(target))


def compiler_of(target: Any) -> str:
    """In this process: it may depend on what the environment was when it was asked for first."""
    from triton.compiler.compiler import make_backend

    return str(make_backend(target).hash())


@dataclass(frozen=True)
class Call:
    """A call of an op's function, with `Outline`s in the place of tensors. module: where the op is registered. kwargs:
    what has a default, all of it. fp32: what the user has set of products."""

    module: str
    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    gpu: Gpu
    fp32: str


def call_of(op: torch._ops.OpOverload, args: Any, kwargs: Mapping[str, Any], gpu: Gpu) -> Call:
    """However it was written. args, kwargs: with `Outline`s for tensors."""
    names = [a.name for a in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ordered, named = [], []
    for a in op._schema.arguments:
        if a.has_default_value():
            named.append((a.name, given.get(a.name, a.default_value)))
        else:
            ordered.append(given[a.name])
    module, fp32 = KERNELS[op._opname]["cuda"].__module__, str(torch.backends.cuda.matmul.fp32_precision)
    return Call(module, op._opname, tuple(ordered), tuple(named), gpu, fp32)


def start_processes() -> None:
    """Starts those in which Inductor compiles, where there is a GPU and they are not running yet. They import PyTorch
    and Inductor first, which may take longer than Dynamo needs for a model; Inductor starts them with its first graph.
    """
    try:
        if not torch.cuda.is_available() or not _wanted():
            return
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()
    except Exception as error:
        log.debug("Inductor's processes are not started early: %s", error)


def planned(gm: fx.GraphModule) -> None:
    """Has what a graph's calls of our ops need compiled, where they run on a GPU."""
    if not _wanted():
        return
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            target = node.target
            ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "xfcompile"
            if not ours or target._opname not in KERNELS:
                continue
            try:
                _ask_for(target, node.args, node.kwargs, _outlined_node)
            except Exception as error:
                log.debug("%s is not compiled ahead: %s", node, error)


def lowered(kernel: Any) -> None:
    """The same of Inductor's node of a call, by the layouts that Inductor has decided on."""
    if _is_on_gpu(kernel) and _wanted():
        args, kwargs = kernel.unflatten_args(kernel.inputs, kernel.constant_args)
        _ask_for(kernel.op_overload, args, {**kwargs, **kernel.kwargs}, _outlined_by_inductor)


def _is_on_gpu(kernel: Any) -> bool:
    device = kernel.get_device()
    return device is not None and device.type == "cuda"


def _ask_for(op: torch._ops.OpOverload, args: Any, kwargs: Mapping[str, Any], outlined: Callable[..., Any]) -> None:
    devices: set[torch.device] = set()

    def mapped(x: Any) -> Any:
        return tuple(map(mapped, x)) if isinstance(x, (list, tuple)) else outlined(x, devices)

    made, named = mapped(args), {k: mapped(v) for k, v in kwargs.items()}
    gpu = _gpu_of(devices)
    if gpu is not None:
        submit(call_of(op, made, named, gpu))


def _gpu_of(devices: set[torch.device]) -> Gpu | None:
    """That of tensors on one GPU."""
    if len(devices) != 1 or (device := next(iter(devices))).type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    _keep_beside_inductors(index)
    return Gpu.of(index)


def _keep_beside_inductors(index: int) -> None:
    """Where Triton keeps kernels is decided now, as Inductor decides it when it loads its first one: else they would be
    looked for elsewhere by then."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(index))


def _wanted() -> bool:
    """Whether Inductor has processes that compile, and kernels are compiled at all."""
    from torch._inductor.async_compile import get_compile_threads

    from xfcompile.kernels.attention.tiles import interpreting

    return get_compile_threads() > 1 and not interpreting()


def _outlined_node(x: Any, devices: set[torch.device]) -> Any:
    """Symbolic sizes are as large as they are at the first call."""
    if isinstance(x, fx.Node):
        x = example_of(x)
        if x is None:
            raise ValueError("nothing is known of an argument")
    if isinstance(x, Tensor):
        devices.add(x.device)
        shape, strides = (tuple(map(_hint, n)) for n in (x.shape, x.stride()))
        return Outline.of(shape, strides, _hint(x.storage_offset()), x.dtype)
    return _hint(x) if isinstance(x, (torch.SymInt, torch.SymFloat)) else x


def _hint(n: Any) -> Any:
    """Raises TypeError where none is known."""
    return n if isinstance(n, (int, float)) else type(n.node.hint)(n.node.hint)


def _outlined_by_inductor(x: Any, devices: set[torch.device]) -> Any:
    import sympy
    from torch._inductor.ir import IRNode

    if isinstance(x, (sympy.Expr, torch.SymInt)):
        return _number(x)
    if not isinstance(x, IRNode):
        return x
    device = x.get_device()
    assert device is not None
    devices.add(device)
    offset = x.get_layout().offset if x.maybe_get_layout() is not None else 0
    shape, strides = (tuple(map(_number, n)) for n in (x.get_size(), x.get_stride()))
    return Outline.of(shape, strides, _number(offset), x.get_dtype())


def _number(x: Any) -> int:
    from torch._inductor.virtualized import V

    if isinstance(x, torch.SymInt):  # `int` would have Dynamo compile for this number alone
        return int(_hint(x))
    try:
        return int(x)
    except (TypeError, ValueError):
        return int(V.graph.sizevars.optimization_hint(x))


_lock = threading.Lock()
_asked: set[str] = set()
"""Marks of the calls that were submitted: the layers of a model make the same ones."""
_pending: list[Future[Any]] = []
MANY = 4096
"""Calls that are remembered."""


def _forked() -> None:
    """Of what its parent waits for a process hears nothing."""
    global _lock
    _lock = threading.Lock()
    _pending.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def submit(call: Call) -> None:
    """Has another process compile what a call launches, if none was asked for the same before."""
    from torch._inductor.async_compile import AsyncCompile

    from xfcompile.pretend import compile_call

    environment = _environment()
    mark = _mark(call, environment)
    with _lock:
        if str(mark) in _asked:
            return
        if len(_asked) >= MANY:
            _asked.clear()
        _asked.add(str(mark))
    if mark.exists():
        return
    future = AsyncCompile.process_pool().submit(compile_call, call, environment, str(mark))
    with _lock:
        _pending.append(future)


def _processes_answer() -> bool:
    from torch._inductor.async_compile import AsyncCompile

    first = AsyncCompile._ready_future  # of the first thing that they were asked, which is to answer
    return first is None or first.done()


def _environment() -> dict[str, str]:
    """What Triton compiles by, and keeps it by, which Inductor's processes may have been started without."""
    import torch._inductor.runtime.compile_tasks as tasks

    # Inductor sets it once it compiles a kernel of its own.
    getattr(tasks, "_set_triton_libdevice_path", lambda: None)()
    return {k: v for k, v in os.environ.items() if counts(k)}


def counts(variable: str) -> bool:
    """Whether a variable of the environment is one of these."""
    return variable.startswith("TRITON_") or variable == "TORCHINDUCTOR_CACHE_DIR"


def _mark(call: Call, environment: Mapping[str, str]) -> Path:
    """A file that is there when the call has been compiled by some process: then nothing has to be asked for, nor be
    waited for. Where Triton's cache is emptied it goes too."""
    from triton import knobs

    from xfcompile.identity import package_hash

    what = repr((call, sorted(environment.items()), package_hash(), torch.__version__))
    return Path(knobs.cache.dir) / "xfcompile" / hashlib.sha256(what.encode()).hexdigest()[:32]


def settle() -> None:
    """Returns when nothing is being compiled any more that was submitted, or after `PATIENCE`; at once if the processes
    have not begun: the kernel is compiled here before they would have it."""
    if not _pending or not _processes_answer():
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
