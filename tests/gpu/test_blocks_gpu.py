"""Lists of tiles, and the kernel for Hopper that most sites run with there, on a CUDA device."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import CASES, Case, Sizes, call, check, inputs, named
from test_attention_gpu import HALVES, on_gpu
from test_blocks import LISTED, LONG, MORE, made_of, verdicts

from xfcompile.kernels.attention import attention, attention_tiles, launch_hopper, lists, prepare, programs
from xfcompile.kernels.attention.arguments import mask_arguments
from xfcompile.kernels.attention.blocks import EVEN, SKIP, WHOLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0)


def wide(case: Case, dim: int, lq: int = 300, lk: int = 420) -> Sizes:
    """Lengths of several tiles of 128; those of a case whose operands know them stay."""
    if case.name == "negative_indices":  # its table has 200 elements
        lq, lk = 150, 170
    if case in MORE:
        return Sizes(LONG.batch, LONG.heads, LONG.kv_heads, LONG.lq, LONG.lk, dim, dim)
    return Sizes(2, 4, case.sizes.kv_heads, lq, lk, dim, dim)


def on_hopper(case: Case, dim: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    return launch_hopper.why_not(programs.program(prepare(case.spec)), DEVICE, dtype, dim, dim) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_every_case_at_head_dims_of_models(case: Case, dim: int, dtype: torch.dtype) -> None:
    check(case, on_gpu(inputs(case, dtype, "transposed", wide(case, dim))))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("dq", "dv"), [(40, 40), (48, 64), (80, 80), (96, 96), (72, 128), (120, 104), (64, 40)])
@pytest.mark.parametrize("name", ["causal", "padding_mean", "alibi"])
def test_padded_head_dims(name: str, dq: int, dv: int, dtype: torch.dtype) -> None:
    case = named(name)
    check(case, on_gpu(inputs(case, dtype, "transposed", Sizes(2, 4, 2, 300, 420, dq, dv))))


@pytest.mark.parametrize(("lq", "lk"), [(64, 1), (64, 127), (65, 128), (128, 129), (129, 1000), (1000, 77), (640, 640)])
@pytest.mark.parametrize(
    "name", ["plain", "causal", "bottom_right_dead_rows", "prefix", "padding_mean", "documents", "sink"]
)
def test_lengths_around_tiles(name: str, lq: int, lk: int) -> None:
    case = named(name)
    check(case, on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(2, 4, 1, lq, lk, 64, 64))))


@pytest.mark.parametrize("layout", ["poisoned", "key_major", "expanded"])
@pytest.mark.parametrize("name", ["causal", "documents", "alibi"])
def test_layouts_that_tma_does_not_read(name: str, layout: str) -> None:
    case = named(name)
    check(case, on_gpu(inputs(case, torch.bfloat16, layout, Sizes(lq=300, lk=420, dq=64, dv=64))))


@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (128, 128), (128, 64)])
@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.name)
def test_lists(case: Case, block_m: int, block_n: int) -> None:
    ours, exact = (
        verdicts(x.cpu()) for x in made_of(case, on_gpu(inputs(case, torch.float32, sizes=LONG)), block_m, block_n)
    )
    assert not ((ours == SKIP) & (exact != SKIP)).any()
    assert not ((ours >= WHOLE) & (exact < WHOLE)).any()
    assert not ((ours == EVEN) & (exact != EVEN)).any()


def test_the_kernel_for_hopper_runs_most_scores() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    names = ["plain", "causal", "prefix", "alibi", "soft_cap_causal", "padding_mean", "sink", "dilated"]
    assert [name for name in names if not on_hopper(named(name), 64)] == []
    assert not on_hopper(named("bias_hij"), 64)
    assert not on_hopper(named("documents"), 64)
    assert not on_hopper(named("plain"), 64, torch.float32)
    assert not on_hopper(named("plain"), 256)


def test_one_list_for_both_kernels() -> None:
    """Lists of 128 by 128, for tensors that TMA reads and for others."""
    case = next(case for case in MORE if case.name == "dense")
    x = on_gpu(inputs(case, torch.bfloat16, "transposed", wide(case, 64)))
    key = prepare(case.spec)
    found = mask_arguments(key, x.operands, x.ints, x.floats)
    made = attention_tiles(x.q, *found, [*x.q.shape[:3], x.k.shape[2]], 128, 128, programs.mask_of(key))
    odd = torch.empty(x.k.numel() + 1, device="cuda", dtype=x.k.dtype)[1:].view(x.k.shape).copy_(x.k)
    with torch.no_grad():
        results = [attention(x.q, k, x.v, x.operands, [], [], key, made, 128, 128)[0] for k in (x.k, odd)]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    assert lists.program(programs.mask_of(key) or "").single


def test_captured_in_a_graph() -> None:
    case = named("padding_mean")
    x = on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(lq=300, lk=600, dq=64, dv=64)))
    expected, _ = call(case.spec, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call(case.spec, x)
    out.fill_(math.nan)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["causal", "padding_mean", "window", "alibi"])
@pytest.mark.parametrize("lq", [300, 2])
def test_output_is_laid_out_as_its_dimensions_are_where_that_is_asked(name: str, lq: int) -> None:
    case = named(name)
    x = on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(lq=lq, lk=420, dq=64, dv=64)))
    key = prepare(case.spec)
    with torch.no_grad():
        usual, ours = (
            attention(x.q, x.k, x.v, x.operands, x.ints, x.floats, key, heads_first=heads_first)[0]
            for heads_first in (False, True)
        )
    assert ours.is_contiguous()
    assert torch.equal(usual, ours)


def test_other_tensors_of_the_same_layout() -> None:
    """Launches are repeated without asking Triton: with other memory, also at other alignments."""
    case = named("causal")
    for seed in range(3):
        x = on_gpu(inputs(case, torch.bfloat16, "transposed", Sizes(lq=200, lk=200, dq=64, dv=64)))
        memory = torch.empty(x.q.numel() + 8, device="cuda", dtype=x.q.dtype)[seed : seed + x.q.numel()]
        x.q.add_(seed)
        moved = memory.as_strided(x.q.shape, x.q.stride(), memory.storage_offset()).copy_(x.q)
        for q in (x.q, moved, x.q.clone()):
            x.q.data = q
            check(case, x)
