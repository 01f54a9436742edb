"""What verdicts and lists of tiles are, in plain PyTorch: the definition, which runs where no kernel does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch

from xfcompile.evaluate import Evaluator
from xfcompile.kernels.attention.blocks import EVEN, HEADER, MASKED, NEAR, SKIP, WHOLE
from xfcompile.score import B, H, I, J
from xfcompile.site import MaskSpec


def reference(
    mask: MaskSpec, operands: Sequence[torch.Tensor], scalars: Mapping[sympy.Symbol, object], shape: Sequence[int],
    block_m: int, block_n: int,
) -> torch.Tensor:  # fmt: skip
    """The tightest verdicts, [B', H', blocks, tiles], element by element in plain PyTorch: the definition.

    shape: batch, heads, queries and keys, where the first two are 1 if the mask does not depend on them.
    """
    device = operands[0].device if operands else torch.device("cpu")
    positions = {
        x: torch.arange(n, device=device).view([-1 if a == axis else 1 for a in range(4)])
        for axis, (x, n) in enumerate(zip((B, H, I, J), shape, strict=True))
    }
    evaluate = Evaluator({**positions, **scalars}, operands, torch.float32, device)  # type: ignore[dict-item]

    def tiles(x: object, value: float) -> torch.Tensor:
        full = torch.as_tensor(x, device=device).expand(tuple(shape))
        pad = (0, -shape[3] % block_n, 0, -shape[2] % block_m)
        padded = torch.nn.functional.pad(full, pad, value=value)
        return padded.unflatten(3, (-1, block_n)).unflatten(2, (-1, block_m)).transpose(3, 4).flatten(4)

    keep = torch.as_tensor(evaluate(mask.keep), device=device).expand(tuple(shape))
    some = tiles(keep, False).any(-1)
    every = tiles(keep, True).all(-1)
    if shape[3] % block_n:
        every[..., -1] = False
    even = torch.ones_like(every)
    for load in mask.even:
        x = evaluate(load)
        low, high = tiles(x, float("inf")).amin(-1), tiles(x, float("-inf")).amax(-1)
        even &= (low == high) & (low.abs() <= NEAR)
    return torch.where(some, torch.where(every, torch.where(even, EVEN, WHOLE), MASKED), SKIP).to(torch.int8)


def by_key(verdicts: torch.Tensor) -> torch.Tensor:
    """The verdicts [.., tiles, blocks] of lists of blocks of queries, in which nothing is even."""
    return verdicts.clamp(max=WHOLE).mT.contiguous()


def lists(verdicts: torch.Tensor) -> torch.Tensor:
    """The lists [..., 3 + tiles] of verdicts [..., tiles]; the places of tiles that are skipped hold 0."""
    tiles = verdicts.shape[-1]
    found = torch.zeros((*verdicts.shape[:-1], HEADER + tiles), dtype=torch.int32, device=verdicts.device)
    for row, made in zip(verdicts.reshape(-1, tiles), found.view(-1, HEADER + tiles), strict=True):
        even, whole, masked = ((row == verdict).nonzero()[:, 0] for verdict in (EVEN, WHOLE, MASKED))
        made[:HEADER] = torch.tensor([len(even), len(even) + len(whole), len(masked)])
        front = torch.cat([even, whole])
        made[HEADER : HEADER + len(front)] = front
        made[HEADER + tiles - len(masked) :] = masked.flip(0)
    return found


def every_tile(made: torch.Tensor) -> torch.Tensor:
    """Lists in which all tiles are masked, which is right for any mask, written into `made`."""
    tiles = made.shape[-1] - HEADER
    made[..., :HEADER] = 0
    made[..., HEADER - 1] = tiles
    made[..., HEADER:] = torch.arange(tiles - 1, -1, -1, dtype=made.dtype, device=made.device)
    return made
