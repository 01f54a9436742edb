"""Calls of our ops on tensors that are nothing but layouts, on a GPU that is not there: what they launch is compiled.

The op's own function runs, as it does at the first call, and so finds out what that will find out: which kernel, which
tiles, what it is compiled for. Each launch that it comes to has Triton compile and goes no further. This is for
processes that launch nothing themselves, as those of `ahead.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xfcompile.ahead import Call, Gpu, Outline, counts
from xfcompile.kernels.registration import KERNELS

log = logging.getLogger(__name__)

PRETENDED = "cuda:0"
"""Any other would be initialised where there are several, by what PyTorch does before an operation."""


def compile_call(call: Call, environment: dict[str, str], mark: str = "") -> list[str]:
    """Compiles what a call of an op's function launches, in this process, which must not launch anything itself
    meanwhile. Returns the kernels' names.

    environment: those variables (`ahead.counts`) of the process that will launch it. mark: a file that says it is done.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from xfcompile.kernels.attention.repeat import Launch

    importlib.import_module(call.module)
    made: list[str] = []

    def compiled(kernel: Any) -> None:
        made.append(kernel.metadata.name)
        _make_launcher(kernel)

    with ExitStack() as stack:
        modes = (Launch.compiling_only(compiled), torch.no_grad(), FakeTensorMode(), _Addresses())
        setting = instead(torch.backends.cuda.matmul, "fp32_precision", call.fp32)
        for context in (_environment_of(environment), _pretended(call.gpu), setting, *modes):
            stack.enter_context(context)

        def laid_out(x: Any) -> Any:
            if isinstance(x, tuple):
                return [laid_out(y) for y in x]
            if not isinstance(x, Outline):
                return x
            size = x.offset + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True))
            whole = torch.empty(max(size, x.offset), dtype=x.dtype, device=PRETENDED)
            return whole.as_strided(x.shape, x.strides, x.offset)

        KERNELS[call.op]["cuda"](*map(laid_out, call.args), **{k: laid_out(v) for k, v in call.kwargs})
    if mark:
        with contextlib.suppress(OSError):  # then it is asked for again
            Path(mark).parent.mkdir(parents=True, exist_ok=True)
            Path(mark).touch()
    return made


def _make_launcher(kernel: Any) -> None:
    """Triton before 3.7 has a C compiler make the function that launches a kernel of such arguments, which it keeps
    beside the kernels."""
    try:
        from triton.backends.nvidia import driver

        if kernel.metadata.target.backend == "cuda" and hasattr(driver, "make_launcher"):
            driver.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:
        log.debug("no launcher was made ahead: %s", error)


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


@contextmanager
def _environment_of(other: dict[str, str]) -> Iterator[None]:
    before = {k: v for k, v in os.environ.items() if counts(k)}

    def become(variables: dict[str, str]) -> None:
        for name in [k for k in os.environ if counts(k) and k not in variables]:
            del os.environ[name]
        os.environ.update(variables)

    become(other)
    try:
        yield
    finally:
        become(before)


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


_kind: Gpu | None = None


@contextmanager
def _pretended(gpu: Gpu) -> Iterator[None]:
    """As if there were such a GPU, and no memory on it. A process remembers too much of it to pretend another one."""
    global _kind
    import torch._subclasses.fake_tensor as fake_tensor
    from triton.compiler.compiler import make_backend
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
            # Inductor's processes have another assembler (TRITON_PTXAS_PATH), or remember it.
            (type(make_backend(gpu.target)), "hash", lambda self: gpu.compiler),
        ):
            stack.enter_context(instead(owner, name, value))
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
