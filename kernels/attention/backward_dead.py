"""The text of the kernels for what rows without keys send back, of which the other kernels see nothing.

The weights of such a row are all 1/lk, some of them dropped out. To v it sends dout/lk. Where its scores stand beside a
number that was added, they have gradients besides, as all others: dx = (dp - mean of dp)/lk, of dp = dout v^T.
"""

from __future__ import annotations

from xfcompile.kernels import philox
from xfcompile.kernels.attention import template
from xfcompile.kernels.attention.backward_text import SCORES
from xfcompile.kernels.attention.backward_writer import Writer, indented

ROWS, KEYS = "dead_rows", "dead_keys"
"""The kernel that finds these rows and makes their dq, and the one for dk and dv."""

MARKED = 16
"""So many rows have a mark that says whether one of them has no keys: all that most programs see of them."""

CHUNK = 1024
"""Marks that a program looks at together."""

CONSTANTS = ["DQ", "DV", "BLOCK_DQ", "BLOCK_DV", "BLOCK_M", "BLOCK_N", "PRECISION", "UPCAST", "EXACT"]


def dead(w: Writer) -> list[str]:
    """The kernels, none where nothing is sent back."""
    if not template.needs_mean(w.spec):
        return []
    return [_rows(w), _keys(w)]


def _rows(w: Writer) -> str:
    tensors = ["q_ptr", "k_ptr", "v_ptr", "dout_ptr", "lse_ptr", "mark_ptr", "delta_ptr", "dq_ptr"]
    axes = (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("g", "bhmd"), ("d", "bhmd"))
    values = [
        "v = load_rows(v_ptr, start, lk, stride_vn, stride_vd, DV, BLOCK_N, BLOCK_DV, True)",
        "if UPCAST:",
        "    v = v.to(tl.float32)",
    ]
    products = [*values, "dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)", *w.dropped("dp")]
    if w.random:
        nothing, mean = "tl.full([BLOCK_M], 0.0, tl.float32)", "total"
        terms = [*products, "total += tl.reduce(dp, 1, tl.standard._sum_combine)"]
    else:
        nothing = "tl.full([BLOCK_DV], 0.0, tl.float32)"
        mean = "tl.reduce(dout.to(tl.float32) * total[None, :], 1, tl.standard._sum_combine)"
        terms = [*values, "total += tl.reduce(v.to(tl.float32), 0, tl.standard._sum_combine)"]
    if w.bend is not None:
        own = ["q = tl.load(q_ptr + rows * stride_qm + offs_dq * stride_qd, mask=dead & (offs_dq < DQ), other=0.0)"]
        own += ["if UPCAST:", "    q = q.to(tl.float32)", *w.row_lines]
        dx = [SCORES.format("q, tl.trans(k)", "[M, N]"), "j = tl.minimum(offs_n, lk - 1)", *w.column_lines]
        dx.append(f"dx = dx * bend(s, {w.site})")
        sums, last = ["dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION)"], f"dq{w.times_slope()}"
        before: list[str] = []
    else:
        own, dx, last = [], [], f"(dq - rest[:, None] * mean[None, :]){w.times_slope()}"
        before = [
            "# The gradients of a row add up to 0, but for roundings, in which all keys' mean should have no part.",
            "rest = tl.full([BLOCK_M], 0.0, tl.float32)",
            "mean = tl.full([BLOCK_DQ], 0.0, tl.float32)",
        ]
        sums = [
            "ds = dx.to(k.dtype)",
            "dq = tl.dot(ds, k, dq, input_precision=PRECISION)",
            "rest += tl.reduce(ds.to(tl.float32), 1, tl.standard._sum_combine)",
            "mean += tl.reduce(k.to(tl.float32), 0, tl.standard._sum_combine) * share",
        ]
    leaks = LEAKING_ROWS.format(
        random=indented([*own, *(template.RANDOM if w.random else [])]),
        nothing=nothing,
        terms=indented(terms, 2),
        mean=mean,
        before=indented(before, 2),
        products=indented(products, 3),
        dx=indented([*dx, "dx = tl.where(offs_n < lk, dx, 0.0)", *sums], 3),
        last=last,
    )
    return ROWS_KERNEL.format(
        options=w.options(lists=False),
        signature=w.signature(
            "attention_backward_dead_rows",
            tensors,
            axes,
            [*CONSTANTS, *w.flags, "NEED_DX", "NEED_DQ", "MARKED"],
            lists=False,
        ),
        place=w.place("heads", "h"),
        leaks=indented(leaks.splitlines()) if w.spec.leaks else "",
    )


