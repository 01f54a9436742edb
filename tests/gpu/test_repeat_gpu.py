"""Launches that are repeated without Triton's binder, on a CUDA device: of other tensors, elsewhere, and in graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import gated_cases
import pytest
import torch
from attention_cases import Inputs, Sizes, check, inputs, named
from backward_cases import DIFFERENTIABLE, kernels
from test_attention_gpu import on_gpu
from torch import Tensor

from xfcompile import activation
from xfcompile.activation import X
from xfcompile.kernels.attention import prepare, programs, repeat
from xfcompile.kernels.bias_act_dropout import bias_act_dropout, linear_act_dropout, text_of
from xfcompile.kernels.bias_act_dropout import calls as bias_calls
from xfcompile.kernels.gated_mlp import programs as gated_programs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ["plain", "causal", "documents", "bias_bhij", "alibi", "scale_at_run_time", "padding_mean"]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    for program in (*programs.known.values(), *gated_programs.known.values()):
        program.calls.clear()
    bias_calls.known.clear()


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch was one that is repeated."""
    seen: list[bool] = []
    real = repeat.Launch.repeat

    def noted(self: repeat.Launch, *arguments: object) -> object:
        compiled = real(self, *arguments)  # type: ignore[arg-type]
        seen.append(compiled is not None)
        return compiled

    monkeypatch.setattr(repeat.Launch, "repeat", noted)
    return seen


def another(x: Inputs, factor: float = 0.5) -> Inputs:
    """Other numbers of the same layout, elsewhere in memory."""
    q, k, v = (torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device) for y in (x.q, x.k, x.v))
    for new, old in zip((q, k, v), (x.q, x.k, x.v), strict=True):
        new.copy_(old * factor)
    return replace(x, q=q, k=k, v=v)


@pytest.mark.parametrize(
    "sizes", [Sizes(2, 4, 2, 300, 300, 64, 64), Sizes(2, 4, 2, 1, 700, 64, 64)], ids=["many", "one"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_attention(name: str, dtype: torch.dtype, sizes: Sizes, repeated: list[bool]) -> None:
    case = named(name)
    x = on_gpu(inputs(case, dtype, "transposed", sizes))
    check(case, x)
    repeated.clear()
    check(case, another(x))
    assert repeated and all(repeated)
    check(case, on_gpu(inputs(case, dtype, "contiguous", sizes)))
    moved = torch.empty(x.k.numel() + 1, dtype=dtype, device="cuda")[1:].view(x.k.shape).copy_(x.k)
    check(case, replace(x, k=moved))
    check(case, another(x, 0.25))


def test_a_cache_that_grows(repeated: list[bool]) -> None:
    """Each length is a layout of its own, for which Triton is asked only where it would make another kernel."""
    case = named("plain")
    x = on_gpu(inputs(case, torch.bfloat16, sizes=Sizes(2, 8, 2, 1, 640, 64, 64)))
    for length in range(500, 564):
        check(case, replace(x, k=x.k[:, :, :length], v=x.v[:, :, :length]))
    assert sum(repeated) > 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "bias_bhij", "documents"])
def test_gradients(name: str, dtype: torch.dtype, repeated: list[bool]) -> None:
    case = next(case for case in DIFFERENTIABLE if case.name == name)
    x = on_gpu(inputs(case, dtype, "transposed", Sizes(2, 4, 2, 300, 300, 64, 64)))
    shape = (*x.q.shape[:3], x.v.shape[3])
    dout = torch.linspace(-1, 1, math.prod(shape), device="cuda").view(shape).to(dtype)
    once = kernels(case, x, dout)
    repeated.clear()
    twice = kernels(case, another(x, 1.0), dout.clone())
    assert repeated and all(repeated)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)
    other = kernels(case, another(x), dout.mT.contiguous().mT)
    again = kernels(case, x, dout)
    assert not torch.equal(other[0], once[0])
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 150])
@pytest.mark.parametrize("layout", ["separate", "gate first", "up even"])
def test_gated_mlps(layout: str, rows: int, dtype: torch.dtype, repeated: list[bool]) -> None:
    case = gated_cases.Case(device="cuda", rows=rows, features=192, inner=128, dtype=dtype, layout=layout, biased=True)  # type: ignore
    first = gated_cases.call(case, "dual")
    gated_cases.check(case)
    repeated.clear()
    gated_cases.check(case)
    assert repeated and all(repeated)
    for a, b in zip(first, gated_cases.call(case, "dual"), strict=True):
        assert torch.equal(a, b)
    gated_cases.check(case.but(memory="poisoned"))
    gated_cases.check(case.but(rows=rows + 1))
    gated_cases.check(case)


def activated(x: Tensor, bias: Tensor) -> Tensor:
    formula = text_of(activation.gelu(X, "none"))
    return bias_act_dropout(x, bias, [], [], None, 0, formula, 0.0, x.dtype, False)  # type: ignore[no-any-return]


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    formula = text_of(activation.gelu(X, "none"))
    return linear_act_dropout(x, weight, bias, [], [], None, 0, formula, 0.0, x.dtype, False)[0]  # type: ignore


def test_bias_act_dropout(repeated: list[bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 60, 256, generator=generator).cuda() for _ in range(2))
    bias, weight = torch.randn(256, generator=generator).cuda(), torch.randn(128, 256, generator=generator).cuda() / 16
    moved = torch.empty(257, device="cuda")[1:].copy_(bias)
    for _ in range(2):
        repeated.clear()
        for z, b in ((x, bias), (y, bias), (y, moved), (x.transpose(0, 1), bias), (x[:, ::2], bias)):
            right = torch.nn.functional.gelu(z.double() + b.double())
            torch.testing.assert_close(activated(z, b).double(), right, rtol=1e-5, atol=1e-5)
        for z in (x, y, x.transpose(0, 1)):
            right = torch.nn.functional.gelu(z.double() @ weight.double().T + bias[:128].double())
            torch.testing.assert_close(product(z, weight, bias[:128]).double(), right, rtol=1e-4, atol=1e-4)
    assert all(repeated)


def calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)

    spec = named("plain").spec
    key = prepare(spec)
    x = [normal(2, 4, 300, 64) for _ in range(3)]
    few = [normal(2, 4, 1, 64), *(normal(2, 4, 700, 64) for _ in range(2))]

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.xfcompile.attention(q, k, v, [], [], [], key)[0]  # type: ignore[no-any-return]

    return {
        "attention": (attended, x),
        "decoding": (attended, few),
        "bias": (activated, [normal(100, 256), normal(256)]),
    }


@pytest.mark.parametrize("name", ["attention", "decoding", "bias"])
def test_what_a_graph_captures_is_replayed_with_other_numbers(name: str) -> None:
    run, x = calls()[name]
    with torch.no_grad():
        for _ in range(2):
            run(*x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(*x)
        for factor in (1.0, 0.5, -2.0):
            for y in x:
                y.mul_(factor)
            graph.replay()
            assert torch.equal(out, run(*x))


@pytest.mark.parametrize("name", ["attention", "decoding", "bias"])
def test_on_the_current_stream(name: str) -> None:
    """What is launched on another stream waits for what that stream does, which takes long."""
    run, x = calls()[name]
    with torch.no_grad():
        right = run(*[y * 0.5 for y in x])
        run(*x)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            scaled = [y * 0.5 for y in x]
            out = run(*scaled)
        stream.synchronize()
        assert torch.equal(out, right)
