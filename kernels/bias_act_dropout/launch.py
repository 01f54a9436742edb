"""From tensors to one launch of a generated kernel: how rows lie in memory, and how large the tiles are."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile.kernels.attention import cache, fit
from xfcompile.kernels.attention.repeat import Launch
from xfcompile.kernels.attention.tiles import interpreting
from xfcompile.kernels.bias_act_dropout.formula import parse
from xfcompile.kernels.bias_act_dropout.template import module
from xfcompile.measured import Fact

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)


@dataclass(frozen=True)
class Tile:
    """A program's share of the result. block_k: of the features that a product sums over, a step."""

    block_m: int
    block_n: int
    num_warps: int
    block_k: int = 0
    num_stages: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class Share:
    """A program's share without a product: so many elements, in rows of `widest` columns at most."""

    elements: int
    widest: int
    num_warps: int


# Not measured yet (examples/bench_bias_tiles.py), for no hardware. Forward: 32 elements a thread, in 4
# loads. Backward: half of it a step, as sums over rows stand in registers too.
POINTWISE = {"forward": Fact(Share(4096, 1024, 4)), "backward": Fact(Share(2048, 256, 4))}

PROGRAMS = 2048
"""Of a backward, about: more would only leave more sums to be added up, each of its own rows."""

# Not measured yet either. By bytes of an element.
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
    """Tensors [.., N] as rows: `inner` rows to a group, and of each tensor the strides of groups, rows and columns."""

    tensors: tuple[Tensor, ...]
    count: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]

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
    return Rows(taken, count, max(lead[best:].numel(), 1), strides)


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


def forward(
    out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
) -> None:
    """Into `out`, contiguous. Raises `fit.Unavailable`."""
    rows = rows_of(x, *tensors)
    n = x.shape[-1]
    tile = pointwise(n, "forward")
    given = [out, rows.tensors[0], _or(bias, out), *map(_dense, vectors), *rows.tensors[1:], _or(seed, out)]
    numbers = [rows.count, rows.inner, *itertools.chain(*rows.strides[1:]), *rows.strides[0]]
    constants = _constants(n, tile, rows, x.dtype, bias)
    programs = -(-rows.count // tile.block_m) * -(-n // tile.block_n)
    key = ("forward", text, p, programs, *_signature(given), *numbers, *constants.values())
    _launch(key, "forward", (text, len(vectors), len(tensors), p), programs, constants, tile)(given, numbers, [stream])


def linear(
    out: Tensor,
    pre: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
) -> None:
    """x [.., K], weight [N, K]; into `out` [.., N] and, where it is there, `pre`: the product without its bias."""
    rows = rows_of(x, *tensors)
    n, k = weight.shape
    tile = INTERPRETED if x.device.type == "cpu" else PRODUCT[x.dtype.itemsize].value
    given = [out, _or(pre, out), rows.tensors[0], weight, _or(bias, out), *map(_dense, vectors), *rows.tensors[1:]]
    given.append(_or(seed, out))
    numbers = [rows.count, rows.inner, *itertools.chain(*rows.strides[1:]), *rows.strides[0], *weight.stride(), k]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    constants = _constants(n, tile, rows, x.dtype, bias) | {
        "BLOCK_K": tile.block_k,
        "GROUP": GROUP,
        "EVEN_K": k % tile.block_k == 0,
        "SAVE": pre is not None,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": interpreting() and x.dtype in HALF,
    }
    programs = -(-rows.count // tile.block_m) * -(-n // tile.block_n)
    key = ("linear", text, p, programs, *_signature(given), *numbers, *constants.values())
    launch = _launch(key, "linear", (text, len(vectors), len(tensors), p), programs, constants, tile)
    if key not in _unfit:
        from triton.runtime.errors import OutOfResources

        try:
            launch(given, numbers, [stream])
            return
        except (OutOfResources, fit.Unavailable) as error:
            _unfit.add(key)
            where = f"the tiles of a linear with its activation do not fit {fit.name_of(x.device)} ({error})"
            why = error if isinstance(error, fit.Unavailable) else fit.NoTilesFit(where)
            fit.give_way(why, text, "it is computed by PyTorch's product and a kernel after it")
    product = F.linear(x, weight)
    if pre is not None:
        pre.copy_(product)
    forward(out, product, bias, vectors, tensors, seed, stream, text, p)


def backward(
    dx: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
    tensors: int,
    needs_bias: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Into `dx`, contiguous, where it is there; the sums over rows for the bias, and for each vector that needs one.
    Raises `fit.Unavailable`."""
    rows = rows_of(dout) if x is None else rows_of(dout, x)
    n = dout.shape[-1]
    tile = pointwise(n, "backward")
    count = -(-rows.count // tile.block_m)
    steps = max(1, count * -(-n // tile.block_n) // PROGRAMS)
    steps = 1 << (steps - 1).bit_length()  # few kernels
    parts = -(-count // steps)

    def partial(needed: bool) -> Tensor | None:
        return dout.new_empty((parts, n), dtype=torch.float32) if needed else None

    dbias, dv = partial(needs_bias), [partial(needed) for needed in needs]
    given = [_or(dx, dout), _or(dbias, dout), *(_or(d, dout) for d in dv), rows.tensors[0], _or(rows.tensors[-1], dout)]
    given += [_or(bias, dout), *map(_dense, vectors), _or(seed, dout)]
    numbers = [rows.count, rows.inner, *rows.strides[0], *rows.strides[-1]]
    dtype = dout.dtype if x is None else x.dtype
    constants = _constants(n, tile, rows, dtype, bias) | {
        "ROWS": steps * tile.block_m,
        "NEED_X": dx is not None,
        "NEED_BIAS": needs_bias,
        **{f"NEED_V{k}": needed for k, needed in enumerate(needs)},
    }
    programs = parts * -(-n // tile.block_n)
    key = ("backward", text, p, programs, *_signature(given), *numbers, *constants.values())
    _launch(key, "backward", (text, len(vectors), tensors, p), programs, constants, tile)(given, numbers, [stream])
    return (None if dbias is None else dbias.sum(0)), [None if d is None else d.sum(0) for d in dv]


MANY_CALLS = 4096
"""Launches that are remembered; row counts that change at every call make new ones."""

_launches: dict[Any, Launch] = {}
_unfit: set[Any] = set()
"""Those of products for which a device has too little shared memory, or Triton an error."""


def _launch(
    key: Any, name: str, program: tuple[str, int, int, float], programs: int, constants: dict[str, Any], tile: Tile
) -> Launch:
    """A launch for tensors laid out like this, made once."""
    key = (*key, tile, interpreting())
    found = _launches.get(key)
    if found is None:
        if len(_launches) >= MANY_CALLS:
            _launches.clear()
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if tile.registers is not None:
            options["maxnreg"] = tile.registers
        found = _launches[key] = Launch(kernel(name, *program), programs, constants, options)
    return found


def _constants(n: int, tile: Tile, rows: Rows, dtype: torch.dtype, bias: Tensor | None) -> dict[str, Any]:
    return {
        "N": n,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SPLIT": rows.split,
        "GROUPED": n % 8 == 0,
        "FAST": fast(dtype),
        "BIASED": bias is not None,
    }


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


def _signature(tensors: Sequence[Tensor]) -> list[Any]:
    return [(x.dtype, x.device) for x in tensors]


def _dense(v: Tensor) -> Tensor:
    """A vector, which is small, with its elements beside each other."""
    return v if v.stride(0) == 1 else v.contiguous()


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """In place of a tensor that is not there, one that the kernel does not look at."""
    return other if x is None else _dense(x) if x.ndim == 1 else x
