"""Scores with a bias of each that is learned, beside masks of every kind, in the interpreter and on GPUs alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from attention_cases import FLOAT, Case, Sizes, named, normal
from torch import Tensor

from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Operand

AXES = {"each": (B, H), "of heads": (0, H), "of batches": (B, 0), "one": (0, 0)}
MASKS = ["plain", "causal", "window", "window_past_the_end", "bottom_right_dead_rows", "documents", "padding_mean"]


def biased(mask: str, axes: str, dtype: torch.dtype = FLOAT, factor: float = 1) -> Case:
    """A case of `attention_cases` with a bias that is learned added to its scores."""
    case, (b, h) = named(mask), AXES[axes]
    number = len(case.spec.operands)
    score = case.spec.score + factor * Load(number, b, h, I, J)
    spec = replace(case.spec, score=score, operands=(*case.spec.operands, Operand(dtype, 4)))

    def tensors(z: Sizes) -> list[Tensor]:
        shape = (z.batch if b == B else 1, z.heads if h == H else 1, z.lq, z.lk)
        return [*case.operands(z), normal(*shape).to(dtype)]

    return Case(f"{mask} with a bias", spec, tensors, case.ints, case.floats)
