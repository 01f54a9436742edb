"""The dual GEMM in Triton: through descriptors where all rows start at multiples of 16 bytes, and by tiles that fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.fallback import FirstThatRuns
from xfcompile.kernels.attention.fit import DoesNotCompile, NoTilesFit, Unavailable, name_of
from xfcompile.kernels.attention.repeat import Described, Launch
from xfcompile.kernels.attention.tiles import BLACKWELL, HOPPER, device_generation
from xfcompile.kernels.gated_mlp import tiles
from xfcompile.kernels.gated_mlp.operands import Dropout, Operands, starts
from xfcompile.kernels.gated_mlp.programs import Program
from xfcompile.kernels.gated_mlp.tiles import Tiles
from xfcompile.measured import multiprocessors
from xfcompile.site import Layout

log = logging.getLogger(__name__)


def by_triton(
    prepared: Program, operands: Operands, layout: Layout, dropout: Dropout, out: Tensor, save: bool
) -> Callable[..., None]:
    """How a kernel in Triton computes with such tensors, one for few rows or one for many."""
    experts, rows, features, inner = operands.sizes
    interpreted = out.device.type == "cpu"
    gate_start, up_start, step = starts(layout, features)
    bias_strides = [
        s for b in (operands.gate_bias, operands.up_bias) for s in (b.stride() if b is not None else (0, 0))
    ]
    strides = [s for t in (operands.x, operands.gate, operands.up) for s in t.stride()]
    constants: dict[str, Any] = {
        "GATE_BIAS": operands.gate_bias is not None,
        "UP_BIAS": operands.up_bias is not None,
        "SAVE": save,
        "STEP": step,
        "DROPOUT": dropout.p != 0.0,
        "ALIGNED": features % 8 == 0,
        "PRECISION": precision(operands.x.dtype),
        "UPCAST": interpreted and operands.x.dtype == torch.bfloat16,
        "ONE": rows == 1,
    }
    numbers = [rows, features, inner, *strides, *bias_strides, gate_start, up_start, *dropout.numbers]
    if rows <= tiles.FEW_ROWS:
        first = tiles.INTERPRETED_FEW if interpreted else tiles.few(operands.x.dtype, rows, inner)
        kernel = prepared.kernel("gated_few", interpreted)
        return _Fitting(kernel, lambda t: experts * -(-features // t.block_n), first, numbers, constants, inner)
    kind = HOPPER if interpreted else device_generation(out.device)
    first = tiles.INTERPRETED if interpreted else tiles.dual(kind, operands.x.dtype, rows, save)

    def for_any_layout() -> Callable[..., None]:
        def programs(t: Tiles) -> int:
            return experts * -(-rows // t.block_m) * -(-features // t.block_n)

        kernel = prepared.kernel("gated_forward", interpreted)
        return _Fitting(kernel, programs, first, numbers, constants, inner)

    if not _described(operands, kind):
        return for_any_layout()
    sizes = [rows, features, inner, *bias_strides, gate_start, up_start, *dropout.numbers]
    through_tma = _Described(prepared.kernel("gated_forward_tma", interpreted), operands, first, sizes, constants)
    return through_tma if interpreted else FirstThatRuns(through_tma, for_any_layout)


def _described(operands: Operands, kind: str) -> bool:
    """Whether all that is multiplied can be read through descriptors: rows that start at multiples of 16 bytes."""
    tensors = (operands.x, operands.gate, operands.up)
    return (
        kind in (HOPPER, BLACKWELL)
        and operands.x.shape[0] == 1
        and operands.x.dtype.itemsize == 2
        and all(
            t.stride(2) == 1 and t.stride(1) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
        )
    )


class _Fitting:
    """Launches with the first tiles that fit the device."""

    def __init__(
        self,
        kernel: Any,
        programs: Callable[[Tiles], int],
        first: Tiles,
        numbers: list[Any],
        constants: dict[str, Any],
        inner: int,
    ) -> None:
        self.kernel, self.programs, self.first = kernel, programs, first
        self.numbers, self.constants, self.inner = numbers, constants, inner
        self.launch: Launch | None = None
        self.unfit: Unavailable | None = None

    def __call__(self, tensors: list[Tensor]) -> None:
        if self.launch is not None:
            self.launch(tensors)
            return
        if self.unfit is not None:
            raise self.unfit.again()
        try:
            self.launch = self._fitted(tensors)
        except Unavailable as error:
            self.unfit = error.again()
            raise

    def _fitted(self, tensors: list[Tensor]) -> Launch:
        return _first_that_fits([self.first, *tiles.smaller(self.first)], self._made, tensors)

    def _made(self, t: Tiles) -> Launch:
        known = {**self.constants, **_sizes(t), "EVEN_K": self.inner % t.block_k == 0}
        names = self.kernel.arg_names
        ordered = {name: known[name] for name in names if name in known}
        return Launch(self.kernel, self.programs(t), self.numbers, ordered, _options(t))


def _sizes(t: Tiles) -> dict[str, Any]:
    blocks = {"BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_K": t.block_k}
    return {**blocks, "GROUP": t.group, "PARTS": t.parts, "FLATTEN": t.flatten, "STAGES": t.num_stages}


def _options(t: Tiles) -> dict[str, int]:
    return {"num_warps": t.num_warps, "num_stages": t.num_stages}


def _first_that_fits(
    candidates: Iterable[Tiles],
    make: Callable[[Tiles], Launch],
    tensors: list[Tensor],
) -> Launch:
    from triton.runtime.errors import OutOfResources

    failed: DoesNotCompile | None = None
    for t in candidates:
        launch = make(t)
        try:
            launch(tensors)
        except OutOfResources as error:
            log.debug("%s does not fit: %s", t, error)
        except DoesNotCompile as error:
            log.warning("a kernel of a gated MLP does not compile with %s: %s", t, error)
            failed = failed or error
        else:
            return launch
    if failed is not None:
        raise failed.again()
    raise NoTilesFit(f"no tile size of a gated MLP fits {name_of(tensors[0].device)}")


class _Described:
    """Launches of the kernel that reads through descriptors, as many programs as there are multiprocessors."""

    def __init__(
        self, kernel: Any, operands: Operands, t: Tiles, numbers: list[Any], constants: dict[str, Any]
    ) -> None:
        known = {**constants, **_sizes(t)}
        ordered = {name: known[name] for name in kernel.arg_names if name in known}
        rows, features = numbers[:2]
        count = -(-rows // t.block_m) * -(-features // t.block_n)
        device = operands.x.device
        programs = 2 if device.type == "cpu" else multiprocessors(device.index)
        blocks = ((operands.x, t.block_m), (operands.gate, t.block_n), (operands.up, t.block_n))
        described = [_descriptor(v, [block, t.block_k]) for v, block in blocks]
        self.launch = Launch(kernel, min(count, programs), numbers, ordered, _options(t), described)

    def __call__(self, tensors: list[Tensor]) -> None:
        self.launch(tensors)


def _descriptor(x: Tensor, block: list[int]) -> Described:
    """Of the one matrix of [1, M, K], of which such blocks are loaded."""
    shape, strides = tuple(x.shape[1:]), x.stride()[1:]

    def make(x: Tensor) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(x[0], list(shape), list(strides), block)

    return Described(shape, strides, make)
