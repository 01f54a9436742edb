"""The decoding kernels, interpreted, against the fp64 definition: few query rows, keys split over programs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from attention_cases import CASES, Case, Inputs, Sizes, call, check, error, inputs, named
from decode_cases import (
    BOTTOM_RIGHT_WINDOW,
    CACHES,
    HEADS_APART,
    MANY_KEYS,
    Cache,
    few,
    filled,
    kept,
    poison_dead_tiles,
)
from torch import Tensor

import xfcompile
from xfcompile.kernels.attention import codegen, decode, launch_decode, prepare, programs, reference
from xfcompile.kernels.attention.repeat import Blank
from xfcompile.kernels.attention.tiles import INTERPRETED_DECODING
from xfcompile.score import J, S
from xfcompile.site import Band, ScoreSpec

pytestmark = [
    pytest.mark.usefixtures("interpreter", "uninitialised"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

BF16_SLACK = 2.0  # the interpreter truncates where hardware rounds to nearest
TILE = INTERPRETED_DECODING.block_n


@pytest.fixture
def uninitialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN: what splits leave unwritten shows where it is read, and outputs where they are not."""
    blank = Blank.__call__

    def poisoned(self: Blank) -> Tensor:
        made = blank(self)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Blank, "__call__", poisoned)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many splits each launch had; keys are as many as it takes."""
    counted: list[int] = []
    launched = launch_decode.Pair.__call__

    def counting(self: launch_decode.Pair, *args: Any) -> Any:
        counted.append(self.splits)
        return launched(self, *args)

    monkeypatch.setattr(launch_decode, "MANY_KEYS", 1)
    monkeypatch.setattr(launch_decode.Pair, "__call__", counting)
    return counted


def multiprocessors(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(launch_decode, "_multiprocessors", lambda device: number)


# All scores and masks


@pytest.mark.parametrize("lq", [1, 3])
@pytest.mark.parametrize("case", [*CASES, BOTTOM_RIGHT_WINDOW], ids=lambda case: case.name)
def test_a_few_rows_are_as_exact_as_eager(case: Case, lq: int, launches: list[int]) -> None:
    check(case, few(case, torch.float32, lq))
    assert bool(launches) == decode.supports(case.spec)


@pytest.mark.parametrize("case", [case for case in CASES if case.spec.far], ids=lambda case: case.name)
def test_far_scores_in_all_of_their_rows(case: Case) -> None:
    check(case, few(case, torch.float32, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [
    "bottom_right", "bias_hij", "soft_cap", "sink", "alibi", "padding_zero", "padding_mean", "padding_nan",
    "some_rows_nan", "some_rows_mean", "some_rows_zero", "nothing_kept", "additive_padding", "far_rows",
])  # fmt: skip
def test_half_precisions(name: str, dtype: torch.dtype) -> None:
    case = named(name)
    check(case, few(case, dtype, 4), BF16_SLACK if dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize("lq", [1, 3])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["alibi", "bias_hij", "sink_dead_rows", "bottom_right"])
def test_heads_share_keys(name: str, group: int, lq: int) -> None:
    case = named(name)
    check(case, few(case, torch.float32, lq, heads=8, kv_heads=8 // group))


@pytest.mark.parametrize(("kv_heads", "lq"), [(1, 1), (2, 1), (4, 2), (8, 3)])
def test_a_program_reads_keys_once_for_all_heads_that_share_them(
    kv_heads: int, lq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many programs as there are splits of each head of keys, however many heads of queries there are."""
    multiprocessors(monkeypatch, 400)
    counted: list[tuple[int, int]] = []
    launched = launch_decode.Pair.__call__

    def recording(self: launch_decode.Pair, *args: Any) -> Any:
        counted.append((self.split.grid[0], self.splits))
        return launched(self, *args)

    monkeypatch.setattr(launch_decode.Pair, "__call__", recording)
    assert 8 // kv_heads * lq <= INTERPRETED_DECODING.block_m
    case = named("plain")
    check(case, few(case, torch.float32, lq, batch=2, heads=8, kv_heads=kv_heads, lk=70, dq=8, dv=8))
    ((number, splits),) = counted
    assert splits == 5 and number == 2 * kv_heads * splits


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("case", HEADS_APART, ids=lambda case: case.name)
def test_rows_of_different_heads_in_one_program(case: Case, kv_heads: int) -> None:
    x = few(case, torch.float32, 3, kv_heads=kv_heads)
    check(case, x)


