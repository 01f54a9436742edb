"""Scores, masks and tensors that the attention kernel is tested on, in the interpreter and on GPUs alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from sympy import Eq, Ne, Rational
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv, ModularIndexing, PythonMod

from xfcompile.kernels.attention import attention, prepare, reference
from xfcompile.score import B, H, I, J, Load, S, Where
from xfcompile.site import Band, Operand, ScoreSpec

SCALE = S * Rational(3, 10)
LQ, LK, N = sympy.symbols("lq lk n", integer=True, positive=True)
X = sympy.Symbol("x", real=True)
FLOAT, BOOL, LONG = torch.float32, torch.bool, torch.int64


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    lq: int = 45
    lk: int = 70
    dq: int = 24
    dv: int = 24


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    operands: list[Tensor]
    ints: list[int]
    floats: list[float]


@dataclass(frozen=True)
class Case:
    """A spec, and what its loads and scalars stand for at given sizes."""

    name: str
    spec: ScoreSpec
    operands: Callable[[Sizes], list[Tensor]] = lambda sizes: []
    ints: Callable[[Sizes], list[int]] = lambda sizes: []
    floats: tuple[float, ...] = ()
    sizes: Sizes = Sizes()


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
CAUSAL = ScoreSpec(SCALE, keep=J <= I, band=Band(None, I + 1, True))
WINDOW = ScoreSpec(SCALE, keep=sympy.And(J <= I, J > I - 16), band=Band(I - 15, I + 1, True))


def documents(sizes: Sizes) -> list[Tensor]:
    n = max(sizes.lq, sizes.lk)
    return [(torch.arange(n) // 20).expand(sizes.batch, n).contiguous() * 2**33]


def padding(sizes: Sizes) -> list[Tensor]:
    """The first keys of each sequence are padding; the last sequence has nothing else."""
    start = torch.tensor([0] * (sizes.batch - 1) + [sizes.lk])
    return [torch.arange(sizes.lk) >= torch.minimum(start + 5, torch.tensor(sizes.lk))[:, None]]


def minus_infinity(sizes: Sizes) -> list[Tensor]:
    bias = torch.zeros(sizes.batch, sizes.lk)
    bias[:, : sizes.lk // 2 + 10] = -torch.inf
    return [bias]


LEAST = sympy.Float(torch.finfo(FLOAT).min, 17)


def far_rows(sizes: Sizes) -> list[Tensor]:
    """Rows of finfo.min, of -inf, of both, and with some of either."""
    mask = normal(sizes.batch, sizes.lq, sizes.lk)
    mask[0, 3] = mask[1, :, ::3] = mask[1, 5] = float(LEAST)
    mask[1, 5, ::2] = mask[0, 6] = mask[:, 7, 1:] = -torch.inf
    return [mask]


def left_padding(sizes: Sizes) -> list[Tensor]:
    """The first keys of all sequences but the first are masked by finfo.min."""
    mask = torch.zeros(sizes.batch, sizes.lk)
    mask[1:, : sizes.lk // 3] = float(LEAST)
    return [mask]


def t5_bucket() -> sympy.Expr:
    """As in T5: exact near, logarithmic far; its borders lie between integers, lest rounding decide."""
    position = J - I
    n = sympy.Abs(position)
    large = 8 + sympy.floor(sympy.log(sympy.Max(n, 1) / Rational(79, 10)) / sympy.log(sympy.Float(16)) * 8)
    return Where(position > 0, sympy.Integer(16), sympy.Integer(0)) + Where(n < 8, n, sympy.Min(large, 15))


def bias(axes: str) -> Case:
    """A dense bias that varies along some of b, h, i, j, and is broadcast over the rest."""
    index = [x if x.name in axes else sympy.S.Zero for x in (B, H, I, J)]

    def tensors(sizes: Sizes) -> list[Tensor]:
        full = (sizes.batch, sizes.heads, sizes.lq, sizes.lk)
        return [normal(*(n if x in axes else 1 for n, x in zip(full, "bhij", strict=True)))]

    return Case(f"bias_{axes or 'scalar'}", ScoreSpec(SCALE + Load(0, *index), operands=(Operand(FLOAT, 4),)), tensors)


CASES: list[Case] = [
    Case("plain", ScoreSpec(SCALE)),
    Case("causal", CAUSAL),
    Case("causal_more_rows", CAUSAL, sizes=Sizes(lq=75, lk=33)),
    Case(
        "bottom_right",
        ScoreSpec(SCALE, keep=J <= I + LK - LQ, scalars=(LQ, LK), band=Band(None, I + LK - LQ + 1, True)),
        ints=lambda z: [z.lq, z.lk],
    ),
    Case(
        "bottom_right_dead_rows",
        ScoreSpec(SCALE, keep=J <= I + LK - LQ, dead="nan", scalars=(LQ, LK), band=Band(None, I + LK - LQ + 1, True)),
        ints=lambda z: [z.lq, z.lk],
        sizes=Sizes(lq=75, lk=33),
    ),
    Case("window", WINDOW, sizes=Sizes(lq=130, lk=130)),
    Case("window_past_the_end", WINDOW, sizes=Sizes(lq=130, lk=40)),
    Case(
        "prefix",
        ScoreSpec(SCALE, keep=sympy.Or(J <= I, J < N), scalars=(N,), band=Band(None, sympy.Max(I + 1, N), True)),
        ints=lambda z: [37],
    ),
    Case("chunks", ScoreSpec(SCALE, keep=Eq(FloorDiv(I, 16), FloorDiv(J, 16)), dead="mean")),
    Case("dilated", ScoreSpec(SCALE, keep=Eq(PythonMod(I - J, 4), 0))),
    Case(
        "documents",
        ScoreSpec(
            SCALE,
            keep=sympy.And(Eq(Load(0, B, I), Load(0, B, J)), J <= I),
            operands=(Operand(LONG, 2),),
            band=Band(None, I + 1, False),
        ),
        documents,
    ),
    Case(
        "documents_of_bytes",
        ScoreSpec(SCALE, keep=Eq(Load(0, B, I), Load(0, B, J)), operands=(Operand(torch.uint8, 2),)),
        lambda z: [(documents(z)[0] // 2**33).to(torch.uint8)],
    ),
    Case(
        "neighbourhood",
        ScoreSpec(
            SCALE,
            keep=sympy.And(
                sympy.Abs(FloorDiv(I, 8) - FloorDiv(J, 8)) <= 1, sympy.Abs(PythonMod(I, 8) - PythonMod(J, 8)) <= 2
            ),
        ),
    ),
    Case(
        "near_in_documents",
        ScoreSpec(
            SCALE,
            keep=sympy.And(Eq(Load(0, B, I), Load(0, B, J)), sympy.Abs(I - J) <= 9, Ne(PythonMod(J, 4), 1)),
            operands=(Operand(LONG, 2),),
        ),
        documents,
    ),
    Case("padding_zero", ScoreSpec(SCALE, Ne(Load(0, B, J), 0), "zero", (Operand(BOOL, 2),)), padding),
    Case("padding_mean", ScoreSpec(SCALE, Ne(Load(0, B, J), 0), "mean", (Operand(BOOL, 2),)), padding),
    Case("padding_nan", ScoreSpec(SCALE, Eq(Load(0, B, J), 1), "nan", (Operand(BOOL, 2),)), padding),
    Case("some_rows_nan", ScoreSpec(SCALE, Ne(PythonMod(I, 3), 0), "nan")),
    Case("some_rows_mean", ScoreSpec(SCALE, Ne(PythonMod(I, 3), 0), "mean")),
    Case("some_rows_leak", ScoreSpec(SCALE, Ne(PythonMod(I, 3), 0), "mean", leaks=True)),
    Case("some_rows_leak_capped", ScoreSpec(2 * sympy.tanh(SCALE / 2), Ne(PythonMod(I, 3), 0), "mean", leaks=True)),
    Case(
        "some_rows_leak_and_slope",
        ScoreSpec(SCALE * (1 + I / 16) - J * H / 4, Ne(PythonMod(I, 3), 0), "mean", leaks=True),
    ),
    Case("some_rows_zero", ScoreSpec(SCALE, Ne(PythonMod(I, 3), 0), "zero")),
    Case("dead_blocks_mean", ScoreSpec(SCALE, J < I - 40, "mean", band=Band(None, I - 40, True)), sizes=Sizes(lq=90)),
    Case("nothing_kept", ScoreSpec(SCALE, sympy.false, "mean")),
    Case("far_number", ScoreSpec(SCALE + LEAST, far=True)),  # nothing is left of any score: the mean of all values
    Case(
        "far_keys_of_whole_tiles",
        ScoreSpec(SCALE + Load(0, B, J), operands=(Operand(FLOAT, 2),), far=True),
        lambda z: [torch.full((z.batch, z.lk), float(LEAST))],
    ),
    Case("additive_padding", ScoreSpec(SCALE + Load(0, B, J), operands=(Operand(FLOAT, 2),)), minus_infinity),
    Case(
        "far_keys",
        ScoreSpec(SCALE + Load(0, B, J) - Load(1, H, I), operands=(Operand(FLOAT, 2), Operand(FLOAT, 2)), far=True),
        lambda z: [left_padding(z)[0], far_rows(z)[0][:1, :, 0].abs().repeat(z.heads, 1)],
    ),
    Case(
        "far_slopes",
        ScoreSpec(SCALE + Load(0, H) * (J - I), operands=(Operand(FLOAT, 1),), far=True),
        lambda z: [torch.cat([normal(z.heads - 1), torch.full((1,), -1e30)])],
    ),
    Case("far_rows", ScoreSpec(SCALE + Load(0, B, I, J), operands=(Operand(FLOAT, 3),), far=True), far_rows),
    *(
        Case(
            name,
            ScoreSpec(
                SCALE + Load(0, B, J),
                keep=J <= I,
                dead="nan",
                operands=(Operand(FLOAT, 2),),
                band=Band(None, I + 1, True),
                far=True,
                full=full,
                floor=LEAST,
            ),
            left_padding,
        )
        for name, full in (
            ("left_padding_replaced", Where(J <= I, SCALE + Load(0, B, J), LEAST)),
            ("left_padding_added", SCALE + Load(0, B, J) + Where(J <= I, sympy.S.Zero, LEAST)),
        )
    ),
    *(bias(axes) for axes in ("", "b", "h", "i", "j", "bh", "bj", "hi", "ij", "bij", "hij", "bhij")),
    Case(
        "bias_half",
        ScoreSpec(SCALE + Load(0, H, I, J), operands=(Operand(torch.float16, 3),)),
        lambda z: [normal(z.heads, z.lk, z.lq).half().mT],
    ),
    Case(
        "alibi",
        ScoreSpec(SCALE + Load(0, H) * (J - I), operands=(Operand(FLOAT, 1),)),
        lambda z: [uniform(z.heads)],
    ),
    Case(
        "alibi_computed",
        ScoreSpec(SCALE - 2 ** (-(H + 1) / 2) * sympy.Abs(I - J), J <= I, band=Band(None, I + 1, True)),
    ),
    Case("soft_cap", ScoreSpec(2 * sympy.tanh(SCALE / 2))),
    Case("soft_cap_causal", ScoreSpec(50 * sympy.tanh(SCALE / 50), J <= I, band=Band(None, I + 1, True))),
    Case("sink", ScoreSpec(SCALE, operands=(Operand(FLOAT, 1),), sink=Load(0, H)), lambda z: [normal(z.heads)]),
    Case(
        "sink_dead_rows",
        ScoreSpec(SCALE, J < I, "nan", (Operand(FLOAT, 2),), sink=2 * Load(0, H, I), band=Band(None, I, True)),
        lambda z: [normal(z.heads, z.lq)],
    ),
    Case(
        "t5",
        ScoreSpec(S + Load(0, t5_bucket(), H), operands=(Operand(FLOAT, 2),)),
        lambda z: [normal(32, z.heads)],
    ),
    Case(
        "negative_indices",
        ScoreSpec(
            SCALE + Load(0, FloorDiv(J - I, 3) + 150) + Load(0, PythonMod(J - I, 7)), operands=(Operand(FLOAT, 1),)
        ),
        lambda z: [normal(300)],
    ),
    Case(
        "flat_index",
        ScoreSpec(SCALE + Load(0, I * LK + J), operands=(Operand(FLOAT, 1),), scalars=(LK,)),
        lambda z: [normal(z.lq * z.lk)],
        ints=lambda z: [z.lk],
    ),
    Case(
        "unfolded_batch",
        ScoreSpec(SCALE + Load(0, ModularIndexing(B, 1, 2), FloorDiv(H, 2), I, J), operands=(Operand(FLOAT, 4),)),
        lambda z: [normal(2, z.heads // 2, z.lq, z.lk)],
    ),
    Case(
        "concatenated",
        ScoreSpec(
            SCALE + Where(J < 30, Load(0, J), Load(1, J - 30)), operands=(Operand(FLOAT, 1), Operand(torch.bfloat16, 1))
        ),
        lambda z: [normal(30), normal(z.lk - 30).bfloat16()],
    ),
    Case(
        "concatenated_mask",
        ScoreSpec(SCALE, sympy.Or(J < 30, sympy.And(J >= 30, Ne(Load(0, B, J - 30), 0))), operands=(Operand(BOOL, 2),)),
        lambda z: [uniform(z.batch, z.lk - 30) > 0.5],
    ),
    Case("scale_at_run_time", ScoreSpec(S * X / N, scalars=(X, N)), ints=lambda z: [7], floats=(-2.5,)),
    Case("negative_scale", ScoreSpec(-SCALE)),
    Case("no_dot_product", ScoreSpec(Load(0, J), operands=(Operand(FLOAT, 1),)), lambda z: [normal(z.lk)]),
    Case("constant", ScoreSpec(sympy.S.One)),
    Case(
        "functions",
        ScoreSpec(
            sympy.exp(-sympy.Abs(S) / 4)
            + sympy.log(1 + S**2)
            + sympy.sqrt(sympy.Abs(S))
            + sympy.Max(sympy.Min(S, 3), -1)
            + 1 / (1 + sympy.exp(-S))
            + sympy.erf(S / 2)
            + sympy.sign(S)
            + sympy.floor(J / 3) / sympy.sqrt(I + 1)
            + sympy.Rational(1, 3) * sympy.ceiling((I - J) / 4)
        ),
    ),
]


QUARTERS = S / 4
FAR_ROWS = [
    Case(
        "each_key_has_a_number",
        ScoreSpec(QUARTERS + Load(0, B, J), operands=(Operand(FLOAT, 2),)),
        lambda z: [normal(z.batch, z.lk).round() - 1e4],
    ),
    Case(
        "each_row_has_a_number",
        ScoreSpec(QUARTERS + Load(0, I), J <= I, operands=(Operand(FLOAT, 1),), band=Band(None, I + 1, True)),
        lambda z: [normal(z.lq).round() + 3e4],
    ),
    Case("all_have_one_number", ScoreSpec(QUARTERS - 10000)),
    Case(
        "a_mask_that_may_be_far",
        ScoreSpec(QUARTERS + Load(0, B, J), operands=(Operand(FLOAT, 2),), far=True),
        lambda z: [torch.where(uniform(z.batch, z.lk) > 0.3, -1e4, torch.finfo(FLOAT).min)],
    ),
    Case(
        "a_sink_beside_them",
        ScoreSpec(QUARTERS + Load(0, H), operands=(Operand(FLOAT, 1),) * 2, sink=Load(1, H)),
        lambda z: [torch.full((z.heads,), -2e4), torch.full((z.heads,), -2e4)],
    ),
]
"""Scores that are far from 0, and not from each other."""


def exact_scores(case: Case, sizes: Sizes) -> Inputs:
    """Inputs of which the scores are exact in fp32, so that what is measured is the softmax."""
    x = inputs(case, FLOAT, sizes=sizes)
    return replace(x, q=x.q.round(), k=x.k.round())


def layouts(z: Sizes, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in memory as models have them; whatever lies beside them is NaN."""

    def make(heads: int, length: int, dim: int) -> Tensor:
        return normal(z.batch, heads, length, dim).to(dtype)

    q, k, v = make(z.heads, z.lq, z.dq), make(z.kv_heads, z.lk, z.dq), make(z.kv_heads, z.lk, z.dv)
    if layout == "contiguous":
        return q, k, v
    if layout == "transposed":  # [B, L, H, D], as projections leave them
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))  # type: ignore[return-value]
    if layout == "poisoned":  # slices of a larger tensor
        return tuple(poisoned(x) for x in (q, k, v))  # type: ignore[return-value]
    if layout == "key_major":  # [B, H, D, L], as a key cache made for decoding
        return q.mT.contiguous().mT, k.mT.contiguous().mT, v.mT.contiguous().mT
    if layout == "expanded":  # one batch and one head, broadcast
        return q, k[:1, :1].expand(k.shape), v[:1, :1].expand(v.shape)
    raise ValueError(layout)


