"""The text of the kernel for Hopper, in Gluon: one warp loads tiles by TMA, two warpgroups of 64 query rows compute.

Each warpgroup gives the tensor cores the scores of a tile and behind them the product of the tile before, and takes the
softmax of the former during the latter: the order of FlashAttention-3 (Shah et al., 2024). The site's own functions are
those of the Triton kernel, which Gluon compiles as its own.
"""

from __future__ import annotations

import struct
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from xfcompile.kernels.attention import codegen, template
from xfcompile.kernels.attention.codegen import Pieces
from xfcompile.kernels.attention.forward_text import HELPERS
from xfcompile.kernels.attention.printer import NAMES, Printer, Term
from xfcompile.kernels.attention.template import wrapped
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import ScoreSpec

ROWS, KEYS = 128, 128
"""Query rows of a program, half of them a warpgroup's, and keys of a tile."""

HEAD_DIMS = (64, 128)
"""Columns of a tile; other head dims are padded by TMA, which reads zeros behind a tensor's end."""

STAGES = {64: 4, 128: 3}
"""Tiles in shared memory: as many as there is room for."""

STAGES_WITH_BIAS, BIAS_STAGES = {64: 4, 128: 2}, 2
"""The same where tiles of a bias stand beside them, and how many of these."""

REGISTERS = {2: 240, 3: 160}
"""Of a thread that computes, by warpgroups of them; the warp that loads leaves it the rest."""


@dataclass(frozen=True)
class Variant:
    """Ways to write the kernel, for the same numbers.

    warpgroups: how many compute, with 64 query rows each. turns: whether they give the tensor cores their products one
    after the other, so that one multiplies while another exponentiates. twice: two tiles a step of a loop, so that
    weights need not move to the registers that a product reads. columns: what is added in proportion to a key's place,
    as ALiBi's bias is, the tensor cores add. tree: the maximum of two neighbours first. emulated: of eight powers of
    two so many by multiplications and additions. bounded: no maximum is taken off scores that are between -CAP and CAP
    in base 2; of weights in bf16, which has fp32's exponents. early: the mask of the first tile is loaded before
    anything is waited for. backwards: the last rows of a head first where tiles are listed, as of most masks they see
    most keys. stages: tiles in shared memory, if not as many as usual. tiles: a bias that has a number for each score
    is loaded by TMA too. persistent: as many programs as multiprocessors, each of which loads
    ahead of the piece of work that it is at.
    """

    warpgroups: int = 2
    turns: bool = False
    twice: bool = False
    columns: bool = False
    tree: bool = False
    emulated: int = 0
    bounded: bool = False
    early: bool = False
    backwards: bool = False
    stages: int | None = None
    tiles: bool = False
    persistent: bool = False

    @property
    def rows(self) -> int:
        """Query rows of a program."""
        return 64 * self.warpgroups

    @property
    def registers(self) -> int:
        return REGISTERS[self.warpgroups]

    def tiles_of(self, columns: int) -> int:
        """Of keys and values, in shared memory."""
        return self.stages or (STAGES_WITH_BIAS if self.tiles else STAGES)[columns]


USUAL = Variant()

CAP = 75.0
"""Of so bounded scores neither weights nor their sums overflow, nor products with values of usual sizes."""


def is_bounded(spec: ScoreSpec, pieces: Pieces) -> bool:
    """Whether no score is beyond CAP in base 2."""
    form = pieces.forms.usual
    if spec.sink is not None or form.scale is None or not form.core or form.shifted or template.wide(spec):
        return False
    cores = [term for term in sympy.Add.make_args(pieces.score) if S in term.free_symbols]
    return cores[0].as_coeff_Mul()[1].func is sympy.tanh and form.scale * template.LOG2E <= CAP


def suited(wanted: Variant, spec: ScoreSpec, pieces: Pieces, dtype: torch.dtype, width: int) -> Variant:
    """What a site can have of a variant. width: columns of a tile."""
    bias = bias_of(spec, pieces)
    return replace(
        wanted,
        warpgroups=wanted.warpgroups if width == HEAD_DIMS[0] else 2,
        # Of 128 columns three stages leave no room for the places of keys.
        columns=wanted.columns
        and columns_of(spec, pieces.score) is not None
        and (width == HEAD_DIMS[0] or wanted.stages == 2),
        bounded=wanted.bounded and dtype == torch.bfloat16 and is_bounded(spec, pieces),
        tiles=wanted.tiles and bias is not None and spec.operands[bias.operand].dtype == dtype,
    )


def usual(spec: ScoreSpec, pieces: Pieces, dtype: torch.dtype, width: int) -> Variant:
    """The variant that a site has by default."""
    return suited(USUAL, spec, pieces, dtype, width)


def why_not(
    spec: ScoreSpec, pieces: Pieces, dtype: torch.dtype, dq: int, dv: int, variant: Variant = USUAL
) -> str | None:
    """Why this kernel is not the one for such a site; None if it is."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "it multiplies numbers of 16 bits"
    if not (HEAD_DIMS[0] // 2 < min(dq, dv) and max(dq, dv) <= HEAD_DIMS[-1]) or columns(dq) != columns(dv):
        return "head dims"
    if dq % 8 or dv % 8:
        return "rows are not multiples of 16 bytes"
    if spec.dropout:
        return "it drops no weights out"
    if spec.full is not None:
        return "rows that score as low as masked keys take a second pass"
    if spec.band.lower is not None and spec.band.exact:
        return "a narrow band is visited in smaller tiles"
    if any(_compares(x) for x in spec.keep.atoms(sympy.core.relational.Relational)):
        return "documents are visited in smaller tiles"
    evens = set(pieces.evens)
    varying = [load for load in pieces.score.atoms(Load) if J in load.free_symbols and load not in evens]
    if varying and not (variant.tiles and bias_of(spec, pieces) is not None):
        return "loads of each score are waited for"
    if not spec.score.has(S):
        return "scores without q·k"
    return None


def _compares(x: sympy.Basic) -> bool:
    """Whether what is loaded for a query is compared with what is for a key: of such masks many tiles are mixed, and
    more of them the larger they are. Documents took 0.33 ms in tiles of 64, and 0.49 in this kernel: an H100, D64, in
    examples/results/programs_h100_f342528.json ("kernel") and programs_h100_lists.json ("xformers")."""
    symbols = [load.free_symbols & {I, J} for load in x.atoms(Load)]
    return {I} in symbols and {J} in symbols


def columns(dim: int) -> int:
    return next(n for n in HEAD_DIMS if dim <= n)


PREAMBLE = '''\
"""Attention forward for Hopper, generated by xfcompile.

