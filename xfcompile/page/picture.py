"""A mask as a picture: which tiles of the scores are skipped, run masked or run whole, and where data decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch

from xfcompile.evaluate import Evaluator, Unsupported
from xfcompile.meaning import AttentionMeaning
from xfcompile.page.markup import Markup, element
from xfcompile.score import B, H, I, J, Load
from xfcompile.sparsity import TILE, verdicts

Verdict = Literal["skipped", "masked", "whole", "data"]
VERDICTS: tuple[Verdict, ...] = ("skipped", "masked", "whole", "data")

MOST = 128
"""Tiles a side that are drawn; of longer sequences larger tiles are."""

EXAMPLE = 512
"""What a size is taken to be of which nothing is known."""

MOST_RUNS = 4000
"""Runs of kept keys that are drawn within the tiles, about 15 bytes each."""


@dataclass(frozen=True)
class Picture:
    """Verdicts on tiles of `tile` by `tile`, as indices into `VERDICTS`, a row for each block of queries.

    kept: for each query the runs (start, end) of the keys that its position lets it see, if they are few.
    notes: what was assumed.
    """

    queries: int
    keys: int
    tile: int
    grid: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[tuple[int, int], ...], ...] = ()
    notes: tuple[str, ...] = ()

    def count(self, verdict: Verdict) -> int:
        return sum(row.count(VERDICTS.index(verdict)) for row in self.grid)

    @property
    def tiles(self) -> int:
        return sum(len(row) for row in self.grid)


def picture(meaning: AttentionMeaning) -> Picture | None:
    """The tiles of an attention's scores at its sizes; None where they depend on what cannot be assumed."""
    notes: list[str] = []
    known = dict(meaning.known)
    of_sizes = sympy.sympify(meaning.queries).free_symbols | sympy.sympify(meaning.keys).free_symbols
    symbols = sorted((of_sizes | meaning.keep.free_symbols) - {B, H, I, J}, key=str)
    if any(not x.is_integer for x in symbols):
        return None
    scope: dict[Any, Any] = {x: sympy.Integer(known.get(x, EXAMPLE)) for x in symbols}
    if symbols:
        words = ", ".join(f"{x} = {scope[x]}" for x in symbols)
        notes.append(f"for {words}" + (", as in this run" if all(x in known for x in symbols) else ", an example"))
    first = sorted(meaning.keep.free_symbols & {B, H}, key=str)
    if first:
        notes.append(f"for the first {' and '.join({'b': 'batch', 'h': 'head'}[str(x)] for x in first)}")
    scope |= dict.fromkeys(first, sympy.S.Zero)
    keep = meaning.keep.xreplace(scope)
    queries, keys = (sympy.sympify(n).xreplace(scope) for n in (meaning.queries, meaning.keys))
    if not (queries.is_Integer and keys.is_Integer and queries > 0 and keys > 0):
        return None
    tile = TILE
    while max(int(queries), int(keys)) > MOST * tile:
        tile *= 2
    try:
        grid = _grid(keep, int(queries), int(keys), tile)
        kept = () if grid is None else _kept(keep, int(queries), int(keys))
    except Unsupported:
        return None
    if grid is None:
        return None
    return Picture(int(queries), int(keys), tile, grid, kept, tuple(notes))


def _grid(keep: Any, queries: int, keys: int, tile: int) -> tuple[tuple[int, ...], ...] | None:
    found = verdicts(keep, queries, keys, tile, tile)
    if found is None:
        return None
    runs, whole = found
    data = torch.zeros_like(runs)
    if keep.atoms(Load):
        most, least = (verdicts(_opened(keep, value), queries, keys, tile, tile) for value in (sympy.true, sympy.false))
        if most is None or least is None:
            return None
        # Where all that depends on data makes a difference, between none of it and all of it.
        data = runs & ~whole & ((most[0] != least[0]) | (most[1] != least[1]))
    numbers = torch.where(data, 3, torch.where(whole, 2, torch.where(runs, 1, 0)))
    return tuple(tuple(row) for row in numbers.tolist())