def _keys(w: Writer) -> str:
    spec = w.spec
    tensors = ["q_ptr", "k_ptr", "v_ptr", "dout_ptr", "lse_ptr", "mark_ptr", "delta_ptr", "dk_ptr", "dv_ptr"]
    axes = (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("g", "bhmd"), ("d", "bhnd"), ("e", "bhnd"))
    values = ["dv += tl.reduce(dout.to(tl.float32), 0, tl.standard._sum_combine)[None, :]"]
    if spec.dropout:
        queries = "(start + tl.arange(0, BLOCK_M))[:, None]"
        values = [
            f"queries = {queries}",
            "kept = tl.full([BLOCK_N, BLOCK_M], 1.0, tl.float32)",
            *template.dropped(spec, "kept", "tl.trans({})", "queries", "first"),
            "dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)",
        ]
    own: list[str] = []
    bend: list[str] = []
    if w.bend is not None and spec.leaks:
        own = [
            "j = keys",
            "k = tl.load(k_ptr + wide_b * stride_kb + wide_h * stride_kh + wide_j * stride_kn + offs_dq * stride_kd,",
            "            mask=offs_dq < DQ, other=0.0)",
            "if UPCAST:",
            "    k = k.to(tl.float32)",
        ]
        bend = [SCORES.format("k, tl.trans(q)", "[N, M]"), "i = tl.minimum(offs_m, lq - 1)[None, :]", *w.row_lines]
        bend += [f"dx = dx * bend(s, {w.site})"]
    leaks = [
        "if NEED_DK:",
        "    q = tl.load(q_head + rows * stride_qm + offs_dq * stride_qd, mask=dead & (offs_dq < DQ), other=0.0)",
        "    delta = tl.load(delta_ptr + vector + offs_m, mask=none, other=0.0)",
        "    if UPCAST:",
        "        q = q.to(tl.float32)",
        "    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)  # [N, M]",
        *(f"    {line}" for line in w.dropped("dp", across=True)),
        "    dx = (dp - delta[None, :]) * share",
        *(f"    {line}" for line in bend),
        "    dx = tl.where(none[None, :], dx, 0.0)",
        "    dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)",
    ]
    scale = f" * {philox.scale(spec.dropout)!r}" if spec.dropout else ""
    each = [*(w.column_lines if bend else []), *(template.RANDOM if w.random else [])]
    return KEYS_KERNEL.format(
        options=w.options(lists=False),
        signature=w.signature(
            "attention_backward_dead_keys",
            tensors,
            axes,
            [*CONSTANTS, *w.flags, "NEED_DK", "NEED_DV", "MARKED", "CHUNK"],
            lists=False,
        ),
        place=w.place("kv_heads", "kv_head"),
        own=indented(own, 2),
        random=indented(each, 3),
        values=indented(["if NEED_DV:", *(f"    {line}" for line in values)], 5),
        leaks=indented(leaks if spec.leaks else [], 5),
        slope=w.times_slope(),
        scale=scale,
    )


ROWS_KERNEL = '''\
@triton.jit{options}
{signature}
    """One program: of BLOCK_M query rows of one head, which have no keys; dq of these, and the mean of their dp."""
    blocks = (lq + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
{place}
    first = pid % blocks * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    wide_b, wide_h = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    vector = (wide_b * heads + h) * lq
    none = tl.load(lse_ptr + vector + offs_m, mask=offs_m < lq, other=0.0) == float("-inf")
    marks = tl.reduce(tl.reshape(none.to(tl.int32), [BLOCK_M // MARKED, MARKED]), 1, tl.standard._elementwise_max)
    places = first // MARKED + tl.arange(0, BLOCK_M // MARKED)
    many = (lq + MARKED - 1) // MARKED
    tl.store(mark_ptr + (wide_b * heads + h) * many + places, marks, mask=places < many)
{leaks}
'''

