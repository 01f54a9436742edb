"""The loops of a forward over tiles of keys: between closed bounds, or by lists."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import sympy

from xfcompile.kernels.attention.names import COMMON, CONSTANTS, Forms, Names
from xfcompile.kernels.lines import indented, wrapped
from xfcompile.site import Band, ScoreSpec

NEAR = 128.0
"""Beside a score that is higher by this, in base e, one has a weight of 0 in fp32."""


def step(names: Names, *, masked: bool, edge: bool, again: bool | None = None, even: bool = False) -> str:
    """A call of `tile`. again: whether it is in the second pass, None where there is none."""
    flags = [masked, edge, *([] if again is None else [again]), *([even] if names.evens else [])]
    evens = names.evens if even else ["0.0" for _ in names.evens]
    arguments = ["acc", "m", "l", "q", "start", *COMMON, *names.inside, *names.random, *evens, *CONSTANTS, *names.flags]
    return wrapped("    acc, m, l = tile", [*arguments, *map(str, flags)])


def _loop(
    names: Names,
    start: str,
    end: str,
    *,
    masked: bool,
    edge: bool,
    again: bool | None,
    even: bool = False,
    listed: str | None = None,
) -> str:
    """A loop over tiles. listed: the place in the list of the tile number n; `start` and `end` are places then."""
    call = step(names, masked=masked, edge=edge, again=again, even=even)
    if listed is None:
        return f"for start in tl.range({start}, {end}, BLOCK_N):\n{call}"
    return "\n".join(
        [f"for n in tl.range({start} * PARTS_N, {end} * PARTS_N):", f"    start = {listed_at('n', listed)}", call]
    )


def listed_at(n: str, place: str, mask: str = "") -> str:
    """Where a tile begins whose number stands in a list."""
    return f"(tl.load(list_ptr + {place}{mask}) * PARTS_N + {n} % PARTS_N) * BLOCK_N"


def _even_loop(names: Names, forms: Forms, again: bool | None) -> str:
    """The loop over even tiles. What is one number for a tile is read one step ahead: nothing waits for it."""
    loop = _loop(names, "0", "evens", masked=False, edge=False, again=again, even=True, listed="3 + n // PARTS_N")
    head, start, *body = loop.splitlines()
    return "\n".join(
        [
            f"ahead = {listed_at('0', '3', ', mask=evens > 0, other=0')}",
            *forms.even_lines,
            *(f"{name} = {value}" for name, value in zip(names.evens, forms.even_values, strict=True)),
            head,
            start,
            "    n_next = tl.minimum(n + 1, evens * PARTS_N - 1)",
            f"    ahead = {listed_at('n_next', '3 + n_next // PARTS_N')}",
            *(f"    {line}" for line in forms.even_lines),
            *(f"    {name}_next = {value}" for name, value in zip(names.evens, forms.even_values, strict=True)),
            *body,
            *(f"    {name} = {name}_next" for name in names.evens),
        ]
    )


def loops(spec: ScoreSpec, forms: Forms, names: Names) -> str:
    """Tiles of three kinds: wholly kept ones are not masked, ones that may be ragged are masked by range as well."""
    again = None if spec.full is None else False
    loop = functools.partial(_loop, names, again=again)
    bounded = bounded_loops(spec, names.scalars, loop)
    if not names.listed:
        return bounded
    front, back = "3 + n // PARTS_N", "2 + tiles - n // PARTS_N"
    lines = [
        "if LISTED:",
        "    # Lists of the tiles to visit: `xfcompile.kernels.attention.blocks`.",
        "    tiles = (lk + BLOCK_N * PARTS_N - 1) // (BLOCK_N * PARTS_N)",
        "    rows = (lq + BLOCK_M * PARTS_M - 1) // (BLOCK_M * PARTS_M)",
        "    place = (b * list_b + h * list_h) * rows + block // PARTS_M",
        "    list_ptr += tl.cast(place, tl.int64) * (tiles + 3)",
        "    evens = tl.load(list_ptr)",
        "    wholes = tl.load(list_ptr + 1)",
        "    masked = tl.load(list_ptr + 2)",
        *([indented(_even_loop(names, forms, again))] if names.evens else []),
        indented(loop("evens" if names.evens else "0", "wholes", masked=False, edge=False, listed=front)),
        indented(loop("0", "masked", masked=True, edge=True, listed=back)),
        "else:",
        indented(bounded),
    ]
    return "\n".join(lines)


def bounded_loops(spec: ScoreSpec, scalars: Sequence[str], loop: Callable[..., str], edge: bool | str = True) -> str:
    """Loops between closed bounds on the keys of a block of queries.

    loop: (start, end, *, masked, edge) -> the text of one. edge: whether the last tile of keys may be ragged, or the
    name of the flag that says so.
    """
    if spec.keep == sympy.true:
        ragged = loop("full", "lk", masked=False, edge=True)
        return "\n".join(
            [
                "full = lk // BLOCK_N * BLOCK_N",
                loop("0", "full", masked=False, edge=False),
                ragged if edge is True else f"if {edge}:\n{indented(ragged)}",
            ]
        )

    def bound(side: str, row: str) -> str:
        if getattr(spec.band, side) is None:
            return "0" if side == "lower" else "lk"
        return f"clamp({side}({', '.join([row, *scalars])}), lk)"

    tiles = " // BLOCK_N * BLOCK_N" if spec.band.lower is not None else ""
    last = ["last = tl.minimum(first + BLOCK_M, lq) - 1"] if spec.band != Band() else []
    lines = [*last, f"lo = {bound('lower', 'first')}{tiles}", f"hi = {bound('upper', 'last')}"]
    if not spec.band.exact:
        return "\n".join([*lines, loop("lo", "hi", masked=True, edge=edge)])
    lo_full = f"tl.minimum(({bound('lower', 'last')} + BLOCK_N - 1) // BLOCK_N * BLOCK_N, hi)"
    lines += [
        "# Every row of the block sees every key from lo_full to hi_full.",
        f"lo_full = {lo_full if spec.band.lower is not None else 'lo'}",
        f"hi_full = tl.maximum({bound('upper', 'first')} // BLOCK_N * BLOCK_N, lo_full)",
    ]
    if spec.band.lower is not None:
        lines.append(loop("lo", "lo_full", masked=True, edge=edge))
    lines.append(loop("lo_full", "hi_full", masked=False, edge=False))
    lines.append(loop("hi_full", "hi", masked=True, edge=edge))
    return "\n".join(lines)


def again(spec: ScoreSpec, names: Names, state: Sequence[str]) -> str:
    """Rows that score as low as masked keys do see all keys after all."""
    if spec.full is None or spec.floor is None:
        return ""
    lines = [
        "# Rows whose scores are as low as those of masked keys see these too.",
        f"low = m <= {float(spec.floor) + NEAR!r} * UNIT",
        "if tl.reduce(low.to(tl.int32), 0, tl.standard._elementwise_max) > 0:",
        "    acc_kept, m_kept, l_kept = acc, m, l",
        *(f"    {line}" for line in state),
        "    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)",
        indented(_loop(names, "0", "lk", masked=False, edge=True, again=True)),
        "    acc = tl.where(low[:, None], acc, acc_kept)",
        "    m = tl.where(low, m, m_kept)",
        "    l = tl.where(low, l, l_kept)",
    ]
    return "\n".join(lines)
