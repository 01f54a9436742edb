"""Dropout of attention's weights: the same by the definition and the kernels, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Inputs, Sizes, error, inputs, named
from torch import Tensor

from xfcompile.kernels.attention import prepare, reference

SEED = torch.tensor([0x1234_5678_9ABC])
RATE = 0.25


def dropping(name: str, rate: float = RATE) -> Case:
    case = named(name)
    return replace(case, spec=replace(case.spec, dropout=rate))


def attention(case: Case, x: Inputs, *qkv: Tensor, stream: int = 3, seed: Tensor | None = SEED) -> Tensor:
    op = torch.ops.xfcompile.attention
    return op(*qkv, x.operands, x.ints, x.floats, prepare(case.spec), seed=seed, stream=stream)[0]


def defined(case: Case, x: Inputs, *qkv: Tensor, stream: int = 3) -> Tensor:
    return reference.attention(case.spec, *qkv, x.operands, x.ints, x.floats, torch.float64, seed=SEED, stream=stream)[
        0
    ]


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize(
    "name",
    ["plain", "causal", "window", "documents", "alibi", "bias_hij", "soft_cap_causal", "sink", "some_rows_nan",
     "padding_mean", "dead_blocks_mean", "some_rows_leak", "some_rows_leak_capped"],
)  # fmt: skip
def test_values_and_gradients(name: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = dropping(name)
    x = inputs(case, torch.float32, sizes=replace(case.sizes, heads=4, kv_heads=2))
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
    wide = [y.double().requires_grad_() for y in (x.q, x.k, x.v)]
    out, exact = attention(case, x, *leaves), defined(case, x, *wide)
    assert error(out, exact) < 2e-5
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    dout = dout.masked_fill(exact.isnan().any(-1, keepdim=True), 0.0)
    finite = exact.masked_fill(exact.isnan(), 0.0) if case.spec.dead == "nan" else exact
    spec = replace(case.spec, dead="zero") if case.spec.dead == "nan" else case.spec
    finite = defined(replace(case, spec=spec), x, *wide)
    found = torch.autograd.grad(out, leaves, dout)
    right = torch.autograd.grad(finite, wide, dout.double())
    for name_, a, b in zip("qkv", found, right, strict=True):
        assert error(a, b) < 1e-4 * max(1.0, b.abs().max().item()), name_


@pytest.mark.parametrize("name", ["bias_hij", "bias_bj", "alibi", "t5"])
def test_gradients_of_what_is_loaded(name: str, interpreter: None) -> None:
    case = dropping(name)
    x = inputs(case, torch.float32, sizes=replace(case.sizes, heads=2, kv_heads=2))
    bias = x.operands[0].clone().requires_grad_()
    wide = x.operands[0].double().requires_grad_()
    dout = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1))
    out = attention(case, replace(x, operands=[bias]), x.q, x.k, x.v)
    exact = defined(case, replace(x, operands=[wide]), x.q, x.k, x.v)
    (found,) = torch.autograd.grad(out, [bias], dout)
    (right,) = torch.autograd.grad(exact, [wide], dout.double())
    assert error(found, right) < 1e-4 * right.abs().max().item()


def test_what_is_dropped_depends_on_seed_and_stream_alone(interpreter: None) -> None:
    case = dropping("causal")
    x = inputs(case, torch.float32)
    first = attention(case, x, x.q, x.k, x.v)
    assert torch.equal(first, attention(case, x, x.q, x.k, x.v))
    assert not torch.equal(first, attention(case, x, x.q, x.k, x.v, stream=4))
    assert not torch.equal(first, attention(case, x, x.q, x.k, x.v, seed=SEED + 1))


def test_the_expectation_is_attention_without_dropout() -> None:
    """The mean over many seeds is within five of its standard errors; the variance is what the rate says."""
    case = dropping("plain", 0.1)
    x = inputs(case, torch.float32, sizes=Sizes(2, 2, 2, 16, 24, 8, 8))
    many = torch.stack([attention(case, x, x.q, x.k, x.v, seed=torch.tensor([n])) for n in range(400)]).double()
    exact = reference.attention(named("plain").spec, x.q, x.k, x.v, dtype=torch.float64)[0]
    deviation = many.std(0) / 20
    assert ((many.mean(0) - exact).abs() < 5 * deviation).all()
    scores = (x.q.double() @ x.k.double().mT) * 0.3
    variance = (scores.softmax(-1) ** 2) @ (x.v.double() ** 2) * (0.1 / 0.9)
    torch.testing.assert_close((many.var(0) / variance).mean().item(), 1.0, rtol=0.05, atol=0)


def test_a_seed_is_asked_for() -> None:
    case = dropping("plain")
    x = inputs(case, torch.float32)
    with pytest.raises(ValueError, match="takes a seed"):
        attention(case, x, x.q, x.k, x.v, seed=None)
