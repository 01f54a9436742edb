"""The text of a backward's module that is the same for every score, and the gaps that `backward.py` fills."""

from __future__ import annotations

HELPER = '''\
@triton.jit
def load_vector(ptr, start, end, N: tl.constexpr, EDGE: tl.constexpr):
    """Elements start ... start + N - 1 of a vector; 0 from `end` on, at an edge."""
    offs = start + tl.arange(0, N)
    if EDGE:
        x = tl.load(ptr + offs, mask=offs < end, other=0.0)
    else:
        x = tl.load(ptr + offs)
    return x  # [N]


@triton.jit
def load_pairs(ptr, start, end, N: tl.constexpr, EDGE: tl.constexpr):
    """The same of two vectors whose elements alternate. They are loaded together: of so many numbers each is read by
    one thread, and by all that have a column of the tile otherwise, which takes registers for as many pointers."""
    offs = 2 * start + tl.arange(0, 2 * N)
    if EDGE:
        x = tl.load(ptr + offs, mask=offs < 2 * end, other=0.0)
    else:
        x = tl.load(ptr + offs)
    return tl.split(tl.reshape(x, [N, 2]))  # [N], [N]


@triton.jit
def without_keys(top, instead: tl.constexpr):
    """Maxima, or log-sum-exps, such that all weights of a row without keys are 0."""
    return tl.where(top == float("-inf"), instead, top)
'''

TALL = 4096.0
"""A log-sum-exp beyond this is rounded by more than half of what weights of 16 bits are rounded by."""

MOST_ROWS = 192
"""Query rows of a block of any forward's."""

KEYS, QUERIES = "offs_n < lk", "offs_m < lq"
"""What is inside of the last tile of keys, or of queries."""

SCORES = "s = tl.dot({}, input_precision=PRECISION, max_num_imprecise_acc=1 if EXACT else 0)  # {}"
"""As in `forward_text.TILE`: what is added to s is not to be where its sum begins."""

SEARCH = '''\
@triton.jit
def first_row_{side}(n, {parameters}):
    """The first query row whose {side} bound on keys is above n; lq if there is none."""
    lo = n * 0
    hi = n * 0 + lq
    while lo < hi:
        mid = (lo + hi) // 2
        if tl.cast({side}({arguments}), tl.int64) > n:
            hi = mid
        else:
            lo = mid + 1
    return lo
'''

DQ_KERNEL = '''\
@triton.jit{options}
{signature}
    """One program: dq of BLOCK_M query rows of one head{more}; and what the other kernels read of a row."""
    blocks = (lq + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
{place}
    block = {block}
    first = block * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    row = tl.minimum(offs_m, lq - 1)  # rows past the end repeat the last one, and are not stored
    i = row[:, None]
    offs_dq = tl.arange(0, BLOCK_DQ)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    wide_b, wide_h, wide_i = tl.cast(b, tl.int64), tl.cast(h, tl.int64), i.to(tl.int64)

    out_ptr += wide_b * stride_ob + wide_h * stride_oh
    dout_ptr += wide_b * stride_gb + wide_h * stride_gh
    out = tl.load(out_ptr + wide_i * stride_om + offs_dv * stride_od, mask=offs_dv < DV, other=0.0)
    dout = tl.load(dout_ptr + wide_i * stride_gm + offs_dv * stride_gd, mask=offs_dv < DV, other=0.0)
    vector = (wide_b * heads + h) * lq
    top = tl.load(lse_ptr + vector + row)
    delta = tl.reduce(out.to(tl.float32) * dout.to(tl.float32), 1, tl.standard._sum_combine)  # [M]
    delta = tl.where(top == float("-inf"), 0.0, delta)  # without keys there may be NaN in out
    top = without_keys(top, float("inf"))
    inverse = top
    if LOOP or EXACT:
        q_ptr += wide_b * stride_qb + wide_h * stride_qh
        k_ptr += wide_b * stride_kb + tl.cast(h // group, tl.int64) * stride_kh
        v_ptr += wide_b * stride_vb + tl.cast(h // group, tl.int64) * stride_vh
        q = tl.load(q_ptr + wide_i * stride_qm + offs_dq * stride_qd, mask=offs_dq < DQ, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
            dout = dout.to(tl.float32)
{rows}
        if EXACT:
            inverse = tl.full([BLOCK_M], 1.0, tl.float32)
            far = (tl.abs(top){steep} > {tall}) & (top != float("inf"))
            if (tl.reduce(far.to(tl.int32), 0, tl.standard._elementwise_max) > 0) | ALWAYS:
{state}
{first_loops}
                top = without_keys(m, 0.0)
                inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
            tl.store(inverse_ptr + vector + offs_m, inverse, mask=offs_m < lq)
    pair = pair_ptr + 2 * (vector + offs_m)
    tl.store(pair, top, mask=offs_m < lq)
    tl.store(pair + 1, delta, mask=offs_m < lq)
    if LOOP:
        dq = tl.full([BLOCK_M, BLOCK_DQ], 0.0, tl.float32)
{sums}

{loops}

{stores}
        if NEED_DQ:
            dq_ptr += wide_b * stride_db + wide_h * stride_dh
            mask = (offs_m[:, None] < lq) & (offs_dq < DQ)
            dq = dq{slope}
            tl.store(dq_ptr + wide_i * stride_dm + offs_dq * stride_dd, dq.to(dq_ptr.dtype.element_ty), mask=mask)
'''

