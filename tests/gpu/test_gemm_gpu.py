"""The product of matrices for Hopper, run on one: through the ops of gated MLPs and of linears, against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from gated_cases import FORMULAS, Case, assert_as_exact, call, check, eager, exact, inputs
from torch import Tensor

import xfcompile
from xfcompile import activation
from xfcompile.activation import KEEP, X, tensor, vector
from xfcompile.kernels import philox
from xfcompile.kernels.bias_act_dropout import calls as linear_calls
from xfcompile.kernels.bias_act_dropout import linear_act_dropout, text_of
from xfcompile.kernels.gated_mlp import programs as gated_programs
from xfcompile.kernels.gemm import tiles
from xfcompile.kernels.gemm.launch import Gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
SIZES = [(256, 8, 8), (257, 72, 40), (300, 264, 136), (1000, 1000, 1000), (2048, 2816, 1024), (4100, 520, 4096)]
"""Rows, features, inner: tiles with and without ends in them, both tile sizes, one step and many."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Gemm]:
    """The launches of the kernel, in order; none is remembered from before."""
    found: list[Gemm] = []
    run, repeat = Gemm.__call__, Gemm.repeat

    def noted(self: Gemm, *arguments: Any) -> Any:
        result = run(self, *arguments)
        found.append(self)
        return result

    def repeated(self: Gemm, *arguments: Any) -> Any:
        result = repeat(self, *arguments)
        found.extend([] if result is None else [self])
        return result

    monkeypatch.setattr(Gemm, "__call__", noted)
    monkeypatch.setattr(Gemm, "repeat", repeated)
    for program in gated_programs.known.values():
        program.calls.clear()
    linear_calls.known.clear()
    return found


# -- gated MLPs ----------------------------------------------------------------------------------------------------


def gpu(**about: Any) -> Case:
    return Case(device="cuda", **{"dtype": torch.bfloat16, "biased": True, **about})


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in FORMULAS), ("gelu", torch.float16)])
def test_every_formula(name: str, dtype: torch.dtype, launched: list[Gemm]) -> None:
    check(gpu(name=name, dtype=dtype, rows=300, features=200, inner=192))
    assert len(launched) == 2


@pytest.mark.parametrize("layout", ["separate", "gate first", "up first"])
@pytest.mark.parametrize(("rows", "features", "inner"), SIZES)
def test_sizes(rows: int, features: int, inner: int, layout: Any, launched: list[Gemm]) -> None:
    check(gpu(rows=rows, features=features, inner=inner, layout=layout))
    assert len(launched) == 2


@pytest.mark.parametrize(
    "about",
    [
        {"rows": 255},
        {"features": 204},
        {"inner": 196},
        {"memory": "transposed"},
        {"memory": "poisoned"},
        {"layout": "up even"},
    ],
    ids=str,
)
def test_what_tma_does_not_read_is_left_to_other_kernels(about: dict[str, Any], launched: list[Gemm]) -> None:
    check(gpu(**{"rows": 300, "features": 200, "inner": 192, **about}))
    assert not launched


def test_memory_beside_a_matrix_is_not_read(launched: list[Gemm]) -> None:
    """Rows of larger tensors full of NaN."""
    case = gpu(rows=300, features=200, inner=200)
    given = inputs(case)

    def within(t: Tensor) -> Tensor:
        large = torch.full((t.shape[0] + 8, t.shape[1] + 16), torch.nan, dtype=t.dtype, device="cuda")
        large[8:, 8:-8] = t
        return large[8:, 8:-8]

    weights = [within(w) for w in given.weights if w is not None]
    about = (case.key, "separate", "dual", True, case.dtype)
    out, saved = xfcompile.kernels.gated_mlp.gated_mlp(within(given.x), *weights, *given.biases, *about)
    assert launched
    whole, both = call(case)
    assert torch.equal(out, whole) and torch.equal(saved, both)


def test_repeated_calls_agree_in_every_bit(launched: list[Gemm]) -> None:
    case = gpu(rows=4100, features=520, inner=1032)
    first = call(case)
    for _ in range(10):
        assert all(map(torch.equal, call(case), first))
    assert len(launched) == 11