{meaning}
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@triton.jit
def clamp(bound, end):
    """A bound on keys, within 0 ... end."""
    return tl.cast(tl.minimum(tl.maximum(tl.cast(bound, tl.int64), 0), end), tl.int32)
'''

FIXED = '''\
@gluon.jit
def pack(p, dtype: gl.constexpr):
    """Weights [M, N] as integers [M, N / 2] with two of 16 bits each: a loop carries numbers of 16 bits one by one, and
    takes them out of registers and puts them back at each step."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    even, odd = p.reshape([M, N // 2, 2]).split()
    if dtype == gl.bfloat16:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)
    return packed


@gluon.jit
def unpack(packed, dtype: gl.constexpr, layout: gl.constexpr):
    M: gl.constexpr = packed.shape[0]
    N: gl.constexpr = packed.shape[1] * 2
    if dtype == gl.bfloat16:
        even, odd = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed],
                                              dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)
    else:
        even, odd = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed],
                                              dtype=(gl.float16, gl.float16), is_pure=True, pack=1)
    return gl.convert_layout(gl.join(even, odd).reshape([M, N]), layout, assert_trivial=True)


@gluon.jit
def partial_sum(p):
    """Of each row's weights those that one thread holds, added: [M, N] to [M, 4]. Nothing moves between threads."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape([M, N // 8, 4, 2]), 3), 1)