@pytest.mark.parametrize("case", HEADS_APART, ids=lambda case: case.name)
def test_heads_apart_with_many_rows(case: Case) -> None:
    check(case, inputs(case, torch.float32, sizes=replace(case.sizes, kv_heads=2)))


def test_more_rows_than_a_tile_has(launches: list[int]) -> None:
    case = named("alibi")
    assert 2 * INTERPRETED_DECODING.block_m < 8 * 5
    check(case, few(case, torch.float32, 5, heads=8, kv_heads=1))
    assert launches


# Sizes and memory


@pytest.mark.parametrize("layout", ["transposed", "poisoned", "key_major", "expanded"])
@pytest.mark.parametrize("name", ["causal", "padding_mean", "bias_bhij"])
def test_any_strides(name: str, layout: str) -> None:
    case = named(name)
    check(case, few(case, torch.float32, 2, layout, heads=4, kv_heads=4))


@pytest.mark.parametrize(("dq", "dv"), [(1, 1), (3, 17), (40, 24), (24, 40), (80, 80), (96, 128), (256, 200)])
def test_head_dims(dq: int, dv: int) -> None:
    case = named("bottom_right")
    check(case, few(case, torch.float32, 2, "poisoned", heads=4, kv_heads=2, dq=dq, dv=dv))


@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (3, 1), (1, 15), (1, 16), (2, 17), (1, 64), (5, 65)])
@pytest.mark.parametrize("name", ["plain", "bottom_right", "window", "padding_mean"])
def test_ragged_lengths(name: str, lq: int, lk: int) -> None:
    case = named(name)
    check(case, few(case, torch.float32, lq, heads=4, kv_heads=2, lk=lk))


