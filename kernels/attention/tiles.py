"""Which devices run the kernel, and with what tile sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.utils._triton import has_triton_package

from xfcompile.measured import GFX942, SM_80, SM_90, SM_100, Fact, Measured
from xfcompile.measured import hardware as generation
from xfcompile.site import ScoreSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Tiles:
    """One program's share: block_m query rows against block_n keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


DEPTH, DEEP = 16, 32
"""Numbers that a product adds up, at least: what `tl.dot` takes; and where an operand comes of bytes that are loaded
and of random numbers. A thread of a tensor core's operand has as many neighbours as fit into the narrowest load that it
comes of, and twice as many where tensors were joined, as random numbers are: 8 then, which four threads have of 16
twice. Triton takes the same numbers twice, up to 3.7 at least (triton-lang/triton#10645, #11691)."""

HOPPER, BLACKWELL, AMPERE, AMD = SM_90, SM_100, SM_80, GFX942

_FORWARD = Measured(
    "examples/bench_routes.py", "2026-11-23", "H200, torch 2.11, triton 3.6", "examples/results/routes-h200.json"
)

_WIDE = Measured(
    "examples/bench_wide_heads.py",
    "2026-11-30",
    "H200, torch 2.11, triton 3.6",
    "examples/results/wide_heads_h200.json",
)

# By (hardware, bits of an element, head dim padded to a power of two). What was measured is the best over seven
# programs: small tiles leave room for several programs on a multiprocessor, one of which multiplies while another
# exponentiates. The others start from the defaults that torch's FlexAttention settled on for this loop
# (torch/_inductor/template_heuristics), changed where they spill registers (examples/cross_compile.py).
TABLE: dict[tuple[str, int, int], Fact[Tiles]] = {
    (HOPPER, 16, 64): Fact(Tiles(64, 64, 4, 3), _FORWARD),
    (HOPPER, 16, 128): Fact(Tiles(64, 64, 4, 3), _FORWARD),
    (HOPPER, 16, 256): Fact(Tiles(128, 64, 8, 2), _WIDE),
    (HOPPER, 32, 64): Fact(Tiles(64, 32, 8, 2)),
    (HOPPER, 32, 128): Fact(Tiles(32, 32, 8, 2)),
    (HOPPER, 32, 256): Fact(Tiles(32, 16, 4, 2)),
    (BLACKWELL, 16, 64): Fact(Tiles(64, 64, 4, 3)),
    (BLACKWELL, 16, 128): Fact(Tiles(64, 64, 4, 3)),
    (BLACKWELL, 16, 256): Fact(Tiles(128, 64, 8, 2)),
    (BLACKWELL, 32, 64): Fact(Tiles(64, 32, 8, 2)),
    (BLACKWELL, 32, 128): Fact(Tiles(32, 32, 8, 2)),
    (BLACKWELL, 32, 256): Fact(Tiles(32, 16, 4, 2)),
    (AMPERE, 16, 64): Fact(Tiles(128, 32, 4, 3)),
    (AMPERE, 16, 128): Fact(Tiles(128, 64, 8, 3)),
    (AMPERE, 16, 256): Fact(Tiles(64, 32, 8, 2)),
    (AMPERE, 32, 64): Fact(Tiles(64, 32, 8, 2)),
    (AMPERE, 32, 128): Fact(Tiles(32, 32, 8, 2)),
    (AMPERE, 32, 256): Fact(Tiles(32, 16, 4, 2)),
    # AMD's compiler counts the loop itself as a stage, and its registers hold less of a tile.
    (AMD, 16, 64): Fact(Tiles(128, 64, 4, 1)),
    (AMD, 16, 128): Fact(Tiles(128, 64, 8, 1)),
    (AMD, 16, 256): Fact(Tiles(64, 32, 4, 1)),
    (AMD, 32, 64): Fact(Tiles(64, 32, 4, 1)),
    (AMD, 32, 128): Fact(Tiles(64, 32, 4, 1)),
    (AMD, 32, 256): Fact(Tiles(32, 16, 4, 1)),
}

