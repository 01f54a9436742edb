"""The text of the kernel for dk and dv."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from xfcompile.kernels.attention import template
from xfcompile.kernels.attention.backward_text import DKDV_KERNEL, QUERIES, SCORES
from xfcompile.kernels.attention.backward_writer import CONSTANTS, Writer, constexprs, indented
from xfcompile.kernels.lines import wrapped

Loop = Callable[..., str]
"""(start, end, *, masked, edge) -> the text of a loop between the two."""


def dkdv(w: Writer) -> str:
    sums = w.found.of("columns")
    names = [f"dcolumn{n}" for n, _ in sums]
    loaded = [
        "q_head",
        "dout_head",
        "pair_head",
        "inverse_head",
        "stride_qm",
        "stride_qd",
        "stride_gm",
        "stride_gd",
    ]
    free = [*w.pointers, *w.strides, *w.scalars, *(t.text for t in w.columns.values()), *w.random]
    free += ["first"] if w.random else []
    constants = [*CONSTANTS, *w.flags, "NEED_DX", "NEED_DK", "NEED_DV"]
    arguments = ["dk", "dv", *names, "k", "v", "start", "b", "h", "j", "lq", *loaded, *free]
    signature = wrapped("def dkdv_tile", [*arguments, *constexprs([*constants, "MASKED", "EDGE"])], ":")
    lines = [
        "q = load_rows(q_head, start, lq, stride_qm, stride_qd, DQ, BLOCK_M, BLOCK_DQ, EDGE)",
        "dout = load_rows(dout_head, start, lq, stride_gm, stride_gd, DV, BLOCK_M, BLOCK_DV, EDGE)",
        "top, delta = load_pairs(pair_head, start, lq, BLOCK_M, EDGE)",
        "inverse = load_vector(inverse_head, start, lq, BLOCK_M, EDGE) if EXACT else top",
        "if UPCAST:",
        "    q = q.to(tl.float32)",
        "    dout = dout.to(tl.float32)",
        SCORES.format("k, tl.trans(q)", "[N, M]"),
        "offs_m = start + tl.arange(0, BLOCK_M)[None, :]",
        "i = offs_m",
        "if EDGE:",
        "    i = tl.minimum(i, lq - 1)",
        *w.row_lines,
        *w.scores(across=True, edge=QUERIES),
        "if NEED_DV:",
        *(f"    {line}" for line in w.kept(across=True)),
        "    dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)",
        "if NEED_DX:",
        "    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)",
        *(f"    {line}" for line in w.dropped("dp", across=True)),
        "    dx = p * (dp - delta[None, :])",
        *(f"    {line}" for line in w.sums("dcolumn", sums, 1, QUERIES)),
        "    if NEED_DK:",
        *(f"        {line}" for line in w.ds(QUERIES)),
        "        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)",
        f"return {', '.join(['dk', 'dv', *names])}",
    ]
    tile = f"@triton.jit\n{signature}\n{indented(lines)}\n"

    def step(*, masked: bool, edge: bool | str) -> str:
        target = f"    {', '.join(['dk', 'dv', *names])} = dkdv_tile"
        return wrapped(target, [*arguments, *constants, str(masked), str(edge)])

    def loop(start: str, end: str, *, masked: bool, edge: bool | str, listed: str | None = None) -> str:
        body = step(masked=masked, edge=edge)
        if listed is None:
            return f"for start in tl.range({start}, {end}, BLOCK_M):\n{body}"
        place = f"(tl.load(row_list + {listed}) * PARTS_M + t % PARTS_M) * BLOCK_M"
        head = f"for t in tl.range({start} * PARTS_M, {end} * PARTS_M):"
        return "\n".join([head, f"    start = {place}", body])

    loops = _query_loops(w, loop)
    if w.listed:
        front, back = "3 + t // PARTS_M", "2 + rows - t // PARTS_M"
        loops = "\n".join(
            [
                "if LISTED:",
                "    tiles = (lk + BLOCK_N * PARTS_N - 1) // (BLOCK_N * PARTS_N)",
                "    rows = (lq + BLOCK_M * PARTS_M - 1) // (BLOCK_M * PARTS_M)",
                "    place = (b * list_b + h * list_h) * tiles + block // PARTS_N",
                "    row_list = list_ptr + tl.cast(place, tl.int64) * (rows + 3)",
                "    wholes = tl.load(row_list + 1)",
                "    masked = tl.load(row_list + 2)",
                "    # The last rows may be ragged, whatever the mask.",
                indented(loop("0", "wholes", masked=False, edge="EDGE_M", listed=front).splitlines()),
                indented(loop("0", "masked", masked=True, edge="EDGE_M", listed=back).splitlines()),
                "else:",
                indented(loops.splitlines()),
            ]
        )
    tensors = ["q_ptr", "k_ptr", "v_ptr", "dout_ptr", "pair_ptr", "inverse_ptr", "dk_ptr", "dv_ptr"]
    tensors += [f"{name}_ptr" for name in names]
    axes = (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("g", "bhmd"), ("d", "bhnd"), ("e", "bhnd"))
    stores = [
        f"tl.store({name}_ptr + (tl.cast(b, tl.int64) * heads + h) * lk + offs_n, {name}, mask=offs_n < lk)"
        for name in names
    ]
    kernel = DKDV_KERNEL.format(
        options=w.options(),
        signature=w.signature("attention_backward_dkdv", tensors, axes, constants),
        more=", and sums of gradients over its queries" if names else "",
        place=w.place("kv_heads", "kv_head"),
        bounds=indented(_query_range(w)),
        columns=indented([*w.column_lines, *(template.RANDOM if w.random else [])], 2),
        sums=indented([f"{name} = tl.full([BLOCK_N], 0.0, tl.float32)" for name in names], 2),
        loops=indented(loops.splitlines(), 2),
        stores=indented(stores, 2),
        slope=w.times_slope(),
    )
    return f"{tile}\n\n{kernel}"


def _query_loops(w: Writer, loop: Loop) -> str:
    """Loops between closed bounds on the queries of a block of keys, which `_query_range` has found."""
    band = w.spec.band
    if w.spec.keep == sympy.true:
        return "\n".join(
            [
                "full = lq // BLOCK_M * BLOCK_M",
                loop("0", "full", masked=False, edge=False),
                "if EDGE_M:",
                indented(loop("full", "lq", masked=False, edge=True).splitlines()),
            ]
        )
    if not band.exact:
        return loop("lo", "hi", masked=True, edge="EDGE_M")
    return "\n".join(
        [
            *([loop("lo", "lo_full", masked=True, edge="EDGE_M")] if band.upper is not None else []),
            loop("lo_full", "hi_full", masked=False, edge=False),
            loop("hi_full", "hi", masked=True, edge="EDGE_M"),
        ]
    )


def _query_range(w: Writer) -> list[str]:
    """Which rows see some key of the block (lo to hi), and which see all of them (lo_full to hi_full)."""
    band = w.spec.band
    if w.spec.keep == sympy.true:
        return []
    rest = ", ".join(["lq", *w.scalars])
    lines = ["last = tl.minimum(first + BLOCK_N, lk) - 1", "lo = 0", "hi = lq"]
    if band.upper is not None:
        lines[1] = f"lo = first_row_upper(first, {rest}) // BLOCK_M * BLOCK_M"
    if band.lower is not None:
        lines[2] = f"hi = first_row_lower(last, {rest})"
    if not band.exact:
        return lines
    lo_full, hi_full = "lo", "lq"
    if band.upper is not None:
        lo_full = f"tl.minimum((first_row_upper(last, {rest}) + BLOCK_M - 1) // BLOCK_M * BLOCK_M, hi)"
    if band.lower is not None:
        hi_full = f"first_row_lower(first, {rest})"
    return [*lines, f"lo_full = {lo_full}", f"hi_full = tl.maximum({hi_full} // BLOCK_M * BLOCK_M, lo_full)"]
