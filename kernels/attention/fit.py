"""Which of several tile sizes a kernel is launched with: the first without faults, or the best of those that fit."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention.tiles import FEW_SPILLS, Tiles, fits_twice

log = logging.getLogger(__name__)

FAULTLESS = (0, False)


class NoTilesFit(RuntimeError):
    """A device has too little shared memory for any tiles of a kernel: its op then computes by other means."""


@functools.cache
def say(what: str) -> None:
    """Warns, once in a process, of what is computed by other means than a kernel, and tells who collects reports."""
    from xfcompile.report import Report, publish

    publish(Report(failures=[what]))
    warnings.warn(f"xfcompile: {what}", RuntimeWarning, stacklevel=3)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def launch(
    launch_with: Callable[[Tiles], Any], candidates: tuple[Iterable[Tiles], Iterable[Tiles]], q: Tensor, dv: int
) -> Tiles:
    """Finds by launching; returns the tiles to launch with from now on. Raises `NoTilesFit` where there are none.

    launch_with: returns what Triton made. candidates: those of which the best is taken, and what is tried if the device
    has too little memory for all of them.
    """
    faults: dict[Tiles, tuple[int, bool]] = {}
    preferred, smaller = candidates
    for tiles in preferred:
        found = _try(launch_with, tiles, q.device)
        if found is not None:
            faults[tiles] = found
            if found == FAULTLESS:
                break
    for tiles in () if faults else smaller:
        found = _try(launch_with, tiles, q.device)
        if found is not None:
            faults[tiles] = found
            break
    if not faults:
        raise NoTilesFit(
            f"no tile size of attention fits {name_of(q.device)} with head dims {q.shape[3]} and {dv} in {q.dtype}"
        )
    best = min(faults, key=lambda tiles: faults[tiles])
    log.debug("%s, spilled registers and crowding: %s", best, faults[best])
    return best


def _try(launch_with: Callable[[Tiles], Any], tiles: Tiles, device: torch.device) -> tuple[int, bool] | None:
    """Registers spilled, where they are more than a few, and whether four warps have a multiprocessor to themselves.

    None if the tiles need more shared memory than there is.
    """
    from triton.runtime.errors import OutOfResources

    try:
        compiled = launch_with(tiles)
    except OutOfResources as error:
        log.debug("%s does not fit: %s", tiles, error)
        return None
    spills = int(compiled.n_spills)
    crowded = tiles.num_warps == 4 and not fits_twice(compiled.metadata.shared, device)
    return (spills if spills > FEW_SPILLS else 0), crowded