_WINDOWS = Measured(
    "examples/bench_few_keys.py", "2026-11-29", "H200, torch 2.11, triton 3.6", "examples/results/few_keys_h200.json"
)

# Heads of 32 columns in windows: by hardware, bits, and what `few_keys` says. Tiles so small that each of the one or
# two warps of a program has its own rows leave room for many programs; larger ones wait.
WINDOWS: dict[tuple[str, int, str], Fact[Tiles]] = {
    (HOPPER, 16, "few keys, even"): Fact(Tiles(32, 16, 2, 3), _WINDOWS),
    (HOPPER, 16, "few keys"): Fact(Tiles(16, 32, 1, 2), _WINDOWS),
}

# Spilled registers a thread up to which the loop is as fast as without: a few are spilled outside of it.
FEW_SPILLS = 16

# The interpreter's time is a matter of how many programs there are, not of what is in them; small enough that tests of
# small sizes still take several steps.
INTERPRETED = Tiles(32, 32, 4, 1)
INTERPRETED_DECODING = Tiles(16, 16, 4, 1)


def padded(dim: int) -> int:
    """A tile's columns: a power of two, and no less than `tl.dot` takes."""
    return max(16, 1 << (dim - 1).bit_length())


NARROW = 32
"""Columns of heads in windows (Swin's)."""

FEW_KEYS = 256
"""Up to this many, a row has so few tiles that what counts is how many programs a multiprocessor has room for."""

FewKeys = Literal["few keys", "few keys, even"]
"""even: in tiles of 16 there is no ragged one."""


def few_keys(dq: int, dv: int, lk: int) -> FewKeys | None:
    """What is said of windows, None of others."""
    if not (dq == dv == NARROW and 0 < lk <= FEW_KEYS):
        return None
    return "few keys" if lk % 16 else "few keys, even"


def columns(dq: int, dv: int, *, interpreted: bool = False, narrow: bool = False) -> tuple[int, int]:
    """The columns of a tile of q and k, and of one of v.

    On GPUs no fewer than 64, and for v no fewer than for k up to 128: with narrower values (D 40 against 24, 64 against
    16 or 32, 128 against 32) whose rows do not start at multiples of 16 bytes, triton 3.6 compiled kernels for sm_90
    that gave wrong numbers or read outside of their memory, with one stage as with three; all wider pairs were right
    (tests/gpu/test_attention_gpu.py, test_head_dims). narrow: of windows whose rows do, 32 each, which were right.
    """
    if interpreted:
        return padded(dq), padded(dv)
    if narrow:
        return NARROW, NARROW
    wide = max(64, padded(dq))
    return wide, max(64, padded(dv), min(wide, 128))


def choose(kind: str, dtype: torch.dtype, dq: int, dv: int, lq: int, few: FewKeys | None = None) -> Tiles:
    """The first tiles to try. few: what `few_keys` says."""
    bits = 8 * dtype.itemsize
    fact = WINDOWS.get((kind, bits, few)) if few is not None else None
    tiles = (fact or TABLE[kind, bits, max(64, padded(max(dq, dv)))]).value
    # Rows that do not exist are computed all the same: short queries get short tiles.
    rows = min(tiles.block_m, padded(lq))
    return replace(tiles, block_m=rows, num_warps=4 if rows < tiles.block_m else tiles.num_warps)


_BACKWARD = Measured(
    "examples/bench_backward.py", "2026-11-25", "H200, torch 2.11, triton 3.6", "examples/results/backward_h200.json"
)
_MORE = Measured(
    "examples/bench_backward.py", "2026-11-28", "H200, torch 2.11, triton 3.6",
    "examples/results/backward_more_h200.json",
)  # fmt: skip

Trait = Literal["few keys", "few keys, even", "window", "listed", "dense", "diagonal", "linear", "other"]
"""What tiles of a backward are chosen by. few keys: see `few_keys`. window: a row sees a window of keys, of which small
tiles waste least. listed: it sees tiles of a list, of 64 or less. dense: what is added has a value of its own for each
score, or a place that it is read from, which take registers; diagonal: it goes by distance, so that what one diagonal
of tiles has is summed (of kernels of loads). linear: the score's derivative by q·k is one number. other: it is not."""