@pytest.mark.parametrize("number", [2, 8, 9, 400])
@pytest.mark.parametrize("name", ["plain", "bottom_right", "padding_mean", "sink", "far_keys"])
def test_any_number_of_splits(name: str, number: int, monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    multiprocessors(monkeypatch, number)
    case = named(name)
    check(case, few(case, torch.float32, 2, batch=2, heads=4, kv_heads=1, lk=330, dq=16, dv=16))
    assert launches == [{2: 2, 8: 8, 9: 9, 400: 21}[number]]


def test_more_splits_than_are_added_up_at_once(monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    multiprocessors(monkeypatch, 1000)
    case = named("soft_cap")
    check(case, few(case, torch.float32, 1, batch=1, heads=2, kv_heads=1, lk=1100, dq=16, dv=16))
    assert launches == [69]
    assert launches[0] > 2 * launch_decode.COMBINED


@pytest.mark.parametrize(("lk", "expected"), [(63 * TILE, 1), (63 * TILE + 1, 2)])
def test_as_many_tiles_as_a_program_may_have(
    lk: int, expected: int, monkeypatch: pytest.MonkeyPatch, launches: list[int]
) -> None:
    assert decode.MOST_TILES == 63
    multiprocessors(monkeypatch, 1)
    masked = replace(named("padding_mean"), operands=lambda z: [torch.arange(z.lk).expand(2, -1) >= 40])
    check(masked, few(masked, torch.float32, 1, batch=2, heads=2, kv_heads=2, lk=lk, dq=16, dv=16))
    assert launches == [expected]


# A cache is read where it is live


def check_equal(spec: ScoreSpec, poisoned: Inputs, x: Inputs) -> None:
    assert torch.equal(call(spec, poisoned)[0], call(spec, x)[0])


@pytest.mark.parametrize("length", [1, 17, 100, 250])
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_dead_tiles_of_a_cache_are_not_read(cache: Cache, length: int) -> None:
    z = MANY_KEYS
    case = Case(cache.name, cache.spec, lambda z: [cache.tensor(filled(length, z.lk).expand(z.batch, -1), z.lq)])
    x = inputs(case, torch.float32, sizes=z)
    check(case, x)
    poisoned, dead = poison_dead_tiles(cache.spec, x, TILE)
    assert (dead > 0) == (length < z.lk or cache.name == "window")
    check_equal(cache.spec, poisoned, x)


def test_sequences_of_different_lengths_with_a_hole() -> None:
    live = torch.stack([filled(40, 250), filled(230, 250) & ~(filled(180, 250) & ~filled(60, 250))])
    cache = CACHES[0]
    case = Case("hole", cache.spec, lambda z: [cache.tensor(live, z.lq)])
    x = inputs(case, torch.float32, sizes=MANY_KEYS)
    poisoned, dead = poison_dead_tiles(cache.spec, x, TILE)
    assert dead > 10
    check(case, x)
    check_equal(cache.spec, poisoned, x)


@pytest.mark.parametrize("case", [named("window"), BOTTOM_RIGHT_WINDOW, named("prefix")], ids=lambda case: case.name)
def test_keys_outside_of_a_band_are_not_read(case: Case) -> None:
    x = few(case, torch.float32, 3, batch=1, heads=4, kv_heads=2, lk=250, dq=16, dv=16)
    poisoned, dead = poison_dead_tiles(case.spec, x, TILE)
    assert dead > 10
    check(case, x)
    check_equal(case.spec, poisoned, x)


def test_every_program_has_its_share_of_a_cache_that_is_hardly_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight splits of 64 tiles, of which the first eight are live: one each, not all of them for one program."""
    multiprocessors(monkeypatch, 16)
    weights: list[Tensor] = []
    blank = Blank.__call__

    def keeping(self: Blank) -> Tensor:
        made = blank(self)
        weights.extend([made] if made.dim() == 1 else [])
        return made

    monkeypatch.setattr(Blank, "__call__", keeping)
    cache = CACHES[0]
    case = Case("filled", cache.spec, lambda z: [cache.tensor(filled(8 * TILE, z.lk).expand(z.batch, -1), z.lq)])
    check(case, inputs(case, torch.float32, sizes=replace(MANY_KEYS, lk=64 * TILE)))
    _, m, l = weights
    assert m.shape == l.shape == (2 * 4 * 2 * 8,)
    assert (l >= 1).all()


def test_rows_without_keys_have_the_mean_of_tiles_that_were_skipped() -> None:
    spec = ScoreSpec(S, J >= 250, "mean", band=Band(sympy.Integer(250), None, True))
    x = inputs(named("plain"), torch.float32, sizes=MANY_KEYS)
    assert not kept(spec, x).any()
    out, lse = call(spec, x)
    assert (lse == -torch.inf).all()
    torch.testing.assert_close(out, x.v.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(out))


# When it runs, and as how many programs


def shapes(heads: int, kv_heads: int, lq: int, lk: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.empty(batch, heads, lq, 8, device="meta"), torch.empty(batch, kv_heads, lk, 8, device="meta")


@pytest.mark.parametrize(
    ("sizes", "decodes"),
    [
        ((32, 8, 1, 8192), True),
        ((32, 8, 16, 8192), True),
        ((71, 1, 1, 2048), True),
        ((71, 1, 31, 2048), True),
        ((8, 8, 64, 2048), True),
        ((8, 8, 65, 2048), False),
        ((32, 8, 32, 8192), False),
        ((32, 8, 1, 255), False),
        ((32, 8, 4096, 4096), False),
    ],
)
def test_few_rows_and_many_keys_are_decoding(
    sizes: tuple[int, ...], decodes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_decode, "MANY_KEYS", 256)
    assert launch_decode.wanted(ScoreSpec(S), *shapes(*sizes)) == decodes


def test_a_second_pass_over_all_keys_is_left_to_the_other_kernel() -> None:
    spec = named("left_padding_replaced").spec
    assert not launch_decode.wanted(spec, *shapes(8, 8, 1, 8192))
    assert "decode" not in codegen.generate(codegen.canonical(spec))


def test_splits_fill_the_device_and_no_program_has_too_many_tiles() -> None:
    tiles = replace(INTERPRETED_DECODING, block_n=64)
    for batch, lk in [(1, 256), (1, 8192), (8, 8192), (64, 8192), (64, 131072), (1, 2**20)]:
        q, k = shapes(32, 8, 1, lk, batch)
        n = launch_decode.splits(q, k, tiles, 132)
        assert n == 1 or (n - 1) * 64 < lk, "a split without a tile"
        assert -(-lk // 64) <= n * decode.MOST_TILES
        programs = 8 * batch * n
        assert programs >= min(132, 8 * batch * lk // 64)


def test_plan_and_launch_agree_on_few_queries() -> None:
    assert importlib.import_module("xfcompile.plan").FEW_QUERIES == launch_decode.FEW_QUERIES


def test_both_kernels_agree(monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    case = named("documents")
    x = few(case, torch.float32, 3)
    split = call(case.spec, x)
    assert launches
    monkeypatch.setattr(launch_decode, "wanted", lambda *args: False)
    programs.program(prepare(case.spec)).calls.clear()
    whole = call(case.spec, x)
    assert len(launches) == 1
    torch.testing.assert_close(split, whole)


def test_lengths_are_no_reason_to_compile_anew() -> None:
    source = codegen.generate(codegen.canonical(BOTTOM_RIGHT_WINDOW.spec))
    options = re.findall(r"do_not_specialize=(\[.*\])\)\ndef decode_\w+", source)
    assert [eval(x) for x in options] == [["lq", "lk", "splits", "n0", "n1"]] * 2


# Compiled programs


def compiled(program: Any, compilations: list[int]) -> Any:
    torch._dynamo.reset()
    options = {"routes": {"attention": "triton"}, "strict": True}

    def counting(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compilations.append(1)
        return xfcompile.xformers(gm, example_inputs, options=options)

    return torch.compile(program, backend=counting)


def test_a_step_with_a_static_cache(launches: list[int]) -> None:
    """Written as one does: the new key goes into the cache, and a mask says how far that is filled."""

    def step(q: Tensor, new: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        k = k.index_copy(2, position, new)
        v = v.index_copy(2, position, new)
        mask = torch.arange(k.shape[2]) <= position
        k, v = (x.repeat_interleave(4, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None, None, :])

    torch.manual_seed(0)
    q, new, k, v = (torch.randn(2, h, n, 16) for h, n in ((8, 1), (2, 1), (2, 96), (2, 96)))
    compilations: list[int] = []
    program = compiled(step, compilations)
    for last in (0, 17, 95):
        position = torch.tensor([last])
        with torch.no_grad():
            torch.testing.assert_close(program(q, new, k, v, position), step(q, new, k, v, position))
    assert len(compilations) == 1
    assert len(launches) == 3


def test_steps_with_a_growing_cache_compile_once(launches: list[int]) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        past = k.shape[2] - q.shape[2]
        i = torch.arange(q.shape[2])[:, None] + past
        keep = (torch.arange(k.shape[2]) <= i) & padding[:, None, None, :]
        scores = (q @ k.mT / 4).masked_fill(~keep, float("-inf"))
        return scores.softmax(-1) @ v

    torch.manual_seed(0)
    compilations: list[int] = []
    program = compiled(step, compilations)
    for lk in (40, 41, 48, 77):
        q, k, v = (torch.randn(2, 4, n, 16) for n in (3, lk, lk))
        padding = torch.arange(lk).expand(2, lk) >= torch.tensor([[0], [5]])
        for x, d in ((k, 2), (v, 2), (padding, 1)):
            torch._dynamo.mark_dynamic(x, d)
        with torch.no_grad():
            torch.testing.assert_close(program(q, k, v, padding), step(q, k, v, padding))
    assert len(compilations) == 1
    assert len(launches) == 4


def test_symbolic_keys_reach_the_kernel_as_numbers() -> None:
    case = named("bottom_right")
    key = prepare(case.spec)
    program = torch.compile(
        lambda q, k, v: torch.ops.xfcompile.attention(q, k, v, [], [q.shape[2], k.shape[2]], [], key)[0], dynamic=True
    )
    for lk in (40, 50):
        x: Inputs = few(case, torch.float32, 2, lk=lk)
        with torch.no_grad():
            out = program(x.q, x.k, x.v)
        exact, _ = reference.attention(case.spec, x.q, x.k, x.v, [], [2, lk], [], torch.float64)
        assert error(out, exact) < 1e-5


def test_sizes_of_the_interpreter_make_several_splits() -> None:
    """Else the tests above would say little."""
    z = Sizes()
    q, k = shapes(z.heads, z.kv_heads, 3, z.lk, z.batch)
    assert launch_decode.splits(q, k, INTERPRETED_DECODING, launch_decode.INTERPRETED_MULTIPROCESSORS) >= 3
