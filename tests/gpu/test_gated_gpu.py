"""The generated kernels of gated MLPs, compiled and run on a CUDA device, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gated_cases import FORMULAS, Case, assert_as_exact, call, check, gradients
from torch import Tensor

import xfcompile
from xfcompile.kernels import philox
from xfcompile.kernels.gated_mlp import launch, launch_few, launch_triton, programs
from xfcompile.kernels.gated_mlp.tiles import Stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES = [torch.float16, torch.bfloat16]
LAYOUTS = ("separate", "gate first", "up first", "gate even", "up even")


def gpu(**about: object) -> Case:
    return Case(device="cuda", **about)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula(name: str, dtype: torch.dtype) -> None:
    check(gpu(name=name, dtype=dtype, rows=150, features=200, inner=192))
    gradients(gpu(name=name, dtype=dtype, rows=150, features=200))


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33, 64, 100, 129, 1000])
@pytest.mark.parametrize(("features", "inner"), [(1, 1), (40, 33), (257, 512), (1000, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_ragged_sizes(rows: int, features: int, inner: int, dtype: torch.dtype) -> None:
    check(gpu(rows=rows, features=features, inner=inner, dtype=dtype, biased=True))


@pytest.mark.parametrize("rows", [1, 16, 256, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["dual", "packed"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sizes_of_models(rows: int, layout: str, form: str, dtype: torch.dtype) -> None:
    check(gpu(rows=rows, features=2816, inner=1024, layout=layout, biased=True, dtype=dtype), form)


@pytest.mark.parametrize("memory", ["transposed", "poisoned"])
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("layout", ["separate", "up first", "gate even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(memory: str, rows: int, layout: str, dtype: torch.dtype) -> None:
    case = gpu(memory=memory, rows=rows, layout=layout, features=200, inner=192, dtype=dtype)
    check(case)
    gradients(case)


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("form", ["dual", "packed"])
def test_experts(rows: int, form: str) -> None:
    check(
        gpu(rows=rows, features=136, inner=128, experts=4, layout="gate first", biased=True, dtype=torch.bfloat16), form
    )


def test_large_products_are_read_through_descriptors_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs Hopper or later")
    used: list[object] = []
    described = launch_triton._Described.__call__

    def noted(self: launch_triton._Described, *arguments: object) -> None:
        described(self, *arguments)  # type: ignore[arg-type]
        used.append(self)

    monkeypatch.setattr(launch_triton._Described, "__call__", noted)
    monkeypatch.setattr(launch.launch_hopper, "declines", lambda *about: "asked not to")
    for layout in LAYOUTS:
        check(gpu(rows=1000, features=1000, inner=520, layout=layout, dtype=torch.bfloat16))
    assert len(used) >= len(LAYOUTS)


FEW = [Stream(1, 1, 5), Stream(1, 4, 2), Stream(1, 2, 3, 2), Stream(2, 2, 2), Stream(3, 1, 4), Stream(4, 1, 2)]


@pytest.mark.parametrize("stream", FEW, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_few_rows_are_streamed_on_hopper(stream: Stream, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    used: set[int] = set()
    few = launch_few.Few.__call__

    def noted(self: launch_few.Few, tensors: list[Tensor]) -> None:
        few(self, tensors)
        used.add(tensors[0].shape[1])

    monkeypatch.setattr(launch_few.Few, "__call__", noted)
    monkeypatch.setattr(launch_few.tiles, "stream", lambda *about: stream)
    monkeypatch.setattr(launch_few.tiles, "HOPPER_LEAST_ROWS", 1)
    monkeypatch.setattr(programs, "known", {})  # calls of other streams
    sizes = ((1, 100, 72), (3, 33, 200), (8, 257, 1032), (9, 4300, 64), (16, 7, 8), (17, 130, 520), (33, 96, 136),
             (64, 200, 264), (65, 31, 1000), (128, 520, 328))  # fmt: skip
    for n, (rows, features, inner) in enumerate(sizes):
        case = gpu(rows=rows, features=features, inner=inner, layout=LAYOUTS[n % 5], dtype=dtype, biased=n % 3 > 0)
        check(case.but(name=list(FORMULAS)[n]))
    assert used == {rows for rows, *_ in sizes}


def test_offsets_beyond_32_bits() -> None:
    """Projections of more than 2**31 numbers: their last rows are those of a small product."""
    rows, features, inner = 2**31 // (2 * 8192) + 100, 8192, 64
    case = gpu(rows=rows, features=features, inner=inner, dtype=torch.bfloat16)
    out, saved = call(case)
    assert saved.numel() > 2**31
    from gated_cases import inputs

    given = inputs(case)
    gate, up = (F.linear(given.x[-50:].double(), w.double()) for w in given.weights if w is not None)
    exact = F.silu(gate) * up
    eager = F.silu(gate.bfloat16()) * up.bfloat16()
    assert_as_exact(out[-50:], eager, exact)
    assert_as_exact(saved[-50:, :features], gate.bfloat16(), gate)


@pytest.mark.parametrize("rows", [1, 16, 40, 300])
@pytest.mark.parametrize("features", [200, 129])
@pytest.mark.parametrize("form", ["dual", "packed"])
def test_dropout(rows: int, features: int, form: str) -> None:
    case = gpu(rows=rows, features=features, inner=64, dtype=torch.bfloat16)
    seed = torch.tensor([12345678901], device="cuda")
    kept, _ = call(case, form, seed=seed, p=0.25)
    whole, _ = call(case, form)
    mask = philox.linear_keep(seed, 0.25, whole.shape)
    assert torch.equal(kept == 0, (whole == 0) | ~mask)
    torch.testing.assert_close(
        kept, torch.where(mask, whole * philox.scale(0.25), 0.0).to(kept.dtype), rtol=0.01, atol=0
    )
    gradients(gpu(rows=rows, features=features), seed, 0.25)


# -- compiled programs ---------------------------------------------------------------------------------------------


def swiglu(x: Tensor, w: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w)) * F.linear(x, v), d)


def packed(x: Tensor, w: Tensor, d: Tensor) -> Tensor:
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.linear(F.gelu(gate, approximate="tanh") * up, d)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("fn", "route"), [(swiglu, "triton"), (packed, "triton"), (packed, "cublas")])
def test_compiled_with_inductor(fn, route: str, grad: bool, mode: str | None) -> None:  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    shapes = (
        [(4, 60, 256), (512, 256), (512, 256), (256, 512)] if fn is swiglu else [(4, 60, 256), (1024, 256), (256, 512)]
    )
    made = [torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in shapes]
    options = {"routes": {"gated_mlp": route}, "strict": True}
    if mode is not None:
        options["triton.cudagraphs"] = True  # type: ignore[assignment]
    compiled = torch.compile(fn, backend=xfcompile.xformers, options=options)

    def results(called, dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [t.to(dtype).requires_grad_(grad) for t in made]
        out = called(*leaves)
        return [out.detach().clone(), *(torch.autograd.grad(out, leaves, torch.ones_like(out)) if grad else [])]

    with xfcompile.collect() as report:
        for _ in range(3):
            ours = results(compiled, torch.bfloat16)
    assert {s.route for s in report.sites} == {route}
    for mine, theirs, truth in zip(ours, results(fn, torch.bfloat16), results(fn, torch.float64), strict=True):
        assert_as_exact(mine, theirs, truth)


def test_a_training_step_keeps_less() -> None:
    """The product is not kept: x, gate and up are."""
    rows, width, features = 4096, 1024, 2816
    made = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in
            ((rows, width), (features, width), (features, width), (width, features))]  # fmt: skip
    kept = {}
    for name, backend in (("inductor", "inductor"), ("ours", xfcompile.xformers)):
        torch._dynamo.reset()
        options = {"routes": {"gated_mlp": "triton"}} if name == "ours" else None
        compiled = torch.compile(swiglu, backend=backend, options=options)
        for _ in range(2):
            out = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = compiled(*made)
            kept[name] = torch.cuda.memory_allocated() - before
            out.sum().backward()
    out_bytes, hidden = 2 * rows * width, 2 * rows * features
    assert kept["ours"] <= out_bytes + 2 * hidden + 2**20
    assert kept["ours"] <= kept["inductor"] - hidden // 2
