"""From tensors to launches of the generated kernels: arguments, tile sizes, and smaller ones where they do not fit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import Tensor

from xfcompile.kernels import philox
from xfcompile.kernels.attention import cache
from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.fallback import FirstThatRuns
from xfcompile.kernels.attention.fit import DoesNotCompile, NoTilesFit, Unavailable, name_of
from xfcompile.kernels.attention.repeat import Blank, Described, Launch, aligned
from xfcompile.kernels.attention.tiles import BLACKWELL, HOPPER, device_generation
from xfcompile.kernels.gated_mlp import codegen, launch_few, launch_hopper, reference, tiles
from xfcompile.kernels.gated_mlp.tiles import Tiles
from xfcompile.kernels.gemm.launch import multiprocessors
from xfcompile.kernels.registration import Site
from xfcompile.site import Layout

log = logging.getLogger(__name__)

PREFIX = "gated_mlp_"


@dataclass(frozen=True)
class Program:
    """A generated module in this process: its formula, its file, and the calls that were made, by the layout of their
    tensors."""

    key: str
    formula: sympy.Expr
    source: str
    calls: dict[object, Callable[..., Any]] = field(default_factory=dict)

    def kernel(self, name: str, interpreted: bool) -> Any:
        """The Triton function, compiled or interpreted: which one `triton.jit` decides when the file is imported."""
        return getattr(_module(self.key, interpreted), name)


_programs: dict[str, Program] = {}


@functools.cache
def _module(key: str, interpreted: bool) -> ModuleType:
    path = cache.store(_programs[key].source, PREFIX)
    return cache.load(path, f"xfcompile_{PREFIX}{key}{'_interpreted' if interpreted else ''}")


def prepare(formula: sympy.Expr) -> str:
    """Generates the kernels of a formula and stores their source; returns the key that the ops are called with.

    Raises evaluate.Unsupported where the formula has no Triton form.
    """
    source = codegen.generate(formula)
    key = cache.key_of(source)
    if key not in _programs:
        log.info("gated MLP kernels %s: %s", cache.store(source, PREFIX), formula)
        _programs[key] = Program(key, formula, source)
    return key


def program(key: str) -> Program:
    """The prepared kernels; those that another process prepared are read back from the cache directory."""
    if key not in _programs:
        source = cache.stored(key, "gated_mlp", "gated_mlp.prepare(formula)", PREFIX)
        module = cache.load(cache.store(source, PREFIX), f"xfcompile_{PREFIX}{key}_formula")
        _programs[key] = Program(key, codegen.parse(module.FORMULA), source)
    return _programs[key]


def source_of_kernel(key: str) -> str:
    """The text of a kernel's module."""
    return program(key).source


@dataclass(frozen=True)
class Operands:
    """x [E, M, K]; gate and up [E, N, K] and their biases [E, N] or None, views of what the op was given."""

    x: Tensor
    gate: Tensor
    up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Experts, rows, features, inner."""
        return (*self.x.shape[:2], self.gate.shape[1], self.x.shape[2])


@dataclass(frozen=True)
class Dropout:
    """p of the product, and an int64 tensor of one element that is the seed (None where p is 0)."""

    seed: Tensor | None = None
    p: float = 0.0

    @property
    def numbers(self) -> list[Any]:
        """threshold and scale, as the kernels take them."""
        return [philox.threshold(self.p), float(philox.scale(self.p))]


MANY_CALLS = 1024
"""Layouts that are remembered of a kernel; row counts that change at every call make new ones."""


def _remembered(program: Program, layout: object, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    call = program.calls.get(layout)
    if call is None:
        if len(program.calls) >= MANY_CALLS:
            program.calls.clear()
        call = program.calls[layout] = make()
    return call


def _layout_of(x: Tensor | None) -> object:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)


def starts(layout: Layout, features: int) -> tuple[int, int, int]:
    """Where gate's and up's features start in what holds both, and the step between neighbours."""
    gate, up = reference.STARTS[layout]
    return (gate, up, 2) if reference.interleaved(layout) else (gate * features, up * features, 1)


def three(x: Tensor) -> Tensor:
    """[M, K] to [1, M, K]; what has experts is that already."""
    return x if x.ndim == 3 else x.unsqueeze(0)


def operands_of(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    layout: Layout,
) -> Operands:
    """Views of the op's arguments."""
    gate, up = (weight, up_weight) if up_weight is not None else reference.parts(weight, layout, -2)
    biases = [b if b is None or x.ndim == 3 else b.unsqueeze(0) for b in (gate_bias, up_bias)]
    return Operands(three(x), three(gate), three(up), biases[0], biases[1])


