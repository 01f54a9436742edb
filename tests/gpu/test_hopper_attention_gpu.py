"""Attention's kernel for Hopper as it is written for each class of sites, against fp64, and that it is what ran."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import sympy
import torch
from attention_cases import SCALE, Case, Inputs, Sizes, check, inputs, named, normal, uniform
from test_attention_gpu import HALVES, on_gpu

from xfcompile.kernels.attention import codegen, hopper_variant, launch_hopper
from xfcompile.kernels.attention.hopper_variant import Kind, Seen, Variant
from xfcompile.measured import multiprocessors
from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Band, Operand, ScoreSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

Ran = list[Variant]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Ran]:
    """What the kernel was written as, of each time it ran."""
    found: Ran = []
    call = launch_hopper.Hopper.__call__

    def noting(self: launch_hopper.Hopper, *about: object) -> None:
        call(self, *about)  # type: ignore[arg-type]
        found.append(self.variant)

    monkeypatch.setattr(launch_hopper.Hopper, "__call__", noting)
    yield found
    assert not [record for record in caplog.records if "another kernel takes its place" in record.message]


FLOAT, BOOL = Operand(torch.float32, 1), torch.bool
CAUSAL = {"keep": J <= I, "band": Band(None, I + 1, True)}
ALIBI = SCALE + Load(0, H) * (J - I)

MINE = {
    "alibi, causal": Case("alibi, causal", ScoreSpec(ALIBI, operands=(FLOAT,), **CAUSAL), lambda z: [uniform(z.heads)]),
    "alibi, far": Case("alibi, far", ScoreSpec(ALIBI, operands=(FLOAT,), far=True), lambda z: [uniform(z.heads)]),
    "alibi, padding": Case(
        "alibi, padding",
        ScoreSpec(ALIBI, sympy.Ne(Load(1, B, J), 0), "nan", (FLOAT, Operand(BOOL, 2))),
        lambda z: [uniform(z.heads), uniform(z.batch, z.lk) > 0.3],
    ),
    "soft-cap, padding": Case(
        "soft-cap, padding",
        ScoreSpec(50 * sympy.tanh(SCALE / 50), sympy.Ne(Load(0, B, J), 0), "zero", (Operand(BOOL, 2),)),
        lambda z: [uniform(z.batch, z.lk) > 0.3],
    ),
    "causal from a buffer": Case(
        "causal from a buffer",
        ScoreSpec(SCALE, sympy.Ne(Load(0, I, J), 0), "nan", (Operand(BOOL, 2),)),
        lambda z: [torch.ones(z.lq, z.lk).tril() > 0],
    ),
    "soft-cap, causal from a buffer": Case(
        "soft-cap, causal from a buffer",
        ScoreSpec(50 * sympy.tanh(SCALE / 50), sympy.Ne(Load(0, I, J), 0), "nan", (Operand(BOOL, 2),)),
        lambda z: [torch.ones(z.lq, z.lk).tril() > 0],
    ),
}

CLASSES: dict[str, tuple[Kind, Seen]] = {
    "plain": ("other", "all"),
    "sink": ("other", "all"),
    "causal": ("other", "bounds"),
    "prefix": ("other", "bounds"),
    "bottom_right_dead_rows": ("other", "bounds"),
    "padding_mean": ("other", "some"),
    "additive_padding": ("other", "some"),
    "causal from a buffer": ("other", "lists"),
    "t5": ("other", "lists"),
    "alibi": ("columns", "all"),
    "alibi, far": ("columns", "all"),
    "alibi, causal": ("columns", "bounds"),
    "alibi, padding": ("columns", "some"),
    "soft_cap": ("bounded", "all"),
    "soft_cap_causal": ("bounded", "bounds"),
    "soft-cap, padding": ("bounded", "some"),
    "soft-cap, causal from a buffer": ("bounded", "lists"),
}

# More blocks of rows than an H200 has multiprocessors, in all or for each sequence, and fewer.
LENGTHS = [Sizes(5, 16, 4, 300, 424), Sizes(2, 16, 8, 1160, 136), Sizes(1, 4, 2, 65, 1504), Sizes(1, 2, 2, 1000, 1001)]


def usual(case: Case, dtype: torch.dtype, dim: int) -> Variant:
    spec = codegen.canonical(case.spec)
    return hopper_variant.usual(spec, codegen.pieces(spec), dtype, dim)


def launched(variant: Variant, sizes: Sizes) -> Variant:
    """What is made of a variant for so many pieces of work."""
    pieces = sizes.batch * sizes.heads * -(-sizes.lq // variant.rows)
    return replace(variant, queued=False) if pieces <= multiprocessors(0) else variant


def at(case: Case, dtype: torch.dtype, dim: int, sizes: Sizes) -> Inputs:
    return on_gpu(inputs(case, dtype, "transposed", replace(sizes, dq=dim, dv=dim)))


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float16)], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_each_class_of_sites(name: str, dim: int, dtype: torch.dtype, ran: Ran) -> None:
    kind, seen = CLASSES[name]
    case = MINE[name] if name in MINE else named(name)
    expected = hopper_variant.USUAL["other" if kind == "bounded" and dtype == torch.float16 else kind, seen, dim].value
    assert usual(case, dtype, dim) == expected
    for sizes in LENGTHS:
        ran.clear()
        check(case, at(case, dtype, dim, sizes))
        assert ran == [launched(expected, sizes)], sizes


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("size", [2.0**-20, 1.0, 2.0**40])
def test_scores_at_their_bounds(size: float, dim: int, ran: Ran) -> None:
    """Rows of the largest scores, of the least, and of both, whose values are large or small."""
    case = named("soft_cap_causal")
    x = at(case, torch.bfloat16, dim, LENGTHS[3])
    k = x.k.abs()
    signs = torch.ones(x.q.shape[2], 1, device=x.q.device)
    signs[1::3] = -1
    q = torch.where(torch.arange(len(signs), device=k.device)[:, None] % 3 < 2, x.q.abs() * signs, x.q) * 100
    check(case, replace(x, q=q.to(k.dtype), k=k, v=x.v * size))
    assert [variant.bounded for variant in ran] == [True]


def dense(dtype: torch.dtype, shared: str, masked: float | None) -> Case:
    """A bias of each score, in the dtype of what is multiplied; masked: what some scores get, and -inf whole rows."""

    def tensors(sizes: Sizes) -> list[torch.Tensor]:
        x = normal(1 if "b" in shared else sizes.batch, 1 if "h" in shared else sizes.heads, sizes.lq, sizes.lk)
        if masked is not None:
            x[..., ::5, 7:200] = masked
        if masked == -torch.inf:
            x[..., 3, :] = masked
        return [x.to(dtype)]

    load = Load(0, 0 if "b" in shared else B, 0 if "h" in shared else H, I, J)
    spec = ScoreSpec(SCALE + load, operands=(Operand(dtype, 4),), far=masked is not None, dead="nan")
    return Case(f"{dtype} {shared} {masked}", spec, tensors)


DENSE = [
    dense(dtype, shared, masked)
    for dtype in HALVES
    for shared in ("", "b", "h")
    for masked in (None, float(torch.finfo(dtype).min), -torch.inf)
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_a_bias_of_each_score(case: Case, causal: bool, ran: Ran) -> None:
    dtype = case.spec.operands[0].dtype
    case = replace(case, spec=replace(case.spec, **CAUSAL)) if causal else case
    variant = usual(case, dtype, 128)
    if not case.spec.far and H in case.spec.score.free_symbols:  # others may be looked at before, and have lists
        assert variant == hopper_variant.USUAL["tiles", "bounds" if causal else "all", 128].value
    for sizes in LENGTHS:
        ran.clear()
        check(case, at(case, dtype, 128, sizes))
        if variant.tiles:
            assert [x.tiles for x in ran] == ([True] if sizes.lk % 8 == 0 else [])  # else TMA does not read it
        else:
            assert not any(x.tiles for x in ran)


def test_a_bias_that_does_not_start_at_16_bytes_is_read_by_another_kernel(ran: Ran) -> None:
    case = dense(torch.bfloat16, "", None)
    x = at(case, torch.bfloat16, 128, LENGTHS[0])
    (bias,) = x.operands
    check(case, x)
    assert len(ran) == 1
    moved = torch.empty(bias.numel() + 1, dtype=bias.dtype, device=bias.device)[1:].view(bias.shape)
    check(case, replace(x, operands=[moved.copy_(bias)]))
    assert len(ran) == 1
    check(case, x)
    assert len(ran) == 2