def test_on_a_stream_of_its_own(launched: list[Gemm]) -> None:
    case = gpu(rows=2048, features=1024, inner=1024)
    given = inputs(case)
    about = (None, None, case.key, "separate", "dual", False, case.dtype)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x = given.x
        for _ in range(20):
            x = x * 1.0  # the kernel has to wait for it
        out, _ = xfcompile.kernels.gated_mlp.gated_mlp(x, *given.weights, *about)
        total = out.double().sum()
    stream.synchronize()
    plain, _ = xfcompile.kernels.gated_mlp.gated_mlp(given.x, *given.weights, *about)
    assert torch.equal(total, plain.double().sum()) and len(launched) == 2


# -- linears -------------------------------------------------------------------------------------------------------

LINEARS: dict[str, tuple[sympy.Expr, Callable[..., Tensor]]] = {
    "gelu": (activation.gelu(X, "none"), lambda h: F.gelu(h)),
    "gelu by tanh": (activation.gelu(X, "tanh"), lambda h: F.gelu(h, approximate="tanh")),
    "silu": (activation.silu(X), lambda h: F.silu(h)),
    "relu": (activation.relu(X), lambda h: F.relu(h)),
    "identity": (X, lambda h: h),
    "scale": (vector(0) * activation.silu(X), lambda h, v: v * F.silu(h)),
    "residual": (activation.gelu(X, "none") + tensor(0), lambda h, r: F.gelu(h) + r),
    "scale, residual": (vector(0) * X + tensor(0), lambda h, v, r: v * h + r),
}


def run_linear(
    name: str,
    rows: tuple[int, ...],
    features: int,
    inner: int,
    dtype: torch.dtype,
    save: bool = False,
    across: bool = False,
) -> None:
    formula, program = LINEARS[name]
    generator = torch.Generator("cuda").manual_seed(features)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x, w, b = random(*rows, inner), random(features, inner) / inner**0.5, random(features)
    w = w.t().contiguous().t() if across else w
    vectors = [random(features)] if vector(0) in formula.free_symbols else []
    tensors = [random(*rows, features)] if tensor(0) in formula.free_symbols else []
    out, pre = linear_act_dropout(x, w, b, vectors, tensors, None, 0, text_of(formula), 0.0, dtype, save)

    def computed(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        to = [t.to(dtype) for t in (x, w, b, *vectors, *tensors)]
        linear = F.linear(*to[:3])
        return program(linear, *to[3:]), linear

    (eager, linear), (truth, exact_linear) = computed(dtype), computed(torch.float64)
    assert_as_exact(out, eager, truth)
    if save:
        assert_as_exact(pre, linear, exact_linear)


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in LINEARS), ("gelu", torch.float16)])
def test_every_epilogue(name: str, dtype: torch.dtype, launched: list[Gemm]) -> None:
    run_linear(name, (2, 300), 200, 192, dtype)
    assert len(launched) == 1


@pytest.mark.parametrize("name", ["gelu", "residual"])
@pytest.mark.parametrize(("rows", "features", "inner"), SIZES)
def test_sizes_of_linears(name: str, rows: int, features: int, inner: int, launched: list[Gemm]) -> None:
    run_linear(name, (rows,), features, inner, torch.bfloat16, save=name == "gelu")
    assert len(launched) == 1


@pytest.mark.parametrize(("rows", "features", "inner"), SIZES)
def test_weights_that_lie_the_other_way(rows: int, features: int, inner: int, launched: list[Gemm]) -> None:
    run_linear("gelu", (rows,), features, inner, torch.bfloat16, across=True)
    assert len(launched) == 1


@pytest.mark.parametrize(("rows", "features", "inner"), [(255, 200, 192), (300, 204, 192), (300, 200, 196)])
def test_linears_that_tma_does_not_read(rows: int, features: int, inner: int, launched: list[Gemm]) -> None:
    run_linear("gelu", (rows,), features, inner, torch.bfloat16)
    assert not launched


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "DROPPING", True)


