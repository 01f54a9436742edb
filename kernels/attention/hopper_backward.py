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
from xfcompile.kernels.attention.hopper_variant import bias_of, place_of
from xfcompile.kernels.attention.template import wrapped
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


PREAMBLE = '''\
"""Attention backward for Hopper, generated by xfcompile.

{meaning}
slope  {slope}
"""

{imports}from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin


@builtin
def add_to_global(desc, coordinates, block, _semantic=None):
    """A block in shared memory is added to a tensor by TMA: what Gluon has no function for yet."""
    at = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, at, block.handle)
'''

KERNELS = '''\
@triton.jit
def prepare_rows(out_ptr, dout_ptr, lse_ptr, pair_ptr, inverse_ptr, top_ptr, delta_ptr, shift_ptr, dq_ptr,
                 stride_ob, stride_oh, stride_om, stride_od, stride_gb, stride_gh, stride_gm, stride_gd,
                 heads, lq, padded, DV: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                 PAIRED: tl.constexpr, EXACT: tl.constexpr):
    """Of ROWS query rows of a head what their weights are made of, and delta, the sum over dout * out; [B, H, padded],
    such that rows past the end have no weights. And zeros where dq [B, H, padded, COLUMNS] is summed up.

    PAIRED: both are there already, as the other kernels read them. EXACT: top is the maximum of a row, and shift log2
    of one over the sum of exponentials; otherwise top is log2 of that sum.
    """
    blocks = padded // ROWS
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    offs_m = block * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = offs_m < lq
    row = tl.cast(head, tl.int64) * lq + offs_m
    place = tl.cast(head, tl.int64) * padded + offs_m
    if PAIRED:
        top = tl.load(pair_ptr + 2 * row, mask=inside, other=float("inf"))
        delta = tl.load(pair_ptr + 2 * row + 1, mask=inside, other=0.0)
    else:
        b, h = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
        rows = offs_m[:, None].to(tl.int64)
        mask = inside[:, None] & (columns < DV)
        out_ptr += b * stride_ob + h * stride_oh
        dout_ptr += b * stride_gb + h * stride_gh
        out = tl.load(out_ptr + rows * stride_om + columns * stride_od, mask=mask, other=0.0)
        dout = tl.load(dout_ptr + rows * stride_gm + columns * stride_gd, mask=mask, other=0.0)
        top = tl.load(lse_ptr + row, mask=inside, other=float("-inf"))
        delta = tl.reduce(out.to(tl.float32) * dout.to(tl.float32), 1, tl.standard._sum_combine)
        delta = tl.where(top == float("-inf"), 0.0, delta)  # without keys there may be NaN in out
        top = tl.where(top == float("-inf"), float("inf"), top)
    if EXACT:
        inverse = tl.load(inverse_ptr + row, mask=inside, other=1.0)
        tl.store(shift_ptr + place, tl.log2(inverse))
    else:
        top *= LOG2E
    tl.store(top_ptr + place, top)
    tl.store(delta_ptr + place, delta)
    tl.store(dq_ptr + place[:, None] * COLUMNS + columns, tl.full([ROWS, COLUMNS], 0.0, tl.float32))


@triton.jit{options}
{finish}
    """From sums [B, H, padded, COLUMNS] to dq, of ROWS query rows of a head."""
    blocks = padded // ROWS
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    b, h = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
    offs_m = block * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    dq = tl.load(sum_ptr + (tl.cast(head, tl.int64) * padded + offs_m) * COLUMNS + columns)
    dq = dq{slope}
    place = b * stride_db + h * stride_dh + offs_m.to(tl.int64) * stride_dm + columns * stride_dd
    tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), mask=(offs_m < lq) & (columns < DQ))


@gluon.jit
{bounds}
    """How many tiles of queries a block of keys visits, how many of them, the first, are masked, and four numbers that
    say which they are."""
    first = block * KEYS
    rows = (lq + ROWS - 1) // ROWS
{bounds_body}
    return n, masked, x0, x1, x2, x3


@gluon.jit
{tile}
    """The first query of the t-th tile."""
{tile_body}
    return start


@gluon.jit
{produce}
    """The warp that loads: queries, what comes back for them, and two numbers of each row."""
    D: gl.constexpr = k_smem.shape[3]
    DIM_V: gl.constexpr = v_smem.shape[3]
    first = block * KEYS
    mbarrier.expect(own, KEYS * (D + DIM_V) * 2)
    tma.async_copy_global_to_shared(k_desc, [b, kv_head, first, 0], own, k_smem)
    tma.async_copy_global_to_shared(v_desc, [b, kv_head, first, 0], own, v_smem)
    n, masked, x0, x1, x2, x3 = {call_bounds_first}
    step = 0
    for member in range(group):
        h = kv_head * group + member
        if EACH_HEAD:
            n, masked, x0, x1, x2, x3 = {call_bounds}
        for t in range(n):
            start = {call_tile}
            at = step % STAGES
            bar = full.index(at)
            mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, ROWS * (D + DIM_V) * 2 + ROWS * {row_bytes})
            tma.async_copy_global_to_shared(q_desc, [b, h, start, 0], bar, q_smem.index(at))
            tma.async_copy_global_to_shared(dout_desc, [b, h, start, 0], bar, dout_smem.index(at))
            tma.async_copy_global_to_shared(top_desc, [b * heads + h, start], bar, top_smem.index(at))
            tma.async_copy_global_to_shared(delta_desc, [b * heads + h, start], bar, delta_smem.index(at))
{load_more}
            step += 1


@gluon.jit
{advance}
    """Tile t of head h. s: its products of keys and queries, where AHEAD; they are returned for the next tile. before:
    the first query of the tile before, which is still to be added to dq where LATER; it is returned too.

    Nothing is in flight at a loop's end: ptxas would then make each product wait for the one before.
    """
    at = step % STAGES
    D: gl.constexpr = k_smem.shape[3]
    DIM_V: gl.constexpr = v_smem.shape[3]
    dtype: gl.constexpr = q_smem.dtype
    k = k_smem.reshape([KEYS, D])
    v = v_smem.reshape([KEYS, DIM_V])
    q = q_smem.index(at).reshape([ROWS, D])
    dout = dout_smem.index(at).reshape([ROWS, DIM_V])
    zeros = gl.zeros([KEYS, ROWS], gl.float32, S_MMA)
    none = gl.zeros([ROWS, D], gl.float32, Q_MMA)
    if not AHEAD:
        mbarrier.wait(full.index(at), step // STAGES & 1)
        s_ = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp_ = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    start = {call_tile_advanced}
    offs_m = start + gl.arange(0, ROWS, gl.SliceLayout(0, S_MMA))[None, :]
    i = gl.minimum(offs_m, lq - 1)
    top = top_smem.index(at).load(S_MMA)
{rows}
{bias}
    if not AHEAD:
        s = warpgroup_mma_wait(1, deps=[s_])
    x = {score}(s, {site})
    if MASKED:
        x = gl.where({seen}, x, float("-inf"))
    p = gl.exp2({exponent})
    a = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, O_MMA, 2))
    dv_ = warpgroup_mma(a, dout, dv, is_async=True)
{bend}
    delta = delta_smem.index(at).load(S_MMA)
    if AHEAD:
        after = (step + 1) % STAGES
        mbarrier.wait(full.index(after), (step + 1) // STAGES & 1, pred=t + 1 < n)
        q_after = q_smem.index(after).reshape([ROWS, D])  # of the last tile: whatever is there, and not used
        s_ = warpgroup_mma(k, q_after.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(2, deps=[dp_])
    else:
        dp = warpgroup_mma_wait(1, deps=[dp_])
    ds = p * (dp - delta)
    ds_ = ds.to(dtype)
    ds_smem.store(ds_)
    fence_async_shared()
    dq_ = warpgroup_mma(ds_smem.permute((1, 0)), k, none, use_acc=False, is_async=True)
    a2 = gl.convert_layout(ds_, gl.DotOperandLayout(0, O_MMA, 2))
    dk_ = warpgroup_mma(a2, q, dk, is_async=True)
    if LATER:
        add_to_global(dq_desc, [b, h, before, 0], dq_smem.index((step + 1) % 2))  # the tile before's
    dq = warpgroup_mma_wait(1, deps=[dq_])
    buffer = dq_smem.index(step % 2 if LATER else 0)
    tma.store_wait(1 if LATER else 0)  # what was added from this buffer before has been read
    buffer.store(dq.reshape([1, 1, ROWS, D]))
    if not LATER:
        fence_async_shared()
        add_to_global(dq_desc, [b, h, start, 0], buffer)
    if AHEAD:
        dk, dv, s, a, a2 = warpgroup_mma_wait(0, deps=[dk_, dv_, s_, a, a2])
    else:
        dk, dv, a, a2 = warpgroup_mma_wait(0, deps=[dk_, dv_, a, a2])
        s = zeros
    mbarrier.arrive(empty.index(at), count=1)
    return dk, dv, s, start


@gluon.jit
{consume}
    """Two warpgroups, each with half of the keys."""
    D: gl.constexpr = k_smem.shape[3]
    DIM_V: gl.constexpr = v_smem.shape[3]
    S_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    O_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    Q_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, gl.num_warps() // 4], [16, D * 4 // gl.num_warps(), 16])
    dtype: gl.constexpr = q_smem.dtype
    first = block * KEYS
    offs_n = first + gl.arange(0, KEYS, gl.SliceLayout(1, S_MMA))[:, None]
    j = gl.minimum(offs_n, lk - 1)
    n, masked, x0, x1, x2, x3 = {call_bounds_first}
    dk = gl.zeros([KEYS, D], gl.float32, O_MMA)
    dv = gl.zeros([KEYS, DIM_V], gl.float32, O_MMA)
    s = gl.zeros([KEYS, ROWS], gl.float32, S_MMA)
    mbarrier.wait(own, 0)
    step = 0
    for member in range(group):
        h = kv_head * group + member
        if EACH_HEAD:
            n, masked, x0, x1, x2, x3 = {call_bounds}
{columns}
        if AHEAD:
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            q = q_smem.index(step % STAGES).reshape([ROWS, D])
            s_ = warpgroup_mma(k_smem.reshape([KEYS, D]), q.permute((1, 0)), s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s_])
        before = padded  # there is no tile before: rows past the end, which are not added to
        for t in range(masked):
            dk, dv, s, before = {call_advance_masked}
            step += 1
        for t in range(masked, n):
            dk, dv, s, before = {call_advance}
            step += 1
        if LATER:
            fence_async_shared()
            add_to_global(dq_desc, [b, h, before, 0], dq_smem.index((step + 1) % 2))
    rows = first + gl.arange(0, KEYS, gl.SliceLayout(1, O_MMA))[:, None]
    cols = gl.arange(0, D, gl.SliceLayout(0, O_MMA))[None, :]
    dk_ptr += b.to(gl.int64) * stride_db + kv_head.to(gl.int64) * stride_dh
    dk = dk{slope}
    places = rows.to(gl.int64) * stride_dn + cols * stride_dd
    gl.store(dk_ptr + places, dk.to(dtype), mask=(rows < lk) & (cols < DQ))
    dv_ptr += b.to(gl.int64) * stride_eb + kv_head.to(gl.int64) * stride_eh
    places = rows.to(gl.int64) * stride_en + cols * stride_ed
    gl.store(dv_ptr + places, dv.to(dtype), mask=(rows < lk) & (cols < DV))
    tma.store_wait(0)


@gluon.jit(do_not_specialize={unspecialized})
{kernel}
    """One program: KEYS keys of a head of keys and values, over all query heads that share it.

    Descriptors are of [B, H, L, D] views, with blocks [1, 1, ROWS, D] for q and dout, [1, 1, KEYS, D] for k and v, and
    of [B * H, padded] for top and delta, with blocks [1, ROWS]. To be launched with eight warps.
    """
    pid = gl.program_id(0)
    blocks = (lk + KEYS - 1) // KEYS
    kv_heads = heads // group
    block = pid % blocks
    kv_head = pid // blocks % kv_heads
    b = pid // blocks // kv_heads
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = k_desc.block_type.shape[3]
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, D], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, D], dout_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [1, 1, KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, KEYS, D], v_desc.layout)
    top_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], top_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], delta_desc.layout)
{more_smem}
    ds_smem = gl.allocate_shared_memory(dtype, [KEYS, ROWS], gl.NVMMASharedLayout(128, 16, 2))
    dq_smem = gl.allocate_shared_memory(gl.float32, [2 if LATER else 1, 1, 1, ROWS, D], dq_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=1)
    mbarrier.init(own, count=1)
    fence_async_shared()
    # The first is run by the program's own warps, with the registers that the other leaves.
    gl.warp_specialize([(consume, (
{consumer}
    )), (produce, (
{producer}
    ))], [1], [PRODUCER_REGISTERS])
'''


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
    tensors = ["q", "k", "v", "dout", *of_rows, *(["bias"] if w.tiles else []), "dq"]
    descriptors = [f"{name}_desc" for name in tensors]
    smem = [f"{name}_smem" for name in tensors if name != "dq"]
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
    produce = [*descriptors[:-1], *smem, *barriers, *place, *sizes, *w.scalars, *listed]
    pointers = ["dk_ptr", "dv_ptr"]
    consume = [
        *smem,
        "ds_smem",
        "dq_smem",
        "dq_desc",
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
        "t", "step", "s", "dk", "dv", *smem, "ds_smem", "dq_smem", "dq_desc", "full", "empty", *tiling, "b", "h", "j",
        "offs_n", "lq", "lk", "before", *own, *hoisted, *listed[:1],
    ]  # fmt: skip
    advance_constants = [*constants, "AHEAD", "LATER", *w.flags, "S_MMA", "O_MMA", "Q_MMA"]
    consume_constants = [*constants, "AHEAD", "LATER", *w.flags, "DQ", "DV"]
    kernel = [*descriptors, *pointers, *w.pointers, *listed[:1], *sizes, "padded", *strides, *w.strides, *w.scalars]
    kernel += listed[1:]
    finish = ["sum_ptr", "dq_ptr", *(f"stride_d{d}" for d in "bhmd"), "heads", "lq", "padded", *w.scalars]

    def advanced(masked: bool) -> str:
        return call("advance", [*advance, *advance_constants, str(masked)], 3)

    more_smem: list[str] = []
    load_more: list[str] = []
    row_bytes, exponent, read_bias = "8", "x - top", ""
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
        read_bias = "bias_smem.index(at).reshape([ROWS, KEYS]).permute((1, 0)).load(S_MMA)"
        read_bias = f"    tile0 = {read_bias}.to(gl.float32)"
        row_bytes = f"({row_bytes} + KEYS * 2)"
    keep = "offs_n < lk" if w.spec.keep == sympy.true else f"keep({w.site}) & (offs_n < lk)"
    first_bounds = ["b", "kv_head * group", *bounds[2:], *bounds_constants]
    return KERNELS.format(
        options=f"(do_not_specialize={w.scalars!r})" if w.scalars else "",
        finish=wrapped("def finish_dq", [*finish, *(f"{x}: tl.constexpr" for x in ("DQ", "COLUMNS", "ROWS"))], ":"),
        slope=w.times_slope(),
        bounds=define("bounds", bounds, bounds_constants),
        bounds_body=_indented(_bounds(w)),
        tile=define("tile", tile, tile_constants),
        tile_body=_indented(_tile(w)),
        produce=define("produce", produce, constants),
        call_bounds_first=call("bounds", first_bounds, 1),
        call_bounds=call("bounds", [*bounds, *bounds_constants], 3),
        call_tile=call("tile", [*tile, *tile_constants], 3),
        advance=define("advance", advance, [*advance_constants, "MASKED"]),
        call_tile_advanced=call("tile", [*tile, *tile_constants], 1),
        rows=_indented("\n".join(w.row_lines)),
        site=w.site,
        seen=keep,
        score="exact_score" if w.exact else "score",
        exponent=exponent,
        # By now dv's product has the weights in 16 bits; later on s and its function's value would take registers.
        bend="" if w.bend is None else f"    p *= bend(s, {w.site})",
        load_more=_indented("\n".join(load_more), 3),
        row_bytes=row_bytes,
        more_smem=_indented("\n".join(more_smem)),
        bias=read_bias,
        consume=define("consume", consume, consume_constants),
        columns=_indented("\n".join(w.column_lines), 2),
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


def _indented(text: str, depth: int = 1) -> str:
    return textwrap.indent(text, "    " * depth)


def _arguments(names: Sequence[str]) -> str:
    return textwrap.fill(
        ", ".join(names), template.WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8, break_long_words=False
    )
