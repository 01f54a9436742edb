"""From tensors to one launch of a generated kernel: arguments, tile sizes, and smaller ones where they do not fit."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import (
    cache,
    codegen,
    fit,
    hopper,
    launch_decode,
    launch_hopper,
    lists,
    reference,
    template,
)
from xfcompile.kernels.attention.blocks import Summary, summary
from xfcompile.kernels.attention.repeat import Blank, Launch, aligned
from xfcompile.kernels.attention.tiles import (
    INTERPRETED,
    Tiles,
    alternatives,
    choose,
    columns,
    device_generation,
    padded,
    smaller,
)
from xfcompile.kernels.registration import Site
from xfcompile.site import ScoreSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """A generated kernel in this process: its spec, its file, what lists of tiles it takes (of the mask that
    `lists.program(mask)` has), what was learned about tiles that fit, the calls that were made, by the layout of
    their tensors, and what Triton made for several of these (see `Launch`)."""

    key: str
    spec: ScoreSpec
    source: str
    summary: Summary | None
    mask: str | None
    integers: tuple[bool, ...]
    fitting: dict[Any, Tiles | fit.Unavailable] = field(default_factory=dict)
    calls: dict[object, Call] = field(default_factory=dict)
    made: dict[object, dict[object, Any]] = field(default_factory=dict)

    def kernel(self, interpreted: bool, name: str = "attention_forward") -> Any:
        """The Triton function, compiled or interpreted: which one `triton.jit` decides when the file is imported."""
        return getattr(_module(self.key, interpreted), name)

    def scalars(self, ints: Sequence[Any], floats: Sequence[Any]) -> list[Any]:
        whole, real = iter(ints), iter(floats)
        return [next(whole) if integer else next(real) for integer in self.integers]

    def numbers(self, ints: Sequence[int], floats: Sequence[float]) -> list[int | float]:
        """Scalars, as kernels are compiled for them: generated code may have written 2.0 as 2."""
        if not self.integers:
            return []
        return self.scalars(ints, [float(x) for x in floats])


_programs: dict[str, Program] = {}


@functools.cache
def _module(key: str, interpreted: bool) -> ModuleType:
    path = cache.store(_programs[key].source)
    name = f"xfcompile_attention_{key}{'_interpreted' if interpreted else ''}"
    return cache.load(path, name)


def prepare(spec: ScoreSpec) -> str:
    """Generates the kernel of a spec and stores its source; returns the key that the op is called with.

    Raises evaluate.Unsupported where the score has no Triton form.
    """
    spec = codegen.canonical(spec)
    source = codegen.generate(spec)
    key = cache.key_of(source)
    if key not in _programs:
        log.info("attention kernel %s: score %s, keep %s", cache.store(source), spec.score, spec.keep)
        _programs[key] = _program(key, spec, source)
    return key


def _program(key: str, spec: ScoreSpec, source: str) -> Program:
    found = summary(spec)
    mask = None if found is None else lists.prepare(found.mask)
    integers = tuple(bool(x.is_integer) for x in spec.scalars)
    return Program(key, spec, source, found, mask, integers)


def program(key: str) -> Program:
    """The prepared kernel; one that another process prepared is read back from the cache directory."""
    if key not in _programs:
        source, spec = cache.read_back(key, "attention", "prepare")
        assert isinstance(spec, ScoreSpec)
        _programs[key] = _program(key, spec, source)
    return _programs[key]


FEW_TILES = 4
"""So many tiles a row are visited without a list: making one takes as long."""


def tile_sizes(key: str, device: torch.device, dtype: torch.dtype, dq: int, dv: int, lq: int) -> tuple[int, int]:
    """Queries and keys of the tiles that lists are made of."""
    if device.type == "cpu":
        return INTERPRETED.block_m, INTERPRETED.block_n
    if always_listed(key, device, dtype, dq, dv):
        return hopper.ROWS, hopper.KEYS
    tiles = choose(device_generation(device), dtype, dq, dv, lq)
    return tiles.block_m, tiles.block_n


def always_listed(key: str, device: torch.device, dtype: torch.dtype, dq: int, dv: int) -> bool:
    """Whether the kernel of such a site goes by lists, however few tiles there are: it makes what it is not given."""
    return launch_hopper.why_not(program(key), device, dtype, dq, dv) is None


def mask_of(key: str) -> str | None:
    """The key of the lists of tiles that a kernel takes."""
    return program(key).mask


def source_of_kernel(key: str) -> str:
    """The text of a kernel's module."""
    return program(key).source


