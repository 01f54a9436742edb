"""The dual GEMM in Triton: through descriptors where all rows start at multiples of 16 bytes, and by tiles that fit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import times
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
        looked_for = _LookedFor("gated_few", prepared.key, operands, first, constants)
        return _Fitting(kernel, lambda t: experts * -(-features // t.block_n), looked_for, numbers, constants, inner)
    kind = HOPPER if interpreted else device_generation(out.device)
    first = tiles.INTERPRETED if interpreted else tiles.dual(kind, operands.x.dtype, rows, save)

    def for_any_layout() -> Callable[..., None]:
        def programs(t: Tiles) -> int:
            return experts * -(-rows // t.block_m) * -(-features // t.block_n)

        kernel = prepared.kernel("gated_forward", interpreted)
        looked_for = _LookedFor("gated_forward", prepared.key, operands, first, constants)
        return _Fitting(kernel, programs, looked_for, numbers, constants, inner)

    if not _described(operands, kind):
        return for_any_layout()
    sizes = [rows, features, inner, *bias_strides, gate_start, up_start, *dropout.numbers]
    looked_for = _LookedFor("gated_forward_tma", prepared.key, operands, first, constants)
    through_tma = _Described(prepared.kernel("gated_forward_tma", interpreted), operands, looked_for, sizes, constants)
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


class _LookedFor:
    """The tiles of one kernel for operands of some sizes. first: those that the table has."""

    def __init__(self, kernel: str, name: str, operands: Operands, first: Tiles, constants: Mapping[str, Any]) -> None:
        experts, rows, features, inner = operands.sizes
        self.name, self.first, self.device = name, first, operands.x.device
        about = (kernel, operands.x.dtype, experts, tiles.padded(rows), features, inner, *constants.items())
        self.kind = (self.device, *about)

    def launch(self, candidates: Iterable[Tiles], make: Callable[[Tiles], Launch], tensors: list[Tensor]) -> Launch:
        """The launch that was made with the first of the candidates that fit, or with the fastest tiles, where they are
        timed."""
        made: dict[Tiles, Launch] = {}

        def launch_with(t: Tiles) -> Any:
            if t not in made:
                made[t] = make(t)
            return made[t](tensors)

        def usual() -> Tiles:
            return _first_that_fits(candidates, launch_with, self.device)

        if self.device.type == "cpu" or not times.wanted(self.name, self.kind):
            return made[usual()]
        search = times.Search(Tiles, self.name, self.kind, self.device)
        return made[search.chosen(usual, tiles.neighbours, lambda t: _fits(t, launch_with), launch_with)]


class _Fitting:
    """Launches with the first tiles that fit the device."""

    def __init__(
        self,
        kernel: Any,
        programs: Callable[[Tiles], int],
        looked_for: _LookedFor,
        numbers: list[Any],
        constants: dict[str, Any],
        inner: int,
    ) -> None:
        self.kernel, self.programs, self.looked_for = kernel, programs, looked_for
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
        first = self.looked_for.first
        return self.looked_for.launch([first, *tiles.smaller(first)], self._made, tensors)

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


def _first_that_fits(candidates: Iterable[Tiles], launch_with: Callable[[Tiles], Any], device: torch.device) -> Tiles:
    from triton.runtime.errors import OutOfResources

    failed: DoesNotCompile | None = None
    for t in candidates:
        try:
            launch_with(t)
        except OutOfResources as error:
            log.debug("%s does not fit: %s", t, error)
        except DoesNotCompile as error:
            log.warning("a kernel of a gated MLP does not compile with %s: %s", t, error)
            failed = failed or error
        else:
            return t
    if failed is not None:
        raise failed.again()
    raise NoTilesFit(f"no tile size of a gated MLP fits {name_of(device)}")


def _fits(t: Tiles, launch_with: Callable[[Tiles], Any]) -> bool:
    from triton.runtime.errors import OutOfResources

    try:
        launch_with(t)
    except (OutOfResources, DoesNotCompile) as error:
        log.debug("%s is not timed: %s", t, error)
        return False
    return True


class _Described:
    """Launches of the kernel that reads through descriptors, as many programs as there are multiprocessors."""

    def __init__(
        self,
        kernel: Any,
        operands: Operands,
        looked_for: _LookedFor,
        numbers: list[Any],
        constants: dict[str, Any],
    ) -> None:
        self.kernel, self.looked_for, self.numbers, self.constants = kernel, looked_for, numbers, constants
        device = operands.x.device
        self.programs = 2 if device.type == "cpu" else multiprocessors(device.index)
        # No tensors are kept, only what they look like.
        self.described = [
            functools.partial(_descriptor, *_outline(v)) for v in (operands.x, operands.gate, operands.up)
        ]
        self.launch: Launch | None = None

    def __call__(self, tensors: list[Tensor]) -> None:
        if self.launch is None:
            self.launch = self.looked_for.launch([self.looked_for.first], self._made, tensors)
        else:
            self.launch(tensors)

    def _made(self, t: Tiles) -> Launch:
        known = {**self.constants, **_sizes(t)}
        ordered = {name: known[name] for name in self.kernel.arg_names if name in known}
        rows, features = self.numbers[:2]
        count = -(-rows // t.block_m) * -(-features // t.block_n)
        blocks = (t.block_m, t.block_n, t.block_n)
        described = [made([block, t.block_k]) for made, block in zip(self.described, blocks, strict=True)]
        return Launch(self.kernel, min(count, self.programs), self.numbers, ordered, _options(t), described)


def _outline(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the one matrix of [1, M, K]."""
    return tuple(x.shape[1:]), x.stride()[1:]


def _descriptor(shape: tuple[int, ...], strides: tuple[int, ...], block: list[int]) -> Described:
    """Of a matrix, of which such blocks are loaded."""

    def make(x: Tensor) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(x[0], list(shape), list(strides), block)

    return Described(shape, strides, make)
