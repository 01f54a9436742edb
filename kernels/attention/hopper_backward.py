"""The text of the backward for Hopper, in Gluon: one warp loads tiles by TMA, two warpgroups share a tile's products.

One kernel computes dq, dk and dv of a tile of scores that is computed once, with five products of matrices instead of
the seven that kernels of their own take: the order of FlashAttention-3 (Shah et al., 2024). A program owns keys; what
it adds to dq, which others add to as well, is added up in memory, in fp32, by TMA, in an order that is not the same
every time. The site's own functions are those of the other backward, which Gluon compiles as its own.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import sympy
import torch

from xfcompile.kernels import gluon
from xfcompile.kernels.attention import hopper, template
from xfcompile.kernels.attention.backward_writer import Writer
from xfcompile.kernels.attention.forward_text import HELPERS
from xfcompile.kernels.attention.gradient import Gradients
from xfcompile.kernels.attention.hopper_backward_text import KERNELS, PREAMBLE
from xfcompile.kernels.attention.hopper_variant import bias_of, place_of
from xfcompile.kernels.lines import WIDTH, indented, wrapped
from xfcompile.kernels.printing.arithmetic import LOG2E
from xfcompile.kernels.printing.extent import extent
from xfcompile.score import I, J, Load, S
from xfcompile.site import Band, ScoreSpec

ROWS, KEYS = 64, 128
"""Query rows of a tile, and the keys of a program, half of them a warpgroup's."""

STAGES, STAGES_WITH_BIAS = {64: 3, 128: 3}, {64: 3, 128: 2}
"""Tiles of queries, and of what comes back for them, in shared memory; where tiles of a bias stand beside them, too."""

AHEAD = {64: True, 128: False}
"""Whether the next tile's scores are computed before this one's are done with, for which registers must be left."""

LATER = {64: True, 128: False}
"""Whether what a tile adds to dq is handed to TMA behind the next tile's fence rather than one of its own, which takes
a second buffer: 2.99 ms and not 3.10 at head dims of 64, and 2.93 and not 2.49 at 128 (an H200, B4 H32 S4096 D64 and
B4 H16 S4096 D128, bf16, no mask; examples/results/hopper_backward_h200.json)."""

NARROW = {64: 512, 128: 256}
"""Fewer keys of a window are too few, or not measured: of 256 it took 0.14 ms and the other kernels 0.16, of 1024 0.50
and 0.69, of 4096 1.12 and 1.86 (an H200, B1 H16 D128, S4096 and twice S8192; examples/bench_windows.py and results as
above)."""

WARPS = 8
PRODUCER_REGISTERS = 24