Place = tuple[str, str, int, int, Trait]
"""(kernel, hardware, bits of an element, head dim padded to a power of two, trait)."""


def _hopper(measured: Measured | None, name: str, dim: int, **tiles: Tiles) -> dict[Place, Fact[Tiles]]:
    return {(name, HOPPER, 16, dim, trait): Fact(each, measured) for trait, each in tiles.items()}  # type: ignore[misc]


# What was measured is the best or near for two programs.
BACKWARD: dict[Place, Fact[Tiles]] = {
    **_hopper(_BACKWARD, "dq", 64, linear=Tiles(64, 64, 4, 3), other=Tiles(64, 64, 4, 3)),
    **_hopper(_MORE, "dq", 64, window=Tiles(64, 64, 4, 1), listed=Tiles(64, 64, 4, 1), dense=Tiles(64, 32, 4, 3)),
    **_hopper(_BACKWARD, "dq", 128, linear=Tiles(128, 64, 8, 3), other=Tiles(128, 64, 8, 3)),
    **_hopper(_MORE, "dq", 128, window=Tiles(64, 64, 4, 2), listed=Tiles(64, 64, 4, 2)),
    **_hopper(_WIDE, "dq", 256, linear=Tiles(128, 64, 8, 1), other=Tiles(128, 64, 8, 1)),
    **_hopper(_BACKWARD, "dkdv", 64, linear=Tiles(32, 64, 4, 3), other=Tiles(64, 64, 4, 3)),
    **_hopper(_MORE, "dkdv", 64, window=Tiles(64, 64, 4, 1), listed=Tiles(32, 64, 4, 3), dense=Tiles(32, 64, 4, 3)),
    **_hopper(_BACKWARD, "dkdv", 128, linear=Tiles(64, 128, 8, 3), other=Tiles(64, 64, 4, 2)),
    **_hopper(_MORE, "dkdv", 128, window=Tiles(32, 64, 4, 3), listed=Tiles(32, 64, 4, 3), dense=Tiles(32, 64, 4, 3)),
    **_hopper(_WIDE, "dkdv", 256, linear=Tiles(64, 64, 8, 1), other=Tiles(64, 64, 8, 2)),
    **_hopper(_MORE, "load", 64, dense=Tiles(64, 64, 4, 2), diagonal=Tiles(64, 64, 4, 2)),
    **_hopper(_MORE, "load", 128, dense=Tiles(64, 128, 8, 2), diagonal=Tiles(64, 64, 4, 2)),
    **_hopper(None, "load", 256, dense=Tiles(64, 64, 8, 1), diagonal=Tiles(64, 64, 8, 1)),
}
BACKWARD |= {
    ("dq", HOPPER, 16, NARROW, "few keys, even"): Fact(Tiles(32, 16, 2, 3), _WINDOWS),
    ("dkdv", HOPPER, 16, NARROW, "few keys, even"): Fact(Tiles(16, 16, 1, 2), _WINDOWS),
    ("load", HOPPER, 16, NARROW, "few keys, even"): Fact(Tiles(16, 32, 1, 2), _WINDOWS),
    ("dq", HOPPER, 16, NARROW, "few keys"): Fact(Tiles(64, 32, 4, 1), _WINDOWS),
    ("dkdv", HOPPER, 16, NARROW, "few keys"): Fact(Tiles(16, 32, 1, 2), _WINDOWS),
    ("load", HOPPER, 16, NARROW, "few keys"): Fact(Tiles(64, 64, 4, 2), _WINDOWS),
}
# Blackwell's are Hopper's.
BACKWARD |= {(name, BLACKWELL, *rest): Fact(fact.value) for (name, _, *rest), fact in BACKWARD.items()}  # type: ignore


