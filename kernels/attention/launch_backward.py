"""From saved tensors to the launches of a generated backward: dq and delta first, dk and dv, then what is loaded."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile.evaluate import Evaluator
from xfcompile.kernels.attention import backward, cache, fit, launch, lists, reference
from xfcompile.kernels.attention.backward import Backward
from xfcompile.kernels.attention.blocks import DISTANCE, along_diagonal
from xfcompile.kernels.attention.gradient import Gradients as Found
from xfcompile.kernels.attention.gradient import LoadGradient, gradients
from xfcompile.kernels.attention.repeat import Blank, Launch
from xfcompile.kernels.attention.tiles import (
    INTERPRETED,
    Tiles,
    Trait,
    choose_backward,
    columns,
    device_generation,
    smaller,
)
from xfcompile.kernels.registration import Site
from xfcompile.score import POSITION, B, H, I, J, Load
from xfcompile.site import ScoreSpec

log = logging.getLogger(__name__)

LISTED_APART = 64
"""Tiles of lists that are no larger have tiles of their own in `tiles.BACKWARD`."""
DEFINITION = "its gradients are computed by their definition, in plain PyTorch"


@dataclass(frozen=True)
class Program:
    """A generated backward in this process. forward: the key of the kernel that it is the backward of. needed: the
    operands that it has gradients for. fitting: tiles that were found to fit. layouts: of tensors that there were.
    compiled: what Triton made for several of these (see `Launch`)."""

    key: str
    forward: str
    needed: tuple[int, ...]
    made: Backward
    fitting: dict[Any, Tiles | fit.Unavailable] = field(default_factory=dict)
    layouts: dict[object, Layout] = field(default_factory=dict)
    compiled: dict[object, dict[object, Any]] = field(default_factory=dict)

    @property
    def spec(self) -> ScoreSpec:
        return launch.program(self.forward).spec

    def traits(self, name: str, listed: tuple[int, int] | None) -> list[Trait]:
        """What the tiles of a kernel are chosen by. listed: the sizes of the tiles of a list."""
        if name.startswith("load"):
            kind = self.made.gradients.loads[int(name.removeprefix("load"))].kind
            return ["dense" if kind == "dense" else "diagonal"]
        found: list[Trait] = []
        if self.spec.band.lower is not None:
            found.append("window")
        if listed is not None and max(listed) <= LISTED_APART:
            found.append("listed")
        if any({I, J} <= load.free_symbols for load in self.spec.score.atoms(Load)):
            found.append("dense")
        return [*found, "linear" if self.made.slope is not None else "other"]

    def kernel(self, name: str, interpreted: bool) -> Any:
        return getattr(_module(self.forward, self.needed, interpreted), f"attention_backward_{name}")


@functools.cache
def prepare(forward: str, needed: tuple[int, ...]) -> Program:
    """Generates the backward of a prepared kernel, with gradients by these operands, and stores its source.

    Raises evaluate.Unsupported where the score cannot be differentiated.
    """
    prepared = launch.program(forward)
    made = backward.generate(prepared.spec, needed)
    key = cache.key_of(made.text)
    log.info("attention backward %s: slope %s", cache.store(made.text), made.gradients.slope)
    return Program(key, forward, needed, made)


@functools.cache
def _module(forward: str, needed: tuple[int, ...], interpreted: bool) -> ModuleType:
    program = prepare(forward, needed)
    name = f"xfcompile_attention_backward_{program.key}{'_interpreted' if interpreted else ''}"
    return cache.load(cache.store(program.made.text), name)


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted: of q, k, v, and of operands by their numbers."""

    q: bool
    k: bool
    v: bool
    operands: tuple[int, ...] = ()

    @staticmethod
    def of(flags: Sequence[bool]) -> Needs:
        """From a flag for each of q, k, v and the operands."""
        return _needs(tuple(flags))


@functools.cache
def _needs(flags: tuple[bool, ...]) -> Needs:
    q, k, v, *rest = flags
    return Needs(q, k, v, tuple(n for n, needed in enumerate(rest) if needed))


Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor]]
"""dq, dk, dv and one for each operand; those that are not wanted are empty."""