def source_of_lists(key: str) -> str:
    """The text of the module that makes the lists of tiles which a kernel takes."""
    mask = mask_of(key)
    assert mask is not None
    return lists.program(mask).source


def mask_arguments(
    key: str, operands: Sequence[Any], ints: Sequence[Any], floats: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Of the operands and the numbers of a score, those that its mask has."""
    prepared = program(key)
    return mask_values(prepared, operands, prepared.scalars(ints, floats))


def mask_values(
    prepared: Program, operands: Sequence[Any], scalars: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    found = prepared.summary
    assert found is not None
    if not scalars:
        return [operands[n] for n in found.operands], [], []
    numbers = dict(zip(prepared.spec.scalars, scalars, strict=True))
    chosen = [(x, numbers[x]) for x in found.scalars]
    whole, real = ([n for x, n in chosen if bool(x.is_integer) == integer] for integer in (True, False))
    return [operands[n] for n in found.operands], whole, real


Call = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, operands, scalars, tiles) -> (out, lse), for tensors of one layout."""

MANY_CALLS = 4096
"""Layouts that are remembered of a kernel; lengths that change at every call make new ones."""


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    key: str,
    tiles: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    heads_first: bool = False,
    check: Callable[..., None] = lambda *tensors: None,
    seed: Tensor | None = None,
    stream: int = 0,
    tiles_by_key: Tensor | None = None,
    site: Site | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel on a GPU, or interpreted on a CPU. check: called at the first of all calls with such tensors.

    What follows from tensors' layouts is found out once: a call costs its host what is left (examples/bench_host.py).
    """
    prepared = _programs.get(key) or program(key)
    random = random_of(prepared.spec, seed, stream) if prepared.spec.dropout else ()
    scalars = prepared.numbers(ints, floats)
    usual = site is not None and aligned(q, k, v)
    call = site.found if site is not None and usual else None
    layout: object = None
    if call is None:
        layout = layout_of(q, k, v, operands, tiles, block_m, block_n, heads_first)
        call = prepared.calls.get(layout)
    if call is None:
        if len(prepared.calls) >= MANY_CALLS:
            prepared.calls.clear()
        check(q, k, v, operands, key, tiles, block_m, block_n, tiles_by_key)
        call = prepared.calls[layout] = _call(
            prepared, q, k, v, operands, tiles is not None, (block_m, block_n), heads_first
        )
    try:
        made = call(q, k, v, operands, scalars, tiles, *random)
    except fit.Unavailable as error:
        fit.give_way(error, key, "it is computed by its definition, in plain PyTorch")
        layout = layout or layout_of(q, k, v, operands, tiles, block_m, block_n, heads_first)
        call = prepared.calls[layout] = _by_definition(prepared.spec, heads_first)
        made = call(q, k, v, operands, scalars, tiles, *random)
    if site is not None and usual:
        site.keep(call, q.dtype)
    return made


def _by_definition(spec: ScoreSpec, heads_first: bool) -> Call:
    """For what no kernel can be launched for."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
        tiles: Tensor | None,
        *random: Any,
    ) -> tuple[Tensor, Tensor]:
        ints, floats = split(spec, scalars)
        dtype = torch.promote_types(q.dtype, torch.float32)
        made = outputs(q, v, heads_first)
        for x, value in zip(
            made, reference.attention(spec, q, k, v, operands, ints, floats, dtype, *random), strict=True
        ):
            x.copy_(value)
        return made

    return call