DKDV_KERNEL = '''\
@triton.jit{options}
{signature}
    """One program: dk and dv of BLOCK_N keys of one head of keys{more}, over all query heads that share it."""
    blocks = (lk + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    kv_heads = heads // group
{place}
    block = pid % blocks
    first = block * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    column = tl.minimum(offs_n, lk - 1)  # columns past the end repeat the last one, and are not stored
    j = column[:, None]
    offs_dq = tl.arange(0, BLOCK_DQ)[None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, :]
    wide_b, wide_h, wide_j = tl.cast(b, tl.int64), tl.cast(kv_head, tl.int64), column[:, None].to(tl.int64)

    k_ptr += wide_b * stride_kb + wide_h * stride_kh
    v_ptr += wide_b * stride_vb + wide_h * stride_vh
    k = tl.load(k_ptr + wide_j * stride_kn + offs_dq * stride_kd, mask=offs_dq < DQ, other=0.0)
    v = tl.load(v_ptr + wide_j * stride_vn + offs_dv * stride_vd, mask=offs_dv < DV, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    dk = tl.full([BLOCK_N, BLOCK_DQ], 0.0, tl.float32)
    dv = tl.full([BLOCK_N, BLOCK_DV], 0.0, tl.float32)
{bounds}
    for n in tl.range(0, group):
        h = kv_head * group + n
        vector = (tl.cast(b, tl.int64) * heads + h) * lq
        q_head = q_ptr + wide_b * stride_qb + tl.cast(h, tl.int64) * stride_qh
        dout_head = dout_ptr + wide_b * stride_gb + tl.cast(h, tl.int64) * stride_gh
        pair_head = pair_ptr + 2 * vector
        inverse_head = inverse_ptr + vector
{columns}
{sums}

{loops}

{stores}
    mask = offs_n[:, None] < lk
    if NEED_DK:
        dk_ptr += wide_b * stride_db + wide_h * stride_dh
        dk = dk{slope}
        tl.store(dk_ptr + wide_j * stride_dn + offs_dq * stride_dd, dk.to(dk_ptr.dtype.element_ty),
                 mask=mask & (offs_dq < DQ))
    if NEED_DV:
        dv_ptr += wide_b * stride_eb + wide_h * stride_eh
        tl.store(dv_ptr + wide_j * stride_en + offs_dv * stride_ed, dv.to(dv_ptr.dtype.element_ty),
                 mask=mask & (offs_dv < DV))
'''

LOAD_KERNEL = '''\
@triton.jit{options}
{signature}
    """One program: the gradient by {load}, {what}."""
    pid = tl.program_id(0)
    rows = (lq + BLOCK_M - 1) // BLOCK_M
    tiles = (lk + BLOCK_N - 1) // BLOCK_N
    batches, own_heads = {batches}, {own_heads}
{place}
    total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
{range}
        b = {batch}
        h = {head}
        first = (first_row + n % steps) * BLOCK_M
        start = (first_tile + n % steps) * BLOCK_N
        offs_m = first + tl.arange(0, BLOCK_M)
        row = tl.minimum(offs_m, lq - 1)
        i = row[:, None]
        wide_b, wide_h = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
        vector = (wide_b * heads + h) * lq
        top, delta = load_pairs(pair_ptr + 2 * vector, first, lq, BLOCK_M, EDGE_M)
        inverse = load_vector(inverse_ptr + vector, first, lq, BLOCK_M, EDGE_M) if EXACT else top
        dout_head = dout_ptr + wide_b * stride_gb + wide_h * stride_gh
        q_head = q_ptr + wide_b * stride_qb + wide_h * stride_qh
        k_head = k_ptr + wide_b * stride_kb + tl.cast(h // group, tl.int64) * stride_kh
        v_head = v_ptr + wide_b * stride_vb + tl.cast(h // group, tl.int64) * stride_vh
        q = load_rows(q_head, first, lq, stride_qm, stride_qd, DQ, BLOCK_M, BLOCK_DQ, EDGE_M)
        dout = load_rows(dout_head, first, lq, stride_gm, stride_gd, DV, BLOCK_M, BLOCK_DV, EDGE_M)
        k = load_rows(k_head, start, lk, stride_kn, stride_kd, DQ, BLOCK_N, BLOCK_DQ, EDGE_N)
        v = load_rows(v_head, start, lk, stride_vn, stride_vd, DV, BLOCK_N, BLOCK_DV, EDGE_N)
        if UPCAST:
            q, k, v, dout = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32), dout.to(tl.float32)
{rows}
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        j = tl.minimum(offs_n, lk - 1)
{columns}
{body}
        more = dx * {derivative}
        if EDGE_M or EDGE_N:
            more = tl.where((offs_m[:, None] < lq) & (offs_n < lk), more, 0.0)
        total += more
{store}
'''

