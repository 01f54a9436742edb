"""How much of the scores a mask leaves, tile by tile: what the report says was proved of it."""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch

from xfcompile.evaluate import Evaluator, Unsupported
from xfcompile.intervals import certain, possible
from xfcompile.score import I, J, Load
from xfcompile.site import Band

TILE = 64
"""Queries and keys of a tile, as most kernels have them."""

I0, I1, J0, J1 = sympy.symbols("i0 i1 j0 j1", integer=True, nonnegative=True)
BOX = {I: (I0, I1), J: (J0, J1)}


def verdicts(
    keep: Any, queries: int, keys: int, tile_m: int = TILE, tile_n: int = TILE
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """For each tile [queries / tile_m, keys / tile_n] whether it has to run, and whether it needs no mask then; None
    where the predicate depends on more than positions and data. Of data nothing is known: such tiles run, and are
    masked."""
    some, every = possible(keep, BOX), certain(keep, BOX)
    if (some.free_symbols | every.free_symbols) - {I0, I1, J0, J1}:
        return None
    i0 = torch.arange(0, max(queries, 1), tile_m)[:, None]
    j0 = torch.arange(0, max(keys, 1), tile_n)[None, :]
    scope = {I0: i0, I1: (i0 + tile_m).clamp(max=queries) - 1, J0: j0, J1: (j0 + tile_n).clamp(max=keys) - 1}
    evaluate = Evaluator(scope, (), torch.float64, i0.device)
    shape = (i0.numel(), j0.numel())
    runs, whole = (torch.as_tensor(evaluate(x)).expand(shape) for x in (some, every))
    return runs, whole & runs


@functools.lru_cache(maxsize=256)
def describe(keep: Any, band: Band, queries: Any, keys: Any) -> str | None:
    """In words: "j < i + 1: 51% of 64x64 tiles run, 2% masked"."""
    if keep in (sympy.true, sympy.false):
        return None
    found = None
    if sympy.sympify(queries).is_Integer and sympy.sympify(keys).is_Integer:
        try:
            found = verdicts(keep, int(queries), int(keys))
        except Unsupported:
            found = None
    bounds = _bounds(band)
    if found is None:
        return bounds
    runs, whole = (float(x.double().mean()) for x in found)
    most = "at most " if keep.atoms(Load) else ""
    share = f"{most}{runs:.0%} of {TILE}x{TILE} tiles run, {runs - whole:.0%} masked"
    return share if bounds is None else f"{bounds}: {share}"


def _bounds(band: Band) -> str | None:
    """The closed bounds of the keys."""
    if band.lower is None and band.upper is None:
        return None
    low = "" if band.lower is None else f"{band.lower} <= "
    high = "" if band.upper is None else f" < {band.upper}"
    return f"{low}j{high}"
