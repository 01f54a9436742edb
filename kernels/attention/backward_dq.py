"""The text of the kernel for dq, which also finds what others read of a row, and writes what each score has alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy

from xfcompile.kernels.attention import template
from xfcompile.kernels.attention.backward_text import DQ_KERNEL, KEYS, MOST_ROWS, SCORES, TALL
from xfcompile.kernels.attention.backward_writer import CONSTANTS, Writer, constexprs, indented
from xfcompile.kernels.attention.gradient import LoadGradient
from xfcompile.kernels.attention.loops import bounded_loops
from xfcompile.kernels.lines import wrapped
from xfcompile.kernels.printing.arithmetic import LOG2E


def dq(w: Writer) -> str:
    sums = w.found.of("rows")
    names = [f"drow{n}" for n, _ in sums]
    dense = w.found.of("dense")
    loaded = ["k_ptr", "v_ptr", "stride_kn", "stride_kd", "stride_vn", "stride_vd"]
    free = [*w.pointers, *w.strides, *w.scalars, *(t.text for t in w.rows.values()), *w.random]
    constants = [*CONSTANTS, *w.flags, "NEED_DQ"]
    writes = [writes_of(n) for n, _ in dense]
    places = [name for n, _ in dense for name in (f"dload{n}_ptr", f"stride_l{n}m", f"stride_l{n}n")]
    places += ["offs_m", "lq"] if dense else []
    of_tile = [*names, "q", "dout", "top", "inverse", "delta", "start", "b", "h", "i", "lk"]
    arguments = ["dq", *of_tile, *loaded, *places, *free]
    signature = wrapped("def dq_tile", [*arguments, *constexprs([*constants, *writes, "MASKED", "EDGE"])], ":")
    lines = [
        "k = load_rows(k_ptr, start, lk, stride_kn, stride_kd, DQ, BLOCK_N, BLOCK_DQ, EDGE)",
        "v = load_rows(v_ptr, start, lk, stride_vn, stride_vd, DV, BLOCK_N, BLOCK_DV, EDGE)",
        "if UPCAST:",
        "    k = k.to(tl.float32)",
        "    v = v.to(tl.float32)",
        SCORES.format("q, tl.trans(k)", "[M, N]"),
        "dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)",
        "offs_n = start + tl.arange(0, BLOCK_N)[None, :]",
        "j = offs_n",
        "if EDGE:",
        "    j = tl.minimum(j, lk - 1)",
        *w.column_lines,
        *w.scores(),
        *w.dropped("dp"),
        "dx = p * (dp - delta[:, None])",
        *w.sums("drow", sums, 1, KEYS),
        *_written(w, dense),
        "if NEED_DQ:",
        *(f"    {line}" for line in w.ds(KEYS)),
        "    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)",
        f"return {', '.join(['dq', *names])}",
    ]
    tile = f"@triton.jit\n{signature}\n{indented(lines)}\n"
    first_arguments = ["m", "l", "q", "start", "b", "h", "i", "lk", "k_ptr", "stride_kn", "stride_kd", *free]
    first_signature = wrapped("def row_tile", [*first_arguments, *constexprs([*constants[:-1], "MASKED", "EDGE"])], ":")
    first_lines = [
        "k = load_rows(k_ptr, start, lk, stride_kn, stride_kd, DQ, BLOCK_N, BLOCK_DQ, EDGE)",
        "if UPCAST:",
        "    k = k.to(tl.float32)",
        SCORES.format("q, tl.trans(k)", "[M, N]"),
        "offs_n = start + tl.arange(0, BLOCK_N)[None, :]",
        "j = offs_n",
        "if EDGE:",
        "    j = tl.minimum(j, lk - 1)",
        *w.column_lines,
        *w.masked(edge=KEYS, scores=[f"x = exact_score(s, {w.site})"]),
        "m_new = tl.maximum(m, tl.reduce(x, 1, tl.standard._elementwise_max))",
        "m_safe = without_keys(m_new, 0.0)",
        f"p = tl.exp2((x - m_safe[:, None]) * {float(LOG2E)!r})",
        f"l = l * tl.exp2((m - m_safe) * {float(LOG2E)!r}) + tl.reduce(p, 1, tl.standard._sum_combine)",
        "return m_new, l",
    ]
    first = f"@triton.jit\n{first_signature}\n{indented(first_lines)}\n"
    state = ['m = tl.full([BLOCK_M], float("-inf"), tl.float32)', "l = tl.full([BLOCK_M], 0.0, tl.float32)"]
    if w.spec.sink is not None:
        own = ", ".join(["b", "h", "row", *w.pointers, *w.strides, *w.scalars, *w.flags])
        state = [
            f"m = sink({own}) + tl.full([BLOCK_M], 0.0, tl.float32)",
            'l = tl.where(m == float("-inf"), 0.0, 1.0)',
        ]

    def step(*, masked: bool, edge: bool | str) -> str:
        target = f"    {', '.join(['dq', *names])} = dq_tile"
        return wrapped(target, [*arguments, *constants, *writes, str(masked), str(edge)])

    def first_step(*, masked: bool, edge: bool | str) -> str:
        return wrapped("    m, l = row_tile", [*first_arguments, *constants[:-1], str(masked), str(edge)])

    loops = _key_loops(w, step)
    tensors = ["q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "lse_ptr", "pair_ptr", "inverse_ptr"]
    tensors.append("dq_ptr")
    tensors += [f"{name}_ptr" for name in names]
    tensors += [f"dload{n}_ptr" for n, _ in dense]
    axes = [("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("o", "bhmd"), ("g", "bhmd"), ("d", "bhmd")]
    axes += [(f"l{n}", "bhmn") for n, _ in dense]
    upper = w.spec.keep != sympy.true and w.spec.band.upper is not None
    stores = [f"tl.store({name}_ptr + vector + offs_m, {name}, mask=offs_m < lq)" for name in names]
    kernel = DQ_KERNEL.format(
        options=w.options(),
        signature=w.signature("attention_backward_dq", tensors, axes, [*constants, *writes, "LOOP", "ALWAYS"]),
        more=_more(bool(names), bool(dense)),
        # The last rows see most keys under a causal mask: they start first.
        block="blocks - 1 - pid % blocks" if upper else "pid % blocks",
        place=w.place("heads", "h"),
        rows=indented([*w.row_lines, *(template.RANDOM if w.random else [])], 2),
        tall=TALL,
        steep=_steep(w),
        state=indented(state, 4),
        first_loops=indented(_key_loops(w, first_step).splitlines(), 4),
        sums=indented(
            [
                *(f"{name} = tl.full([BLOCK_M], 0.0, tl.float32)" for name in names),
                *(f"dload{n}_ptr += wide_b * stride_l{n}b + wide_h * stride_l{n}h" for n, _ in dense),
            ],
            2,
        ),
        loops=indented(loops.splitlines(), 2),
        stores=indented(stores, 2),
        slope=w.times_slope(),
    )
    return f"{first}\n\n{tile}\n\n{kernel}"


def writes_of(n: int) -> str:
    """The constant that says whether the kernel writes the gradient by a dense load, which has then an element of its
    own for each score: nothing is to be added up, and no other kernel has to compute all tiles once more."""
    return f"WRITE{n}"


def _written(w: Writer, dense: Sequence[tuple[int, LoadGradient]]) -> list[str]:
    lines = []
    for n, x in dense:
        lines += [
            f"if {writes_of(n)}:",
            f"    places = offs_m[:, None].to(tl.int64) * stride_l{n}m + offs_n.to(tl.int64) * stride_l{n}n",
            f"    more = (dx * {w.by(n, x)}).to(dload{n}_ptr.dtype.element_ty)",
            f"    tl.store(dload{n}_ptr + places, more, mask=(offs_m[:, None] < lq) & ({KEYS}))",
        ]
    return lines


def _more(sums: bool, dense: bool) -> str:
    found = [", and sums of gradients over its keys"] if sums else []
    found += [", and gradients that are each score's own, where WRITE"] if dense else []
    return "".join(found)


def _steep(w: Writer) -> str:
    """What is added to a log-sum-exp's size: the forward has it as that of a block's first row, and by how much it is
    more, which may both be far from 0 where it is not."""
    if w.steep == 0:
        return ""
    own = ", ".join(["b", "h", "i", *w.pointers, *w.strides, *w.scalars, *w.flags])
    return f" + {float(MOST_ROWS)} * tl.abs(steep({own}))"


def _key_loops(w: Writer, step: Callable[..., str]) -> str:
    def loop(start: str, end: str, *, masked: bool, edge: bool | str, listed: str | None = None) -> str:
        body = step(masked=masked, edge=edge)
        if listed is None:
            return f"for start in tl.range({start}, {end}, BLOCK_N):\n{body}"
        head = f"for n in tl.range({start} * PARTS_N, {end} * PARTS_N):"
        place = f"(tl.load(key_list + {listed}) * PARTS_N + n % PARTS_N) * BLOCK_N"
        return "\n".join([head, f"    start = {place}", body])

    bounded = bounded_loops(w.spec, w.scalars, loop, "EDGE_N")
    if not w.listed:
        return bounded
    front, back = "3 + n // PARTS_N", "2 + tiles - n // PARTS_N"
    lines = [
        "if LISTED:",
        "    tiles = (lk + BLOCK_N * PARTS_N - 1) // (BLOCK_N * PARTS_N)",
        "    rows = (lq + BLOCK_M * PARTS_M - 1) // (BLOCK_M * PARTS_M)",
        "    place = (b * list_b + h * list_h) * rows + block // PARTS_M",
        "    key_list = list_ptr + tl.cast(place, tl.int64) * (tiles + 3)",  # the list is walked twice
        "    wholes = tl.load(key_list + 1)",
        "    masked = tl.load(key_list + 2)",
        indented(loop("0", "wholes", masked=False, edge=False, listed=front).splitlines()),
        indented(loop("0", "masked", masked=True, edge="EDGE_N", listed=back).splitlines()),
        "else:",
        indented(bounded.splitlines()),
    ]
    return "\n".join(lines)