def outputs(
    x: Tensor, weight: Tensor, up_weight: Tensor | None, save: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out [.., M, N] and, if they are kept, both projections [.., M, 2 N], else nothing."""
    features = weight.shape[-2] // (1 if up_weight is not None else 2)
    out = x.new_empty((*x.shape[:-1], features), dtype=dtype)
    return out, x.new_empty((*x.shape[:-1], 2 * features) if save else (0,))


def forward(
    key: str,
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    layout: Layout,
    save: bool,
    dtype: torch.dtype,
    seed: Tensor | None,
    p: float,
    check: Callable[[], None],
    site: Site | None = None,
) -> tuple[Tensor, Tensor]:
    """What `outputs` says, filled.

    check: called at the first of all calls with such tensors. Raises `Unavailable` where no kernel can be launched.
    """
    prepared = _programs.get(key) or program(key)
    seed = seed if p != 0.0 else None
    given = (x, weight, up_weight, gate_bias, up_bias, seed)
    usual = site is not None and aligned(*given)
    if site is not None and usual and site.found is not None:
        return site.found(*given)
    setting = x.dtype is torch.float32 and precision(x.dtype)
    described = ("forward", layout, save, dtype, p, setting, *map(_layout_of, given))

    def make() -> Callable[..., tuple[Tensor, Tensor]]:
        check()
        return _Forward(prepared, x, weight, up_weight, gate_bias, up_bias, layout, save, dtype, Dropout(seed, p))

    call = _remembered(prepared, described, make)
    if site is not None and usual:
        site.keep(call, x.dtype)
    return call(*given)


class _Forward:
    """Calls of the dual GEMM with tensors of one layout."""

    def __init__(
        self,
        prepared: Program,
        x: Tensor,
        weight: Tensor,
        up_weight: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        layout: Layout,
        save: bool,
        dtype: torch.dtype,
        dropout: Dropout,
    ) -> None:
        self.layout, self.save = layout, save
        out, saved = outputs(x, weight, up_weight, save, dtype)
        self.out, self.saved = Blank.like(out), Blank.like(saved)
        self.ready: Launch | launch_hopper.Hopper | None = None
        self.empty = out.numel() == 0
        if self.empty:
            return
        operands = operands_of(x, weight, up_weight, gate_bias, up_bias, layout)
        self.launch = _forward(prepared, operands, layout, dropout, three(out), three(saved) if save else None)
        # Gate and up start so many bytes after what they are views of.
        self.to_gate = operands.gate.data_ptr() - weight.data_ptr()
        self.to_up = operands.up.data_ptr() - (weight if up_weight is None else up_weight).data_ptr()

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        up_weight: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, saved = self.out(), self.saved()
        if self.empty:
            return out, saved
        ready = self.ready
        if ready is not None:
            # In place of what is not there, pointers that are not looked at.
            start, gate = x.data_ptr(), weight.data_ptr()
            pointers = [
                start,
                gate + self.to_gate,
                (gate if up_weight is None else up_weight.data_ptr()) + self.to_up,
                out.data_ptr(),
                saved.data_ptr() if self.save else start,
                start if gate_bias is None else gate_bias.data_ptr(),
                start if up_bias is None else up_bias.data_ptr(),
                start if seed is None else seed.data_ptr(),
            ]
            if ready.repeat(pointers) is not None:
                return out, saved
        at = operands_of(x, weight, up_weight, gate_bias, up_bias, self.layout)
        tensors = [
            at.x,
            at.gate,
            at.up,
            three(out),
            three(saved) if self.save else None,
            at.gate_bias,
            at.up_bias,
            seed,
        ]
        self.launch([at.x if t is None else t for t in tensors])
        self.ready = _come_to(self.launch)
        return out, saved


def _come_to(runner: Any) -> Launch | launch_hopper.Hopper:
    """The launch that a runner has come to."""
    while not hasattr(runner, "repeat"):
        runner = runner.launch
    return runner


def _forward(
    prepared: Program, operands: Operands, layout: Layout, dropout: Dropout, out: Tensor, saved: Tensor | None
) -> Callable[..., None]:
    """How such tensors are computed with, from now on."""
    if out.device.type != "cuda" or device_generation(out.device) != HOPPER:
        return _by_triton(prepared, operands, layout, dropout, out, saved is not None)
    *start, step = starts(layout, out.shape[2])
    drops = dropout.p != 0.0
    if launch_few.declines(prepared.formula, operands, out, drops) is None:
        few = launch_few.Few(prepared.formula, operands, (*start, step), saved is not None)
        return FirstThatRuns(few, lambda: _by_triton(prepared, operands, layout, dropout, out, saved is not None))
    reason = launch_hopper.declines(prepared.formula, operands, out, saved, step, drops)
    if reason is not None:
        log.debug("not by the kernel for Hopper: %s", reason)
        return _by_triton(prepared, operands, layout, dropout, out, saved is not None)
    dropping = dropout.numbers if drops else []
    first = launch_hopper.Hopper(prepared.formula, operands, None if saved is None else start, dropping)
    return FirstThatRuns(first, lambda: _by_triton(prepared, operands, layout, dropout, out, saved is not None))


def _by_triton(
    prepared: Program, operands: Operands, layout: Layout, dropout: Dropout, out: Tensor, save: bool
) -> Callable[..., None]:
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


def product(key: str, saved: Tensor, layout: Layout, dropout: Dropout, out: Tensor) -> None:
    """Fills out [.., M, N] from saved [.., M, 2 N]."""
    prepared = _programs.get(key) or program(key)
    if out.numel() == 0:
        return
    features = out.shape[-1]
    tensors = [saved, out, dropout.seed]
    described = ("product", layout, dropout.p, *map(_layout_of, tensors))

    def make() -> Callable[..., None]:
        numbers = [out.numel() // features, features, *starts(layout, features)[:2]]
        return _pointwise(prepared, "gated_product", out, numbers, layout, dropout, {})

    call = _remembered(prepared, described, make)
    call([saved if t is None else t for t in tensors])


def backward(
    key: str, dout: Tensor, saved: Tensor, layout: Layout, seed: Tensor | None, p: float, product: bool
) -> tuple[Tensor, Tensor]:
    """grad [.., M, 2 N], laid out as saved, from dout [.., M, N]; and the product [.., M, N] if it is wanted, else
    nothing."""
    prepared = _programs.get(key) or program(key)
    seed = seed if p != 0.0 else None
    tensors = (dout, saved, seed)
    described = ("backward", layout, p, product, *map(_layout_of, tensors))

    def make() -> Callable[..., tuple[Tensor, Tensor]]:
        return _backward(prepared, dout, saved, layout, Dropout(seed, p), product)

    return _remembered(prepared, described, make)(*tensors)


def backward_outputs(dout: Tensor, saved: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    """Memory for what `backward` returns."""
    return torch.empty_like(saved), dout.new_empty(dout.shape if product else (0,))


def _backward(
    prepared: Program, dout: Tensor, saved: Tensor, layout: Layout, dropout: Dropout, product: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    blank_grad, blank_made = (Blank.like(x) for x in backward_outputs(dout, saved, product))
    if dout.numel() == 0:
        return lambda *tensors: (blank_grad(), blank_made())
    features = dout.shape[-1]
    whole = three(dout)
    sizes = [dout.numel() // features, features, whole.shape[1], *whole.stride()]
    numbers = [*sizes, *starts(layout, features)[:2]]
    launch = _pointwise(prepared, "gated_backward", dout, numbers, layout, dropout, {"PRODUCT": product})

    def call(dout: Tensor, saved: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        grad, made = blank_grad(), blank_made()
        launch([dout, saved, grad, made if product else saved, saved if seed is None else seed])
        return grad, made

    return call


def _pointwise(
    prepared: Program,
    name: str,
    like: Tensor,
    numbers: list[Any],
    layout: Layout,
    dropout: Dropout,
    more: dict[str, Any],
) -> Callable[..., None]:
    interpreted = like.device.type == "cpu"
    block_m, block_n, warps = tiles.INTERPRETED_POINTWISE if interpreted else tiles.POINTWISE
    rows, features = numbers[:2]
    known = {
        **more,
        "STEP": starts(layout, features)[2],
        "DROPOUT": dropout.p != 0.0,
        "ALIGNED": features % 8 == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    kernel = prepared.kernel(name, interpreted)
    ordered = {n: known[n] for n in kernel.arg_names if n in known}
    programs = -(-rows // block_m) * -(-features // block_n)
    return Launch(kernel, programs, [*numbers, *dropout.numbers], ordered, {"num_warps": warps})
