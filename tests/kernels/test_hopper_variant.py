"""How attention's kernel for Hopper is written for a site, as far as a CPU shows it."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from attention_cases import CASES, SCALE, Case, Sizes, inputs, named, normal
from torch import Tensor

from xfcompile.kernels.attention import (
    codegen,
    forward_call,
    hopper,
    hopper_variant,
    launch_hopper,
    lists,
    prepare,
    programs,
)
from xfcompile.kernels.attention.arguments import mask_values
from xfcompile.kernels.attention.codegen import Pieces
from xfcompile.kernels.attention.hopper_variant import USUAL, Variant
from xfcompile.kernels.attention.repeat import Launch
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import Operand, ScoreSpec

SLOPE = Load(0, H)
FLOAT, HALF = Operand(torch.float32, 1), Operand(torch.bfloat16, 4)


def made(spec: ScoreSpec) -> tuple[ScoreSpec, Pieces]:
    spec = codegen.canonical(spec)
    return spec, codegen.pieces(spec)


def place(spec: ScoreSpec, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    return hopper_variant.kind_of(*made(spec), dtype), hopper_variant.seen_of(*made(spec))


@pytest.mark.parametrize("bias", [SLOPE * (J - I), SLOPE * J, -SLOPE * (I - J) + 2 * SLOPE, (SLOPE + 1) * (J - I) / 4])
def test_what_goes_by_a_keys_place_is_added_by_products(bias: sympy.Expr) -> None:
    """The score of a block's first row, taken apart and put together again."""
    for scaled in (SCALE, S / sympy.sqrt(128)):
        spec = ScoreSpec(scaled + bias, operands=(FLOAT,))
        pieces = codegen.pieces(spec)
        found = hopper_variant.columns_of(spec, pieces.score)
        assert found is not None and not {I, J, S} & (found.factor.free_symbols | found.shift.free_symbols)
        whole = found.scale * (S + found.factor * (J - hopper_variant.START)) + found.shift
        for slope, start, first in ((0.25, 128, 64), (-3, 0, 192)):
            values = {SLOPE: slope, hopper_variant.START: start, codegen.FIRST: first, S: 0.75, J: start + 5}
            assert abs(float((whole - pieces.score).xreplace(values))) < 1e-12


@pytest.mark.parametrize(
    "score",
    [SCALE, SCALE + SLOPE * sympy.Abs(I - J), SCALE + SLOPE * J**2, sympy.tanh(SCALE) + SLOPE * J, SCALE + Load(0, J)],
)
def test_other_scores_are_not(score: sympy.Expr) -> None:
    spec = ScoreSpec(score, operands=(FLOAT,))
    assert hopper_variant.columns_of(spec, codegen.pieces(spec).score) is None


@pytest.mark.parametrize(
    ("score", "bounded"),
    [
        (50 * sympy.tanh(SCALE / 50), True),
        (60 * sympy.tanh(SCALE / 50), False),
        (SCALE, False),
        (2 * sympy.tanh(S), True),
        (2 * sympy.tanh(S) + SCALE, False),
        (2 * sympy.tanh(S) + 100 * J, False),
    ],
)
def test_no_maximum_is_looked_for_among_bounded_scores_alone(score: sympy.Expr, bounded: bool) -> None:
    assert (place(ScoreSpec(score))[0] == "bounded") == bounded
    assert place(ScoreSpec(score), torch.float16)[0] != "bounded"  # weights in fp16 would be infinite


def test_of_bounded_scores_sums_are_finite_and_products_normal() -> None:
    numbers = torch.finfo(torch.float32)
    above, below = (x - hopper_variant.REFERENCE for x in (hopper_variant.CAP, -hopper_variant.CAP))
    assert 2.0**above * 2.0**62.9 * 4096 < numbers.max
    assert 2.0 ** (below - 33) >= numbers.tiny
    assert 50 * math.log2(math.e) < hopper_variant.CAP


def test_of_one_bias_of_each_score_tiles_are_loaded() -> None:
    for load, taken in (
        (Load(0, B, H, I, J), True), (Load(0, 0, H, I, J), True), (Load(0, B, H, J, I), False),
        (Load(0, B, 0, 0, J), False), (Load(0, B, H, I, J + 1), False),
    ):  # fmt: skip
        spec = ScoreSpec(SCALE + load, operands=(HALF,))
        assert (place(spec)[0] == "tiles") == taken
        if load.indices[1] == H:
            why_not = {dim: hopper.why_not(*made(spec), torch.bfloat16, dim, dim) for dim in (64, 128)}
            assert why_not[64] == "loads of each score are waited for"
            assert (why_not[128] is None) == taken
            assert place(spec, torch.float16)[0] != "tiles"  # it is in another dtype than q


def test_what_a_block_of_rows_visits() -> None:
    seen = {name: place(named(name).spec)[1] for name in (case.name for case in CASES)}
    assert seen["plain"] == seen["alibi"] == seen["soft_cap"] == "all"
    assert seen["causal"] == seen["prefix"] == seen["soft_cap_causal"] == "bounds"
    assert seen["padding_mean"] == seen["additive_padding"] == "some"
    assert seen["documents"] == seen["t5"] == "lists"


