"""The generated attention kernel, compiled and run on a CUDA device, against the fp64 definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case, Inputs, Sizes, call, check, inputs, named

from xfcompile.kernels.attention import attention, launch_blocks, prepare, programs, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES = [torch.float16, torch.bfloat16]


def on_gpu(x: Inputs) -> Inputs:
    """Moved with strides as they are: `Tensor.to` makes expanded tensors dense."""

    def move(t: torch.Tensor) -> torch.Tensor:
        if 0 not in t.stride():
            return t.cuda()
        whole = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())]
        return whole.cuda().expand(t.shape)

    return replace(x, q=move(x.q), k=move(x.k), v=move(x.v), operands=[move(t) for t in x.operands])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_is_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    check(case, on_gpu(inputs(case, dtype)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "name", ["plain", "causal", "window", "prefix", "documents", "soft_cap_causal", "alibi", "bias_hij", "sink", "t5"]
)
def test_sizes_of_models(name: str, dim: int, dtype: torch.dtype) -> None:
    case = named(name)
    sizes = Sizes(2, 8, 2, 1024, 1024, dim, dim)
    check(case, on_gpu(inputs(case, dtype, "transposed", sizes)))


@pytest.mark.parametrize("layout", ["transposed", "poisoned", "key_major", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "bias_bhij", "padding_mean"])
def test_any_strides(name: str, dtype: torch.dtype, layout: str) -> None:
    case = named(name)
    check(case, on_gpu(inputs(case, dtype, layout, Sizes(lq=150, lk=170, dq=64, dv=64))))


HEAD_DIMS = [
    (1, 1), (3, 17), (17, 3), (8, 72), (16, 64), (24, 24), (24, 64), (32, 32), (32, 128), (40, 24), (40, 64), (64, 16),
    (64, 32), (64, 64), (80, 80), (96, 128), (128, 32), (128, 64), (192, 128), (256, 16), (256, 64), (256, 256),
]  # fmt: skip


@pytest.mark.parametrize(("dq", "dv"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_head_dims(dtype: torch.dtype, dq: int, dv: int) -> None:
    case = named("causal")
    check(case, on_gpu(inputs(case, dtype, "poisoned", Sizes(heads=2, kv_heads=1, lq=135, lk=135, dq=dq, dv=dv))))


@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (1, 1000), (65, 1), (128, 256), (256, 128), (127, 129), (1000, 1)])
@pytest.mark.parametrize("name", ["plain", "causal", "bottom_right", "window", "padding_mean", "additive_padding"])
def test_ragged_lengths(name: str, lq: int, lk: int) -> None:
    case = named(name)
    check(
        case, on_gpu(inputs(case, torch.bfloat16, "poisoned", Sizes(heads=4, kv_heads=2, lq=lq, lk=lk, dq=64, dv=64)))
    )


def test_offsets_beyond_32_bits() -> None:
    """Batch and head offsets that do not fit in 32 bits; the tensor is mostly unwritten memory, 5 GB of it."""
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of free memory")
    far = 2**31 // 64 + 64  # rows of 64 elements
    memory = torch.empty(far + 256, 64, device="cuda", dtype=torch.bfloat16)
    x = memory.as_strided((2, 1, 128, 64), (far * 64, 0, 64, 1))
    x.normal_()
    case = named("causal")
    check(case, Inputs(x, x, x, [], [], []))


def test_tf32_only_where_allowed() -> None:
    x = on_gpu(inputs(named("plain"), torch.float32, sizes=Sizes(lq=256, lk=256, dq=64, dv=64)))
    exact, _ = reference.attention(named("plain").spec, x.q, x.k, x.v, dtype=torch.float64)
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            errors[allowed] = (call(named("plain").spec, x)[0] - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-5 < errors[True]


def test_smaller_tiles_where_shared_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfcompile.kernels.attention.tiles import Tiles

    huge = Tiles(128, 128, 8, 5)
    monkeypatch.setattr(launch_blocks, "choose", lambda *args: huge)
    case = named("soft_cap_causal")
    fitting = programs.program(prepare(case.spec)).fitting
    fitting.clear()
    check(case, on_gpu(inputs(case, torch.bfloat16, sizes=Sizes(lq=300, lk=300, dq=256, dv=256))))
    assert [tiles for tiles in fitting.values() if tiles != huge]
    fitting.clear()


def test_captured_in_a_graph() -> None:
    case = named("causal")
    x = on_gpu(inputs(case, torch.bfloat16, sizes=Sizes(lq=128, lk=128, dq=64, dv=64)))
    expected, _ = call(case.spec, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call(case.spec, x)
    out.fill_(math.nan)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_passes_strides_and_symbols(mode: str) -> None:
    case = named("scale_at_run_time")
    key = prepare(case.spec)

    @torch.compile(mode=mode, dynamic=mode == "default")
    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, [], [k.shape[2]], [3.0], key)[0] * 2

    for lk in (90, 120):
        x = on_gpu(inputs(case, torch.float32, "transposed", Sizes(lq=50, lk=lk)))
        with torch.no_grad():
            out = program(x.q, x.k, x.v).clone()
        exact, _ = reference.attention(case.spec, x.q, x.k, x.v, [], [lk], [3.0])
        torch.testing.assert_close(out, exact * 2)


def test_is_deterministic() -> None:
    case = named("soft_cap_causal")
    x = on_gpu(inputs(case, torch.bfloat16, sizes=Sizes(lq=500, lk=500, dq=64, dv=64)))
    first, again = call(case.spec, x), call(case.spec, x)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