DENSE_PLACE = """\
    each = rows * tiles * own_heads * batches
    part = pid // each
    pid = pid % each
    first_tile = pid % tiles
    first_row = pid // tiles % rows
    own_h = pid // tiles // rows % own_heads
    own_b = pid // tiles // rows // own_heads
    steps = 1
{skip}"""

DENSE_RANGE = """\
    count = steps * (batch // batches) * (heads // own_heads)
    share = (count + parts - 1) // parts
    for n in tl.range(part * share, tl.minimum((part + 1) * share, count)):"""

DENSE_STORE = """\
    offs_m = first_row * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = first_tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dload_ptr += tl.cast(part, tl.int64) * stride_lp
    dload_ptr += tl.cast(own_b, tl.int64) * stride_lb + tl.cast(own_h, tl.int64) * stride_lh
    places = offs_m.to(tl.int64) * stride_lm + offs_n.to(tl.int64) * stride_ln
    tl.store(dload_ptr + places, total.to(dload_ptr.dtype.element_ty), mask=(offs_m < lq) & (offs_n < lk))"""

DIAGONAL_PLACE = """\
    diagonals = rows + tiles - 1
    diagonal = pid % diagonals
    own_h = pid // diagonals % own_heads
    own_b = pid // diagonals // own_heads
    first_row = tl.maximum(rows - 1 - diagonal, 0)
    first_tile = tl.maximum(diagonal - (rows - 1), 0)
    steps = tl.minimum(rows - first_row, tiles - first_tile)"""

DIAGONAL_RANGE = "    for n in tl.range(0, steps * (batch // batches) * (heads // own_heads)):"

DIAGONAL_STORE = """\
    dload_ptr += tl.cast(pid, tl.int64) * (BLOCK_M * BLOCK_N)
    tl.store(dload_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], total)"""

FOLD_KERNEL = '''\
@triton.jit
def attention_backward_fold(
    tiles_ptr, out_ptr, stride_ob, stride_oh, stride_oe, heads, diagonals, first, count,
    SIZE: tl.constexpr, ROWS: tl.constexpr, DISTANCES: tl.constexpr,
):
    """One program: the sums at DISTANCES distances of one batch and head. Of the tiles [b, h, diagonals, SIZE, SIZE],
    element (r, c) of diagonal d is at the distance d SIZE + c - r - first, counted from the least."""
    blocks = (count + DISTANCES - 1) // DISTANCES
    pid = tl.program_id(0)
    h = pid // blocks % heads
    b = pid // blocks // heads
    offs = pid % blocks * DISTANCES + tl.arange(0, DISTANCES)
    tiles_ptr += (tl.cast(b, tl.int64) * heads + h) * diagonals * (SIZE * SIZE)
    total = tl.full([DISTANCES], 0.0, tl.float32)
    for start in tl.range(0, SIZE, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        place = offs[None, :] + first + rows  # d SIZE + c
        inside = (place >= 0) & (place < diagonals * SIZE)
        place = tl.where(inside, place, 0)
        tile = (place // SIZE).to(tl.int64) * (SIZE * SIZE)
        x = tl.load(tiles_ptr + tile + rows * SIZE + place % SIZE, mask=inside, other=0.0)
        total += tl.reduce(x, 0, tl.standard._sum_combine)
    out_ptr += tl.cast(b, tl.int64) * stride_ob + tl.cast(h, tl.int64) * stride_oh
    tl.store(out_ptr + offs.to(tl.int64) * stride_oe, total.to(out_ptr.dtype.element_ty), mask=offs < count)
'''
