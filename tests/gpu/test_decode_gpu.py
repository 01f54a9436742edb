"""The decoding kernels, compiled and run on a CUDA device, against the fp64 definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, Inputs, Sizes, call, check, inputs, named
from decode_cases import BOTTOM_RIGHT_WINDOW, CACHES, HEADS_APART, Cache, few, filled, poison_dead_tiles
from test_attention_gpu import on_gpu

import xfcompile
from xfcompile.kernels.attention import launch_decode, prepare
from xfcompile.kernels.attention.tiles import choose_decoding, device_generation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES = [torch.float16, torch.bfloat16]
MODEL = Sizes(2, 32, 8, 1, 4096, 128, 128)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    counted: list[int] = []
    launched = launch_decode.Pair.__call__

    def counting(self: launch_decode.Pair, *args: Any) -> Any:
        counted.append(1)
        return launched(self, *args)

    monkeypatch.setattr(launch_decode, "MANY_KEYS", 1)
    monkeypatch.setattr(launch_decode.Pair, "__call__", counting)
    return counted


@pytest.mark.parametrize("lq", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", [*CASES, BOTTOM_RIGHT_WINDOW, *HEADS_APART], ids=lambda case: case.name)
def test_a_few_rows_are_as_exact_as_eager(case: Case, dtype: torch.dtype, lq: int, launches: list[int]) -> None:
    check(case, on_gpu(few(case, dtype, lq, kv_heads=2)))
    assert bool(launches) == (case.spec.full is None)


@pytest.mark.parametrize("lq", [1, 5])
@pytest.mark.parametrize("group", [1, 4, 8, 32])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["plain", "bottom_right", "alibi", "padding_mean", "sink", "soft_cap", "bias_bhij"])
def test_sizes_of_models(name: str, dim: int, group: int, lq: int) -> None:
    case = named(name)
    x = few(case, torch.bfloat16, lq, "transposed", heads=32, kv_heads=32 // group, lk=3001, dq=dim, dv=dim)
    check(case, on_gpu(x))


@pytest.mark.parametrize("layout", ["transposed", "poisoned", "key_major", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["bottom_right", "bias_bhij", "padding_mean"])
def test_any_strides(name: str, dtype: torch.dtype, layout: str) -> None:
    case = named(name)
    check(case, on_gpu(few(case, dtype, 2, layout, lk=1170, dq=64, dv=64)))


@pytest.mark.parametrize(
    ("dq", "dv"), [(1, 1), (3, 17), (17, 3), (40, 24), (64, 16), (80, 80), (96, 128), (128, 64), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_head_dims(dtype: torch.dtype, dq: int, dv: int) -> None:
    case = named("bottom_right")
    check(case, on_gpu(few(case, dtype, 2, "poisoned", heads=4, kv_heads=1, lk=335, dq=dq, dv=dv)))


@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (3, 1), (1, 63), (2, 65), (1, 4096), (16, 4097), (33, 500)])
@pytest.mark.parametrize("name", ["plain", "bottom_right", "window", "padding_mean", "additive_padding"])
def test_ragged_lengths(name: str, lq: int, lk: int) -> None:
    case = named(name)
    check(case, on_gpu(few(case, torch.bfloat16, lq, "poisoned", heads=4, kv_heads=2, lk=lk, dq=64, dv=64)))


@pytest.mark.parametrize("length", [1, 64, 65, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_dead_tiles_of_a_cache_are_not_read(cache: Cache, dtype: torch.dtype, length: int) -> None:
    z = replace(MODEL, lq=2)
    case = Case(cache.name, cache.spec, lambda z: [cache.tensor(filled(length, z.lk).expand(z.batch, -1), z.lq)])
    x = inputs(case, dtype, sizes=z)
    tiles = choose_decoding(device_generation(torch.device("cuda", 0)), dtype, 128, 128, 8)
    poisoned, dead = poison_dead_tiles(cache.spec, x, tiles.block_n)
    assert (dead > 0) == (length < z.lk or cache.name == "window")
    check(case, on_gpu(x))
    assert torch.equal(call(cache.spec, on_gpu(poisoned))[0], call(cache.spec, on_gpu(x))[0])


def test_offsets_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of free memory")
    far = 2**31 // 64 + 64  # rows of 64 elements
    memory = torch.empty(far + 512, 64, device="cuda", dtype=torch.bfloat16)
    x = memory.as_strided((2, 1, 300, 64), (far * 64, 0, 64, 1))
    x.normal_()
    check(named("plain"), Inputs(x[:, :, :2], x, x, [], [], []))


def test_captured_in_a_graph_and_replayed_with_a_longer_cache() -> None:
    """The position is data: a captured step is right for the next one too."""
    cache = next(c for c in CACHES if c.name == "position")
    case = Case(cache.name, cache.spec, lambda z: [torch.tensor(700)])
    x = on_gpu(inputs(case, torch.bfloat16, sizes=MODEL))
    call(case.spec, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call(case.spec, x)
    for position in (700, 701, 4095):
        x.operands[0].fill_(position)
        out.fill_(math.nan)
        graph.replay()
        torch.testing.assert_close(out, call(case.spec, x)[0], rtol=0, atol=0)


def test_growing_caches_compile_once() -> None:
    case = named("bottom_right")
    key = prepare(case.spec)
    from xfcompile.kernels.attention.programs import program

    split = program(key).kernel(False, "decode_split")
    made: list[int] = []
    for lk in (1000, 1001, 1008, 1024, 2000):
        call(case.spec, on_gpu(few(case, torch.bfloat16, 1, heads=8, kv_heads=2, lk=lk, dq=64, dv=64)))
        made.append(sum(len(cache[0]) for cache in split.device_caches.values()))
    assert made[0] == made[-1]


def test_is_deterministic() -> None:
    case = named("soft_cap")
    x = on_gpu(inputs(case, torch.bfloat16, sizes=MODEL))
    first, again = call(case.spec, x), call(case.spec, x)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step(mode: str, launches: list[int]) -> None:
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(4, 1) for x in (k, v))
        return (q @ k.mT / 8).masked_fill(~mask, float("-inf")).softmax(-1) @ v

    torch._dynamo.reset()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 64, device="cuda", dtype=torch.bfloat16) for h, n in ((8, 1), (2, 999), (2, 999)))
    program = torch.compile(step, backend=xfcompile.xformers, mode=None if mode == "default" else mode)
    for length in (1, 500, 999):
        mask = (torch.arange(999, device="cuda") < length).expand(2, 1, 1, -1).contiguous()
        with torch.no_grad():
            out = program(q, k, v, mask).clone()
        exact = step(*(x.double() for x in (q, k, v)), mask)
        assert (out - exact).abs().max() <= 2 * (step(q, k, v, mask) - exact).abs().max() + 2**-8
    assert launches
