"""Which of a site's tensors and numbers each kernel is given, and as what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention.programs import Program, program
from xfcompile.site import ScoreSpec


def mask_arguments(
    key: str, operands: Sequence[Any], ints: Sequence[Any], floats: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Of the operands and the numbers of a score, those that its mask has."""
    prepared = program(key)
    return mask_values(prepared, operands, prepared.scalars(ints, floats))


def mask_values(
    prepared: Program, operands: Sequence[Any], scalars: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """The same of a program's scalars, which are in the order of its kernel."""
    found = prepared.summary
    assert found is not None
    if not scalars:
        return [operands[n] for n in found.operands], [], []
    numbers = dict(zip(prepared.spec.scalars, scalars, strict=True))
    chosen = [(x, numbers[x]) for x in found.scalars]
    whole, real = ([n for x, n in chosen if bool(x.is_integer) == integer] for integer in (True, False))
    return [operands[n] for n in found.operands], whole, real


def split(spec: ScoreSpec, scalars: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Scalars, as a kernel takes them, as whole and real numbers."""
    chosen = list(zip(spec.scalars, scalars, strict=True))
    return [x for s, x in chosen if s.is_integer], [x for s, x in chosen if not s.is_integer]


def random_of(spec: ScoreSpec, seed: Tensor | None, stream: int) -> tuple[Tensor, int] | tuple[()]:
    """What a kernel that drops weights out is given; raises ValueError where it has no seed."""
    if not spec.dropout:
        return ()
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        found = "None" if seed is None else f"{seed.dtype} of {list(seed.shape)}"
        raise ValueError(f"xfcompile::attention: dropout takes a seed, an int64 tensor of one element, not {found}")
    return seed, stream