def choose_backward(name: str, kind: str, dtype: torch.dtype, dq: int, dv: int, traits: Sequence[Trait]) -> Tiles:
    """The first tiles to try for a kernel of the backward: "dq", "dkdv", that of a load, or those of rows without keys,
    "dead_rows" and "dead_keys". traits: of the score, those
    that count most first; of "dq" and "dkdv" the last is "linear" or "other"."""
    wide = max(64, padded(max(dq, dv)))
    name = "load" if name.startswith("load") else name
    for trait in traits:
        dim = NARROW if trait.startswith("few keys") else wide
        found = BACKWARD.get((name, kind, 8 * dtype.itemsize, dim, trait))
        if found is not None:
            return found.value
    # Elsewhere nothing is measured: tiles that spill few registers (examples/cross_compile.py).
    if name == "load":  # square: tiles along a diagonal then have the same distances at the same places
        return Tiles(64, 64, 4, 1) if kind == AMD or wide == 64 else Tiles(32, 32, 4, 1)
    if name.startswith("dead") and dtype.itemsize == 4:
        return Tiles(32, 32, 8, 1)
    if dtype.itemsize == 4 or wide == 256:
        return Tiles(32, 32, 4, 1)
    if name == "dead_rows":
        return Tiles(64, 64, 4, 1 if kind == AMD else 2)
    if name == "dq":
        return Tiles(64, 64, 4 if kind == AMD else 8, 1 if kind == AMD else 2)
    return Tiles(32, 64, 4 if kind == AMD else 8, 1 if kind == AMD else 2)


def depth(spec: ScoreSpec) -> int:
    """Of the products of weights and of their gradients."""
    return DEEP if spec.dropout and any(x.dtype.itemsize == 1 for x in spec.operands) else DEPTH


def deepened(tiles: Tiles, least: int, *, over_queries: bool = False) -> Tiles:
    """Whose products add so many numbers up: keys, or queries."""
    if over_queries:
        return replace(tiles, block_m=max(tiles.block_m, least))
    return replace(tiles, block_n=max(tiles.block_n, least))


STEP_BYTES = 32 * 1024
"""Keys and values that a step of the decoding kernel reads. Two steps under way and two or three programs on a
multiprocessor are well above the 40 KiB each that an H200 must have under way for its bandwidth (4.8 TB/s, 1 µs)."""