LEAKING_ROWS = """\
some = tl.reduce(marks, 0, tl.standard._elementwise_max) if NEED_DX else 0
if some > 0:
    i = tl.minimum(offs_m, lq - 1)[:, None]
    rows, dead = i.to(tl.int64), none[:, None]
    offs_dq = tl.arange(0, BLOCK_DQ)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    q_ptr += wide_b * stride_qb + wide_h * stride_qh
    k_ptr += wide_b * stride_kb + tl.cast(h // group, tl.int64) * stride_kh
    v_ptr += wide_b * stride_vb + tl.cast(h // group, tl.int64) * stride_vh
    dout_ptr += wide_b * stride_gb + wide_h * stride_gh
    dout = tl.load(dout_ptr + rows * stride_gm + offs_dv * stride_gd, mask=dead & (offs_dv < DV), other=0.0)
    if UPCAST:
        dout = dout.to(tl.float32)
{random}
    share = 1.0 / lk
    # Not dout * out: out is rounded, and what is left of dp beside its mean may be small.
    total = {nothing}
    for start in tl.range(0, lk, BLOCK_N):
{terms}
    delta = {mean} * share
    tl.store(delta_ptr + vector + offs_m, delta, mask=none)
    if NEED_DQ:
        dq = tl.full([BLOCK_M, BLOCK_DQ], 0.0, tl.float32)
{before}
        for start in tl.range(0, lk, BLOCK_N):
{products}
            k = load_rows(k_ptr, start, lk, stride_kn, stride_kd, DQ, BLOCK_N, BLOCK_DQ, True)
            if UPCAST:
                k = k.to(tl.float32)
            offs_n = start + tl.arange(0, BLOCK_N)[None, :]
            dx = (dp - delta[:, None]) * share
{dx}
        dq = {last}
        dq_ptr += wide_b * stride_db + wide_h * stride_dh
        tl.store(dq_ptr + rows * stride_dm + offs_dq * stride_dd, dq.to(dq_ptr.dtype.element_ty),
                 mask=dead & (offs_dq < DQ))
"""

KEYS_KERNEL = '''\
@triton.jit{options}
{signature}
    """One program: what rows without keys add to dk and dv of BLOCK_N keys of one head of keys, over all query heads
    that share it."""
    blocks = (lk + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    kv_heads = heads // group
{place}
    wide_b, wide_h = tl.cast(b, tl.int64), tl.cast(kv_head, tl.int64)
    many = (lq + MARKED - 1) // MARKED
    mark_ptr += (wide_b * heads + kv_head * group) * many
    some = pid * 0
    for begin in tl.range(0, group * many, CHUNK):
        places = begin + tl.arange(0, CHUNK)
        marks = tl.load(mark_ptr + places, mask=places < group * many, other=0)
        some = tl.maximum(some, tl.reduce(marks, 0, tl.standard._elementwise_max))
    if some > 0:
        first = pid % blocks * BLOCK_N
        offs_n = first + tl.arange(0, BLOCK_N)
        keys = tl.minimum(offs_n, lk - 1)[:, None]
        wide_j = keys.to(tl.int64)
        offs_dq = tl.arange(0, BLOCK_DQ)[None, :]
        offs_dv = tl.arange(0, BLOCK_DV)[None, :]
        v = tl.load(v_ptr + wide_b * stride_vb + wide_h * stride_vh + wide_j * stride_vn + offs_dv * stride_vd,
                    mask=offs_dv < DV, other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
{own}
        share = 1.0 / lk
        dk = tl.full([BLOCK_N, BLOCK_DQ], 0.0, tl.float32)
        dv = tl.full([BLOCK_N, BLOCK_DV], 0.0, tl.float32)
        for n in tl.range(0, group):
            h = kv_head * group + n
            vector = (wide_b * heads + h) * lq
            q_head = q_ptr + wide_b * stride_qb + tl.cast(h, tl.int64) * stride_qh
            dout_head = dout_ptr + wide_b * stride_gb + tl.cast(h, tl.int64) * stride_gh
{random}
            for start in tl.range(0, lq, BLOCK_M):
                places = start // MARKED + tl.arange(0, BLOCK_M // MARKED)
                marks = tl.load(mark_ptr + n * many + places, mask=places < many, other=0)
                if tl.reduce(marks, 0, tl.standard._elementwise_max) > 0:
                    offs_m = start + tl.arange(0, BLOCK_M)
                    none = tl.load(lse_ptr + vector + offs_m, mask=offs_m < lq, other=0.0) == float("-inf")
                    rows, dead = offs_m[:, None].to(tl.int64), none[:, None]
                    dout = tl.load(dout_head + rows * stride_gm + offs_dv * stride_gd, mask=dead & (offs_dv < DV),
                                   other=0.0)
                    if UPCAST:
                        dout = dout.to(tl.float32)
{values}
{leaks}
        mask = offs_n[:, None] < lk
        if NEED_DK:
            dk_ptrs = dk_ptr + wide_b * stride_db + wide_h * stride_dh + wide_j * stride_dn + offs_dq * stride_dd
            inside = mask & (offs_dq < DQ)
            dk = dk{slope} + tl.load(dk_ptrs, mask=inside, other=0.0).to(tl.float32)
            tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        if NEED_DV:
            dv_ptrs = dv_ptr + wide_b * stride_eb + wide_h * stride_eh + wide_j * stride_en + offs_dv * stride_ed
            inside = mask & (offs_dv < DV)
            dv = dv * share{scale} + tl.load(dv_ptrs, mask=inside, other=0.0).to(tl.float32)
            tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=inside)
'''
