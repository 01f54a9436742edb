"""What the ways to write attention's kernel for Hopper rest on, without a GPU."""

from __future__ import annotations

import ast

import pytest
import sympy
import torch
from attention_cases import CASES, SCALE, named

from xfcompile.kernels.attention import codegen, hopper
from xfcompile.kernels.attention.hopper import Variant
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import Operand, ScoreSpec

SLOPE = Load(0, H)
FLOAT, HALF = Operand(torch.float32, 1), Operand(torch.bfloat16, 4)
EVERYTHING = Variant(3, True, True, True, True, 2, True, True, True, None, True, True)


@pytest.mark.parametrize("bias", [SLOPE * (J - I), SLOPE * J, -SLOPE * (I - J) + 2 * SLOPE, (SLOPE + 1) * (J - I) / 4])
def test_what_goes_by_a_keys_place_is_added_by_products(bias: sympy.Expr) -> None:
    """The score of a block's first row, taken apart and put together again."""
    pieces = codegen.pieces(ScoreSpec(SCALE + bias, operands=(FLOAT,)))
    found = hopper.columns_of(ScoreSpec(SCALE + bias, operands=(FLOAT,)), pieces.score)
    assert found is not None and not {I, J, S} & (found.factor.free_symbols | found.shift.free_symbols)
    whole = found.scale * (S + found.factor * (J - hopper.START)) + found.shift
    expected = pieces.score
    for slope, start, first in ((0.25, 128, 64), (-3, 0, 192)):
        values = {SLOPE: slope, hopper.START: start, codegen.FIRST: first}
        difference = sympy.expand((whole - expected).xreplace(values))
        assert all(abs(x) < 1e-12 for x in difference.as_coefficients_dict().values())


@pytest.mark.parametrize(
    "score",
    [SCALE, SCALE + SLOPE * sympy.Abs(I - J), SCALE + SLOPE * J**2, sympy.tanh(SCALE) + SLOPE * J, SCALE + Load(0, J)],
)
def test_other_scores_are_not(score: sympy.Expr) -> None:
    spec = ScoreSpec(score, operands=(FLOAT,))
    assert hopper.columns_of(spec, codegen.pieces(spec).score) is None


@pytest.mark.parametrize(
    ("score", "bounded"),
    [
        (50 * sympy.tanh(SCALE / 50), True),
        (60 * sympy.tanh(SCALE / 50), False),
        (SCALE, False),
        (2 * sympy.tanh(S), True),
    ],
)
def test_no_maximum_is_taken_off_bounded_scores_alone(score: sympy.Expr, bounded: bool) -> None:
    spec = ScoreSpec(score)
    pieces = codegen.pieces(spec)
    assert hopper.is_bounded(spec, pieces) == bounded
    for dtype in (torch.bfloat16, torch.float16):
        found = hopper.suited(Variant(bounded=True), spec, pieces, dtype, 64)
        assert found.bounded == (bounded and dtype == torch.bfloat16)  # weights in fp16 may be infinite


def test_of_one_bias_of_each_score_tiles_are_loaded() -> None:
    for load, taken in (
        (Load(0, B, H, I, J), True), (Load(0, 0, H, I, J), True), (Load(0, B, H, J, I), False),
        (Load(0, B, 0, 0, J), False), (Load(0, B, H, I, J + 1), False),
    ):  # fmt: skip
        spec = ScoreSpec(SCALE + load, operands=(HALF,))
        pieces = codegen.pieces(spec)
        found = hopper.suited(Variant(tiles=True), spec, pieces, torch.bfloat16, 64)
        assert found.tiles == taken
        if load.indices[1] == H:
            assert (hopper.why_not(spec, pieces, torch.bfloat16, 64, 64, found) is None) == taken
            assert not hopper.suited(Variant(tiles=True), spec, pieces, torch.float16, 64).tiles


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_variant_is_python(name: str) -> None:
    spec = codegen.canonical(named(name).spec)
    pieces = codegen.pieces(spec)
    if hopper.why_not(spec, pieces, torch.bfloat16, 64, 64) is None:
        for wanted in (Variant(), EVERYTHING):
            variant = hopper.suited(wanted, spec, pieces, torch.bfloat16, 64)
            ast.parse(hopper.module(spec, pieces, variant))