def split(spec: ScoreSpec, scalars: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Scalars, as a kernel takes them, as whole and real numbers."""
    chosen = list(zip(spec.scalars, scalars, strict=True))
    return [x for s, x in chosen if s.is_integer], [x for s, x in chosen if not s.is_integer]


def random_of(spec: ScoreSpec, seed: Tensor | None, stream: int) -> tuple[Tensor, int] | tuple[()]:
    """What a kernel that drops weights out is given; raises ValueError where it has no seed."""
    if not spec.dropout:
        return ()
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        found = "None" if seed is None else f"{seed.dtype} of {list(seed.shape)}"
        raise ValueError(f"xfcompile::attention: dropout takes a seed, an int64 tensor of one element, not {found}")
    return seed, stream


def layout_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    tiles: Tensor | None,
    block_m: int,
    block_n: int,
    heads_first: bool,
) -> tuple[object, ...]:
    """All that a call depends on but for where its tensors are, as long as they start at multiples of 16 bytes or do
    not, and what scalars it has. That is the user's setting of fp32 products too."""
    dtype = q.dtype
    return (
        q.shape, q.stride(), dtype, q.device,
        k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device,
        aligned(q, k, v),
        heads_first, block_m, block_n,
        None if tiles is None else (tiles.shape, tiles.stride(), tiles.dtype, tiles.device),
        dtype is torch.float32 and precision(dtype),
        *[(x.dtype, x.device, x.stride()) for x in operands],
    )  # fmt: skip


def _call(
    prepared: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    listed: bool,
    sizes: tuple[int, int],
    heads_first: bool,
) -> Call:
    """How such tensors are computed with, from now on."""
    batch, heads, lq, dq = q.shape
    kv_heads, lk, dv = k.shape[1], k.shape[2], v.shape[3]
    spec, interpreted = prepared.spec, q.device.type == "cpu"
    if 0 in (batch, heads, lq, dv):
        return lambda q, k, v, *rest: _filled(outputs(q, v, heads_first))
    if lk == 0:
        return lambda q, k, v, operands, scalars, tiles, *random: no_keys(
            spec, q, k, v, operands, scalars, *outputs(q, v, heads_first)
        )
    strides = [stride for operand in operands for stride in operand.stride()]
    wide_q, wide_v = columns(dq, dv, interpreted=interpreted)
    constants: dict[str, Any] = {
        "DQ": dq,
        "DV": dv,
        "BLOCK_DQ": wide_q,
        "BLOCK_DV": wide_v,
        "PRECISION": precision(q.dtype),
        # The interpreter's dot reads bf16 as integers.
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
        "HEADS_FIRST": heads_first,
        "UNIT": _unit(prepared.key, q.dtype),
    }
    kernel = prepared.kernel(interpreted)
    if "FAST" in kernel.arg_names:
        constants["FAST"] = speed(spec, q)
    blank_out, blank_lse = (Blank.like(x) for x in outputs(q, v, heads_first))
    if launch_decode.wanted(spec, q, k):
        decoding = launch_decode.Decoding(prepared, constants, interpreted)

        def decode(
            q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], scalars: Sequence[Any], tiles: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            out, lse = blank_out(), blank_lse()
            decoding(q, k, v, out, lse, operands, scalars)
            return out, lse

        return decode

    key, mask = prepared.key, prepared.mask
    block_m, block_n = sizes if listed else tile_sizes(key, q.device, q.dtype, dq, dv, lq)
    fast = not interpreted and launch_hopper.suits(prepared, q, k, v, operands, (block_m, block_n))
    made = mask is not None and not listed and (fast or -(-lk // block_n) > FEW_TILES)
    shape = (batch, heads, lq, lk)

    def for_any_hardware() -> _Blocks:
        numbers = [*q.stride(), *k.stride(), *v.stride(), heads, heads // kv_heads, lq, lk, *strides]
        types = (q.device, q.dtype, *[x.dtype for x in operands])
        return _Blocks(
            prepared, kernel, numbers, constants, (block_m, block_n) if listed or made else None, types, q, dv
        )

    launch: Callable[..., None]
    if fast:
        flags: dict[str, Any] = {name: constants[name] for name in ("UNIT", "FAST") if name in constants}
        first = launch_hopper.Hopper(prepared, q, k, v, strides, flags, heads_first, operands)
        launch = FirstThatRuns(first, for_any_hardware)
        if first.bias is not None:
            launch = WhereAligned(launch, first.bias, for_any_hardware)
    else:
        launch = for_any_hardware()

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
        tiles: Tensor | None,
        *random: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = blank_out(), blank_lse()
        if made:
            assert mask is not None
            tiles = lists.run(q, *mask_values(prepared, operands, scalars), shape, block_m, block_n, mask)
        launch(q, k, v, out, lse, operands, scalars, tiles, *random)
        return out, lse

    return call


def _filled(made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    made[1].fill_(-math.inf)
    return made


class FirstThatRuns:
    """A launch, and another one in its place if it fails the first time: what it is made with may not be there, or has
    too little of something."""

    def __init__(self, first: Callable[..., None], other: Callable[[], Callable[..., None]]) -> None:
        self.launch = first
        # None once it is known which of them it is: it may hold tensors.
        self.other: Callable[[], Callable[..., None]] | None = other

    def __call__(self, *arguments: Any) -> None:
        if self.other is None:
            self.launch(*arguments)
            return
        try:
            self.launch(*arguments)
        except Exception as error:
            other = self.other
            if other is not None:  # no other thread was here meanwhile
                log.warning("%s does not run (%s: %s): another kernel takes its place", self.launch, type(error), error)
                self.launch = other()
                self.other = None
            self.launch(*arguments)  # what this one raises is raised: nothing else is left
        self.other = None


class WhereAligned:
    """A launch for an operand that starts at a multiple of 16 bytes, and another one where it does not: of operands
    that is not part of a layout."""

    def __init__(self, launch: Callable[..., None], n: int, other: Callable[[], Callable[..., None]]) -> None:
        self.launch, self.n = launch, n
        self.make = other
        self.other: Callable[..., None] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, operands: Sequence[Tensor], *rest: Any
    ) -> None:
        if aligned(operands[self.n]):
            self.launch(q, k, v, out, lse, operands, *rest)
            return
        if self.other is None:
            self.other = self.make()
        self.other(q, k, v, out, lse, operands, *rest)


class _Blocks:
    """Launches of the kernel that gives each block of queries all of its keys."""

    def __init__(
        self,
        prepared: Program,
        kernel: Any,
        numbers: Sequence[int],
        constants: dict[str, Any],
        listed: tuple[int, int] | None,
        types: tuple[object, ...],
        q: Tensor,
        dv: int,
    ) -> None:
        self.prepared, self.kernel, self.numbers = prepared, kernel, numbers
        self.constants, self.listed, self.types, self.dv = constants, listed, types, dv
        self.masked = prepared.mask is not None
        self.batch, self.heads, self.lq = q.shape[:3]
        self.launches: dict[Tiles, Launch] = {}
        self.launch: Launch | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        operands: Sequence[Tensor],
        scalars: Sequence[Any],
        tiles: Tensor | None,
        *random: Any,
    ) -> None:
        tensors, free = [q, k, v, out, lse, *operands], scalars
        if self.masked:
            tensors.append(q if tiles is None else tiles)  # a pointer that is not looked at, where there are none
            free = [*free, *lists.steps(tiles)]
        if random:
            tensors.append(random[0])
            free = [*free, random[1]]
        if self.launch is not None:
            self.launch(tensors, free)
            return

        def launch(sizes: Tiles) -> Any:
            if sizes not in self.launches:
                self.launches[sizes] = self._launch(sizes)
            return self.launches[sizes](tensors, free)

        if q.device.type == "cpu":
            chosen = INTERPRETED
            if self.listed is not None:
                chosen = replace(INTERPRETED, block_m=self.listed[0], block_n=self.listed[1])
            launch(chosen)
        else:
            chosen = _fitting(self.prepared, q, self.dv, launch, self.listed)
        self.launch = self.launches[chosen]

    def _launch(self, sizes: Tiles) -> Launch:
        constants = {**self.constants, "BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n}
        if self.masked:
            m, n = self.listed or (sizes.block_m, sizes.block_n)
            constants |= {
                "LISTED": self.listed is not None,
                "PARTS_M": m // sizes.block_m,
                "PARTS_N": n // sizes.block_n,
            }
        options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
        names = self.kernel.arg_names
        ordered = {name: constants[name] for name in names if name in constants}
        made = self.prepared.made.setdefault(("blocks", sizes, *ordered.items(), *self.types), {})
        programs = self.batch * self.heads * -(-self.lq // sizes.block_m)
        return Launch(self.kernel, programs, self.numbers, ordered, options, made=made)


def _fitting(
    prepared: Program, q: Tensor, dv: int, launch: Callable[[Tiles], Any], listed: tuple[int, int] | None
) -> Tiles:
    """Launches with the tiles that this kernel was found to fit in, and returns them; at first, by launching.

    listed: the sizes of the tiles in a list, which those of the kernel must divide.
    """
    kind = (q.device.index, q.dtype, precision(q.dtype), q.shape[3], dv, padded(min(q.shape[2], 128)), listed)
    first = choose(device_generation(q.device), q.dtype, q.shape[3], dv, q.shape[2])
    if listed is not None:
        first = replace(first, block_m=min(first.block_m, listed[0]), block_n=min(first.block_n, listed[1]))

    def divides(tiles: Tiles) -> bool:
        return listed is None or not (listed[0] % tiles.block_m or listed[1] % tiles.block_n)

    def find() -> Tiles:
        return fit.launch(launch, (filter(divides, alternatives(first)), filter(divides, smaller(first))), q, dv)

    return fit.remembered(prepared.fitting, kind, launch, find)


def outputs(q: Tensor, v: Tensor, heads_first: bool = False) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] with memory in the order [B, Lq, Hq, Dv], which the next projection reads as it is, or as
    its dimensions are with `heads_first`; lse."""
    batch, heads, lq, _ = q.shape
    if heads_first:
        return q.new_empty((batch, heads, lq, v.shape[3])), q.new_empty((batch, heads, lq), dtype=torch.float32)
    out = q.new_empty((batch, lq, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, lq), dtype=torch.float32)


def no_keys(
    spec: ScoreSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    scalars: Sequence[Any],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """A sum over nothing is 0, whatever the rule for rows whose keys are all masked."""
    lse.fill_(-math.inf)
    if spec.sink is not None:
        ints, floats = split(spec, scalars)
        lse.copy_(reference.attention(spec, q, k, v, operands, ints, floats)[1])
    return out.zero_(), lse


@functools.cache
def _unit(key: str, dtype: torch.dtype) -> float:
    return template.unit(program(key).spec, dtype)


def speed(spec: ScoreSpec, q: Tensor) -> int:
    """Which tanh is exact enough: see the template's."""
    if q.dtype.itemsize != 2:
        return 0
    return 2 if spec.coarse and q.dtype == torch.bfloat16 and q.is_cuda and torch.version.hip is None else 1


def precision(dtype: torch.dtype) -> str:
    """What `tl.dot` may round fp32 to: what the user allowed matrix products to."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
