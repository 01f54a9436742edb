"""From tensors to one launch of a generated kernel: how rows lie in memory, and how large the tiles are."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile.kernels.attention import cache, fit
from xfcompile.kernels.attention.repeat import Blank, Launch
from xfcompile.kernels.attention.tiles import HOPPER, device_generation, interpreting
from xfcompile.kernels.bias_act_dropout import launch_hopper
from xfcompile.kernels.bias_act_dropout.formula import parse
from xfcompile.kernels.bias_act_dropout.template import module
from xfcompile.kernels.registration import Site
from xfcompile.measured import Fact, Measured

log = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)


MANY = 8 << 32
"""Elements; groups of eight of no more than these have numbers of 32 bits."""


@dataclass(frozen=True)
class Tile:
    """A program's share of the result. block_k: of the features that a product sums over, a step."""

    block_m: int
    block_n: int
    num_warps: int
    block_k: int = 0
    num_stages: int = 1


@dataclass(frozen=True)
class Share:
    """A program's share without a product: so many elements a step, in rows of `widest` columns at most. stages: steps
    that are read at a time. programs: about so many share all steps, where there are more."""

    elements: int
    widest: int
    num_warps: int
    stages: int
    programs: int


_MEASURED = Measured(
    "examples/bench_bias_bandwidth.py", "2026-11-29", "H200, torch 2.11, triton 3.6",
    "examples/results/bias_bandwidth_h200.json",
)  # fmt: skip

# The best on average over three formulas. A step is of 16 elements a thread, or 8, in loads of 16 bytes. Of a backward
# more programs would only leave more sums to be added up, each of its own rows.
POINTWISE = {
    "forward": Fact(Share(2048, 1024, 4, 3, 4096), _MEASURED),
    "backward": Fact(Share(1024, 128, 4, 3, 2048), _MEASURED),
}

# Not measured yet. By bytes of an element.
PRODUCT = {2: Fact(Tile(128, 128, 8, 64, 3)), 4: Fact(Tile(64, 64, 4, 32, 3))}
GROUP = 8
"""Blocks of rows that run beside each other, so that a weight's columns are read from cache."""

INTERPRETED = Tile(16, 32, 4, 32)


@functools.cache
def source_of_kernel(text: str, vectors: int, tensors: int, p: float) -> str:
    """The text of a formula's module."""
    return module(parse(text, vectors, tensors), p)


@functools.cache
def _module(text: str, vectors: int, tensors: int, p: float, interpreted: bool) -> ModuleType:
    source = source_of_kernel(text, vectors, tensors, p)
    path = cache.store(source, "bias_act_dropout_")
    return cache.load(path, f"xfcompile_{path.stem}{'_interpreted' if interpreted else ''}")


def kernel(name: str, text: str, vectors: int, tensors: int, p: float) -> Any:
    """A Triton function of the generated module, compiled or interpreted: which, `triton.jit` decides at its import."""
    return getattr(_module(text, vectors, tensors, p, interpreting()), name)