def why_not(spec: ScoreSpec, found: Gradients, dtype: torch.dtype, dq: int, dv: int) -> str | None:
    """Why this kernel is not the one for such a site; None if it is."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "it multiplies numbers of 16 bits"
    head_dims = hopper.HEAD_DIMS
    if not (head_dims[0] // 2 < min(dq, dv) and max(dq, dv) <= head_dims[-1]):
        return "head dims"
    if hopper.columns(dq) != hopper.columns(dv) or dq % 8 or dv % 8:
        return "head dims"
    if spec.dropout:
        return "it drops no weights out"
    if found.of("rows", "columns"):
        return "what is added has a gradient that is a sum over keys or queries"
    if _width(spec.band) < NARROW[hopper.columns(dq)]:
        return "a narrow band is visited in smaller tiles"
    if any(load.free_symbols >= {I, J} for load in spec.score.atoms(Load) - {bias_of(spec, dtype)}):
        return "loads of each score are waited for"
    if not spec.score.has(S):
        return "scores without q·k"
    w = writer(spec, found, dtype)
    if w.bend is not None and not is_bounded(w.bend, spec.scalars):
        return "a slope that may not be finite where a weight is 0"
    if extent(w.score) != {I, J}:
        return "a score that is one for many"
    return None


def is_bounded(slope: sympy.Basic, scalars: Sequence[sympy.Symbol]) -> bool:
    """Whether an expression in s is finite for every number that s may be, also an infinite one: weights of 0 are
    multiplied by it, at an edge and where masked, and have to stay 0. And whether it has s in it."""
    if isinstance(slope, sympy.tanh):
        (x,) = slope.args
        return x.free_symbols <= {S, *scalars} and S not in x.diff(S).free_symbols  # a x + b, which is not NaN
    if isinstance(slope, sympy.Pow):
        return bool(slope.exp.is_Integer and slope.exp > 0) and is_bounded(slope.base, scalars)
    if isinstance(slope, (sympy.Add, sympy.Mul)):
        return all(x.is_number or is_bounded(x, scalars) for x in slope.args)
    return False


def _width(band: Band) -> float:
    """How many keys a row sees within exact bounds, if that is a number; infinitely many without."""
    if band.lower is None or not band.exact:
        return math.inf
    width = sympy.oo if band.upper is None else sympy.expand(sympy.sympify(band.upper) - band.lower)
    return float(width) if width.is_number else 0.0


def writer(spec: ScoreSpec, found: Gradients, dtype: torch.dtype) -> Writer:
    """What writes the text of a site, with its bias as a tile."""
    bias = bias_of(spec, dtype)
    return Writer(spec, found, () if bias is None else (bias,))


def written(w: Writer) -> int | None:
    """The load of a bias whose gradient is that of the scores, which is there to be written, by its number; None if it
    is not."""
    if w.bend is not None:
        return None
    return next((n for n, x in w.found.of("dense") if x.load in w.tiles and x.derivative == 1), None)


def module(w: Writer) -> str:
    """The whole text, of a site that `why_not` has nothing against."""
    head = PREAMBLE.format(meaning=template.meaning(w.spec), slope=w.found.slope, imports=gluon.IMPORTS)
    head += f"\nLOG2E = tl.constexpr({float(LOG2E)!r})\n"
    functions = w.functions()
    return "\n\n".join([head, *(HELPERS[name] for name in sorted(w.helpers)), *functions, _kernels(w)])


def stages(w: Writer, columns: int) -> int:
    return (STAGES_WITH_BIAS if w.tiles else STAGES)[columns]


def _kernels(w: Writer) -> str:
    listed = ["list_ptr", "list_b", "list_h"] if w.listed else []
    own = [*w.pointers, *w.strides, *w.scalars]
    tiling = ["n", "masked", "x0", "x1", "x2", "x3"]
    of_rows = ["top", "delta", *(["shift"] if w.exact else [])]
    read = ["q", "k", "v", "dout", *of_rows, *(["bias"] if w.tiles else [])]
    own_bias = written(w) is not None
    writes = ["dq_desc", *(["dbias_desc"] if own_bias else [])]
    descriptors = [*(f"{name}_desc" for name in read), *writes]
    smem = [f"{name}_smem" for name in read]
    barriers = ["full", "empty", "own"]
    place = ["b", "kv_head", "block"]
    sizes = ["heads", "group", "lq", "lk"]
    constants = ["ROWS", "KEYS", "STAGES", "LISTED_ROWS", "EACH_HEAD"]
    strides = [f"stride_{x}{d}" for x in "de" for d in "bhnd"]

    def define(name: str, arguments: Sequence[str], constant: Sequence[str] = ()) -> str:
        return wrapped(f"def {name}", [*arguments, *(f"{x}: gl.constexpr" for x in constant)], ":")

    def call(name: str, arguments: Sequence[str], depth: int) -> str:
        return textwrap.indent(wrapped(name, arguments), " " * (4 * depth + 4)).strip()

    bounds = ["b", "h", "block", "lq", "lk", *w.scalars, *listed]
    bounds_constants = ["ROWS", "KEYS", "LISTED_ROWS"]
    tile = ["t", *tiling, *listed[:1]]
    tile_constants = ["ROWS", "LISTED_ROWS"]
    produce = [*descriptors[: len(read)], *smem, *barriers, *place, *sizes, *w.scalars, *listed]
    pointers = ["dk_ptr", "dv_ptr"]
    consume = [
        *smem,
        "ds_smem",
        "dq_smem",
        *writes,
        *barriers,
        *place,
        *sizes,
        "padded",
        *pointers,
        *strides,
        *own,
        *listed,
    ]
    hoisted = [t.text for t in w.columns.values()]
    advance = [
        "t", "step", "s", "dk", "dv", *smem, "ds_smem", "dq_smem", *writes, "full", "empty", *tiling, "b", "h", "j",
        "offs_n", "lq", "lk", "before", *(["first"] if own_bias else []), *own, *hoisted, *listed[:1],
    ]  # fmt: skip
    own_constants = [*constants, "AHEAD", "LATER", *(["WRITE"] if own_bias else []), *w.flags]
    advance_constants = [*own_constants, "S_MMA", "O_MMA", "Q_MMA"]
    consume_constants = [*own_constants, "DQ", "DV"]
    kernel = [*descriptors, *pointers, *w.pointers, *listed[:1], *sizes, "padded", *strides, *w.strides, *w.scalars]
    kernel += listed[1:]
    finish = ["sum_ptr", "dq_ptr", *(f"stride_d{d}" for d in "bhmd"), "heads", "lq", "padded", *w.scalars]

    def advanced(masked: bool) -> str:
        return call("advance", [*advance, *advance_constants, str(masked)], 3)

    more_smem: list[str] = []
    load_more: list[str] = []
    row_bytes, exponent, read_bias, store, send = "8", "x - top", "", "", ""
    if w.exact:
        exponent = "gl.fma(x - top, LOG2E, shift_smem.index(at).load(S_MMA))"
        more_smem.append("shift_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], shift_desc.layout)")
        load_more.append(
            "tma.async_copy_global_to_shared(shift_desc, [b * heads + h, start], bar, shift_smem.index(at))"
        )
        row_bytes = "12"
    for bias in w.tiles:
        assert isinstance(bias, Load)
        b, h, *_ = place_of(bias)
        at_bias = f"[{b}, {h}, start, first]"
        more_smem.append("bias_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, KEYS], bias_desc.layout)")
        load_more.append(f"tma.async_copy_global_to_shared(bias_desc, {at_bias}, bar, bias_smem.index(at))")
        stage = "bias_smem.index(at).reshape([ROWS, KEYS]).permute((1, 0))"
        read_bias = f"    tile0 = {stage}.load(S_MMA).to(gl.float32)"
        row_bytes = f"({row_bytes} + KEYS * 2)"
        if own_bias:
            # In the stage's own memory, which all have read by then; it is given back behind the next wait for TMA.
            store = f"\n    if WRITE:\n        {stage}.store(ds_)"
            send = f"tma.async_copy_shared_to_global(dbias_desc, {at_bias}, bias_smem.index(at))"
            send = f"\n    if WRITE:\n        {send}"
    keep = "offs_n < lk" if w.spec.keep == sympy.true else f"keep({w.site}) & (offs_n < lk)"
    first_bounds = ["b", "kv_head * group", *bounds[2:], *bounds_constants]
    return KERNELS.format(
        options=f"(do_not_specialize={w.scalars!r})" if w.scalars else "",
        finish=wrapped("def finish_dq", [*finish, *(f"{x}: tl.constexpr" for x in ("DQ", "COLUMNS", "ROWS"))], ":"),
        slope=w.times_slope(),
        bounds=define("bounds", bounds, bounds_constants),
        bounds_body=indented(_bounds(w)),
        tile=define("tile", tile, tile_constants),
        tile_body=indented(_tile(w)),
        produce=define("produce", produce, constants),
        call_bounds_first=call("bounds", first_bounds, 1),
        call_bounds=call("bounds", [*bounds, *bounds_constants], 3),
        call_tile=call("tile", [*tile, *tile_constants], 3),
        advance=define("advance", advance, [*advance_constants, "MASKED"]),
        call_tile_advanced=call("tile", [*tile, *tile_constants], 1),
        rows=indented("\n".join(w.row_lines)),
        site=w.site,
        seen=keep,
        score="exact_score" if w.exact else "score",
        exponent=exponent,
        # By now dv's product has the weights in 16 bits; later on s and its function's value would take registers.
        bend="" if w.bend is None else f"    p *= bend(s, {w.site})",
        load_more=indented("\n".join(load_more), 3),
        row_bytes=row_bytes,
        more_smem=indented("\n".join(more_smem)),
        bias=read_bias,
        store_scores=store,
        send_scores=send,
        consume=define("consume", consume, consume_constants),
        columns=indented("\n".join(w.column_lines), 2),
        call_advance_masked=advanced(True),
        call_advance=advanced(False),
        unspecialized=repr([*sizes, "padded", *w.scalars, *listed[1:]]),
        kernel=define("attention_backward", kernel, [*consume_constants, "PRODUCER_REGISTERS"]),
        consumer=_arguments([*consume, *consume_constants]),
        producer=_arguments([*produce, *constants]),
    )


def _bounds(w: Writer) -> str:
    """Masked tiles come first; a ragged block of keys has no others, lest what is past the end is computed with."""
    ragged = ["masked = gl.where(first + KEYS > lk, n, masked)", "# A block without tiles visits one, which is masked."]
    some = ["masked = gl.where(n == 0, 1, masked)", "n = gl.maximum(n, 1)"]
    if w.listed:
        return "\n".join(
            [
                "PARTS: gl.constexpr = LISTED_ROWS // ROWS",
                "blocks = (lk + KEYS - 1) // KEYS",
                "listed = (lq + LISTED_ROWS - 1) // LISTED_ROWS",
                "x0 = ((b * list_b + h * list_h) * blocks + block).to(gl.int64) * (listed + 3)",
                "x1 = listed",
                "wholes = gl.load(list_ptr + x0 + 1) * PARTS",
                "x2 = gl.load(list_ptr + x0 + 2) * PARTS",
                "n = wholes + x2",
                "x3 = n",
                "masked = x2",
                *ragged,
                *some,
            ]
        )
    band, rest = w.spec.band, ", ".join(["lq", *w.scalars])
    if w.spec.keep == sympy.true:
        lines = ["x0 = 0", "x1 = 0", "x2 = 0", "x3 = 0", "n = rows", "masked = 0"]
        return "\n".join([*lines, *ragged, *some])
    lines = ["last = gl.minimum(first + KEYS, lk) - 1", "x0 = 0", "high = rows"]
    if band.upper is not None:
        lines[1] = f"x0 = first_row_upper(first, {rest}) // ROWS"
    if band.lower is not None:
        lines[2] = f"high = (first_row_lower(last, {rest}) + ROWS - 1) // ROWS"
    lines += ["n = gl.maximum(high - x0, 0)", "x0 = gl.minimum(x0, rows - 1)"]
    upper = f"gl.minimum((first_row_upper(last, {rest}) + ROWS - 1) // ROWS - x0, n)"
    if _in_order(w):
        lines += ["x1 = 0", "x2 = 0", "x3 = 0", f"masked = {upper if band.exact else 'n'}"]
    else:
        lines += [f"x1 = {'0' if band.upper is None else upper}"]
        lines += [f"x3 = gl.minimum(gl.maximum(first_row_lower(first, {rest}) // ROWS, x0 + x1), high)"]
        lines += ["masked = gl.maximum(x1, 0) + gl.maximum(high - x3, 0)", "x2 = masked"]
    return "\n".join([*lines, *ragged, *some])


def _tile(w: Writer) -> str:
    if w.listed:
        return "\n".join(
            [
                "PARTS: gl.constexpr = LISTED_ROWS // ROWS",
                "# Of a list whole ones stand first, and the masked ones at the end, backwards.",
                "at = gl.where(t < x2, 2 + x1 - t // PARTS, 3 + (t - x2) // PARTS)",
                "part = gl.where(t < x2, t, t - x2) % PARTS",
                "start = (gl.load(list_ptr + x0 + at, mask=x3 > 0, other=0) * PARTS + part) * ROWS",
            ]
        )
    if _in_order(w):
        return "start = (x0 + t) * ROWS"
    return "start = gl.where(t < x1, x0 + t, gl.where(t < x2, x3 + t - x1, x0 + x1 + t - x2)) * ROWS"


def _in_order(w: Writer) -> bool:
    """Whether masked tiles, which come first, are the first ones."""
    return w.spec.keep == sympy.true or not w.spec.band.exact or w.spec.band.lower is None


def _arguments(names: Sequence[str]) -> str:
    return textwrap.fill(
        ", ".join(names), WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8, break_long_words=False
    )