@pytest.mark.usefixtures("dropping")
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "features", "inner"), SIZES)
def test_what_a_gated_mlp_drops(rows: int, features: int, inner: int, p: float, launched: list[Gemm]) -> None:
    case = gpu(rows=rows, features=features, inner=inner)
    seed = torch.tensor([-1234567890123], device="cuda")
    kept, saved = call(case, seed=seed, p=p)
    whole, both = call(case)
    assert len(launched) == 2
    mask = philox.linear_keep(seed, p, whole.shape)
    assert torch.equal(kept == 0, (whole == 0) | ~mask)
    torch.testing.assert_close(kept.double(), mask * whole.double() * philox.scale(p), rtol=0.01, atol=0)
    assert torch.equal(saved, both)
    assert torch.equal(call(case, seed=seed, p=p)[0], kept)


@pytest.mark.usefixtures("dropping")
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(("rows", "features", "inner"), SIZES)
def test_what_a_linear_drops(rows: int, features: int, inner: int, save: bool, launched: list[Gemm]) -> None:
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(features, inner, device="cuda", dtype=torch.bfloat16) / inner**0.5
    r = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
    seed, stream, p = torch.tensor([2**61 + 77], device="cuda"), 5, 0.3
    tensors = [] if save else [r]
    formula = KEEP * activation.silu(X) + (0 if save else tensor(0))
    out, pre = linear_act_dropout(x, w, None, [], tensors, seed, stream, text_of(formula), p, x.dtype, save)
    assert len(launched) == 1
    keep = philox.linear_keep(seed, p, out.shape, stream) * philox.scale(p)

    def computed(dtype: torch.dtype) -> Tensor:
        value = F.silu(F.linear(x.to(dtype), w.to(dtype))) * keep.to(dtype)
        return value if save else value + r.to(dtype)

    assert_as_exact(out, computed(torch.bfloat16), computed(torch.float64))
    if save:
        assert torch.equal(out == 0, (keep == 0) | (pre == 0))


# -- compiled programs ---------------------------------------------------------------------------------------------


def mlp(x: Tensor, w: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w, b)), d)


def swiglu(x: Tensor, w: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w)) * F.linear(x, v), d)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(
    ("fn", "shapes", "route"),
    [
        (mlp, [(8, 512, 768), (3072, 768), (3072,), (768, 3072)], "epilogue"),
        (swiglu, [(8, 512, 768), (2048, 768), (2048, 768), (768, 2048)], "triton"),
    ],
)
def test_by_default_at_inference(fn: Any, shapes: Any, route: str, mode: str | None, launched: list[Gemm]) -> None:
    torch._dynamo.reset()
    made = [torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in shapes]
    options: dict[str, Any] = {"strict": True}
    if mode is not None:
        options["triton.cudagraphs"] = True
    compiled = torch.compile(fn, backend=xfcompile.xformers, options=options)
    halves = [t.bfloat16() for t in made]
    with torch.no_grad(), xfcompile.collect() as report:
        for _ in range(3):
            ours = compiled(*halves).clone()
        assert [s.route for s in report.sites if s.matched] == [route]
        assert launched
        assert_as_exact(ours, fn(*halves), fn(*(t.double() for t in halves)))


def test_training_that_is_asked_for(launched: list[Gemm]) -> None:
    torch._dynamo.reset()
    shapes = [(4096, 512), (1024, 512), (1024, 512), (512, 1024)]
    made = [torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in shapes]
    compiled = torch.compile(swiglu, backend=xfcompile.xformers, options={"routes": {"gated_mlp": "triton"}})

    def results(fn: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in made]
        out = fn(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    ours = results(compiled, torch.bfloat16)
    assert launched
    for mine, theirs, truth in zip(ours, results(swiglu, torch.bfloat16), results(swiglu, torch.float64), strict=True):
        assert_as_exact(mine, theirs, truth)


def test_a_kernel_that_fails_is_replaced(monkeypatch: pytest.MonkeyPatch, launched: list[Gemm]) -> None:
    def fails(self: Gemm, *arguments: Any) -> None:
        raise RuntimeError("no TMA here")

    monkeypatch.setattr(Gemm, "__call__", fails)
    case = gpu(rows=300, features=200, inner=192)
    out, _ = call(case)
    given = inputs(case)
    assert_as_exact(out, eager(case, given)[0], exact(case, given)[0])
    run_linear("gelu", (300,), 200, 192, torch.bfloat16)
