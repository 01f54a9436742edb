"""What is known of a backward before it is called: its kernels, what is wanted, what tensors of one layout share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import Tensor

from xfcompile.kernels.attention import backward, cache, fit, lists_sizes, programs, template
from xfcompile.kernels.attention.backward import Backward
from xfcompile.kernels.attention.backward_dead import MARKED
from xfcompile.kernels.attention.blocks import DISTANCE, along_diagonal
from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.gradient import Gradients as Found
from xfcompile.kernels.attention.gradient import LoadGradient
from xfcompile.kernels.attention.repeat import Blank, Launch, aligned, windows
from xfcompile.kernels.attention.tiles import Tiles, Trait
from xfcompile.kernels.registration import Site
from xfcompile.score import POSITION, B, H
from xfcompile.site import ScoreSpec

log = logging.getLogger(__name__)

LISTED_APART = 64
"""Tiles of lists that are no larger have tiles of their own in `tiles.BACKWARD`."""


@dataclass(frozen=True)
class Program:
    """A generated backward in this process. forward: the key of the kernel that it is the backward of. needed: the
    operands that it has gradients for. fitting: tiles that were found to fit. layouts: of tensors that there were.
    compiled: what Triton made for several of these (see `Launch`)."""

    key: str
    forward: str
    needed: tuple[int, ...]
    made: Backward
    spec: ScoreSpec
    fitting: dict[Any, Tiles | fit.Unavailable] = field(default_factory=dict)
    layouts: dict[object, Layout] = field(default_factory=dict)
    compiled: dict[object, dict[object, Any]] = field(default_factory=dict)

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
        if template.dense_loads(self.spec):
            found.append("dense")
        return [*found, "linear" if self.made.linear else "other"]

    def kernel(self, name: str, interpreted: bool) -> Any:
        return getattr(_module(self.forward, self.needed, interpreted), f"attention_backward_{name}")


@functools.cache
def prepare(forward: str, needed: tuple[int, ...]) -> Program:
    """Generates the backward of a prepared kernel, with gradients by these operands, and stores its source.

    Raises evaluate.Unsupported where the score cannot be differentiated.
    """
    prepared = programs.program(forward)
    made = backward.generate(prepared.spec, needed)
    key = cache.key_of(made.text)
    log.info("attention backward %s: slope %s", cache.store(made.text), made.gradients.slope)
    return Program(key, forward, needed, made, prepared.spec)


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


def layout_of(
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
    """What is remembered of tensors like these: of all that launches depend on, but for where tensors are, as long as
    they start at multiples of 16 bytes or do not."""
    key = (
        needs, block_m, block_n, precision(q.dtype) if q.dtype is torch.float32 else None, aligned(q, k, v, dout),
        *[(x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v, out, dout, lse, *operands)],
        *[x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in (tiles, tiles_by_key)],
    )  # fmt: skip
    found = program.layouts.get(key)
    if found is None:
        if len(program.layouts) >= programs.MANY_CALLS:
            program.layouts.clear()
        found = program.layouts[key] = Layout(program, needs, q, k, v, dout, lse, operands)
    return found


UNKNOWN = object()


class Layout:
    """What a backward's calls with tensors of one layout have in common, found out at the first of them.

    launches: of its kernels by their names, with tiles that fit. hopper: a `HopperBackward`, None where that is not for
    these tensors, or UNKNOWN. direct: where kernels write operands' gradients as they are, by the numbers of loads;
    dense: the loads of each score; each_score: those of them of which an operand's gradient has an element for each
    score, which are not added up. lists: that it makes. totals: of a kernel for a load the memory that it writes to,
    where that is no operand's gradient. unavailable: why its kernels cannot be launched, once that is known. few: what
    is said of windows, which have tiles of their own.
    """

    def __init__(
        self,
        program: Program,
        needs: Needs,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        lse: Tensor,
        operands: Sequence[Tensor],
    ) -> None:
        self.few = windows(program.spec.dropout, q, k, v, dout)
        dq, dk, dv, doperands = outputs(q, k, v, operands, needs)
        self.own = [Blank.like(x) for x in (dq, dk, dv)]
        self.of_operands = [Blank.like(x) for x in doperands]
        self.empty = q.numel() == 0 or v.numel() == 0 or k.shape[2] == 0
        self.exact = q.dtype == torch.float32 or program.made.exact
        self.pair = Blank((*lse.shape, 2), lse.dtype, lse.device)
        self.inverse = Blank(lse.shape, lse.dtype, lse.device)
        self.row = Blank(q.shape[:3], torch.float32, q.device)
        self.marks = Blank((*q.shape[:2], -(-q.shape[2] // MARKED)), torch.int32, q.device)
        self.column = Blank((*q.shape[:2], k.shape[2]), torch.float32, q.device)
        found = program.made.gradients
        self.rows = [n for n, _ in found.of("rows")]
        self.columns = [n for n, _ in found.of("columns")]
        shape = (*q.shape[:3], k.shape[2])
        self.direct = {
            n: place for n, x in enumerate(found.loads) if (place := _direct(found, x, doperands, shape)) is not None
        }
        self.dense = [n for n, _ in found.of("dense")]
        self.each_score = [n for n in self.dense if n in self.direct and self.direct[n][0] == [*shape]]
        whole = {found.loads[n].load.operand for n in self.direct}
        self.added_to = [n for n in needs.operands if n not in whole]
        self.launches: dict[str, Launch] = {}
        self.hopper: Any = UNKNOWN
        self.unavailable: fit.Unavailable | None = None
        self.totals: dict[str, Blank] = {}
        self.lists = _lists(program, q, k, v)

    def outputs(self) -> Gradients:
        """As the function of this name makes them."""
        dq, dk, dv = self.own
        return dq(), dk(), dv(), [blank() for blank in self.of_operands]


@dataclass(frozen=True)
class Lists:
    """Lists of tiles that a backward makes where it is given none: what of, the sizes of the tiles, and what is known
    of both calls that make them, by blocks of queries and by blocks of keys."""

    mask: str
    block_m: int
    block_n: int
    sites: tuple[Site, Site]


def _lists(program: Program, q: Tensor, k: Tensor, v: Tensor) -> Lists | None:
    """None where the kernels take no lists, or so few tiles that lists are not worth their while."""
    mask = programs.program(program.forward).mask
    if mask is None:
        return None
    sizes = lists_sizes.tile_sizes(program.forward, q.device, q.dtype, q.shape[3], v.shape[3], q.shape[2])
    few = -(-k.shape[2] // sizes[1]) <= lists_sizes.FEW_TILES
    return None if few else Lists(mask, *sizes, (Site(), Site()))


Place = tuple[list[int], list[int]]
"""Sizes and strides."""


def _direct(found: Found, x: LoadGradient, doperands: Sequence[Tensor], shape: Sequence[int]) -> Place | None:
    """The gradient of an operand as [b, h, i, j], or as [b, h, distances], where a kernel can write it as it is: each
    element is read, and that by one load."""
    of_operand = [y for y in found.loads if y.load.operand == x.load.operand]
    if len(of_operand) > 1:
        return None
    batch, heads, lq, lk = shape
    sizes: dict[sympy.Expr, int]
    if x.kind == "dense":
        indices, sizes = x.load.indices, dict(zip(POSITION, shape, strict=True))
    elif x.kind == "diagonal":
        moved = along_diagonal(x.load)
        assert moved is not None
        indices, sizes = moved.indices, {B: batch, H: heads, DISTANCE + lq - 1: lq + lk - 1}
    else:
        return None
    axes = {i: d for d, i in enumerate(indices) if i != 0}
    if not axes.keys() <= sizes.keys() or len(axes) != sum(i != 0 for i in indices):
        return None
    doperand = doperands[x.load.operand]
    if doperand.shape != tuple(sizes.get(i, 1) for i in indices):
        return None
    return (
        [n if i in axes else 1 for i, n in sizes.items()],
        [doperand.stride(axes[i]) if i in axes else 0 for i in sizes],
    )