def outputs(q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], needs: Needs) -> Gradients:
    """Memory for the gradients, laid out as what they are of; empty where none is wanted."""

    def like(x: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(x) if wanted else x.new_empty((0,))

    made = [like(x, n in needs.operands) for n, x in enumerate(operands)]
    return like(q, needs.q), like(k, needs.k), like(v, needs.v), made


def run(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    forward: str,
    needs: Needs,
    tiles: Tensor | None = None,
    tiles_by_key: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    seed: Tensor | None = None,
    stream: int = 0,
    site: Site | None = None,
) -> Gradients:
    """The gradients, by kernels: on a GPU, or interpreted on a CPU.

    dout, out [B, Hq, Lq, Dv]; lse [B, Hq, Lq]; all others as in the forward, with its lists of tiles, if it had any, by
    blocks of queries and by blocks of keys.
    """
    try:
        program = prepare(forward, needs.operands)
    except Exception as error:
        log.debug("making the text of a backward failed", exc_info=error)
        fit.give_way(fit.DoesNotCompile(f"{type(error).__name__}: {error}"), forward, DEFINITION)
        return by_definition(dout, q, k, v, operands, ints, floats, forward, needs, seed, stream)
    layout: Layout | None = None if site is None else site.found
    if layout is None:
        layout = _layout(program, needs, dout, q, k, v, out, lse, operands, tiles, tiles_by_key, block_m, block_n)
        if site is not None and q.dtype is not torch.float32:  # how that is multiplied may change
            site.found = layout
    made = layout.outputs()
    if layout.empty:
        for x in (*made[:3], *made[3]):
            x.zero_()
        return made
    random = launch.random_of(program.spec, seed, stream)
    call = _Call(program, layout, needs, dout, q, k, v, out, lse, operands, ints, floats, random)
    call.listed(tiles, tiles_by_key, block_m, block_n)
    try:
        if layout.unavailable is not None:
            raise layout.unavailable.again()
        call.fill(made)
    except fit.Unavailable as error:
        layout.unavailable = error.again()
        fit.give_way(error, forward, DEFINITION)
        return by_definition(dout, q, k, v, operands, ints, floats, forward, needs, seed, stream)
    return made


def by_definition(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    forward: str,
    needs: Needs,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Gradients:
    """The gradients as the definition has them, in plain PyTorch, in fp32 at least."""
    spec = launch.program(forward).spec
    found = gradients(spec, needs.operands)
    made = outputs(q, k, v, operands, needs)
    dtype = torch.promote_types(q.dtype, torch.float32)
    arguments = (dout, q, k, v, operands, ints, floats)
    *own, loads = reference.backward(spec, found, *arguments, dtype, seed=seed, stream=stream)
    for given, value in zip(made, own, strict=False):
        assert isinstance(given, Tensor)
        if given.numel():
            given.copy_(value)
    for doperand in made[3]:
        doperand.zero_()
    shape = (*q.shape[:3], k.shape[2])
    evaluate = reference.evaluator(spec, shape, operands, ints, floats, torch.float32, q.device)
    for x, value in zip(found.loads, loads, strict=True):
        deposit(made[3][x.load.operand], x.load, value, evaluate)
    return made


def _layout(
    program: Program,
    needs: Needs,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    tiles: Tensor | None,
    tiles_by_key: Tensor | None,
    block_m: int,
    block_n: int,
) -> Layout:
    """What is remembered of tensors like these: of all that launches depend on, but where tensors are."""
    key = (
        needs, block_m, block_n, launch.precision(q.dtype) if q.dtype is torch.float32 else None,
        *[(x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v, out, dout, lse, *operands)],
        *[x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in (tiles, tiles_by_key)],
    )  # fmt: skip
    found = program.layouts.get(key)
    if found is None:
        if len(program.layouts) >= launch.MANY_CALLS:
            program.layouts.clear()
        found = program.layouts[key] = Layout(program, needs, q, k, v, lse, operands)
    return found


class Layout:
    """What a backward's calls with tensors of one layout have in common, found out at the first of them.

    launches: of its kernels by their names, with tiles that fit. totals: of a kernel for a load the memory that it
    writes to, where that is no operand's gradient. unavailable: why its kernels cannot be launched, once that is known.
    """

    def __init__(
        self, program: Program, needs: Needs, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, operands: Sequence[Tensor]
    ) -> None:
        dq, dk, dv, doperands = outputs(q, k, v, operands, needs)
        self.own = [Blank.like(x) for x in (dq, dk, dv)]
        self.of_operands = [Blank.like(x) for x in doperands]
        self.empty = q.numel() == 0 or v.numel() == 0 or k.shape[2] == 0
        self.exact = q.dtype == torch.float32 or program.made.exact
        self.pair = Blank((*lse.shape, 2), lse.dtype, lse.device)
        self.inverse = Blank(lse.shape, lse.dtype, lse.device)
        self.row = Blank(q.shape[:3], torch.float32, q.device)
        self.column = Blank((*q.shape[:2], k.shape[2]), torch.float32, q.device)
        found = program.made.gradients
        self.rows = [n for n, _ in found.of("rows")]
        self.columns = [n for n, _ in found.of("columns")]
        shape = (*q.shape[:3], k.shape[2])
        self.direct = {
            n: place for n, x in enumerate(found.loads) if (place := _direct(found, x, doperands, shape)) is not None
        }
        whole = {found.loads[n].load.operand for n in self.direct}
        self.added_to = [n for n in range(len(doperands)) if n not in whole]
        self.launches: dict[str, Launch] = {}
        self.unavailable: fit.Unavailable | None = None
        self.totals: dict[str, Blank] = {}

    def outputs(self) -> Gradients:
        """As the function of this name makes them."""
        dq, dk, dv = self.own
        return dq(), dk(), dv(), [blank() for blank in self.of_operands]


Place = tuple[list[int], list[int]]
"""Sizes and strides."""


def _direct(found: Found, x: LoadGradient, doperands: Sequence[Tensor], shape: Sequence[int]) -> Place | None:
    """The gradient of an operand as [b, h, i, j], where a kernel can write it as it is: each element is read once, and
    that by one load."""
    of_operand = [y for y in found.loads if y.load.operand == x.load.operand]
    if x.kind != "dense" or len(of_operand) > 1 or not all(i == 0 or i in x.axes for i in x.load.indices):
        return None
    doperand = doperands[x.load.operand]
    sizes = dict(zip(POSITION, shape, strict=True))
    if doperand.shape != tuple(sizes.get(i, 1) for i in x.load.indices):
        return None
    steps = {i: d for d, i in enumerate(x.load.indices) if i != 0}
    if len(steps) != len(x.axes):
        return None
    strides = [doperand.stride(steps[p]) if p in steps else 0 for p in POSITION]
    return [sizes[p] if p in steps else 1 for p in POSITION], strides


class _Call:
    """One backward: its tensors, and what its kernels have in common."""

    def __init__(
        self,
        program: Program,
        layout: Layout,
        needs: Needs,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        operands: Sequence[Tensor],
        ints: Sequence[int],
        floats: Sequence[float],
        random: tuple[Any, ...],
    ) -> None:
        self.random = random
        self.program, self.layout, self.needs = program, layout, needs
        self.dout, self.q, self.k, self.v, self.out, self.lse = dout, q, k, v, out, lse
        self.operands = operands
        self.forward = launch.program(program.forward)
        self.scalars = self.forward.numbers(ints, floats)
        self.ints, self.floats = ints, floats
        self.batch, self.heads, self.lq, self.dq = q.shape
        self.kv_heads, self.lk, self.dv = k.shape[1], k.shape[2], v.shape[3]
        self.interpreted = q.device.type == "cpu"
        self.exact = layout.exact
        # Of each row what its weights are made of, its maximum (and, in `inverse`, one over its sum) or its
        # log-sum-exp; and delta.
        self.pair = layout.pair()
        self.inverse = layout.inverse() if self.exact else lse
        self.lists: tuple[Tensor, Tensor] | None = None
        self.sizes: tuple[int, int] | None = None

    def listed(self, tiles: Tensor | None, tiles_by_key: Tensor | None, block_m: int, block_n: int) -> None:
        """Takes the lists of tiles, or makes them where they are worth their while."""
        mask = self.forward.mask
        if mask is None:
            return
        if tiles is None or tiles_by_key is None:
            block_m, block_n = launch.tile_sizes(
                self.program.forward, self.q.device, self.q.dtype, self.dq, self.dv, self.lq
            )
            if -(-self.lk // block_n) <= launch.FEW_TILES:
                return
            values = launch.mask_values(self.forward, self.operands, self.scalars)
            shape = (self.batch, self.heads, self.lq, self.lk)
            made = [lists.run(self.q, *values, shape, block_m, block_n, mask, by_key=x) for x in (False, True)]
            tiles, tiles_by_key = made
        self.lists, self.sizes = (tiles, tiles_by_key), (block_m, block_n)

    def fill(self, made: Gradients) -> None:
        """Launches the kernels, which write the gradients."""
        dq, dk, dv, doperands = made
        needs, layout = self.needs, self.layout
        rows = {n: layout.row() for n in layout.rows}
        columns_ = {n: layout.column() for n in layout.columns}
        dq = dq if needs.q else self.q
        own = [self.q, self.k, self.v, self.out, self.dout, self.lse, self.pair, self.inverse, dq]
        self._launch("dq", [*own, *rows.values()], (dq,))
        if needs.k or needs.v or columns_:
            outer = (dk if needs.k else self.k, dv if needs.v else self.v)
            own = [self.q, self.k, self.v, self.dout, self.pair, self.inverse, *outer]
            self._launch("dkdv", [*own, *columns_.values()], outer)
        if needs.v and self.program.spec.dead == "mean" and self.program.spec.sink is None:
            self._mean_rows(dv)
        if self.program.spec.leaks:
            self._leaking_rows(dq if needs.q else None, dk if needs.k else None)
        for n in layout.added_to:
            doperands[n].zero_()
        for n, x in enumerate(self.program.made.gradients.loads):
            if n in layout.direct:
                self._launch_load(n, doperands[x.load.operand].as_strided(*layout.direct[n]))
            else:
                self._deposit(x, self._of_load(n, x, rows, columns_), doperands)

    # -- launches ----------------------------------------------------------------------------------------------

    def _launch(self, name: str, tensors: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """One of the two main kernels. made: what it writes to and has strides of."""
        tensors = [*tensors, *self.operands]
        free = self.scalars
        if self.program.made.listed:
            given = None if self.lists is None else self.lists[0 if name == "dq" else 1]
            tensors.append(self.q if given is None else given)
            free = [*free, *lists.steps(given)]
        if self.random:
            tensors.append(self.random[0])
            free = [*free, self.random[1]]
        ready = self.layout.launches.get(name)
        if ready is None:
            self._first(name, tensors, free, made)
        else:
            ready(tensors, free)

    def _first(self, name: str, tensors: Sequence[Tensor], free: Sequence[Any], made: Sequence[Tensor]) -> None:
        """Programs for blocks of queries or of keys, of each batch and head."""
        flags: dict[str, Any]
        if name == "dq":
            flags = {
                "NEED_DQ": self.needs.q,
                "LOOP": self.needs.q or bool(self.layout.rows),
                "ALWAYS": self.q.dtype == torch.float32,
            }
            strided = [self.q, self.k, self.v, self.out, self.dout, *made]
            length, heads = self.lq, self.heads
        else:
            flags = {
                "NEED_DX": self.needs.k or bool(self.layout.columns),
                "NEED_DK": self.needs.k,
                "NEED_DV": self.needs.v,
            }
            strided = [self.q, self.k, self.v, self.dout, *made]
            length, heads = self.lk, self.kv_heads
        numbers = [stride for x in strided for stride in x.stride()]
        numbers += [self.heads, self.heads // self.kv_heads, self.lq, self.lk]
        numbers += [stride for x in self.operands for stride in x.stride()]

        def with_tiles(sizes: Tiles) -> Any:
            constants = self._constants(sizes) | flags
            if self.program.made.listed:
                m, n = self.sizes or (sizes.block_m, sizes.block_n)
                constants |= {
                    "LISTED": self.lists is not None,
                    "PARTS_M": m // sizes.block_m,
                    "PARTS_N": n // sizes.block_n,
                }
            programs = self.batch * heads * -(-length // (sizes.block_m if name == "dq" else sizes.block_n))
            return self._made(name, programs, numbers, constants, sizes, tensors)

        self._fitting(name, with_tiles, tensors, free)

    def _constants(self, sizes: Tiles) -> dict[str, Any]:
        wide_q, wide_v = columns(self.dq, self.dv, interpreted=self.interpreted)
        return {
            "DQ": self.dq,
            "DV": self.dv,
            "BLOCK_DQ": wide_q,
            "BLOCK_DV": wide_v,
            "PRECISION": launch.precision(self.q.dtype),
            "UPCAST": self.interpreted and self.q.dtype == torch.bfloat16,
            "EXACT": self.exact,
            "EDGE_M": self.lq % sizes.block_m != 0,
            "EDGE_N": self.lk % sizes.block_n != 0,
            "FAST": launch.speed(self.program.spec, self.q),
            "BLOCK_M": sizes.block_m,
            "BLOCK_N": sizes.block_n,
        }

    def _made(
        self,
        name: str,
        programs: int,
        numbers: Sequence[int],
        constants: dict[str, Any],
        sizes: Tiles,
        tensors: Sequence[Tensor],
    ) -> Launch:
        kernel = self.program.kernel(name, self.interpreted)
        ordered = {x: constants[x] for x in kernel.arg_names if x in constants}
        options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
        kind = (name, *ordered.items(), sizes, self.q.device, *[x.dtype for x in tensors])
        compiled = self.program.compiled.setdefault(kind, {})
        return Launch(kernel, programs, numbers, ordered, options, made=compiled)

    def _fitting(
        self, name: str, make: Callable[[Tiles], Launch], tensors: Sequence[Tensor], free: Sequence[Any]
    ) -> None:
        """Launches with the tiles that were found to fit, and remembers that launch; at first, finds them by
        launching."""
        made: dict[Tiles, Launch] = {}

        def launch_with(tiles: Tiles) -> Any:
            made[tiles] = make(tiles)
            return made[tiles](tensors, free)

        self.layout.launches[name] = made[self._tiles(name, launch_with)]

    def _tiles(self, name: str, launch_with: Callable[[Tiles], Any]) -> Tiles:
        listed = self.sizes if name in ("dq", "dkdv") else None
        if self.interpreted:
            wanted = INTERPRETED if listed is None else replace(INTERPRETED, block_m=listed[0], block_n=listed[1])
            launch_with(wanted)
            return wanted
        kind = (name, self.q.device.index, self.q.dtype, self.dq, self.dv, listed, self.needs)

        def find() -> Tiles:
            kind_of_gpu, traits = device_generation(self.q.device), self.program.traits(name, listed)
            first = choose_backward(name, kind_of_gpu, self.q.dtype, self.dq, self.dv, traits)
            if listed is not None:
                first = replace(first, block_m=min(first.block_m, listed[0]), block_n=min(first.block_n, listed[1]))
            # The first that fits: the loops' tiles are chosen for what they hold, spilled or not.
            return fit.launch(launch_with, ((first,), smaller(first)), self.q, self.dv)

        return fit.remembered(self.program.fitting, kind, launch_with, find)

    # -- loads -------------------------------------------------------------------------------------------------

    def _of_load(
        self, n: int, x: LoadGradient, rows: dict[int, Tensor], columns_: dict[int, Tensor]
    ) -> tuple[Tensor, bool]:
        """The gradient by a load as [b, h, i, j], 1 where it has no axis, or as [b, h, distances]; and whether that."""
        if x.kind == "rows":
            return _summed(rows[n][..., None], x.axes), False
        if x.kind == "columns":
            return _summed(columns_[n][:, :, None, :], x.axes), False
        if x.kind == "sink":
            return _summed(self._of_sink(x), x.axes), False
        own = (self.batch if B in x.axes else 1, self.heads if H in x.axes else 1)
        if x.kind == "dense":
            alone = sum(y.load.operand == x.load.operand for y in self.program.made.gradients.loads) == 1
            dtype = self.operands[x.load.operand].dtype if alone else torch.float32
            total = self.q.new_empty((*own, self.lq, self.lk), dtype=dtype)
            self._launch_load(n, total)
            return total, False
        return self._of_diagonal(n, own), True

    def _launch_load(self, n: int, dense: Tensor | None = None, own: tuple[int, int] = (1, 1)) -> Tensor:
        """The kernel of a load writes its gradient as [b, h, i, j] to `dense`; without, that of a diagonal is returned:
        [b, h, diagonals of tiles, T, T], where `own` are the first two sizes."""
        from triton.runtime.errors import OutOfResources

        name = f"load{n}"
        before, after = [self.q, self.k, self.v, self.dout, self.pair, self.inverse], [*self.operands, *self.random[:1]]
        free = [*self.scalars, *self.random[1:]]
        ready = self.layout.launches.get(name)
        if ready is not None:
            total = self.layout.totals[name]() if dense is None else dense
            ready([*before, total, *after], free)
            return total

        numbers = [stride for x in (self.q, self.k, self.v, self.dout) for stride in x.stride()]
        numbers += () if dense is None else dense.stride()
        numbers += [self.batch, self.heads, self.heads // self.kv_heads, self.lq, self.lk]
        numbers += [stride for x in self.operands for stride in x.stride()]
        made: dict[Tiles, tuple[Launch, Tensor]] = {}

        def launch_with(sizes: Tiles) -> Any:
            rows, tiles = -(-self.lq // sizes.block_m), -(-self.lk // sizes.block_n)
            blocks, total = rows * tiles, dense
            if total is None:
                if sizes.block_m != sizes.block_n:  # as if it did not fit: the next one may be square
                    raise OutOfResources(sizes.block_m, sizes.block_n, "square tiles")
                blocks = rows + tiles - 1
                total = Blank((*own, blocks, sizes.block_m, sizes.block_n), torch.float32, self.q.device)()
            tensors = [*before, total, *after]
            programs = total.shape[0] * total.shape[1] * blocks
            one = self._made(name, programs, numbers, self._constants(sizes), sizes, tensors)
            made[sizes] = one, total
            return one(tensors, free)

        chosen, total = made[self._tiles(name, launch_with)]
        self.layout.totals[name] = Blank.like(total)
        self.layout.launches[name] = chosen
        return total

    def _of_diagonal(self, n: int, own: tuple[int, int]) -> Tensor:
        """[b, h, Lq + Lk - 1]: what scores at distances 1 - Lq ... Lk - 1 have together.

        The kernel leaves a tile [T, T] of sums for each diagonal of tiles; element (r, c) of diagonal d is at the
        distance (d - rows + 1) T + c - r. Tiles are skewed, so that what is as far apart is one column.
        """
        total = self._launch_load(n, own=own)
        size = total.shape[-1]
        rows = -(-self.lq // size)
        skewed = F.pad(total.flip(-2), (0, size)).flatten(-2)[..., :-size].unflatten(-1, (size, 2 * size - 1)).sum(-2)
        halves = F.pad(skewed, (0, 1)).unflatten(-1, (2, size))
        joined = F.pad(halves[..., 0, :], (0, 0, 0, 1)) + F.pad(halves[..., 1, :], (0, 0, 1, 0))
        vector = joined.flatten(-2)  # element 0 is at the distance 1 - rows T
        first = rows * size - self.lq
        return vector[..., first : first + self.lq + self.lk - 1]

    def _of_sink(self, x: LoadGradient) -> Tensor:
        """Of p = exp(sink - lse), the sink's weight, which meets no value: -p delta."""
        spec = self.program.spec
        assert spec.sink is not None
        evaluate = self._evaluator()
        weights = (torch.as_tensor(evaluate(spec.sink), device=self.q.device) - self.pair[..., :1]).exp()
        if self.exact:
            weights = weights * self.inverse[..., None]
        weights = weights.masked_fill((self.lse == -math.inf)[..., None], 0.0)
        by = torch.as_tensor(evaluate(x.derivative), device=self.q.device)
        return -weights * self.pair[..., 1:] * by

    def _evaluator(self) -> Evaluator:
        shape, device = (self.batch, self.heads, self.lq, self.lk), self.q.device
        return reference.evaluator(
            self.program.spec, shape, self.operands, self.ints, self.floats, torch.float32, device
        )

    def _deposit(self, x: LoadGradient, found: tuple[Tensor, bool], doperands: Sequence[Tensor]) -> None:
        """Adds the gradient by a load to that of its operand, at the places that it is loaded from."""
        value, diagonal = found
        evaluate = self._evaluator()
        load = x.load
        if diagonal:
            moved = along_diagonal(load)
            assert moved is not None
            load = moved
            evaluate.scope = {  # [b, h, distance]
                **{s: v.view(v.shape[:3]) if isinstance(v, Tensor) and s in (B, H) else v
                   for s, v in evaluate.scope.items()},
                DISTANCE: torch.arange(1 - self.lq, self.lk, device=self.q.device).view(1, 1, -1),
            }  # fmt: skip
        deposit(doperands[x.load.operand], load, value, evaluate)

    def _mean_rows(self, dv: Tensor) -> None:
        """Rows that see no key got the mean of all values: each has its part of what comes back."""
        dead = (self.lse == -math.inf).to(self.dout.dtype)
        back = (dead[:, :, None, :] @ self.dout).float()  # [B, Hq, 1, Dv]
        dv += (back.unflatten(1, (self.kv_heads, -1)).sum(2) / self.lk).to(dv.dtype)

    def _leaking_rows(self, dq: Tensor | None, dk: Tensor | None) -> None:
        """What rows without keys add to dq and dk: their scores s are all replaced by one number, with the derivative
        of a sum. Their weights are 1/Lk, so that

            ds_ij = c/Lk (dout_i·v_j - mean over j),  dq_i = c/Lk dout_i Σ_j (v_j - v̄)ᵀ(k_j - k̄),
            dk_j = c/Lk (v_j - v̄) Σ_i dout_iᵀ q_i

        where c is the score's derivative by q·k, a number. Keys and values are centred: their means cancel out.
        """
        # A number stays one: a tensor of it on the device would be copied there, which no CUDA graph captures.
        slope = self._evaluator()(self.program.made.gradients.slope)
        slope = slope.float() if isinstance(slope, Tensor) else float(slope)
        dead = self.lse == -math.inf
        # [B, Hkv, g, i, Dv]
        dout = torch.where(dead[..., None], self.dout, 0.0).float().unflatten(1, (self.kv_heads, -1))
        v = _centred(self.v)
        if dq is not None:
            more = dout @ (v.mT @ _centred(self.k))[:, :, None] * (slope / self.lk)
            dq += more.flatten(1, 2).to(dq.dtype)
        if dk is not None:
            q = self.q.float().unflatten(1, (self.kv_heads, -1))
            dk += (v @ (dout.mT @ q).sum(2) * (slope / self.lk)).to(dk.dtype)


def _centred(x: Tensor) -> Tensor:
    """Keys or values [B, Hkv, j, D] less their mean over j, in fp32."""
    wide = x.float()
    return wide - wide.mean(2, keepdim=True)


def _summed(x: Tensor, axes: Sequence[sympy.Symbol]) -> Tensor:
    gone = [a for a, p in enumerate(POSITION) if p not in axes and x.shape[a] > 1]
    return x.sum(gone, keepdim=True) if gone else x


def deposit(doperand: Tensor, load: Load, value: Tensor, evaluate: Evaluator) -> None:
    """Adds `value`, the gradient by a load for each position, to the operand's gradient where the load reads it.

    value: of the shape that the load's indices have when they are evaluated and broadcast.
    """
    if not load.indices:
        doperand += value.reshape(()).to(doperand.dtype)
        return
    positions = [x for x in load.indices if x != 0]
    if all(x in POSITION for x in positions) and len(set(positions)) == len(positions):
        # Positions as they are: the gradient is one for each element, in another order. Where the operand is shorter,
        # a condition of the score keeps loads inside.
        order = [POSITION.index(x) for x in load.indices if x != 0]
        rest = [a for a in range(4) if a not in order]
        placed = value.permute(*order, *rest).reshape([value.shape[a] for a in order])
        lengths = [
            min(size, value.shape[POSITION.index(x)] if x != 0 else 1)
            for x, size in zip(load.indices, doperand.shape, strict=True)
        ]
        placed = placed[tuple(slice(0, n) for n, x in zip(lengths, load.indices, strict=True) if x != 0)]
        for d, x in enumerate(load.indices):
            if x == 0:
                placed = placed.unsqueeze(d)
        doperand[tuple(slice(0, n) for n in lengths)] += placed.to(doperand.dtype)
        return
    index = []
    for size, x in zip(doperand.shape, load.indices, strict=True):
        index.append(torch.as_tensor(evaluate(x), device=doperand.device).clamp(0, max(size - 1, 0)))
    whole = torch.zeros(doperand.shape, dtype=torch.float32, device=doperand.device)
    shape = torch.broadcast_shapes(*(x.shape for x in index), value.shape)
    places = tuple(x.expand(shape) for x in index)
    if torch.are_deterministic_algorithms_enabled():
        whole.index_put_(places, value.float().expand(shape), accumulate=True)
    else:  # which sorts all places first
        flat = sum(x * stride for x, stride in zip(places, whole.stride(), strict=True))
        assert isinstance(flat, Tensor)
        whole.view(-1).scatter_add_(0, flat.reshape(-1), value.float().expand(shape).reshape(-1))
    doperand += whole.to(doperand.dtype)