@gluon.jit
def highest(s):
    """The maximum of each row: of neighbours first, which makes a chain half as long."""
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    return gl.convert_layout(gl.max(gl.max(gl.max(s.reshape([M, N // 8, 4, 2]), 3), 1), 1), rows)
'''

KERNEL = '''\
@gluon.jit
{locate}
    """Batch, head and block of rows of a piece of work."""
{place}
    return b, h, block


@gluon.jit
{bounds}
    """How many tiles a block of rows visits, how many of them, the first, are masked, where the even ones begin, and
    three numbers that say which they are."""
    first = block * ROWS
{bounds_body}
    return n, masked, evens_at, x0, x1, x2


@gluon.jit
{tile}
    """The first key of the t-th tile."""
{tile_body}
    return start


@gluon.jit
{produce}
    """The warp that loads. A stage has the keys of a tile, and the values of the one before."""
    M: gl.constexpr = q_smem.shape[3]
    K_BYTES: gl.constexpr = KEYS * k_smem.shape[4] * 2
    V_BYTES: gl.constexpr = KEYS * v_smem.shape[4] * 2
    step = 0
    turn = 0
    for work in range(gl.program_id(0), total, gl.num_programs(0)):
        b, h, block = locate(work, blocks, heads, total)
        first = block * ROWS
        n, masked, evens_at, x0, x1, x2 = {call_bounds}
        for w in gl.static_range({groups}):
            mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(w), M * q_smem.shape[4] * 2)
            tma.async_copy_global_to_shared(q_desc, [b, h, first + w * M, 0], q_full.index(w), q_smem.index(w))
        turn += 1
        before = 0
        for t in range(n + 1):
            start = {call_tile_produced}
            at = step % STAGES
            bar = full.index(at)
            mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
            has_k = t < n
            has_v = t > 0
            mbarrier.expect(bar, K_BYTES + V_BYTES, pred=has_k & has_v)
            mbarrier.expect(bar, K_BYTES, pred=has_v ^ True)
            mbarrier.expect(bar, V_BYTES, pred=has_k ^ True)
            tma.async_copy_global_to_shared(k_desc, [b, h // group, start, 0], bar, k_smem.index(at), pred=has_k)
            tma.async_copy_global_to_shared(v_desc, [b, h // group, before, 0], bar, v_smem.index(at), pred=has_v)
{produce_bias}
            before = start
            step += 1


@gluon.jit
{softmax}
    """The weights of a tile whose product of queries and keys is s, what those before it are multiplied by, and the
    maximum of each row's scores, UNIT times as large as they are."""
    {power}
{softmax_body}
{alpha}
    return p, alpha, m_new


@gluon.jit
{advance}
    """Tile t. p: weights of tile t - 1; acc: what values before those add up to, still to be multiplied by alpha.

    Nothing is in flight at a loop's end: ptxas would then make each product wait for the one before.
    """
    at = step % STAGES
    M: gl.constexpr = q.shape[0]
    D: gl.constexpr = k_smem.shape[4]
    DIM_V: gl.constexpr = v_smem.shape[4]
    k = k_smem.index(at).reshape([KEYS, D]).permute((1, 0))
{take_turn}
    s_ = warpgroup_mma(q, k, gl.zeros([M, KEYS], gl.float32, S_MMA), use_acc=False, is_async=True)
{add_columns}
    # The rest of step t - 1.
{leave}
{rescale}
    a = unpack(p, v_smem.dtype, gl.DotOperandLayout(0, O_MMA, 2))
    acc_ = warpgroup_mma(a, v_smem.index(at).reshape([KEYS, DIM_V]), acc, is_async=True)
{give_turn}
    start = {call_tile}
{ahead}
{read_bias}
    s = warpgroup_mma_wait(1, deps=[s_])
    p_new, alpha, m = {call_softmax}
{rescale_sum}
    l = l + partial_sum(p_new)
    # The next stage, needed by the next step: waited for here, because the predicate's branch tends to keep ptxas from
    # moving the exponentials behind the wait for the product.
    mbarrier.wait(full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=t + 1 < n)
    acc, p = warpgroup_mma_wait(0, deps=[acc_, p])
    return pack(p_new, v_smem.dtype), acc, alpha, m, l  # packed into the registers that the product has read until now


@gluon.jit
{consume}
    """A warpgroup with M rows of each block."""
    M: gl.constexpr = q_smem.shape[3]
    D: gl.constexpr = k_smem.shape[4]
    DIM_V: gl.constexpr = v_smem.shape[4]
    S_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    O_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, DIM_V, 16])
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_MMA)
    dtype: gl.constexpr = v_smem.dtype
    offs_m = gl.arange(0, M, S_ROW)
    offs_n = gl.arange(0, KEYS, gl.SliceLayout(0, S_MMA))[None, :]
    q = q_smem.index(w).reshape([M, D])
    step = 0
    turn = 0
    for work in range(gl.program_id(0), total, gl.num_programs(0)):
        b, h, block = locate(work, blocks, heads, total)
        n, masked, evens_at, x0, x1, x2 = {call_bounds}
        first = block * ROWS + w * M
        row = gl.minimum(first + offs_m, lq - 1)  # rows past the end repeat the last one, and are not stored
        i = row[:, None]
{rows}
{factors}
        m = {initial}
        acc = gl.zeros([M, DIM_V], gl.float32, O_MMA)

        # The first tile has no weights behind it. It may be masked or not: this suits both.
        start = {call_tile_first}
{kept}
        mbarrier.wait(q_full.index(w), turn & 1)
        mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
        k = k_smem.index(step % STAGES).reshape([KEYS, D]).permute((1, 0))
{take_turn_outside}
        s_ = warpgroup_mma(q, k, gl.zeros([M, KEYS], gl.float32, S_MMA), use_acc=False, is_async=True)
{add_columns_outside}
{give_turn_outside}
{read_bias_first}
        s = warpgroup_mma_wait(0, deps=[s_])
        p_, alpha, m = {call_softmax_first}
        l = partial_sum(p_)
        p = pack(p_, dtype)
        turn += 1
        step += 1
        mbarrier.wait(full.index(step % STAGES), step // STAGES & 1, pred=n > 1)

{loops}
        mbarrier.arrive(q_empty.index(w), count=1)
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)

        at = step % STAGES
        mbarrier.wait(full.index(at), step // STAGES & 1)
{rescale_outside}
        a = unpack(p, dtype, gl.DotOperandLayout(0, O_MMA, 2))
{take_turn_outside}
        acc_ = warpgroup_mma(a, v_smem.index(at).reshape([KEYS, DIM_V]), acc, is_async=True)
{give_turn_outside}
        l = gl.convert_layout(gl.sum(l, 1), S_ROW)
{sink}
        lse = {lse}
        rows = first + offs_m
        gl.store(lse_ptr + (b.to(gl.int64) * heads + h) * lq + rows, lse, mask=rows < lq)
{dead}
        inverse = gl.convert_layout(1.0 / l, gl.SliceLayout(1, O_MMA))
        acc = warpgroup_mma_wait(0, deps=[acc_])
        mbarrier.arrive(empty.index(at), count=1)
        step += 1
        out = (acc * inverse[:, None]).to(dtype)
        rows = gl.arange(0, M, gl.SliceLayout(1, O_MMA))[:, None]
        cols = gl.arange(0, DIM_V, gl.SliceLayout(0, O_MMA))[None, :]
        if HEADS_FIRST:
            out_ptrs = out_ptr + ((b.to(gl.int64) * heads + h) * lq + first) * DV + rows * DV
        else:
            out_ptrs = out_ptr + ((b.to(gl.int64) * lq + first) * heads + h) * DV + rows * (heads * DV)
        gl.store(out_ptrs + cols, out, mask=(first + rows < lq) & (cols < DV))


@gluon.jit(do_not_specialize={unspecialized})
{kernel}
    """One program: pieces of work `program_id`, `program_id + num_programs` ...; a piece is ROWS query rows of a head.

    Descriptors are of [B, H, L, D] views, with blocks [1, 1, ROWS / 2, D] for q and [1, 1, KEYS, D] for k and v. To be
    launched with four warps.
    """
    dtype: gl.constexpr = q_desc.dtype
    M: gl.constexpr = q_desc.block_type.shape[2]
    q_smem = gl.allocate_shared_memory(dtype, [{groups}, 1, 1, M, q_desc.block_type.shape[3]], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, k_desc.block_type.shape[3]], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, v_desc.block_type.shape[3]], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [{groups}, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [{groups}, 1], mbarrier.MBarrierLayout())
{turns}
{places}
{bias_memory}
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range({groups}):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_empty.index(w), count=1)
{turns_init}
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count={groups})
{bias_init}
    fence_async_shared()
    # The first is run by the program's own warps, with the registers that the others leave.
    gl.warp_specialize([(consume, (
{consumers}
    )), (produce, (
{producer}
    ))], {warps}, {registers})
'''

MEAN = '''\
@triton.jit
def fill_dead_rows(out_ptr, lse_ptr, v_ptr, stride_vb, stride_vh, stride_vn, stride_vd, heads, group, lq, lk,
                   DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   HEADS_FIRST: tl.constexpr):
    """A row that may see no key has equal weights for all keys: the mean of all values."""
    blocks = (lq + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    b = pid // blocks // heads
    h = pid // blocks % heads
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + (tl.cast(b, tl.int64) * heads + h) * lq + rows, mask=rows < lq, other=0.0)
    none = lse == float("-inf")
    if tl.reduce(none.to(tl.int32), 0, tl.standard._elementwise_max) > 0:
        offs_dv = tl.arange(0, BLOCK_DV)
        v_ptr += tl.cast(b, tl.int64) * stride_vb + tl.cast(h // group, tl.int64) * stride_vh
        total = tl.full([BLOCK_DV], 0.0, tl.float32)
        for start in tl.range(0, lk, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)[:, None]
            at = offs_n.to(tl.int64) * stride_vn + offs_dv[None, :].to(tl.int64) * stride_vd
            v = tl.load(v_ptr + at, mask=(offs_n < lk) & (offs_dv[None, :] < DV), other=0.0)
            total += tl.reduce(v.to(tl.float32), 0, tl.standard._sum_combine)
        mean = total / lk
        if HEADS_FIRST:
            out_row = (tl.cast(b, tl.int64) * heads + h) * lq + rows[:, None]
        else:
            out_row = (tl.cast(b, tl.int64) * lq + rows[:, None]) * heads + h
        mask = none[:, None] & (rows[:, None] < lq) & (offs_dv[None, :] < DV)
        value = (mean[None, :] + tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_row * DV + offs_dv[None, :], value, mask=mask)
'''


# 2**x for x in -0.5 ... 0.5, with relative errors below 1e-4: a twentieth of what rounding to bf16 makes.
POWERS = (0.0551716451, 0.242611383, 0.693261009, 0.999928058)


def _exp2(emulated: int) -> str:
    """Powers of two, some of each eight neighbours by a polynomial: special functions have a sixteenth of the
    throughput of additions. -inf gives 0 and NaN gives NaN, as the instruction does."""
    chosen = set(range(7, 7 - 8 // emulated * emulated, -(8 // emulated))) if emulated else set()
    lines = []
    for n in range(8):
        x = f"${n + 8}"
        if n not in chosen:
            lines.append(f"ex2.approx.ftz.f32 ${n}, {x};")
            continue
        c3, c2, c1, c0 = (_hexadecimal(c) for c in POWERS)
        lines += [
            "{ .reg .f32 t, r, f, p; .reg .b32 n;",
            f"max.NaN.f32 t, {x}, {_hexadecimal(-127.0)};",
            f"add.rn.f32 r, t, {_hexadecimal(12582912.0)}; sub.rn.f32 f, r, {_hexadecimal(12582912.0)};",
            f"sub.rn.f32 f, t, f; fma.rn.f32 p, f, {c3}, {c2}; fma.rn.f32 p, p, f, {c1}; fma.rn.f32 p, p, f, {c0};",
            "mov.b32 n, r; shl.b32 n, n, 23; add.s32 n, n, 0x3F800000; mov.b32 r, n;",
            f"mul.rn.f32 ${n}, p, r; }}",
        ]
    text = "\n".join(f"        {line}" for line in lines)
    constraints = ",".join(["=f"] * 8 + ["f"] * 8)
    return (
        f'@gluon.jit\ndef exp2(x):\n    return gl.inline_asm_elementwise("""\n{text}\n        """, '
        f'"{constraints}", [x], dtype=gl.float32, is_pure=True, pack=8)\n'
    )


def _hexadecimal(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex().upper()


FACTORS = """\
# What a key's place is multiplied by, as three numbers of 16 bits.
factor = column_factor({arguments})
high = factor.to(gl.bfloat16).to(gl.float32)
middle = (factor - high).to(gl.bfloat16).to(gl.float32)
part = gl.arange(0, 16, gl.SliceLayout(0, gl.DotOperandLayout(0, S_MMA, 2)))[None, :]
factors = gl.where(part == 0, high, gl.where(part == 1, middle, gl.where(part == 2, factor - high - middle, 0.0)))
factors = (factors + gl.zeros([M, 16], gl.float32, gl.DotOperandLayout(0, S_MMA, 2))).to(gl.bfloat16)"""

PLACES = """\
PLACE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [gl.num_warps(), 1], [1, 0])
place = gl.arange(0, KEYS, gl.SliceLayout(1, PLACE_LAYOUT))[:, None]
part = gl.arange(0, 16, gl.SliceLayout(0, PLACE_LAYOUT))[None, :]
places = gl.allocate_shared_memory(
    gl.bfloat16, [KEYS, 16], gl.NVMMASharedLayout.get_default_for([KEYS, 16], gl.bfloat16),
    gl.where(part < 3, place, 0).to(gl.float32).to(gl.bfloat16))"""

PRODUCE_BIAS = """\
if has_k:
    bias_step = step - turn + 1  # a work has one step more than tiles of the bias
    for w in gl.static_range({groups}):
        bias_at = bias_step % {stages} * {groups} + w
        mbarrier.wait(bias_empty.index(bias_at), (bias_step // {stages} & 1) ^ 1)
        mbarrier.expect(bias_full.index(bias_at), q_smem.shape[3] * KEYS * 2)
        tma.async_copy_global_to_shared(
            bias_desc, [{b}, {h}, first + w * q_smem.shape[3], start], bias_full.index(bias_at),
            bias_smem.index(bias_at))"""

READ_BIAS = """\
bias_at = bias_step % {stages} * {groups} + w
mbarrier.wait(bias_full.index(bias_at), bias_step // {stages} & 1)
bias = bias_smem.index(bias_at).reshape([M, KEYS]).load(S_MMA)
fence_async_shared()
mbarrier.arrive(bias_empty.index(bias_at), count=1)"""

BIAS_MEMORY = """\
bias_smem = gl.allocate_shared_memory(dtype, [{number}, 1, 1, M, KEYS], bias_desc.layout)
bias_full = gl.allocate_shared_memory(gl.int64, [{number}, 1], mbarrier.MBarrierLayout())
bias_empty = gl.allocate_shared_memory(gl.int64, [{number}, 1], mbarrier.MBarrierLayout())"""

BIAS_INIT = """\
for n in gl.static_range({number}):
    mbarrier.init(bias_full.index(n), count=1)
    mbarrier.init(bias_empty.index(n), count=1)"""

BIAS = sympy.Symbol("bias", real=True)
"""A bias of each score."""


def bias_of(spec: ScoreSpec, pieces: Pieces) -> Load | None:
    """The one load that has a number for each score, if it can be read by TMA: [B or 1, H or 1, Lq, Lk]."""
    varying = [load for load in pieces.score.atoms(Load) if J in load.free_symbols]
    if len(varying) != 1 or pieces.names.listed or spec.keep.has(Load):
        return None
    (load,) = varying
    if len(load.indices) != 4 or load.indices[2:] != (I, J):
        return None
    b, h = load.indices[:2]
    return load if b in (0, B) and h in (0, H) else None


def _bias_function(spec: ScoreSpec, pieces: Pieces, load: Load) -> str:
    """What a tile of scores is with its bias, as the program has it: UNIT is 1."""
    names = pieces.names
    score = pieces.score.xreplace({load: BIAS})
    scope = {**NAMES, **{x: x.name for x in (*spec.scalars, codegen.FIRST, codegen.UNIT, BIAS)}}
    rows = {x: Term(f"row{n}", "float") for n, x in enumerate(codegen.row_loads(pieces.score, spec.keep))}
    printer = Printer(spec.operands, scope, rows)
    text = printer.float(score).text
    arguments = ["s", "bias", "b", "h", "i", "j", *names.inside, *names.flag_parameters]
    lines = "".join(f"    {line}\n" for line in [*printer.lines, *template.returned(text)])
    return f"@triton.jit\n{wrapped('def biased', arguments, ':')}\n{lines}"


# Of rows whose maximum is that far from 0 a score is equal to it, or lower by more than leaves any weight: a fraction
# of the difference does as well, and the products stay finite.
WITH_BIAS = """\
power = tl.where(tl.abs(m_safe) > 1e30, POWER / 4, POWER)
p = tl.exp2(s * power[:, None] - (m_safe * power)[:, None])"""

START = sympy.Symbol("start", integer=True, nonnegative=True)
"""The first key of a tile."""


@dataclass(frozen=True)
class Columns:
    """A score scale * (s + factor * (j - start)) + shift, where the last two are numbers for a whole tile."""

    scale: float
    factor: sympy.Expr
    shift: sympy.Expr


def columns_of(spec: ScoreSpec, score: sympy.Expr) -> Columns | None:
    """The score as that; None if it is something else."""
    cores = [term for term in sympy.Add.make_args(score) if S in term.free_symbols]
    if len(cores) != 1 or spec.full is not None or template.wide(spec):
        return None
    scale, core = cores[0].as_coeff_Mul()
    rest = sympy.expand(score - cores[0])
    slope = rest.coeff(J, 1)
    shift = sympy.expand(rest - slope * J)
    if core != S or not scale > 0 or slope == 0 or {I, J} & (slope.free_symbols | shift.free_symbols):
        return None
    from_first = shift.coeff(codegen.FIRST, 1)
    if from_first == -slope:  # which is exact
        moved = slope * (START - codegen.FIRST) + sympy.expand(shift - from_first * codegen.FIRST)
    else:
        moved = slope * START + shift
    return Columns(float(scale), slope / scale, moved)


def _column_functions(spec: ScoreSpec, pieces: Pieces, found: Columns) -> list[str]:
    names = pieces.names
    scope = {**NAMES, **{x: x.name for x in (*spec.scalars, codegen.FIRST, codegen.UNIT, START)}}
    rows = {x: Term(f"row{n}", "float") for n, x in enumerate(codegen.row_loads(pieces.score, spec.keep))}
    made = []
    for name, value in (("factor", found.factor), ("shift", codegen.times(codegen.UNIT, found.shift))):
        printer = Printer(spec.operands, scope, rows)
        arguments = ["start", "b", "h", *names.inside, *names.flag_parameters]
        text = printer.float(value).text
        lines = "".join(f"    {line}\n" for line in [*printer.lines, f"return {text}"])
        made.append(f"@triton.jit\n{wrapped(f'def column_{name}', arguments, ':')}\n{lines}")
    return made


def module(spec: ScoreSpec, pieces: Pieces, variant: Variant = USUAL) -> str:
    """The whole text, of a site that `why_not` has nothing against."""
    helpers = [HELPERS[name] for name in sorted(pieces.helpers)]
    found = columns_of(spec, pieces.score) if variant.columns else None
    powers = [_exp2(variant.emulated)] if variant.emulated else []
    bias = bias_of(spec, pieces) if variant.tiles else None
    biased = [_bias_function(spec, pieces, bias)] if bias is not None else []
    functions = [*pieces.functions, *biased, *(_column_functions(spec, pieces, found) if found is not None else [])]
    parts = [
        PREAMBLE.format(meaning=template.meaning(spec)),
        *helpers,
        *functions,
        FIXED,
        *powers,
        _kernel(spec, pieces, variant),
    ]
    if needs_mean(spec):
        parts.append(MEAN)
    return "\n\n".join(parts)


def needs_mean(spec: ScoreSpec) -> bool:
    """Whether rows that may see no key are filled by a kernel of their own, with the mean of all values."""
    return spec.dead == "mean" and spec.sink is None and spec.keep != sympy.true


def _kernel(spec: ScoreSpec, pieces: Pieces, variant: Variant) -> str:
    names, forms = pieces.names, pieces.forms
    listed = ["list_ptr", "list_b", "list_h"] if names.listed else []
    own = [*names.outside, *listed]
    flags = names.flags
    tiling = ["n", "masked", "evens_at", "x0", "x1", "x2"]
    barriers = ["q_full", "q_empty", "full", "empty"]
    turns = ["turns"] if variant.turns else []
    smem = ["q_smem", "k_smem", "v_smem"]
    sizes = ["blocks", "heads", "lq", "lk", "total"]
    constants = ["ROWS", "KEYS", "STAGES"]
    layouts = ["S_MMA", "O_MMA"]
    where = ["b", "h", "i", "offs_n", "start", "lk"]
    inside = [*names.inside, *names.evens]
    more = ["EVEN"] if names.evens else []

    def define(name: str, arguments: Sequence[str], constant: Sequence[str] = ()) -> str:
        return wrapped(f"def {name}", [*arguments, *(f"{x}: gl.constexpr" for x in constant)], ":")

    def call(name: str, arguments: Sequence[str], depth: int) -> str:
        text = wrapped(name, arguments)
        return textwrap.indent(text, " " * (4 * depth + 4)).strip()

    bounds = ["b", "h", "block", "lq", "lk", *names.scalars, *listed]
    tile = ["t", *tiling, *listed[:1]]
    softmax = ["s", "m", *where, *inside]
    advance = [
        "t", "step", "p", "acc", "alpha", "m", "l", "q", *smem[1:], "full", "empty", *tiling, "b", "h", "i", "offs_n",
        "lk", *names.inside, *listed[:1],
    ]  # fmt: skip
    if variant.turns:
        advance += ["w", *turns]
    found = columns_of(spec, pieces.score) if variant.columns else None
    places = ["places"] if found is not None else []
    advance += ["factors", *places] if places else []
    bias = bias_of(spec, pieces) if variant.tiles else None
    memory = ["bias_smem", "bias_full", "bias_empty"] if bias is not None else []
    tile_of_bias = ["bias"] if bias is not None else []
    softmax += tile_of_bias
    if bias is not None:
        advance += [*memory, "bias_step", *([] if variant.turns else ["w"])]
    if "first" not in advance:
        advance.append("first")
    consume = ["w", *smem, *barriers, *turns, *places, *memory, *sizes, "out_ptr", "lse_ptr", *own]
    described = ["q_desc", "k_desc", "v_desc", *(["bias_desc"] if bias is not None else [])]
    produce = [*described, *smem, *barriers, *memory, *sizes, "group", *names.scalars, *listed]
    pointers = [*described, "out_ptr", "lse_ptr", *names.pointers, *listed[:1]]
    kernel = [*pointers, *sizes, "group", *names.strides, *names.scalars, *listed[1:]]

    def advanced(masked: bool, even: bool) -> str:
        kinds = [str(masked), *([str(even)] if more else [])]
        given = ["step - turn + 1" if x == "bias_step" else x for x in advance]
        return call("advance", [*given, *constants, *flags, *layouts, *kinds], 4)

    evens = names.evens
    ahead: list[str] = []
    if evens:
        ahead = [f"{name} = 0.0" for name in evens]
        values = zip(evens, forms.even_values, strict=True)
        read = [*forms.even_lines, *(f"{name} = {value}" for name, value in values)]
        ahead = ["if EVEN:", "    ahead = start", *(f"    {x}" for x in read), "else:", *(f"    {x}" for x in ahead)]
    first_step = [
        "s",
        "m",
        *where,
        *names.inside,
        *("0.0" for _ in evens),
        *tile_of_bias,
        *flags,
        "True",
        *(["False"] if more else []),
    ]
    lse = template.lse(forms, names)
    sink, initial = "", 'gl.full([M], float("-inf"), gl.float32, S_ROW)'
    if spec.sink is not None:
        arguments = ", ".join(["b", "h", "row", *names.outside, *flags])
        initial = f"sink({arguments}) + gl.zeros([M], gl.float32, S_ROW)"
        sink = "\n".join(
            [
                "# The sink is there before any key: it has weight but no value.",
                f"sink_ = sink({arguments})",
                template.POWER,
                'l += tl.where(m == float("-inf"), 0.0, tl.exp2((sink_ - m) * POWER))',
            ]
        )
    dead = "l = tl.where(l == 0.0, 1.0, l)" if spec.dead == "zero" and spec.sink is None else ""
    if needs_mean(spec):
        dead = "l = tl.where(l == 0.0, 1.0, l)  # such rows are filled later"
    loops = [
        _loop("1", "masked", advanced(True, False), False),
        _loop("gl.maximum(masked, 1)", "evens_at", advanced(False, False), variant.twice),
    ]
    if evens:
        loops.append(_loop("gl.maximum(evens_at, 1)", "n", advanced(False, True), variant.twice))
    take_turn, give_turn = "", ""
    if variant.turns:
        # The first is let in by the phase that a new barrier is not in.
        take_turn = "mbarrier.wait(turns.index(w), (step & 1) ^ (w == 0))"
        give_turn = f"mbarrier.arrive(turns.index((w + 1) % {variant.warpgroups}), count=1)"
    bounded = variant.bounded and is_bounded(spec, pieces)
    rescale = "acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_MMA))[:, None]"
    rescale_sum = "l = l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))[:, None]"
    alpha = "alpha = tl.exp2((m - m_safe) * POWER)"
    if bounded:
        rescale, rescale_sum, alpha = "", "", "alpha = m"
        initial = "gl.zeros([M], gl.float32, S_ROW)"
    early = variant.early and spec.keep.has(Load)
    kept = ""
    if early:
        site = ", ".join(["b", "h", "i", "gl.minimum(start + offs_n, lk - 1)", *names.inside, *flags])
        kept = f"kept = keep({site}) & (start + offs_n < lk)"
    leave = "mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)"
    add_columns, factors = "", ""
    if found is not None:
        add_columns = "s_ = warpgroup_mma(factors, places.permute((1, 0)), s_, is_async=True)"
        factors = FACTORS.format(arguments=", ".join(["0", "b", "h", *names.inside, *flags]))
    number = BIAS_STAGES * variant.warpgroups
    produce_bias, read_bias, bias_memory, bias_init = "", "", "", ""
    if bias is not None:
        about = {"stages": BIAS_STAGES, "groups": variant.warpgroups}
        produce_bias = PRODUCE_BIAS.format(b=bias.indices[0], h=bias.indices[1], **about)
        read_bias = READ_BIAS.format(**about)
        bias_memory, bias_init = BIAS_MEMORY.format(number=number), BIAS_INIT.format(number=number)
    given = [*consume[1:], *constants, *flags, "DV", "HEADS_FIRST"]
    made = [_arguments([str(w), *given]) for w in range(variant.warpgroups)]
    others = variant.warpgroups - 1
    return KERNEL.format(
        locate=define("locate", ["work", "blocks", "heads", "total"]),
        place=_indented(_place(spec, variant.backwards and names.listed)),
        bounds=define("bounds", bounds, ["ROWS", "KEYS"]),
        bounds_body=_indented(_bounds(spec, names)),
        tile=define("tile", tile, ["KEYS"]),
        tile_body=_indented(_tile(names)),
        produce=define("produce", produce, constants),
        call_bounds=call("bounds", [*bounds, "ROWS", "KEYS"], 2),
        call_tile_produced=call("tile", ["gl.minimum(t, n - 1)", *tile[1:], "KEYS"], 3),
        softmax=define("softmax", softmax, [*flags, "MASKED", *more]).replace("):", ", kept):" if early else "):"),
        softmax_body=_indented(_softmax(spec, pieces, variant, found)),
        power=template.POWER,
        advance=define("advance", advance, [*constants, *flags, *layouts, "MASKED", *more]),
        call_tile=call("tile", [*tile, "KEYS"], 1),
        ahead=_indented("\n".join(ahead)),
        call_softmax=call("softmax", [*softmax, *flags, "MASKED", *more, *(["None"] if early else [])], 1),
        consume=define("consume", consume, [*constants, *flags, "DV", "HEADS_FIRST"]),
        rows=_indented("\n".join(pieces.row_lines), 2),
        initial=initial,
        call_tile_first=call("tile", ["0", *tile[1:], "KEYS"], 2),
        call_softmax_first=call("softmax", [*first_step, *(["kept"] if early else [])], 2),
        loops=_indented("\n".join(loops), 2),
        sink=_indented(sink, 2),
        lse=lse,
        dead=_indented(dead, 2),
        unspecialized=repr([*sizes, "group", *names.scalars, *listed[1:]]),
        kernel=define("attention_forward", kernel, [*constants, *flags, "DV", "HEADS_FIRST", "REGISTERS"]),
        consumers="\n    )), (consume, (\n".join(made),
        producer=_arguments([*produce, *constants]),
        groups=variant.warpgroups,
        warps=repr([4] * others + [1]),
        registers=f"[{', '.join(['REGISTERS'] * others)}, 24]",
        produce_bias=_indented(produce_bias, 3),
        read_bias=_indented(read_bias),
        read_bias_first=_indented(f"bias_step = step - turn\n{read_bias}" if read_bias else "", 2),
        bias_memory=_indented(bias_memory),
        bias_init=_indented(bias_init),
        rescale=_indented(rescale),
        rescale_outside=_indented(rescale, 2),
        rescale_sum=_indented(rescale_sum),
        alpha=_indented(alpha),
        kept=_indented(kept, 2),
        add_columns=_indented(add_columns),
        add_columns_outside=_indented(add_columns, 2),
        factors=_indented(factors, 2),
        places=_indented(PLACES if found is not None else ""),
        leave="" if variant.turns else _indented(leave),
        take_turn=_indented(f"{leave}\n{take_turn}" if variant.turns else ""),
        give_turn=_indented(give_turn),
        take_turn_outside=_indented(take_turn, 2),
        give_turn_outside=_indented(give_turn, 2),
        turns=_indented(
            f"turns = gl.allocate_shared_memory(gl.int64, [{variant.warpgroups}, 1], mbarrier.MBarrierLayout())"
            if variant.turns
            else ""
        ),
        turns_init=_indented("mbarrier.init(turns.index(w), count=1)" if variant.turns else "", 2),
    )


def _loop(start: str, end: str, call: str, twice: bool) -> str:
    """Over tiles from start to end."""
    step = f"p, acc, alpha, m, l = {call}\nstep += 1"
    if not twice:
        return f"for t in range({start}, {end}):\n{_indented(step)}"
    return "\n".join(
        [
            f"t_first = {start}",
            f"pairs = gl.maximum({end} - t_first, 0) // 2",
            "for pair in range(pairs):",
            "    t = t_first + 2 * pair",
            _indented(step),
            "    t += 1",
            _indented(step),
            "t = t_first + 2 * pairs",
            f"if t < {end}:",
            _indented(step),
        ]
    )


def _place(spec: ScoreSpec, backwards: bool) -> str:
    lines = ["b = work // blocks // heads", "h = work // blocks % heads"]
    if template._batches_share(spec):
        # All batches load the same tile of the bias: one after the other.
        batch = "batch = total // (blocks * heads)"
        lines = [batch, "b = work % batch", "work = work // batch", "h = work // blocks"]
    if backwards or (spec.keep != sympy.true and spec.band.upper is not None):
        return "\n".join([*lines, "block = blocks - 1 - work % blocks  # the last rows see most keys: start with them"])
    return "\n".join([*lines, "block = work % blocks"])


def _bounds(spec: ScoreSpec, names: template.Names) -> str:
    if names.listed:
        return "\n".join(
            [
                "tiles = (lk + KEYS - 1) // KEYS",
                "rows = (lq + ROWS - 1) // ROWS",
                "x0 = ((b * list_b + h * list_h) * rows + block).to(gl.int64) * (tiles + 3)",
                "x1 = tiles",
                # Without loads that may be even all whole tiles count as even, and are as others are.
                "evens = gl.load(list_ptr + x0)" if names.evens else "evens = 0",
                "wholes = gl.load(list_ptr + x0 + 1)",
                "masked = gl.load(list_ptr + x0 + 2)",
                "x2 = wholes + masked",
                "# A block without tiles visits one, all of which is masked.",
                "masked = gl.where(x2 == 0, 1, masked)",
                "n = gl.maximum(x2, 1)",
                "evens_at = n - evens",
            ]
        )

    def bound(side: str, row: str) -> str:
        return f"clamp({side}({', '.join([row, *names.scalars])}), lk)"

    lines = ["x2 = 0", "high = (lk + KEYS - 1) // KEYS", "full = lk // KEYS"]
    if spec.keep != sympy.true:
        if spec.band.upper is not None:
            lines += [
                "last = gl.minimum(first + ROWS, lq) - 1",
                f"high = ({bound('upper', 'last')} + KEYS - 1) // KEYS",
                f"full = gl.minimum({bound('upper', 'first')} // KEYS, high)",
            ]
        if not spec.band.exact:
            lines.append("full = 0")
    return "\n".join(
        [
            *lines,
            "# A block without tiles visits one, all of which is masked.",
            "x1 = gl.maximum(high, 1)",
            "x0 = 0",
            "n = x1",
            "masked = x1 - full",
            "evens_at = n",
        ]
    )


def _tile(names: template.Names) -> str:
    """Masked tiles come first."""
    if names.listed:
        return "\n".join(
            [
                "# Of a list the first are even, then come whole ones; the masked ones stand at the end, backwards.",
                "front = gl.where(t < evens_at, n - evens_at + t - masked, t - evens_at)",
                "at = gl.where(t < masked, 2 + x1 - t, 3 + front)",
                "start = gl.load(list_ptr + x0 + at, mask=x2 > 0, other=0) * KEYS",
            ]
        )
    return "start = (n - 1 - t) * KEYS"


def _softmax(spec: ScoreSpec, pieces: Pieces, variant: Variant, columns: Columns | None) -> str:
    names, forms = pieces.names, pieces.forms
    site = ", ".join(["b", "h", "i", "j", *names.inside, *names.flags])
    highest = "highest(s)" if variant.tree else "gl.max(s, 1)"
    lines = ["column = start + offs_n", "j = column", "if MASKED:", "    j = gl.minimum(j, lk - 1)"]
    masks = ["if MASKED:"]
    seen = "column < lk" if spec.keep == sympy.true else f"keep({site}) & (column < lk)"
    if variant.early and spec.keep.has(Load):
        masks += [
            "    if kept is None:",
            f'        s = gl.where({seen}, s, float("-inf"))',
            "    else:",
            '        s = gl.where(kept, s, float("-inf"))',
        ]
    else:
        masks.append(f'    s = gl.where({seen}, s, float("-inf"))')
    usual = [
        *template.scores(spec, forms.usual, site),
        *masks,
        *template.softmax(forms.usual, site, highest=highest),
    ]
    if columns is not None:
        shift = ", ".join(["start", "b", "h", *names.inside, *names.flags])
        form = template.Form(columns.scale, shifted=True)
        usual = [*masks, *template.softmax(form, shift, "column_", highest=highest)]
    if variant.tiles and bias_of(spec, pieces) is not None:
        *safe, _ = template.softmax(template.Form(), site, highest=highest)
        usual = ["bias = bias.to(tl.float32)", f"s = biased(s, bias, {site})", *masks, *safe, *WITH_BIAS.splitlines()]
    if variant.bounded and is_bounded(spec, pieces):
        scale = f"({forms.usual.scale!r} * UNIT * POWER)"
        usual = [*template.scores(spec, forms.usual, site), *masks, "m_new = m", f"p = tl.exp2(s * {scale})"]
    if variant.emulated:
        usual = [line.replace("p = tl.exp2(", "p = exp2(") for line in usual]
    if forms.even is None:
        return "\n".join([*lines, *usual])
    with_evens = ", ".join([site, *names.evens])
    even = [
        *template.scores(spec, forms.even, with_evens, "even_"),
        *template.softmax(forms.even, with_evens, "even_", highest=highest),
    ]
    if variant.emulated:
        even = [line.replace("p = tl.exp2(", "p = exp2(") for line in even]
    return "\n".join([*lines, "if EVEN:", *(f"    {x}" for x in even), "else:", *(f"    {x}" for x in usual)])


def _indented(text: str, depth: int = 1) -> str:
    return textwrap.indent(text, "    " * depth)


def _arguments(names: Sequence[str]) -> str:
    return textwrap.fill(
        ", ".join(names), template.WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8, break_long_words=False
    )