def test_persistent_programs_have_pieces_of_equal_sizes_and_lists_are_of_one_size() -> None:
    for (kind, seen, width), fact in USUAL.items():
        one_size = seen in ("all", "some")
        assert fact.value.persistent + fact.value.queued == 1 or not one_size, (kind, seen, width)
        assert not fact.value.persistent or one_size, (kind, seen, width)
        assert fact.value.rows == hopper.ROWS or seen == "all", (kind, seen, width)
        assert kind == "other" or getattr(fact.value, kind), (kind, seen, width)


def test_short_sequences_have_no_polynomials() -> None:
    for fact in USUAL.values():
        long, short = (hopper_variant.at_length(fact.value, n) for n in (hopper_variant.LONG, 1024))
        assert long == fact.value and short.polynomials == 0
        changed = {"polynomials": long.polynomials, "warpgroups": long.warpgroups}
        assert short == long or (short.rows == hopper.ROWS and replace(short, **changed) == long)


def taken(case: Case) -> bool:
    return hopper.why_not(*made(case.spec), torch.bfloat16, 64, 64) is None


WAYS: list[dict[str, Any]] = [{"turns": True, "warpgroups": 3}, {"queued": True}, {"polynomials": 1}]


@pytest.mark.parametrize("case", [case for case in CASES if taken(case)], ids=lambda case: case.name)
def test_every_text_is_python(case: Case) -> None:
    spec, pieces = made(case.spec)
    for dim in hopper.HEAD_DIMS:
        usual = hopper_variant.usual(spec, pieces, torch.bfloat16, dim)
        for variant in (usual, *(replace(usual, **way) for way in WAYS)):
            text = hopper.module(spec, pieces, variant)
            ast.parse(text)
            assert not re.search(r"{\w", text.split("@gluon.jit", 1)[1]), "a part is left open"
            assert text.count("consume, (") == variant.warpgroups


DENSE = ScoreSpec(SCALE + Load(0, 0, H, I, J), operands=(HALF,))
BIASED = Case("dense", DENSE, lambda z: [normal(1, z.heads, z.lq, z.lk).bfloat16()])


@pytest.mark.parametrize("case", [*filter(taken, CASES), BIASED], ids=lambda case: case.name)
def test_the_kernel_is_given_what_it_takes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument by its place: tensors, numbers and what is free, then the constants by their names."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def launched(self: Launch, tensors: Sequence[Tensor], free: Sequence[Any] = ()) -> None:
        names, constants = self.kernel.arg_names, list(self.constants)
        given = len(tensors) + len(self.numbers) + len(free)
        assert sorted(names[given:]) == sorted(constants), self.kernel
        assert names[: len(tensors)] == [name for name in names if name.endswith(("_ptr", "_desc"))]
        assert [name for name in names if name.endswith("_desc")] == names[: len(self.described)]
        seen.append((self.kernel.__name__, self.grid))

    monkeypatch.setattr(Launch, "__call__", launched)
    monkeypatch.setattr(launch_hopper, "multiprocessors", lambda device: 9)
    sizes = Sizes(2, 4, 2, 700, case.sizes.lk if case is not BIASED else 72, 128, 128)
    x = inputs(case, torch.bfloat16, "contiguous", sizes)
    prepared = programs.program(prepare(case.spec))
    flags = {name: 1 for name in prepared.kernel(False).arg_names if name in ("UNIT", "FAST")}
    strides = [stride for operand in x.operands for stride in operand.stride()]
    kernel = launch_hopper.Hopper(prepared, x.q, x.k, x.v, strides, flags, False, x.operands)
    out, lse = forward_call.outputs(x.q, x.v)
    tiles = None
    if prepared.mask is not None:
        arguments = mask_values(prepared, x.operands, [*x.ints, *x.floats])
        shape = (*x.q.shape[:3], x.k.shape[2])
        tiles = lists.tightest(x.q, *arguments, shape, hopper.ROWS, hopper.KEYS, prepared.mask)
    kernel(x.q, x.k, x.v, out, lse, x.operands, [*x.ints, *x.floats], tiles)
    blocks = 2 * 4 * -(-700 // hopper.ROWS)
    variant = kernel.variant
    assert seen[0] == ("attention_forward", (9 if variant.persistent or variant.queued else blocks, 1, 1))


def test_few_pieces_of_work_are_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("soft_cap_causal")
    prepared = programs.program(prepare(case.spec))
    x = inputs(case, torch.bfloat16, "contiguous", Sizes(2, 4, 2, 700, 700, 128, 128))
    for multiprocessors, queued in ((47, True), (48, False)):
        monkeypatch.setattr(launch_hopper, "multiprocessors", lambda device, n=multiprocessors: n)
        kernel = launch_hopper.Hopper(prepared, x.q, x.k, x.v, [], {"UNIT": 1.0, "FAST": 1}, False)
        assert kernel.variant.queued == queued
        assert kernel.launch.grid == (47 if queued else 48, 1, 1)


def test_tiles_of_a_bias_are_read_as_the_variant_says() -> None:
    spec, pieces = made(DENSE)
    text = hopper.module(spec, pieces, Variant(2, tiles=True, persistent=True))
    ast.parse(text)
    assert "bias_desc, [0, h, first + w * q_smem.shape[3], start]" in text
