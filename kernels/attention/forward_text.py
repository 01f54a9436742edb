"""The text of a generated module that is the same for every score, and the gaps that `template.py` fills."""

from __future__ import annotations

FAR = 1e28
"""A number that is larger may not be finite once it is multiplied by log2(e) and a position."""

HELPERS = {
    "tanh": """\
@triton.jit
def tanh(x, x_log2, FAST: tl.constexpr):
    # x_log2 = 2 log2(e) x; r * r is 1 / (1 + exp(2x)) in one instruction less than a division takes.
    if FAST == 2:  # one instruction, with a relative error of 2**-11
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        r = tl.rsqrt(tl.exp2(x_log2) + 1.0)
        y = 1.0 - 2.0 * r * r
    if FAST == 0:
        # Near 0 that is off by 2e-7, which is much for a small y; this polynomial is exact to 2 ulp there.
        x2 = x * x
        p = -0.006094488908823051 * x2 + 0.02098278814222448
        p = p * x2 - 0.05384295941056172
        p = p * x2 + 0.13332642858993402
        p = p * x2 - 0.33333324155150773
        y = tl.where(tl.abs(x) < 0.625, p * x2 * x + x, 1.0 - 2.0 / (tl.exp2(x_log2) + 1.0))
    return y
""",
    "clamped": f"""\
@triton.jit
def clamped(x):
    # Nothing is left of a score beside {FAR} either, and its products with positions are finite. Infinity and NaN stay.
    return tl.where(tl.abs(x) < float("inf"), tl.minimum(tl.maximum(x, {-FAR}), {FAR}), x)
""",
    "rounded_to_bfloat16": """\
@triton.jit
def rounded_to_bfloat16(x):
    # To the nearest, by its bits: Triton's interpreter cuts them off instead.
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
""",
    "floor_div": """\
@triton.jit
def floor_div(a, b):
    quotient = a // b  # rounds to zero
    return tl.where((quotient * b != a) & ((a < 0) != (b < 0)), quotient - 1, quotient)
""",
    "remainder": """\
@triton.jit
def remainder(a, b):
    rest = a % b  # has the sign of a
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
""",
}

HEAD = """\
import triton
import triton.language as tl

# What this kernel was made from: `xfcompile.kernels.attention.cache` reads it back.
SPEC = {spec}
"""

FUNCTIONS = '''\
@triton.jit
def load_rows(ptr, start, end, stride_n, stride_d, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
              EDGE: tl.constexpr):
    """Rows start, start + 1 ... of a matrix with D columns; at an edge, zeros from row `end` on."""
    offs_n = start + tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, COLS)[None, :]
    # The start is added as a scalar, so that the rest does not change from one tile to the next.
    tile = tl.arange(0, ROWS)[:, None].to(tl.int64) * stride_n + offs_d.to(tl.int64) * stride_d
    ptrs = ptr + tl.cast(start, tl.int64) * stride_n + tile
    if EDGE:
        x = tl.load(ptrs, mask=(offs_n < end) & (offs_d < D), other=0.0)
    elif D < COLS:
        x = tl.load(ptrs, mask=offs_d < D, other=0.0)
    else:
        x = tl.load(ptrs)
    return x  # [ROWS, COLS]


@triton.jit
def clamp(bound, end):
    """A bound on keys, within 0 ... end."""
    return tl.cast(tl.minimum(tl.maximum(tl.cast(bound, tl.int64), 0), end), tl.int32)
'''

TILE = '''\
@triton.jit
{signature}
    """One step of the online softmax over keys start ... start + BLOCK_N - 1.

    acc [M, DV] weighted sum of values, m [M] maximum of scores, UNIT times as large as they are, l [M] sum of weights.
    """
    {power}
    k = load_rows(k_ptr, start, lk, stride_kn, stride_kd, DQ, BLOCK_N, BLOCK_DQ, EDGE)
    if UPCAST:
        k = k.to(tl.float32)
    # Where UNIT is 1, triton would start the sum from what is added to s, and round each step of it to that number's
    # size, but for the last argument, which means nothing else here.
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, max_num_imprecise_acc=1 if UNIT == 1 else 0)  # [M, N]
{body}
    v = load_rows(v_ptr, start, lk, stride_vn, stride_vd, DV, BLOCK_N, BLOCK_DV, EDGE)
    if UPCAST:
        v = v.to(tl.float32)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l
'''

KERNEL = '''\
@triton.jit{jit_options}
{signature}
    """One program: BLOCK_M query rows of one head."""
    blocks = (lq + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
{place}
    first = block * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    row = tl.minimum(offs_m, lq - 1)  # rows past the end repeat the last one, and are not stored
    i = row[:, None]

    offs_dq = tl.arange(0, BLOCK_DQ)[None, :]
    q_ptr += tl.cast(b, tl.int64) * stride_qb + tl.cast(h, tl.int64) * stride_qh
    k_ptr += tl.cast(b, tl.int64) * stride_kb + tl.cast(h // group, tl.int64) * stride_kh
    v_ptr += tl.cast(b, tl.int64) * stride_vb + tl.cast(h // group, tl.int64) * stride_vh
    q = tl.load(q_ptr + i.to(tl.int64) * stride_qm + offs_dq.to(tl.int64) * stride_qd, mask=offs_dq < DQ, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
{rows}
{state}
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)

{loops}
{again}
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    if HEADS_FIRST:
        out_row = (tl.cast(b, tl.int64) * heads + h) * lq + i  # [M, 1]
    else:
        out_row = (tl.cast(b, tl.int64) * lq + i) * heads + h
    lse = {lse}
    tl.store(lse_ptr + (tl.cast(b, tl.int64) * heads + h) * lq + offs_m, lse, mask=offs_m < lq)
{dead}
    out = acc * tl.div_rn(1.0, l)[:, None]{scale}
    mask = (offs_m[:, None] < lq) & (offs_dv < DV)
    tl.store(out_ptr + out_row * DV + offs_dv, out.to(out_ptr.dtype.element_ty), mask=mask)
'''

DEAD = {
    "nan": "",  # 0 / 0
    "zero": "l = tl.where(l == 0.0, 1.0, l)",
    "mean": """\
# A row that may see no key has equal weights for all keys, also those in tiles that were skipped.
none = l == 0.0
if tl.reduce(none.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
    total = tl.full([BLOCK_DV], 0.0, tl.float32)
    for start in tl.range(0, lk, BLOCK_N):
        v = load_rows(v_ptr, start, lk, stride_vn, stride_vd, DV, BLOCK_N, BLOCK_DV, True)
        total += tl.reduce(v.to(tl.float32), 0, tl.standard._sum_combine)
    acc = tl.where(none[:, None], total[None, :], acc)
    l = tl.where(none, tl.cast(lk, tl.float32), l)""",
}

MEAN_OF_SOME = """\
# As a row that may see no key has equal weights for all keys, some of which are dropped out.
none = l == 0.0
if tl.reduce(none.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
    total = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
    for start in tl.range(0, lk, BLOCK_N):
        v = load_rows(v_ptr, start, lk, stride_vn, stride_vd, DV, BLOCK_N, BLOCK_DV, True)
        if UPCAST:
            v = v.to(tl.float32)
        p = tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32)
{dropped}
        total = tl.dot(p.to(v.dtype), v, total, input_precision=PRECISION)
    acc = tl.where(none[:, None], total, acc)
    l = tl.where(none, tl.cast(lk, tl.float32), l)"""
"""`DEAD` "mean" where weights are dropped out."""