def _opened(keep: Any, value: Any) -> Any:
    """The mask, with `value` for each of its terms that depends on data: the more of these hold, the more is kept."""
    if isinstance(keep, (sympy.And, sympy.Or)):
        return keep.func(*(_opened(x, value) for x in keep.args))
    return value if keep.atoms(Load) else keep


def _kept(keep: Any, queries: int, keys: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    keep = _opened(keep, sympy.true)
    if keep in (sympy.true, sympy.false) or queries * keys > 1 << 22:
        return ()
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    cells = torch.as_tensor(Evaluator({I: i, J: j}, (), torch.float64, i.device)(keep)).expand(queries, keys)
    edges = torch.nn.functional.pad(cells.to(torch.int8), (1, 1)).diff(dim=1)
    starts, ends = edges == 1, edges == -1
    if int(starts.sum()) > MOST_RUNS:
        return ()
    return tuple(
        tuple(zip(a.nonzero()[:, 0].tolist(), b.nonzero()[:, 0].tolist(), strict=True))
        for a, b in zip(starts, ends, strict=True)
    )


# -- drawn --------------------------------------------------------------------------------------------------------

LONG = 6
"""How many times as long as high a picture may be."""


def draw(found: Picture, name: str) -> Markup:
    """The picture as SVG, a path for each verdict; queries downwards, keys to the right. name: its own in the page."""
    across, down = found.keys, found.queries
    stretched = max(across / down, down / across) > LONG
    groups = [_tiles(found, number, name) for number in range(len(VERDICTS))]
    fine = None
    if found.kept:
        runs = ((i, a, b) for i, row in enumerate(found.kept) for a, b in row)
        fine = element("path", class_="kept", d="".join(f"M{a} {i}h{b - a}v1h{a - b}z" for i, a, b in runs))
    # The pattern's units are those of the scores: scaled so that it looks alike at any length.
    scale = max(across, down) / 260
    pattern = element(
        "pattern",
        element("rect", width=6, height=6, class_="data-back"),
        element("rect", width=2, height=6, class_="data-line"),
        id=name,
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
        patternTransform=f"scale({scale:.4g}) rotate(45)",
    )
    size = {"width": "100%", "height": "40"} if stretched else {}
    return element(
        "svg",
        element("defs", pattern),
        *groups,
        fine,
        viewBox=f"0 0 {across} {down}",
        preserveAspectRatio="none" if stretched else "xMidYMid meet",
        class_="tiles wide" if stretched else "tiles",
        role="img",
        aria_label=f"{found.count('skipped')} of {found.tiles} tiles are skipped",
        style=None if stretched else f"aspect-ratio: {across} / {down}",
        **size,
    )


def _tiles(found: Picture, number: int, name: str) -> Markup | None:
    verdict = VERDICTS[number]
    parts = []
    few = len(found.grid) <= 48 and len(found.grid[0]) <= 48
    gap = min(found.tile * 0.04, max(found.queries, found.keys) * 0.01) if few else 0
    for m, row in enumerate(found.grid):
        y, bottom = m * found.tile, min((m + 1) * found.tile, found.queries)
        for n, value in enumerate(row):
            if value == number:
                x, right = n * found.tile, min((n + 1) * found.tile, found.keys)
                parts.append(_box(x + gap, y + gap, max(right - x - 2 * gap, gap), max(bottom - y - 2 * gap, gap)))
    if not parts:
        return None
    fill = f"fill: url(#{name})" if verdict == "data" else None
    return element("path", class_=verdict, d="".join(parts), style=fill, data_verdict=verdict, data_count=len(parts))


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:g} {y:g}h{width:g}v{height:g}h{-width:g}z"


def legend(found: Picture) -> list[tuple[Verdict, int, str]]:
    """What is in the picture: verdict, how many tiles, and what it means."""
    words: Sequence[tuple[Verdict, str]] = (
        ("whole", "run whole"), ("masked", "run masked"), ("data", "data decides"), ("skipped", "never run"),
    )  # fmt: skip
    return [(verdict, found.count(verdict), text) for verdict, text in words if found.count(verdict)]
