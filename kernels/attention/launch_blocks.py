"""Launches the kernel that gives each block of queries all of its keys, with tiles that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xfcompile.kernels.attention import fit, lists
from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.programs import Program
from xfcompile.kernels.attention.repeat import Launch
from xfcompile.kernels.attention.tiles import (
    INTERPRETED,
    FewKeys,
    Tiles,
    alternatives,
    choose,
    deepened,
    depth,
    device_generation,
    neighbours,
    padded,
    smaller,
    usable,
    within,
)


class Blocks:
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
        few: FewKeys | None,
    ) -> None:
        self.prepared, self.kernel, self.numbers = prepared, kernel, numbers
        self.constants, self.listed, self.types, self.dv, self.few = constants, listed, types, dv, few
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
            chosen = within(INTERPRETED, self.listed)
            launch(chosen)
        else:
            chosen = _fitting(self.prepared, q, self.dv, self.few, launch, self.listed)
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
    prepared: Program,
    q: Tensor,
    dv: int,
    few: FewKeys | None,
    launch: Callable[[Tiles], Any],
    listed: tuple[int, int] | None,
) -> Tiles:
    """Launches with the tiles that this kernel was found to fit in, and returns them; at first, by launching.

    few: what is said of windows. listed: the sizes of the tiles in a list, which those of the kernel must divide.
    """
    kind = (q.device, q.dtype, precision(q.dtype), q.shape[3], dv, padded(min(q.shape[2], 128)), listed, few)

    def candidates() -> fit.Candidates:
        least = depth(prepared.spec)
        first = deepened(choose(device_generation(q.device), q.dtype, q.shape[3], dv, q.shape[2], few), least)
        first = within(first, listed)
        ways = (alternatives(first), smaller(first), neighbours(first))
        return fit.Candidates(*(usable(way, listed, least) for way in ways))

    return fit.remembered(prepared.fitting, kind, launch, candidates, q, dv, prepared.key)
