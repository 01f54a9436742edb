"""One backward: its tensors, the launches of its two main kernels, and what all of its kernels have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from xfcompile.evaluate import Evaluator
from xfcompile.kernels.attention import backward_dead, fit, lists, programs, reference
from xfcompile.kernels.attention.arguments import mask_values
from xfcompile.kernels.attention.backward_dq import writes_of
from xfcompile.kernels.attention.backward_layout import Layout, Needs, Program
from xfcompile.kernels.attention.exactness import precision, speed
from xfcompile.kernels.attention.repeat import Launch
from xfcompile.kernels.attention.tiles import (
    INTERPRETED,
    Tiles,
    choose_backward,
    columns,
    deepened,
    depth,
    device_generation,
    neighbours,
    smaller,
    usable,
    within,
)


class Call:
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
        self.forward = programs.program(program.forward)
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
        own = self.layout.lists
        if tiles is None or tiles_by_key is None:
            if own is None:
                return
            block_m, block_n = own.block_m, own.block_n
            values = mask_values(self.forward, self.operands, self.scalars)
            about = (*values, (self.batch, self.heads, self.lq, self.lk), block_m, block_n, own.mask)
            tiles, tiles_by_key = (lists.run(self.q, *about, bool(n), own.sites[n]) for n in (0, 1))
        self.lists, self.sizes = (tiles, tiles_by_key), (block_m, block_n)

    def clear(self, written: Sequence[Tensor]) -> None:
        """Zeros, where tiles without a kept score are not visited."""
        spec = self.program.spec
        bounded = spec.keep != sympy.true and (spec.band.lower is not None or spec.band.upper is not None)
        if bounded or self.lists is not None:
            for x in written:
                x.zero_()

    def launch(self, name: str, tensors: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """One of the two main kernels, or what finds of each row what others read of it ("pair"), which is that for dq
        without its loop. made: what it writes to and has strides of."""
        tensors = [*tensors, *self.operands]
        free = self.scalars
        if self.program.made.listed:
            given = None if self.lists is None else self.lists[1 if name == "dkdv" else 0]
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
        if name != "dkdv":
            alone = name == "pair"
            own = [] if alone else self.layout.each_score
            flags = {
                "NEED_DQ": self.needs.q and not alone,
                **{writes_of(n): n in own for n in self.layout.dense},
                "LOOP": bool(self.needs.q or self.layout.rows or own) and not alone,
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
            constants = self.constants(sizes) | flags
            if self.program.made.listed:
                m, n = self.sizes or (sizes.block_m, sizes.block_n)
                constants |= {
                    "LISTED": self.lists is not None,
                    "PARTS_M": m // sizes.block_m,
                    "PARTS_N": n // sizes.block_n,
                }
            programs = self.batch * heads * -(-length // (sizes.block_n if name == "dkdv" else sizes.block_m))
            return self.made(name, programs, numbers, constants, sizes, tensors)

        self.fitting(name, with_tiles, tensors, free)

    def constants(self, sizes: Tiles) -> dict[str, Any]:
        # Of a list's tile that ends beyond the last row, or key, all parts are visited.
        listed = self.sizes or (1, 1)
        wide_q, wide_v = columns(self.dq, self.dv, interpreted=self.interpreted, narrow=self.layout.few is not None)
        return {
            "DQ": self.dq,
            "DV": self.dv,
            "BLOCK_DQ": wide_q,
            "BLOCK_DV": wide_v,
            "PRECISION": precision(self.q.dtype),
            "UPCAST": self.interpreted and self.q.dtype == torch.bfloat16,
            "EXACT": self.exact,
            "EDGE_M": bool(self.lq % sizes.block_m or self.lq % listed[0]),
            "EDGE_N": bool(self.lk % sizes.block_n or self.lk % listed[1]),
            "FAST": speed(self.program.spec, self.q),
            "BLOCK_M": sizes.block_m,
            "BLOCK_N": sizes.block_n,
        }

    def made(
        self,
        name: str,
        programs: int,
        numbers: Sequence[int],
        constants: dict[str, Any],
        sizes: Tiles,
        tensors: Sequence[Tensor],
    ) -> Launch:
        kernel = self.program.kernel(_source(name), self.interpreted)
        ordered = {x: constants[x] for x in kernel.arg_names if x in constants}
        options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages, **alike(self.program.made.exact)}
        kind = (name, *ordered.items(), sizes, self.q.device, *[x.dtype for x in tensors])
        compiled = self.program.compiled.setdefault(kind, {})
        return Launch(kernel, programs, numbers, ordered, options, made=compiled)

    def fitting(
        self, name: str, make: Callable[[Tiles], Launch], tensors: Sequence[Tensor], free: Sequence[Any]
    ) -> None:
        """Launches with the tiles that were found to fit, and remembers that launch; at first, finds them by
        launching."""
        made: dict[Tiles, Launch] = {}

        def launch_with(tiles: Tiles) -> Any:
            made[tiles] = make(tiles)
            return made[tiles](tensors, free)

        self.layout.launches[name] = made[self.tiles(name, launch_with)]

    def tiles(self, name: str, launch_with: Callable[[Tiles], Any]) -> Tiles:
        listed = self.sizes if _source(name) in ("dq", "dkdv") else None
        if self.interpreted:
            wanted = within(INTERPRETED, listed)
            launch_with(wanted)
            return wanted
        few = self.layout.few
        own = tuple(self.layout.each_score)
        kind = (name, self.q.device, self.q.dtype, self.dq, self.dv, listed, self.needs, few, own)

        def candidates() -> fit.Candidates:
            kind_of_gpu, traits = device_generation(self.q.device), self.program.traits(name, listed)
            traits = [few, *traits] if few is not None else traits
            least, over_queries = depth(self.program.spec), name in ADD_QUERIES
            first = choose_backward(_source(name), kind_of_gpu, self.q.dtype, self.dq, self.dv, traits)
            first = within(deepened(first, least, over_queries=over_queries), listed)
            # The first that fits: the loops' tiles are chosen for what they hold, spilled or not.
            timed = neighbours(first) if _source(name) in ("dq", "dkdv") else ()  # the two main kernels
            ways = (smaller(first), timed)
            return fit.Candidates((first,), *(usable(way, listed, least, over_queries=over_queries) for way in ways))

        return fit.remembered(
            self.program.fitting, kind, launch_with, candidates, self.q, self.dv, self.program.forward
        )

    def evaluator(self) -> Evaluator:
        shape, device = (self.batch, self.heads, self.lq, self.lk), self.q.device
        return reference.evaluator(
            self.program.spec, shape, self.operands, self.ints, self.floats, torch.float32, device
        )


ADD_QUERIES = ("dkdv", backward_dead.KEYS)
"""Kernels whose products of weights add queries up; those of the others add keys."""


def alike(exact: bool) -> dict[str, bool]:
    """Options of kernels that compute scores that another one has found the maximum of. Where these may be far away
    (exact), a product and a sum that one kernel fuses and the other does not are apart by so much that a weight of 1
    becomes 0 or infinite: then none does."""
    return {"enable_fp_fusion": False} if exact else {}


def _source(name: str) -> str:
    """The kernel that a launch is of."""
    return "dq" if name == "pair" else name
