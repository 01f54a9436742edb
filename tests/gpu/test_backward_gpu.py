"""Gradients of attention on a CUDA device: every case in every dtype, against fp64 and eager's own error."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from attention_cases import CAUSAL, Case, Inputs, Sizes, inputs, named
from attention_cases import check as check_forward
from backward_cases import BIAS, BOTH, DIFFERENTIABLE, check, distances
from bias_cases import AXES, MASKS, biased
from dropout_cases import check as check_dropout

from xfcompile.kernels.attention import lists_sizes
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
    case = named(name)
    check_dropout(case, on_gpu(inputs(case, dtype, "transposed", Sizes(2, 4, 2, *lengths, 32, 32))))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_dropout_at_head_dims_of_models(case: Case, dim: int) -> None:
    check_dropout(case, on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, 4, 2, 130, 140, dim, dim))))


@pytest.mark.parametrize("dim", [32, 64, 128, 192])
@pytest.mark.parametrize("lengths", [(192, 320), (320, 192), (192, 192), (96, 160)])
@pytest.mark.parametrize("name", ["documents", "padding_mean", "additive_padding", "t5"])
def test_tiles_of_a_list_that_end_beyond_the_last_row_or_key(
    name: str, lengths: tuple[int, int], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of lists are of 128 rows, or keys, those of these kernels of 64 or 32."""
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    case = named(name)
    x = on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, 4, 2, *lengths, dim, dim)))
    check_forward(case, x)
    check(case, x)
    check_dropout(case, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128, 192])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_bias_of_each_score(
    mask: str, axes: str, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That has an element for each is written where dq is computed, others by kernels of their own."""
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    case = biased(mask, axes, dtype)
    x = inputs(case, dtype, "transposed", Sizes(1 if axes == "of heads" else 2, 4, 2, 330, 264, dim, dim))
    check(case, on_gpu(x))


@pytest.mark.parametrize("lengths", [(2, 16), (70, 90), (300, 310)])
def test_scores_of_thousands_are_rounded_alike_by_all_kernels(lengths: tuple[int, int]) -> None:
    """X-CLIP's prompts: in fp32, where a row sees one key. One kernel multiplies q by k and another k by q, in the same
    order of columns (which the interpreter's products of matrices are not in)."""
    case = named("plain")
    x = inputs(case, torch.float32, "transposed", Sizes(2, 8, 8, *lengths, 64, 64))
    check(case, on_gpu(replace(x, q=30 * x.q, k=30 * x.k)))


@pytest.mark.parametrize("mask", MASKS)
def test_a_bias_of_each_score_where_weights_are_dropped_out(mask: str) -> None:
    case = biased(mask, "each", torch.bfloat16)
    check_dropout(case, on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, 4, 2, 144, 130, 32, 32))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [16, 49, 64, 144, 197, 256])
@pytest.mark.parametrize("case", [BIAS, BOTH], ids=lambda case: case.name)
def test_windows(case: Case, keys: int, dtype: torch.dtype) -> None:
    """Heads of 32 columns: tiles and columns of their own, and sums over batches in parts."""
    x = inputs(case, dtype, "transposed", Sizes(64, 4, 4, keys, keys, 32, 32))
    check_forward(case, on_gpu(x))
    check(case, on_gpu(x))