def choose_decoding(kind: str, dtype: torch.dtype, dq: int, dv: int, rows: int) -> Tiles:
    """The first tiles to try for few query rows: how much is read at a time counts. They spill no registers up to D128
    (examples/cross_compile.py), and are not measured."""
    size = dtype.itemsize
    keys = min(128 // size, STEP_BYTES // (size * sum(columns(dq, dv))))
    block_n = max(16, 1 << (keys.bit_length() - 1))
    # fp32 is multiplied without tensor cores, for which rows beyond those that there are have their price.
    block_m = min(64 if size == 2 else 16, padded(rows))
    small = block_n * size * sum(columns(dq, dv)) <= STEP_BYTES // 2
    stages = 2 if kind == AMD else 4 if small else 3
    return Tiles(block_m, block_n, 8 if block_m == 64 or size == 4 else 4, stages)


def decoding_alternatives(tiles: Tiles) -> Iterator[Tiles]:
    """What to try, in order, for a mask that takes too many registers with these: a shorter step."""
    yield tiles
    if tiles.block_n > 16:
        yield replace(tiles, block_n=tiles.block_n // 2)


def alternatives(tiles: Tiles) -> Iterator[Tiles]:
    """What to try, in order, for a score that is too large for these: more threads to hold it, then a shorter step."""
    yield tiles
    if tiles.num_warps == 4 and tiles.block_m >= 64:
        tiles = replace(tiles, block_m=128, num_warps=8)
        yield tiles
    if tiles.block_n > 16:
        yield replace(tiles, block_n=tiles.block_n // 2)


def within(tiles: Tiles, listed: tuple[int, int] | None) -> Tiles:
    """No larger than those of a list, where there is one."""
    if listed is None:
        return tiles
    return replace(tiles, block_m=min(tiles.block_m, listed[0]), block_n=min(tiles.block_n, listed[1]))


def divides(tiles: Tiles, listed: tuple[int, int] | None) -> bool:
    """Whether tiles of a list, where there is one, are made up of these."""
    return listed is None or not (listed[0] % tiles.block_m or listed[1] % tiles.block_n)


def usable(
    way: Iterable[Tiles], listed: tuple[int, int] | None, least: int, *, over_queries: bool = False
) -> list[Tiles]:
    """Those that tiles of a list are made up of, and whose products add so many numbers up."""
    return [t for t in way if divides(t, listed) and t == deepened(t, least, over_queries=over_queries)]


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """What is timed beside these where it is asked for: one step away in each direction, and in two at once where one
    alone makes a program's threads, or its memory, fit worse."""
    twice, half = tiles.block_m * 2, tiles.block_n // 2
    made = [
        replace(tiles, block_m=twice),
        replace(tiles, block_m=twice, num_warps=tiles.num_warps * 2),
        replace(tiles, block_m=tiles.block_m // 2),
        replace(tiles, block_n=tiles.block_n * 2),
        replace(tiles, block_n=half),
        replace(tiles, block_n=half, num_stages=tiles.num_stages + 1),
        replace(tiles, num_warps=tiles.num_warps * 2),
        replace(tiles, num_warps=tiles.num_warps // 2),
        replace(tiles, num_stages=tiles.num_stages + 1),
        replace(tiles, num_stages=tiles.num_stages - 1),
    ]
    for t in made:
        sizes = min(t.block_m, t.block_n) >= 16 and max(t.block_m, t.block_n) <= 128
        if sizes and 1 <= t.num_warps <= 8 and 1 <= t.num_stages <= 5:
            yield t


def smaller(tiles: Tiles) -> Iterator[Tiles]:
    """What to try, in order, where the device has too little shared memory: fewer stages, then smaller tiles."""
    while tiles.num_stages > 1:
        tiles = replace(tiles, num_stages=tiles.num_stages - 1)
        yield tiles
    while tiles.block_n > 16 or tiles.block_m > 16:
        wide = tiles.block_n >= tiles.block_m
        tiles = replace(tiles, **({"block_n": tiles.block_n // 2} if wide else {"block_m": tiles.block_m // 2}))
        yield tiles


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def device_generation(device: torch.device) -> str:
    """The class of a GPU's hardware, as in tables: see `xfcompile.measured`."""
    return generation(capability(device.index)[0], torch.version.hip is not None)


def fits_twice(shared: int, device: torch.device) -> bool:
    """Whether two programs with that much shared memory (and 1 KiB that the driver takes) fit on one multiprocessor.

    Four warps alone do not hide what they wait for: a dense bias at D128 took 2.4 ms so, 1.6 with eight warps (H200).
    """
    if torch.version.hip is not None:
        return True
    return 2 * (shared + 1024) <= torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def supports(device: torch.device, dtype: torch.dtype, dq: int, dv: int) -> str | None:
    """Why the kernel cannot run such inputs there; None if it can."""
    reason = runs(device, dtype)
    if reason is not None:
        return reason
    if not (1 <= dq <= MAX_HEAD_DIM and 1 <= dv <= MAX_HEAD_DIM):
        return f"head dims are 1 to {MAX_HEAD_DIM}, not {dq} and {dv}"
    if device.type == "cpu" and not interpreting():
        return "on a CPU the kernel runs in Triton's interpreter only (TRITON_INTERPRET=1)"
    return None


def runs(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel of ours computes in this dtype there; None if one may, on CPUs in the interpreter."""
    if not has_triton_package():
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"the kernel computes in fp16, bf16 and fp32, not in {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the kernel runs on CUDA and ROCm devices, not on {device.type}"
    if torch.version.hip is None and capability(device.index) < (8, 0):
        return "the kernel needs compute capability 8.0 or higher"
    return None


def interpreting() -> bool:
    """Whether Triton's own variable asks for its interpreter, now: it may change between calls."""
    import triton

    return bool(triton.knobs.runtime.interpret)