def poisoned(x: Tensor) -> Tensor:
    """A copy of x in the middle of memory full of NaN."""
    around = x.new_full([n + 3 for n in x.shape], torch.nan)
    inside = around[tuple(slice(1, n + 1) for n in x.shape)]
    return inside.copy_(x)


def inputs(case: Case, dtype: torch.dtype, layout: str = "contiguous", sizes: Sizes | None = None) -> Inputs:
    z = sizes or case.sizes
    GENERATOR.manual_seed(0)
    return Inputs(*layouts(z, dtype, layout), case.operands(z), case.ints(z), list(case.floats))


def call(spec: ScoreSpec, x: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return attention(x.q, x.k, x.v, x.operands, x.ints, x.floats, prepare(spec))


def error(a: Tensor, exact: Tensor) -> float:
    """The largest difference; NaN and infinities must be in the same places."""
    a = a.double()
    special = ~exact.isfinite()
    torch.testing.assert_close(a[special], exact[special], rtol=0, atol=0, equal_nan=True)
    return (a - exact)[~special].abs().max().item() if not special.all() else 0.0


def eager(spec: ScoreSpec, x: Inputs) -> Tensor:
    """What the author's program yields in the inputs' own precision: scores and weights are rounded to it."""
    dtype = torch.float32 if spec.far else x.q.dtype  # a mask in fp32 makes scores fp32
    z = reference.attention(spec, x.q, x.k, x.v, x.operands, x.ints, x.floats, dtype)[0]
    return z.to(x.q.dtype)


def eager_in_sequence(spec: ScoreSpec, x: Inputs) -> tuple[Tensor, Tensor]:
    """Eager in fp32 with q·k added up column by column, as a product of matrices does; one with few rows may not."""
    k = x.k.repeat_interleave(x.q.shape[1] // x.k.shape[1], 1)
    product = x.q.new_zeros((*x.q.shape[:3], k.shape[2]))
    for d in range(x.q.shape[3]):
        product = torch.addcmul(product, x.q[..., :, None, d], k[..., None, :, d])
    s = Load(len(spec.operands), B, H, I, J)

    def of_operand(score: sympy.Expr | None) -> sympy.Expr | None:
        return None if score is None else sympy.sympify(score).xreplace({S: s})

    operands = (*spec.operands, Operand(FLOAT, 4))
    given = replace(spec, score=of_operand(spec.score), full=of_operand(spec.full), operands=operands)
    return reference.attention(given, x.q, x.k, x.v, [*x.operands, product], x.ints, x.floats, torch.float32)


def check(case: Case, x: Inputs, slack: float = 1.0, lse: bool = True) -> None:
    """The kernel against fp64: its error is at most eager's and a rounding of the result.

    slack: roundings of the result that are allowed; the interpreter truncates to bf16, which is two halves. lse:
    whether log-sum-exps are looked at, too.
    """
    out, log_sum_exp = call(case.spec, x)
    arguments = (case.spec, x.q, x.k, x.v, x.operands, x.ints, x.floats)
    exact, exact_lse = reference.attention(*arguments, dtype=torch.float64)
    single, single_lse = reference.attention(*arguments, dtype=torch.float32)
    singles = [single_lse]
    magnitude = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    if x.q.dtype == torch.float32:
        # Sums in another order than eager's are neither better nor worse: twice its error is within its own spread. So
        # is what it has where it adds products up as we do: of a few rows it may do that in a tree.
        in_sequence, in_sequence_lse = eager_in_sequence(case.spec, x)
        allowed = 2 * max(error(single, exact), error(in_sequence, exact))
        singles.append(in_sequence_lse)
        if x.q.is_cuda:  # whose powers of two are off by 2**-22 of them (CUDA's exp2f), and those of e by half of it
            allowed += 2.0**-22 * magnitude
    else:
        allowed = min(error(eager(case.spec, x), exact), 4 * torch.finfo(x.q.dtype).eps * magnitude)
    allowed += slack * torch.finfo(x.q.dtype).eps * magnitude
    assert error(out, exact) <= allowed, f"{case.name}: {error(out, exact):.3g} > {allowed:.3g}"
    if lse:
        check_lse(case, log_sum_exp, exact_lse, singles, x.q.dtype)


def check_lse(case: Case, lse: Tensor, exact_lse: Tensor, singles: Sequence[Tensor], dtype: torch.dtype) -> None:
    """singles: eager's own in fp32, of products added up in one order and in another."""
    if case.spec.far:  # nothing but infinities is said of log-sum-exps that are far away
        near = exact_lse.abs() < 1e18
        lse, exact_lse, *singles = (x[near | ~exact_lse.isfinite()] for x in (lse, exact_lse, *singles))
    dead = ~exact_lse.isfinite()
    lse_magnitude = exact_lse[~dead].abs().max().item() if not dead.all() else 0.0
    # 16-bit weights are rounded by eps: a 64th of that may be spent on scores (a faster tanh).
    spent = torch.finfo(dtype).eps / 64 if dtype.itemsize == 2 else 0.0
    allowed_lse = (
        spent
        + 2 * max(error(x, exact_lse) for x in singles)
        + 2 * torch.finfo(torch.float32).eps * max(lse_magnitude, 1.0)
    )
    assert error(lse, exact_lse) <= allowed_lse, f"{case.name}: lse {error(lse, exact_lse):.3g} > {allowed_lse:.3g}"


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