# -- layout -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Tensors [.., N] as rows: `inner` rows to a group, and of each tensor whether it is a copy, and the strides of
    groups, rows and columns."""

    tensors: tuple[Tensor, ...]
    copies: tuple[bool, ...]
    count: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]

    @property
    def copied(self) -> tuple[bool, ...]:
        """Empty where none is a copy."""
        return self.copies if any(self.copies) else ()

    @property
    def split(self) -> bool:
        return any(outer != inner_stride * self.inner for outer, inner_stride, _ in self.strides)


def rows_of(*tensors: Tensor) -> Rows:
    """As rows, grouped where that makes the fewest copies: none, where leading dimensions have two strides at most, and
    these change at one place. All but the last size must be the same."""
    lead = tensors[0].shape[:-1]
    count = lead.numel()

    def at(d: int) -> list[tuple[int, int, int] | None]:
        return [_strides(x, d) for x in tensors]

    best = min(range(max(len(lead), 1)), key=lambda d: (at(d).count(None), -d))
    taken = tuple(x if s is not None else x.contiguous() for x, s in zip(tensors, at(best), strict=True))
    strides = tuple(s for x in taken if (s := _strides(x, best)) is not None)
    copies = tuple(s is None for s in at(best))
    return Rows(taken, copies, count, max(lead[best:].numel(), 1), strides)


def _strides(x: Tensor, d: int) -> tuple[int, int, int] | None:
    """The strides of groups, rows and columns where dimensions from d on are the rows of a group."""
    inner = _merged(x, d, x.ndim - 1)
    outer = _merged(x, 0, d)
    if inner is None or outer is None:
        return None
    rows = x.shape[d:-1].numel()
    return outer if d > 0 else inner * rows, inner, x.stride(-1)


def _merged(x: Tensor, start: int, end: int) -> int | None:
    """The stride of some neighbouring dimensions, taken as one; None if they have no single one."""
    dims = [d for d in range(start, end) if x.shape[d] != 1]
    for a, b in itertools.pairwise(dims):
        if x.stride(a) != x.stride(b) * x.shape[b]:
            return None
    return x.stride(dims[-1]) if dims else 0


# -- launches -----------------------------------------------------------------------------------------------------

MANY_CALLS = 4096
"""Layouts that are remembered; sizes that change at every call make new ones."""

_calls: dict[object, Callable[..., Any] | None] = {}
"""What runs tensors of one layout; None where the kernels do not."""


def _remembered(key: object, make: Callable[[], Callable[..., Any] | None]) -> Callable[..., Any] | None:
    call = _calls.get(key, key)
    if call is key:
        if len(_calls) >= MANY_CALLS:
            _calls.clear()
        call = _calls[key] = make()
    return call  # type: ignore[return-value]


def _layout_of(x: Tensor | None) -> object:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def _keep(site: Site | None, call: Callable[..., Any] | None, x: Tensor) -> None:
    """What a site comes to again, unless it depends on a setting."""
    if site is not None and not _setting(x):
        site.keep(call, x.dtype)


def _setting(x: Tensor) -> object:
    """What may change between calls besides their tensors: whether Triton interprets, and products in fp32."""
    if x.device.type == "cpu":
        return interpreting()
    return x.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32


def forward(
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
    dtype: torch.dtype,
    check: Callable[..., bool],
    site: Site | None = None,
) -> Tensor | None:
    """The result, contiguous; None where the kernels do not run. Raises `fit.Unavailable`.

    check: whether they do, for tensors, the first of all that are laid out like these.
    """
    if site is not None and site.found is not None:
        return site.found(x, bias, vectors, tensors, seed, stream)
    given = (x, bias, *vectors, *tensors)
    key = ("forward", text, p, dtype, len(vectors), seed is None, _setting(x), *map(_layout_of, given))

    def make() -> Callable[..., Tensor] | None:
        if not check(x, x.shape[-1], bias, vectors, tensors, dtype):
            return None
        return _forward(x, bias, vectors, tensors, text, p, dtype)

    call = _remembered(key, make)
    _keep(site, call, x)
    return None if call is None else call(x, bias, vectors, tensors, seed, stream)


def _forward(
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    text: str,
    p: float,
    dtype: torch.dtype,
) -> Callable[..., Tensor]:
    rows = rows_of(x, *tensors)
    n = x.shape[-1]
    tile = pointwise(n, "forward")
    numbers = [rows.count, rows.inner, *itertools.chain(*rows.strides[1:]), *rows.strides[0]]
    parts, loop = _loop(rows.count, n, tile, "forward")
    constants = _constants(n, tile, rows, x.dtype, bias) | loop
    programs = parts * -(-n // tile.block_n)
    launch = _launch("forward", (text, len(vectors), len(tensors), p), programs, numbers, constants, tile)
    blank = Blank(x.shape, dtype, x.device)
    copied = rows.copied

    def call(
        x: Tensor,
        bias: Tensor | None,
        vectors: Sequence[Tensor],
        tensors: Sequence[Tensor],
        seed: Tensor | None,
        stream: int,
    ) -> Tensor:
        out = blank()
        if copied:
            x, *tensors = _taken((x, *tensors), copied)
        launch([out, x, _or(bias, out), *map(_dense, vectors), *tensors, _or(seed, out)], [stream])
        return out

    return call


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
    dtype: torch.dtype,
    save: bool,
    check: Callable[..., bool],
    site: Site | None = None,
) -> tuple[Tensor, Tensor] | None:
    """x [.., K], weight [N, K]; the result [.., N] and, where it is saved, the product without its bias, else nothing.
    None where the kernels do not run. check: as that of `forward`."""
    if site is not None and site.found is not None:
        return site.found(x, weight, bias, vectors, tensors, seed, stream)
    given = (x, weight, bias, *vectors, *tensors)
    key = ("linear", text, p, dtype, save, len(vectors), seed is None, _setting(x), *map(_layout_of, given))

    def make() -> Callable[..., tuple[Tensor, Tensor]] | None:
        n = weight.shape[0]
        if not check(x, n, bias, vectors, tensors, dtype, weight) or n == 0:
            return None
        return _linear(x, weight, bias, vectors, tensors, text, p, dtype, save, check)

    call = _remembered(key, make)
    _keep(site, call, x)
    return None if call is None else call(x, weight, bias, vectors, tensors, seed, stream)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    text: str,
    p: float,
    dtype: torch.dtype,
    save: bool,
    check: Callable[..., bool],
) -> Callable[..., tuple[Tensor, Tensor]]:
    from triton.runtime.errors import OutOfResources

    rows = rows_of(x, *tensors)
    n, k = weight.shape
    tile = INTERPRETED if x.device.type == "cpu" else PRODUCT[x.dtype.itemsize].value
    numbers = [rows.count, rows.inner, *itertools.chain(*rows.strides[1:]), *rows.strides[0], *weight.stride(), k]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    constants = _constants(n, tile, rows, x.dtype, bias) | {
        "BLOCK_K": tile.block_k,
        "GROUP": GROUP,
        "EVEN_K": k % tile.block_k == 0,
        "SAVE": save,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": interpreting() and x.dtype in HALF,
    }
    programs = -(-rows.count // tile.block_m) * -(-n // tile.block_n)
    launch = _launch("linear", (text, len(vectors), len(tensors), p), programs, numbers, constants, tile)
    shape = (*x.shape[:-1], n)
    blank_out, blank_pre = Blank(shape, dtype, x.device), Blank(shape if save else (0,), x.dtype, x.device)
    copied = rows.copied
    fits = True

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vectors: Sequence[Tensor],
        tensors: Sequence[Tensor],
        seed: Tensor | None,
        stream: int,
    ) -> tuple[Tensor, Tensor]:
        nonlocal fits
        if fits:
            out, pre = blank_out(), blank_pre()
            left, *added = _taken((x, *tensors), copied) if copied else (x, *tensors)
            given = [out, pre if save else out, left, weight, _or(bias, out), *map(_dense, vectors), *added]
            try:
                launch([*given, _or(seed, out)], [stream])
                return out, pre
            except (OutOfResources, fit.Unavailable) as error:
                fits = False
                where = f"the tiles of a linear with its activation do not fit {fit.name_of(x.device)} ({error})"
                why = error if isinstance(error, fit.Unavailable) else fit.NoTilesFit(where)
                fit.give_way(why, text, "it is computed by PyTorch's product and a kernel after it")
        product = F.linear(x, weight)
        made = forward(product, bias, vectors, tensors, seed, stream, text, p, dtype, check)
        assert made is not None
        return made, product if save else blank_pre()

    if x.device.type != "cuda" or device_generation(x.device) != HOPPER:
        return call
    outputs = (blank_out(), blank_pre())
    reason = launch_hopper.declines(x, weight, bias, vectors, tensors, text, outputs, save)
    if reason is not None:
        log.debug("not by the kernel for Hopper: %s", reason)
        return call
    return launch_hopper.Linear(x, weight, bias, vectors, tensors, text, p, outputs, save, call)


Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None]]
"""Of x, of the bias and of vectors; None where none is wanted."""


def backward(
    dout: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
    tensors: int,
    needed: Sequence[bool],
    dtype: torch.dtype,
    runs: Callable[..., bool],
) -> Gradients | None:
    """The gradient of x, contiguous, in `dtype`; and in fp32 those of the bias and of the vectors, which are sums over
    rows. needed: of x, the bias and each vector. None where the kernels do not run, which `runs` says of tensors."""
    given = (dout, x, bias, *vectors)
    key = (
        "backward",
        text,
        p,
        dtype,
        tensors,
        *needed,
        seed is None,
        POINTWISE["backward"].value.programs,
        _setting(dout),
        *map(_layout_of, given),
    )

    def make() -> Callable[..., Gradients] | None:
        if not runs(*[t for t in given if t is not None]):
            return None
        return _backward(dout, x, bias, vectors, text, p, tensors, needed, dtype)

    call = _remembered(key, make)
    return None if call is None else call(dout, x, bias, vectors, seed, stream)


def _backward(
    dout: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    text: str,
    p: float,
    tensors: int,
    needed: Sequence[bool],
    dtype: torch.dtype,
) -> Callable[..., Gradients]:
    needs_x, needs_bias, *needs = needed
    rows = rows_of(dout) if x is None else rows_of(dout, x)
    n = dout.shape[-1]
    tile = pointwise(n, "backward")
    parts, loop = _loop(rows.count, n, tile, "backward")
    numbers = [rows.count, rows.inner, *rows.strides[0], *rows.strides[-1]]
    constants = _constants(n, tile, rows, dout.dtype if x is None else x.dtype, bias) | {
        **loop,
        "NEED_X": needs_x,
        "NEED_BIAS": needs_bias,
        **{f"NEED_V{k}": yes for k, yes in enumerate(needs)},
    }
    programs = parts * -(-n // tile.block_n)
    launch = _launch("backward", (text, len(vectors), tensors, p), programs, numbers, constants, tile)
    blank = Blank(dout.shape, dtype, dout.device)
    part = Blank((parts, n), torch.float32, dout.device)
    copied = rows.copied

    def call(
        dout: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        vectors: Sequence[Tensor],
        seed: Tensor | None,
        stream: int,
    ) -> Gradients:
        dx = blank() if needs_x else None
        sums = [part() if yes else None for yes in (needs_bias, *needs)]
        laid: tuple[Tensor, ...] = (dout,) if x is None else (dout, x)
        if copied:
            laid = _taken(laid, copied)
        dout = laid[0]
        given = [_or(dx, dout), *[dout if d is None else d for d in sums], dout, laid[-1]]
        launch([*given, _or(bias, dout), *map(_dense, vectors), _or(seed, dout)], [stream])
        dbias, *dv = [None if d is None else d.sum(0) for d in sums]
        return dx, dbias, dv

    return call


def _taken(tensors: tuple[Tensor, ...], copied: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return tuple([x.contiguous() if yes else x for x, yes in zip(tensors, copied, strict=True)])


def _launch(
    name: str,
    program: tuple[str, int, int, float],
    programs: int,
    numbers: Sequence[int],
    constants: dict[str, Any],
    tile: Tile,
) -> Launch:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Launch(kernel(name, *program), programs, numbers, constants, options)


def _constants(n: int, tile: Tile, rows: Rows, dtype: torch.dtype, bias: Tensor | None) -> dict[str, Any]:
    return {
        "N": n,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SPLIT": rows.split,
        "GROUPED": n % 8 == 0,
        "FEW": rows.count * n <= MANY,
        "FAST": fast(dtype),
        "BIASED": bias is not None,
    }


def _loop(rows: int, n: int, tile: Tile, kernel: str) -> tuple[int, dict[str, Any]]:
    """How many parts rows are in, a program's each, and what the kernel's loop over these is compiled for."""
    share = POINTWISE[kernel].value
    count = -(-rows // tile.block_m)
    steps = max(1, count * -(-n // tile.block_n) // share.programs)
    steps = 1 << (steps - 1).bit_length()  # few kernels
    part = steps * tile.block_m
    even = rows % part == 0 and n % tile.block_n == 0
    return -(-rows // part), {"ROWS": part, "STAGES": min(share.stages, steps), "EVEN": even}


def pointwise(n: int, kernel: str) -> Tile:
    """Tiles of the kernels without a product."""
    if interpreting():
        return Tile(8, 32, 4)
    share = POINTWISE[kernel].value
    block_n = min(max(1 << (n - 1).bit_length(), 8), share.widest)
    return Tile(max(share.elements // block_n, 1), block_n, share.num_warps)


def fast(dtype: torch.dtype) -> int:
    """See `xfcompile.kernels.pointwise`."""
    if dtype not in HALF:
        return 0
    return 1 if interpreting() or torch.version.hip is not None else 2


def _dense(v: Tensor) -> Tensor:
    """A vector, which is small, with its elements beside each other."""
    return v if v.stride(0) == 1 else v.contiguous()


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """In place of a tensor that is not there, one that the kernel does not look at."""
    return other if x is None else _dense(x) if x.ndim == 1 else x
