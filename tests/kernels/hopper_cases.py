"""A site for each class of them that the attention kernel for Hopper is written for in a way of its own."""

from __future__ import annotations

import sympy
import torch
from attention_cases import SCALE, Case, Sizes, named, normal, uniform
from torch import Tensor

from xfcompile.kernels.attention import codegen, hopper, hopper_variant
from xfcompile.kernels.attention.hopper_variant import Kind, Seen, Variant
from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Band, Operand, ScoreSpec

FLOAT, BOOL = Operand(torch.float32, 1), torch.bool
CAUSAL = {"keep": J <= I, "band": Band(None, I + 1, True)}
ALIBI = SCALE + Load(0, H) * (J - I)

MINE = {
    "alibi, causal": Case("alibi, causal", ScoreSpec(ALIBI, operands=(FLOAT,), **CAUSAL), lambda z: [uniform(z.heads)]),
    "alibi, far": Case("alibi, far", ScoreSpec(ALIBI, operands=(FLOAT,), far=True), lambda z: [uniform(z.heads)]),
    "alibi, padding": Case(
        "alibi, padding",
        ScoreSpec(ALIBI, sympy.Ne(Load(1, B, J), 0), "nan", (FLOAT, Operand(BOOL, 2))),
        lambda z: [uniform(z.heads), uniform(z.batch, z.lk) > 0.3],
    ),
    "alibi, causal from a buffer": Case(
        "alibi, causal from a buffer",
        ScoreSpec(ALIBI, sympy.Ne(Load(1, I, J), 0), "nan", (FLOAT, Operand(BOOL, 2))),
        lambda z: [uniform(z.heads), torch.ones(z.lq, z.lk).tril() > 0],
    ),
    "soft-cap, padding": Case(
        "soft-cap, padding",
        ScoreSpec(50 * sympy.tanh(SCALE / 50), sympy.Ne(Load(0, B, J), 0), "zero", (Operand(BOOL, 2),)),
        lambda z: [uniform(z.batch, z.lk) > 0.3],
    ),
    "causal from a buffer": Case(
        "causal from a buffer",
        ScoreSpec(SCALE, sympy.Ne(Load(0, I, J), 0), "nan", (Operand(BOOL, 2),)),
        lambda z: [torch.ones(z.lq, z.lk).tril() > 0],
    ),
    "soft-cap, causal from a buffer": Case(
        "soft-cap, causal from a buffer",
        ScoreSpec(50 * sympy.tanh(SCALE / 50), sympy.Ne(Load(0, I, J), 0), "nan", (Operand(BOOL, 2),)),
        lambda z: [torch.ones(z.lq, z.lk).tril() > 0],
    ),
}

CLASSES: dict[str, tuple[Kind, Seen]] = {
    "plain": ("other", "all"),
    "sink": ("other", "all"),
    "causal": ("other", "bounds"),
    "prefix": ("other", "bounds"),
    "bottom_right_dead_rows": ("other", "bounds"),
    "padding_mean": ("other", "some"),
    "additive_padding": ("other", "some"),
    "causal from a buffer": ("other", "lists"),
    "t5": ("other", "lists"),
    "alibi": ("columns", "all"),
    "alibi, far": ("columns", "all"),
    "alibi, causal": ("columns", "bounds"),
    "alibi, padding": ("columns", "some"),
    "alibi, causal from a buffer": ("columns", "lists"),
    "soft_cap": ("bounded", "all"),
    "soft_cap_causal": ("bounded", "bounds"),
    "soft-cap, padding": ("bounded", "some"),
    "soft-cap, causal from a buffer": ("bounded", "lists"),
}


def of_class(name: str) -> Case:
    return MINE[name] if name in MINE else named(name)


def usual(case: Case, dtype: torch.dtype, dim: int) -> Variant:
    spec = codegen.canonical(case.spec)
    return hopper_variant.usual(spec, codegen.pieces(spec), dtype, dim)


def is_taken(case: Case, dtype: torch.dtype = torch.bfloat16, dim: int = 64) -> bool:
    spec = codegen.canonical(case.spec)
    return hopper.why_not(spec, codegen.pieces(spec), dtype, dim, dim) is None


def dense(dtype: torch.dtype, shared: str, masked: float | None) -> Case:
    """A bias of each score, in the dtype of what is multiplied; masked: what some scores get, and -inf whole rows."""

    def tensors(sizes: Sizes) -> list[Tensor]:
        x = normal(1 if "b" in shared else sizes.batch, 1 if "h" in shared else sizes.heads, sizes.lq, sizes.lk)
        if masked is not None:
            x[..., ::5, 7:200] = masked
        if masked == -torch.inf:
            x[..., 3, :] = masked
        return [x.to(dtype)]

    load = Load(0, 0 if "b" in shared else B, 0 if "h" in shared else H, I, J)
    spec = ScoreSpec(SCALE + load, operands=(Operand(dtype, 4),), far=masked is not None, dead="nan")
    return Case(f"{dtype} {shared} {masked}", spec, tensors)
