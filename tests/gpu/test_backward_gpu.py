"""Gradients of attention on a CUDA device: every case in every dtype, against fp64 and eager's own error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sympy
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from attention_cases import CAUSAL, Case, Inputs, Sizes, error, inputs, named
from attention_cases import check as check_forward
from backward_cases import BIAS, BOTH, DIFFERENTIABLE, check, distances
from torch import Tensor

from xfcompile.kernels.attention import lists_sizes, prepare, reference
from xfcompile.score import H

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_gpu(x: Inputs) -> Inputs:
    return Inputs(x.q.cuda(), x.k.cuda(), x.v.cuda(), [y.cuda() for y in x.operands], x.ints, x.floats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    check(case, on_gpu(inputs(case, dtype)))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_at_head_dims_of_models(case: Case, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    z = case.sizes
    sizes = Sizes(2, 4, 2, max(z.lq, 300) if z.lq >= z.lk else 290, 300 if z.lq == z.lk else max(z.lk, 310), dim, dim)
    check(case, on_gpu(inputs(case, dtype, "transposed", sizes)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(300, 310), (310, 130), (256, 256), (1, 700), (1024, 999)])
def test_biases_of_distances(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """Folded into an operand of the tensors' own dtype, as models have it."""
    z = Sizes(2, 4, 2, *lengths, 64, 64)
    for spec in (None, CAUSAL) if lengths[0] > 1 else (None,):
        case = distances((sympy.S.Zero, H, sympy.S.Zero), z, spec, dtype=dtype)
        check(case, on_gpu(inputs(case, dtype)))


@pytest.mark.parametrize("layout", ["transposed", "poisoned", "key_major", "expanded"])
@pytest.mark.parametrize(
    "name", ["plain", "bottom_right", "window", "documents", "alibi", "bias_hij", "t5", "soft_cap"]
)
def test_any_strides_and_grouped_heads(name: str, layout: str) -> None:
    z = Sizes(heads=4, kv_heads=2 if layout != "expanded" else 1, lq=150, lk=141, dq=17, dv=33)
    check(named(name), on_gpu(inputs(named(name), torch.bfloat16, layout, z)))


@pytest.mark.parametrize(
    ("dq", "dv"), [(1, 1), (3, 17), (40, 24), (64, 16), (80, 80), (96, 128), (128, 64), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(dq: int, dv: int, dtype: torch.dtype) -> None:
    for name in ("plain", "soft_cap_causal", "bias_hij"):
        z = Sizes(1, 2, 2, 150, 130, dq, dv)
        check(named(name), on_gpu(inputs(named(name), dtype, "transposed", z)))


@pytest.mark.parametrize("lengths", [(130, 140), (144, 144), (300, 310)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "padding_mean", "some_rows_mean", "some_rows_leak"])
def test_dropout(name: str, dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    """In tiles of windows, too."""
    drops_out(named(name), dtype, 32, lengths)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_dropout_at_head_dims_of_models(case: Case, dim: int) -> None:
    drops_out(case, torch.bfloat16, dim)


def drops_out(case: Case, dtype: torch.dtype, dim: int, lengths: tuple[int, int] = (130, 140)) -> None:
    """The same weights are dropped out as by the definition, of rows without keys too."""
    seed = torch.tensor([0x1234_5678_9ABC], device="cuda")
    # Of a row that is NaN nothing comes back.
    spec = replace(case.spec, dropout=0.25, dead="zero" if case.spec.dead == "nan" else case.spec.dead)
    x = on_gpu(inputs(case, dtype, "transposed", Sizes(2, 4, 2, *lengths, dim, dim)))
    dout = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1)).to(x.q)

    def step(
        attention: Callable[..., tuple[Tensor, Tensor]], dout: Tensor, wanted: torch.dtype, *more: object
    ) -> list[Tensor]:
        qkv = [y.to(wanted, copy=True).requires_grad_() for y in (x.q, x.k, x.v)]
        out = attention(*qkv, x.operands, x.ints, x.floats, *more, seed=seed, stream=3)[0]
        return [out, *torch.autograd.grad(out, qkv, dout.to(wanted))]

    definition = partial(reference.attention, spec)
    right, eager = (step(definition, dout, wanted, wanted) for wanted in (torch.float64, dtype))
    ours = step(torch.ops.xfcompile.attention, dout, dtype, prepare(spec))
    # dv is a sum of weights, which are not below 0, times dout: its roundings are measured in what that has of sizes.
    sizes = [*right[:3], step(definition, dout.abs(), torch.float64, torch.float64)[3]]
    for a, b, exact, size in zip(ours, eager, right, sizes, strict=True):
        assert error(a, exact) <= 2 * error(b, exact) + 4 * torch.finfo(dtype).eps * size.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [16, 49, 64, 144, 197, 256])
@pytest.mark.parametrize("case", [BIAS, BOTH], ids=lambda case: case.name)
def test_windows(case: Case, keys: int, dtype: torch.dtype) -> None:
    """Heads of 32 columns: tiles and columns of their own, and sums over batches in parts."""
    x = inputs(case, dtype, "transposed", Sizes(64, 4, 4, keys, keys, 32, 32))
    check_forward(case, on_gpu(x))
    check(case, on_gpu(x))
