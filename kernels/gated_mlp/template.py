"""The Triton kernels of a gated MLP, as a text that calls a site's own `activation` and `gradients`.

- `gated_forward`: a dual GEMM. Each program has one tile of the result, reads x once, and accumulates gate and up;
- `gated_forward_tma`: the same where tensors can be read through descriptors: programs stay and take tile after tile;
- `gated_few`: for few rows, where the time is that of reading the weights: no row of x is computed that is not there;
- `gated_product`: activation and product of projections that are there, [M, 2 N] of gate and up;
- `gated_backward`: the gradients of both projections, and the product again, in one pass.

Shapes: x [E, M, K], weights [E, N, K], biases [E, N], out [E, M, N] contiguous, projections [E, M, 2 N] contiguous, in
which gate's feature n stands at gate_start + n * STEP and up's at up_start + n * STEP. Elements of dropout are counted
in the order of out's memory.
"""

from __future__ import annotations

KERNELS = '''\
@triton.jit
def tiles_in(n, size: tl.constexpr):
    return (n + size - 1) // size


@triton.jit
def keep_tile(
    seed_ptr, threshold, expert, m, first, rows, features, ALIGNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """What dropout keeps [M, N] of rows m [M] and N features from `first` on."""
    seed = tl.load(seed_ptr)
    line = (expert.to(tl.int64) * rows + m.to(tl.int64)) * features
    if ALIGNED and N % 8 == 0:  # features and first are multiples of 8
        groups = (line[:, None] + first) // 8 + tl.arange(0, N // 8)[None, :]
        keep = keep_linear(seed, groups, 0, threshold, M, N)
    else:
        keep = keep_each(seed, line[:, None] + first + tl.arange(0, N)[None, :], 0, threshold)
    return keep


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The place of a tile: expert, row and column. Programs that run together share what they read."""
    expert = tile // (tiles_m * tiles_n)
    tile = tile % (tiles_m * tiles_n)
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return expert, first + inside % height, inside // height


@triton.jit
def banked(total, part, end):
    """What of a sum in fp32 is put aside: after each 256 of it a part is added to the total, and begins anew. One chain
    of additions loses bits in proportion to its length."""
    if end % 256 == 0:
        total += part
        part = tl.full(part.shape, 0.0, tl.float32)
    return total, part


@triton.jit
def gated_epilogue(
    gate, up, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
    expert, first_m, first_n, rows, features, stride_gbe, stride_gbn, stride_ube, stride_ubn,
    gate_start, up_start, threshold, scale,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):
    """From both sums [M, N], fp32, to what is stored."""
    m = first_m + tl.arange(0, M)
    n = first_n + tl.arange(0, N)
    inside = (m < rows)[:, None] & (n < features)[None, :]
    e = expert.to(tl.int64)
    if GATE_BIAS:
        bias = tl.load(gate_bias_ptr + e * stride_gbe + n.to(tl.int64) * stride_gbn, mask=n < features, other=0)
        gate += bias.to(tl.float32)[None, :]
    if UP_BIAS:
        bias = tl.load(up_bias_ptr + e * stride_ube + n.to(tl.int64) * stride_ubn, mask=n < features, other=0)
        up += bias.to(tl.float32)[None, :]
    line = e * rows + m.to(tl.int64)
    if SAVE:
        at = saved_ptr + line[:, None] * (2 * features) + n[None, :] * STEP
        tl.store(at + gate_start, gate.to(saved_ptr.dtype.element_ty), mask=inside)
        tl.store(at + up_start, up.to(saved_ptr.dtype.element_ty), mask=inside)
    product = activation(gate, up)
    if DROPOUT:
        keep = keep_tile(seed_ptr, threshold, expert, m, first_n, rows, features, ALIGNED, M, N)
        product = tl.where(keep, product * scale, 0.0)
    tl.store(out_ptr + line[:, None] * features + n[None, :], product.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of a block [M, N]."""
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def gated_epilogues(
    gate, up, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
    expert, first_m, first_n, rows, features, stride_gbe, stride_gbn, stride_ube, stride_ubn,
    gate_start, up_start, threshold, scale,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
):
    """`gated_epilogue` of one half after the other, and so on: what a large one takes besides its sums does not fit in
    registers."""
    if PARTS == 1:
        gated_epilogue(
            gate, up, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
            expert, first_m, first_n, rows, features, stride_gbe, stride_gbn, stride_ube, stride_ubn,
            gate_start, up_start, threshold, scale,
            GATE_BIAS, UP_BIAS, SAVE, STEP, DROPOUT, ALIGNED, M, N,
        )  # fmt: skip
    else:
        gate_left, gate_right = halves(gate, M, N)
        up_left, up_right = halves(up, M, N)
        gated_epilogues(
            gate_left, up_left, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
            expert, first_m, first_n, rows, features, stride_gbe, stride_gbn, stride_ube, stride_ubn,
            gate_start, up_start, threshold, scale,
            GATE_BIAS, UP_BIAS, SAVE, STEP, DROPOUT, ALIGNED, M, N // 2, PARTS // 2,
        )  # fmt: skip
        gated_epilogues(
            gate_right, up_right, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
            expert, first_m, first_n + N // 2, rows, features, stride_gbe, stride_gbn, stride_ube, stride_ubn,
            gate_start, up_start, threshold, scale,
            GATE_BIAS, UP_BIAS, SAVE, STEP, DROPOUT, ALIGNED, M, N // 2, PARTS // 2,
        )  # fmt: skip


@triton.jit
def gated_forward(
    x_ptr, gate_ptr, up_ptr, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
    rows, features, inner, stride_xe, stride_xm, stride_xk, stride_ge, stride_gn, stride_gk,
    stride_ue, stride_un, stride_uk, stride_gbe, stride_gbn, stride_ube, stride_ubn,
    gate_start, up_start, threshold, scale,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):
    tiles_m, tiles_n = tiles_in(rows, BLOCK_M), tiles_in(features, BLOCK_N)
    expert, tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    # Rows and features beyond the last are read as others, and not stored: no load but those along K needs a mask.
    m = ((tile_m * BLOCK_M + tl.arange(0, BLOCK_M)) % rows).to(tl.int64)
    n = ((tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % features).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    e = expert.to(tl.int64)
    x_at = x_ptr + e * stride_xe + m[:, None] * stride_xm + k[None, :] * stride_xk  # [M, K]
    gate_at = gate_ptr + e * stride_ge + n[None, :] * stride_gn + k[:, None] * stride_gk  # [K, N]
    up_at = up_ptr + e * stride_ue + n[None, :] * stride_un + k[:, None] * stride_uk
    gate = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    up = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    EXACT: tl.constexpr = PRECISION == "ieee" and x_ptr.dtype.element_ty == tl.float32
    gate_total, up_total = gate, up
    for start in range(0, inner, BLOCK_K):
        if EVEN_K:
            x, g, u = tl.load(x_at), tl.load(gate_at), tl.load(up_at)
        else:
            there = k < inner - start
            x = tl.load(x_at, mask=there[None, :], other=0.0)
            g = tl.load(gate_at, mask=there[:, None], other=0.0)
            u = tl.load(up_at, mask=there[:, None], other=0.0)
        if UPCAST:
            x, g, u = x.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
        gate = tl.dot(x, g, gate, input_precision=PRECISION)
        up = tl.dot(x, u, up, input_precision=PRECISION)
        if EXACT:
            gate_total, gate = banked(gate_total, gate, start + BLOCK_K)
            up_total, up = banked(up_total, up, start + BLOCK_K)
        x_at += BLOCK_K * stride_xk
        gate_at += BLOCK_K * stride_gk
        up_at += BLOCK_K * stride_uk
    if EXACT:
        gate, up = gate_total + gate, up_total + up
    gated_epilogues(
        gate, up, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
        expert, tile_m * BLOCK_M, tile_n * BLOCK_N, rows, features, stride_gbe, stride_gbn, stride_ube, stride_ubn,
        gate_start, up_start, threshold, scale,
        GATE_BIAS, UP_BIAS, SAVE, STEP, DROPOUT, ALIGNED, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


@triton.jit
def gated_forward_tma(
    x_desc, gate_desc, up_desc, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
    rows, features, inner, stride_gbe, stride_gbn, stride_ube, stride_ubn,
    gate_start, up_start, threshold, scale,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """x_desc [M, K], gate_desc and up_desc [N, K]; what is beyond their ends reads as 0. No experts."""
    tiles_m, tiles_n = tiles_in(rows, BLOCK_M), tiles_in(features, BLOCK_N)
    # FLATTEN: one loop of tiles and steps, in which the next tile is loaded while the last one is stored.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        gate = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
        up = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
        for start in range(0, inner, BLOCK_K):
            x = x_desc.load([tile_m * BLOCK_M, start])
            g = gate_desc.load([tile_n * BLOCK_N, start])
            u = up_desc.load([tile_n * BLOCK_N, start])
            if UPCAST:
                x, g, u = x.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
            gate = tl.dot(x, g.T, gate, input_precision=PRECISION)
            up = tl.dot(x, u.T, up, input_precision=PRECISION)
        gated_epilogues(
            gate, up, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
            expert, tile_m * BLOCK_M, tile_n * BLOCK_N, rows, features, stride_gbe, stride_gbn, stride_ube, stride_ubn,
            gate_start, up_start, threshold, scale,
            GATE_BIAS, UP_BIAS, SAVE, STEP, DROPOUT, ALIGNED, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def gated_few(
    x_ptr, gate_ptr, up_ptr, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
    rows, features, inner, stride_xe, stride_xm, stride_xk, stride_ge, stride_gn, stride_gk,
    stride_ue, stride_un, stride_uk, stride_gbe, stride_gbn, stride_ube, stride_ubn,
    gate_start, up_start, threshold, scale,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):
    """All rows and BLOCK_N features a program. One row (ONE) is multiplied without tensor cores, which take 16."""
    tiles_n = tiles_in(features, BLOCK_N)
    expert, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    n = ((tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % features).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    e = expert.to(tl.int64)
    gate_at = gate_ptr + e * stride_ge + n[:, None] * stride_gn + k[None, :] * stride_gk  # [N, K]
    up_at = up_ptr + e * stride_ue + n[:, None] * stride_un + k[None, :] * stride_uk
    if ONE:
        x_at = x_ptr + e * stride_xe + k * stride_xk  # [K]
        gate_sum = tl.full([BLOCK_N, BLOCK_K], 0.0, tl.float32)
        up_sum = tl.full([BLOCK_N, BLOCK_K], 0.0, tl.float32)
        # Without products of matrices in it Triton loads ahead in a loop that says so only.
        for start in tl.range(0, inner, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                x, g, u = tl.load(x_at), tl.load(gate_at), tl.load(up_at)
            else:
                there = k < inner - start
                x = tl.load(x_at, mask=there, other=0.0)
                g = tl.load(gate_at, mask=there[None, :], other=0.0)
                u = tl.load(up_at, mask=there[None, :], other=0.0)
            gate_sum += g.to(tl.float32) * x.to(tl.float32)[None, :]
            up_sum += u.to(tl.float32) * x.to(tl.float32)[None, :]
            x_at += BLOCK_K * stride_xk
            gate_at += BLOCK_K * stride_gk
            up_at += BLOCK_K * stride_uk
        gate = tl.reduce(gate_sum, 1, plus)[None, :]
        up = tl.reduce(up_sum, 1, plus)[None, :]
    else:
        # The weights are the larger operand, so that they are the one with the tensor cores' rows.
        m = (tl.arange(0, BLOCK_M) % rows).to(tl.int64)
        x_at = x_ptr + e * stride_xe + m[None, :] * stride_xm + k[:, None] * stride_xk  # [K, M]
        gate_sum = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
        up_sum = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
        EXACT: tl.constexpr = PRECISION == "ieee" and x_ptr.dtype.element_ty == tl.float32
        gate_total, up_total = gate_sum, up_sum
        for start in range(0, inner, BLOCK_K):
            if EVEN_K:
                x, g, u = tl.load(x_at), tl.load(gate_at), tl.load(up_at)
            else:
                there = k < inner - start
                x = tl.load(x_at, mask=there[:, None], other=0.0)
                g = tl.load(gate_at, mask=there[None, :], other=0.0)
                u = tl.load(up_at, mask=there[None, :], other=0.0)
            if UPCAST:
                x, g, u = x.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
            gate_sum = tl.dot(g, x, gate_sum, input_precision=PRECISION)
            up_sum = tl.dot(u, x, up_sum, input_precision=PRECISION)
            if EXACT:
                gate_total, gate_sum = banked(gate_total, gate_sum, start + BLOCK_K)
                up_total, up_sum = banked(up_total, up_sum, start + BLOCK_K)
            x_at += BLOCK_K * stride_xk
            gate_at += BLOCK_K * stride_gk
            up_at += BLOCK_K * stride_uk
        if EXACT:
            gate_sum, up_sum = gate_total + gate_sum, up_total + up_sum
        gate = tl.trans(gate_sum)
        up = tl.trans(up_sum)
    gated_epilogue(
        gate, up, out_ptr, saved_ptr, gate_bias_ptr, up_bias_ptr, seed_ptr,
        expert, 0, tile_n * BLOCK_N, rows, features, stride_gbe, stride_gbn, stride_ube, stride_ubn,
        gate_start, up_start, threshold, scale,
        GATE_BIAS, UP_BIAS, SAVE, STEP, DROPOUT, ALIGNED, 1 if ONE else BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def gated_product(
    saved_ptr, out_ptr, seed_ptr, rows, features, gate_start, up_start, threshold, scale,
    STEP: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """rows: of all experts."""
    tiles_n = tiles_in(features, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % tiles_n * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < features)[None, :]
    line = m.to(tl.int64)[:, None]
    at = saved_ptr + line * (2 * features) + n[None, :] * STEP
    gate = tl.load(at + gate_start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + up_start, mask=inside, other=0.0).to(tl.float32)
    product = activation(gate, up)
    if DROPOUT:
        expert = tl.full([], 0, tl.int32)
        keep = keep_tile(seed_ptr, threshold, expert, m, first, rows, features, ALIGNED, BLOCK_M, BLOCK_N)
        product = tl.where(keep, product * scale, 0.0)
    tl.store(out_ptr + line * features + n[None, :], product.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(
    dout_ptr, saved_ptr, grad_ptr, product_ptr, seed_ptr,
    rows, features, of_expert, stride_de, stride_dm, stride_dn, gate_start, up_start, threshold, scale,
    PRODUCT: tl.constexpr, STEP: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dout [E, M, N], of any strides; grad is laid out as saved, product as out. rows: of all experts, of_expert: M."""
    tiles_n = tiles_in(features, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % tiles_n * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < features)[None, :]
    line = m.to(tl.int64)[:, None]
    dout_at = dout_ptr + (m // of_expert).to(tl.int64)[:, None] * stride_de
    dout_at += (m % of_expert).to(tl.int64)[:, None] * stride_dm + n.to(tl.int64)[None, :] * stride_dn
    dout = tl.load(dout_at, mask=inside, other=0.0).to(tl.float32)
    at = line * (2 * features) + n[None, :] * STEP
    gate = tl.load(saved_ptr + at + gate_start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(saved_ptr + at + up_start, mask=inside, other=0.0).to(tl.float32)
    product, by_gate, by_up = gradients(gate, up)
    if DROPOUT:
        expert = tl.full([], 0, tl.int32)
        keep = keep_tile(seed_ptr, threshold, expert, m, first, rows, features, ALIGNED, BLOCK_M, BLOCK_N)
        product = tl.where(keep, product * scale, 0.0)
        dout = tl.where(keep, dout * scale, 0.0)
    tl.store(grad_ptr + at + gate_start, (dout * by_gate).to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_ptr + at + up_start, (dout * by_up).to(grad_ptr.dtype.element_ty), mask=inside)
    if PRODUCT:
        tl.store(product_ptr + line * features + n[None, :], product.to(product_ptr.dtype.element_ty), mask=inside)
'''
"""Loaded blocks say their shape as [M, K]: that of BLOCK_M by BLOCK_K."""
