"""Bias, activation and dropout on a CUDA device: what the interpreter has no instructions for, and rows read ahead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_exact_halves import FUNCTIONS, HALVES, TAIL, eagers, misrounded, numbers, ours

from xfcompile import activation
from xfcompile.activation import KEEP, X, tensor, vector
from xfcompile.kernels import philox
from xfcompile.kernels.bias_act_dropout import bias_act_dropout, calls, reference, text_of, tiles
from xfcompile.kernels.bias_act_dropout.formula import parse
from xfcompile.measured import Fact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(16384, 768), (4096, 3072), (1001, 1032), (77, 1030), (3, 8), (1, 5)]
"""Of rows that are a multiple of a tile's and not, and of features that are a multiple of eight and not."""


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "known", {})


@pytest.fixture(params=[64, None], ids=["many steps", "usual"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        shares = {kernel: Fact(replace(fact.value, programs=request.param)) for kernel, fact in tiles.POINTWISE.items()}
        monkeypatch.setattr(tiles, "POINTWISE", shares)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_more_numbers_are_rounded_the_wrong_way_than_eagers(name: str, dtype: torch.dtype) -> None:
    formula, approximate, *exact = FUNCTIONS[name]
    x = numbers(dtype).cuda()
    wanted = [f(x.double()) for f in exact]
    found, theirs = ours(formula, x), eagers(approximate, x)
    for mine, other, correct in zip(found, theirs, wanted, strict=True):
        wrong, others_wrong = misrounded(mine, correct, dtype), misrounded(other, correct, dtype)
        assert wrong.sum() <= others_wrong.sum()
        assert wrong[x < TAIL].sum() <= others_wrong[x < TAIL].sum()
    value, slope = ((a - b).abs() for a, b in zip(found, wanted, strict=True))
    assert (value <= 2.0**-21 * x.double().abs()).all()  # its exponential is off by 2**-22
    assert slope.max() <= 2.0**-18


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("rows, features", SIZES)
def test_the_mask_is_the_references(rows: int, features: int) -> None:
    x, seed = torch.ones(rows, features, device="cuda", dtype=torch.bfloat16), torch.tensor([-99], device="cuda")
    out = bias_act_dropout(x, None, [], [], seed, 2, text_of(KEEP * X), 0.25, torch.bfloat16, False)
    assert torch.equal(out != 0, philox.linear_keep(seed, 0.25, (rows, features), 2))
    given = (x, None, None, [], seed, 2, text_of(KEEP * X), 0.25, 0, [True, False], ["bfloat16", "bfloat16"])
    assert torch.equal(torch.ops.xfcompile.bias_act_dropout_backward(*given)[0], out)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, features", SIZES)
@pytest.mark.parametrize("act", ["gelu", "gelu by tanh", "silu"])
def test_results_and_gradients_are_the_references(act: str, rows: int, features: int, dtype: torch.dtype) -> None:
    value = {"silu": activation.silu(X), **{name: f for name, (f, *_) in FUNCTIONS.items()}}[act]
    formula = parse(text_of(KEEP * value * vector(0) + tensor(0)), 1, 1)
    text, p, stream = text_of(KEEP * value * vector(0) + tensor(0)), 0.3, 4
    torch.manual_seed(0)
    x, r, dout = (torch.randn(rows, features, device="cuda", dtype=dtype) for _ in range(3))
    bias, v = (torch.randn(features, device="cuda", dtype=dtype) for _ in range(2))
    seed = torch.tensor([1 << 40 | 3], device="cuda")
    for t in (bias, v, x, r):
        t.requires_grad_()
    out = bias_act_dropout(x, bias, [v], [r], seed, stream, text, p, dtype, False)
    dx, dbias, dv = torch.autograd.grad(out, [x, bias, v], dout)
    wanted = reference.forward(formula, x, bias, [v], [r], seed, stream, p, torch.float64)
    wanted_dx, (wanted_dv,) = reference.gradients(formula, dout, x, bias, [v], seed, stream, p, torch.float64)
    eps = torch.finfo(dtype).eps
    # Of what little large terms leave of each other (gelu's tail) the error is that of the terms.
    h, upstream = (x.double() + bias).abs(), dout.double().abs()
    terms = ((v * h).abs() + r.abs(), (upstream * v).abs(), (upstream * v).abs().sum(0), (upstream * h).sum(0))
    exact = (wanted, wanted_dx, wanted_dx.sum(0), wanted_dv)
    for mine, right, size in zip((out, dx, dbias, dv), exact, terms, strict=True):
        assert mine.dtype == dtype and mine.isfinite().all()
        assert (mine.double() - right).abs().max() <= 4 * eps * size.max()
