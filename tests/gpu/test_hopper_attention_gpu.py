"""Attention's kernel for Hopper as it is written for each class of sites, against fp64, and that it is what ran."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Inputs, Sizes, check, inputs, named
from hopper_cases import CAUSAL, CLASSES, dense, of_class, usual
from test_attention_gpu import HALVES, on_gpu

from xfcompile.kernels.attention import hopper_variant, launch_hopper
from xfcompile.kernels.attention.hopper_variant import Variant
from xfcompile.measured import multiprocessors
from xfcompile.score import H

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


# More blocks of rows than an H200 has multiprocessors, in all or for each sequence, and fewer.
LENGTHS = [Sizes(5, 16, 4, 300, 424), Sizes(2, 16, 8, 1160, 136), Sizes(1, 4, 2, 65, 1504), Sizes(1, 2, 2, 1000, 1001)]


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
    case = of_class(name)
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
