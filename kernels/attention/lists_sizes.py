"""Which tiles lists are made of, and where they are made at all."""

from __future__ import annotations

import torch

from xfcompile.kernels.attention import hopper, launch_hopper
from xfcompile.kernels.attention.programs import program
from xfcompile.kernels.attention.tiles import INTERPRETED, choose, deepened, depth, device_generation

FEW_TILES = 4
"""So many tiles a row are visited without a list: making one takes as long."""


def tile_sizes(key: str, device: torch.device, dtype: torch.dtype, dq: int, dv: int, lq: int) -> tuple[int, int]:
    """Queries and keys of the tiles that lists are made of."""
    if device.type == "cpu":
        return INTERPRETED.block_m, INTERPRETED.block_n
    if always_listed(key, device, dtype, dq, dv):
        return hopper.ROWS, hopper.KEYS
    tiles = deepened(choose(device_generation(device), dtype, dq, dv, lq), depth(program(key).spec))
    return tiles.block_m, tiles.block_n


def always_listed(key: str, device: torch.device, dtype: torch.dtype, dq: int, dv: int) -> bool:
    """Whether the kernel of such a site goes by lists, however few tiles there are: it makes what it is not given."""
    return launch_hopper.why_not(program(key), device, dtype, dq, dv) is None
