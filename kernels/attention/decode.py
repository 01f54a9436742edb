"""The text of the decoding kernels: a few query rows against many keys, split over programs and combined."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import sympy

from xfcompile.kernels.attention import template
from xfcompile.kernels.attention.forward_text import DEAD
from xfcompile.kernels.attention.loops import step
from xfcompile.kernels.attention.names import CONSTANTS, Forms, Names
from xfcompile.kernels.lines import constexprs, wrapped
from xfcompile.score import H, I, J, Load
from xfcompile.site import ScoreSpec

SPLIT = '''\
@triton.jit(do_not_specialize={lengths!r})
{signature}
    """One program: some tiles of keys, against the rows of all query heads that share a head of k and v.

    These rows are packed: row r is query r // group of the group's head r % group. Tiles are dealt out in turn, so that
    programs have equally many that are live wherever these are: the beginning of a cache, a window at its end.
    """
    rows = group * lq
    blocks = (rows + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    block = pid % blocks
    split = pid // blocks % splits
    hk = pid // blocks // splits % (heads // group)
    b = pid // blocks // splits // (heads // group)
    offs_r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.minimum(offs_r, rows - 1)  # rows past the end repeat the last one, and are not stored
    i = (r // group)[:, None]
    h = (hk * group + r % group)[:, None]

    offs_dq = tl.arange(0, BLOCK_DQ)[None, :]
    q_row = tl.cast(b, tl.int64) * stride_qb + tl.cast(h, tl.int64) * stride_qh + tl.cast(i, tl.int64) * stride_qm
    k_ptr += tl.cast(b, tl.int64) * stride_kb + tl.cast(hk, tl.int64) * stride_kh
    v_ptr += tl.cast(b, tl.int64) * stride_vb + tl.cast(hk, tl.int64) * stride_vh
    q = tl.load(q_ptr + q_row + offs_dq.to(tl.int64) * stride_qd, mask=offs_dq < DQ, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    first = 0
{rows}
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)

{loop}

    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    part = ((tl.cast(b, tl.int64) * heads + hk * group + r % group) * lq + r // group) * splits + split  # [M]
    tl.store(m_ptr + part, m, mask=offs_r < rows)
    tl.store(l_ptr + part, l, mask=offs_r < rows)
    # A program that saw no key has nothing to add: its l says so, and acc stays unwritten.
    mask = ((offs_r < rows) & (l != 0.0))[:, None] & (offs_dv < DV)
    tl.store(acc_ptr + part[:, None] * DV + offs_dv, acc, mask=mask)
'''

LOOP = """\
for index in tl.range(split, tiles, splits):
    start = lo + index * BLOCK_N
{step}"""

LIVE = """\
# K and V are read only of tiles in which some row keeps some key; of the others the mask alone is, of several tiles at
# once. Live tiles are bits of `left`: one loop over them takes half the registers of two nested loops.
left = tl.cast(0, tl.int64)
steps = tl.cast(0, tl.int64)
for first in tl.range(0, (tiles - split + splits - 1) // splits, {ahead}):
    nth = first + tl.arange(0, {ahead})
    offs_n = lo + (split + nth * splits)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    offs_n = tl.reshape(offs_n, [1, {ahead} * BLOCK_N])
    j = tl.minimum(offs_n, lk - 1)
{keep}
    seen = tl.where(seen, offs_n < hi, False).to(tl.int32)
    seen = tl.reshape(tl.reduce(seen, 0, tl.standard._elementwise_max), [{ahead}, BLOCK_N])
    live = tl.reduce(seen, 1, tl.standard._elementwise_max).to(tl.int64)
    left += tl.reduce(live << nth, 0, tl.standard._sum_combine)
    steps += tl.reduce(live, 0, tl.standard._sum_combine)
for _ in tl.range(0, steps):
    lowest = left & -left
    left -= lowest
    nth = (tl.cast(lowest, tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # the exponent of a power of 2
    start = lo + (split + nth * splits) * BLOCK_N
{step}"""

COMBINE = '''\
@triton.jit(do_not_specialize={lengths!r})
{signature}
    """One program: what the splits of one query row add up to.

    DEPENDENT: it was launched while the splits still ran (programmatic dependent launch), and waits for them.
    """
    {power}
    pid = tl.program_id(0)
    i = pid % lq
    h = pid // lq % heads
    b = pid // lq // heads
    offs_dv = tl.arange(0, BLOCK_DV)
{state}
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    acc = tl.full([BLOCK_DV], 0.0, tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        part = tl.cast(pid, tl.int64) * splits + offs_s
        m_part = tl.load(m_ptr + part, mask=offs_s < splits, other=float("-inf"))
        l_part = tl.load(l_ptr + part, mask=offs_s < splits, other=0.0)
        # Whatever stands where nothing was written: to load by l would be to wait for l.
        mask = (offs_s < splits)[:, None] & (offs_dv < DV)[None, :]
        acc_part = tl.load(acc_ptr + part[:, None] * DV + offs_dv[None, :], mask=mask, other=0.0)  # [S, DV]
        acc_part = tl.where((l_part != 0.0)[:, None], acc_part, 0.0)
        m_new = tl.maximum(m, tl.reduce(m_part, 0, tl.standard._elementwise_max))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.where(l_part == 0.0, 0.0, tl.exp2((m_part - m_safe) * POWER))
        alpha = tl.exp2((m - m_safe) * POWER)
        l = l * alpha + tl.reduce(l_part * weight, 0, tl.standard._sum_combine)
        acc = acc * alpha + tl.reduce(acc_part * weight[:, None], 0, tl.standard._sum_combine)
        m = m_new
    tl.store(lse_ptr + pid, {lse})
{dead}
    if HEADS_FIRST:
        out_row = (tl.cast(b, tl.int64) * heads + h) * lq + i
    else:
        out_row = (tl.cast(b, tl.int64) * lq + i) * heads + h
    out = acc * tl.div_rn(1.0, l)
    tl.store(out_ptr + out_row * DV + offs_dv, out.to(out_ptr.dtype.element_ty), mask=offs_dv < DV)
'''

MEAN = """\
if l == 0.0:
    # A row that may see no key has equal weights for all keys, also those in tiles that were skipped.
    v_ptr += tl.cast(b, tl.int64) * stride_vb + tl.cast(h // group, tl.int64) * stride_vh
    acc = tl.full([BLOCK_DV], 0.0, tl.float32)
    for start in tl.range(0, lk, BLOCK_N):
        v = load_rows(v_ptr, start, lk, stride_vn, stride_vd, DV, BLOCK_N, BLOCK_DV, True)
        acc += tl.reduce(v.to(tl.float32), 0, tl.standard._sum_combine)
    l = tl.cast(lk, tl.float32)"""

LENGTHS = ["lq", "lk", "splits"]
"""Arguments that may differ at every call of a program that generates text: no reason to compile anew."""

MOST_TILES = 63
"""Tiles of one program: those that are live are bits of an integer."""

AHEAD = 16
"""Tiles of which the mask is read at once, lest their programs wait for memory once a tile. 1024 keys of 128 bf16."""

AHEAD_OF_ROWS = 2
"""The same where each row has a mask of its own: 16 rows and more of them take as many registers."""


def kernels(spec: ScoreSpec, forms: Forms, names: Names, row_lines: Sequence[str]) -> str:
    """The two kernels, which call the functions that `template.module` writes for the other one; none where these do
    not compute the spec."""
    if not supports(spec):
        return ""
    return "\n\n".join(["", _split(spec, names, row_lines), _combine(spec, forms, names)])


def supports(spec: ScoreSpec) -> bool:
    """Whether these kernels compute it: a row's second pass over all keys needs its maximum, which no split knows."""
    return spec.full is None and not spec.dropout


def _split(spec: ScoreSpec, names: Names, row_lines: Sequence[str]) -> str:
    strides = [f"stride_{x}{d}" for x, dims in (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd")) for d in dims]
    pointers = ["q_ptr", "k_ptr", "v_ptr", "acc_ptr", "m_ptr", "l_ptr", *names.pointers]
    arguments = [*pointers, *strides, "heads", "group", *LENGTHS, *names.strides, *names.scalars]
    constants = constexprs([*CONSTANTS, *names.flags, "BLOCK_M", "DEPENDENT"])
    return SPLIT.format(
        lengths=[*LENGTHS, *names.scalars],
        signature=wrapped("def decode_split", [*arguments, *constants], ":"),
        rows=textwrap.indent("\n".join(row_lines), "    "),
        loop=textwrap.indent(_loop(spec, names), "    "),
    )


def _loop(spec: ScoreSpec, names: Names) -> str:
    """The tiles of one program, from the first to the last key that the band leaves to its rows."""
    masked = spec.keep != sympy.true
    visit = step(names, masked=masked, edge=True)
    lines = [
        f"lo = {_bound(spec, names, 'lower', 'block * BLOCK_M // group')}",
        f"hi = {_bound(spec, names, 'upper', '(tl.minimum((block + 1) * BLOCK_M, rows) - 1) // group')}",
        "tiles = (hi - lo + BLOCK_N - 1) // BLOCK_N",
    ]
    if not masked or spec.band.exact:
        return "\n".join([*lines, LOOP.format(step=visit)])
    live = LIVE.format(
        ahead=AHEAD_OF_ROWS if _per_row(spec.keep) else AHEAD,
        keep=wrapped("    seen = keep", ["b", "h", "i", "j", *names.inside, *names.flags]),
        step=visit,
    )
    return "\n".join([*lines, live])


def _bound(spec: ScoreSpec, names: Names, side: str, row: str) -> str:
    if getattr(spec.band, side) is None:
        return "0" if side == "lower" else "lk"
    bound = f"clamp({side}({', '.join([row, *names.scalars])}), lk)"
    # Tiles start where they would without a bound, so that what is known of addresses stays known.
    return f"{bound} // BLOCK_N * BLOCK_N" if side == "lower" else bound


def _per_row(keep: sympy.Basic) -> bool:
    """Whether the mask is loaded for each row: comparisons of what a row and a key have take no more than registers."""
    return any(J in load.free_symbols and load.free_symbols & {H, I} for load in keep.atoms(Load))


def _combine(spec: ScoreSpec, forms: Forms, names: Names) -> str:
    state = ['m = tl.cast(float("-inf"), tl.float32)', "l = tl.cast(0.0, tl.float32)"]
    if spec.sink is not None:
        arguments = ["b", "h", "i", *names.outside, *names.flags]
        state = [
            "# The sink counts once, whatever the number of splits: it has weight but no value.",
            wrapped("m = tl.cast(sink", arguments, ", tl.float32)"),
            'l = tl.where(m == float("-inf"), 0.0, 1.0)',
        ]
    # With a sink a row has weights even without keys; where the sink is -inf too they are 0 / 0.
    dead = {"nan": "", "mean": MEAN, "zero": DEAD["zero"]}["nan" if spec.sink is not None else spec.dead]
    pointers = ["acc_ptr", "m_ptr", "l_ptr", "v_ptr", "out_ptr", "lse_ptr", *names.pointers]
    strides = [f"stride_v{d}" for d in "bhnd"]
    arguments = [*pointers, *strides, "heads", "group", *LENGTHS, *names.strides, *names.scalars]
    blocks = ["DV", "BLOCK_DV", "BLOCK_N", "BLOCK_S", "HEADS_FIRST"]
    constants = [f"{x}: tl.constexpr" for x in (*blocks, *names.flags, "DEPENDENT")]
    return COMBINE.format(
        lengths=[*LENGTHS, *names.scalars],
        signature=wrapped("def decode_combine", [*arguments, *constants], ":"),
        state=textwrap.indent("\n".join(state), "    "),
        power=template.POWER,
        lse=template.lse(forms, names, row="i", first="0"),
        dead=textwrap.indent(dead, "    "),
    )
