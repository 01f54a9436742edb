"""Which of several tile sizes a kernel is launched with, the first without faults, the best of those that fit, or the
fastest; and what an op does where none can be."""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.asked import asked
from xfcompile.kernels.attention import times
from xfcompile.kernels.attention.tiles import FEW_SPILLS, Tiles, fits_twice
from xfcompile.source import RewriteError

log = logging.getLogger(__name__)

FAULTLESS = (0, False)


class Unavailable(RuntimeError):
    """A kernel cannot be launched: its op then computes by other means."""

    def again(self) -> Unavailable:
        """The same, without the frames (and their tensors) that it was raised through: to be kept."""
        return type(self)(*self.args)


class NoTilesFit(Unavailable):
    """A device has too little shared memory for any tiles of a kernel."""


class DoesNotCompile(Unavailable):
    """Triton, or what it calls, has an error with a kernel."""


_interpreter = threading.RLock()


def alone(device: torch.device) -> AbstractContextManager[Any]:
    """Around launches: Triton's interpreter, which runs kernels on CPUs, keeps the place of a program, and puts its own
    functions into `triton.language`, for all threads at once."""
    return _interpreter if device.type == "cpu" else nullcontext()


def compile_first(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
    """Has Triton compile a kernel for these arguments, and not launch it yet: an error is then one of compilation, and
    nothing is written. Returns what Triton made, nothing in its interpreter. Raises `DoesNotCompile`."""
    try:
        return kernel.warmup(*arguments, grid=grid, **constants)
    except Exception as error:
        log.debug("compiling a kernel failed", exc_info=error)
        raise DoesNotCompile(f"{type(error).__name__}: {str(error).strip()[:LONGEST]}") from None


LONGEST = 1000
"""Characters of a compiler's error that are passed on."""


def give_way(error: Unavailable, name: str, instead: str) -> None:
    """Says, once, that something else computes what a kernel cannot; if it does not compile and `strict` was asked for,
    raises an error with the user's line. name: of the kernel, as operators call it."""
    if not isinstance(error, DoesNotCompile):
        say(f"{error}: {instead}")
        return
    of = asked(name)
    if of.strict:
        raise RewriteError(f"compiling a kernel of {of.what}", error) from error
    say(f"compiling a kernel of {of.what}: {error}: {instead}")


@functools.cache
def say(what: str) -> None:
    """Warns, once in a process, of what is computed by other means than a kernel, and tells who collects reports."""
    from xfcompile.report import Report, publish

    publish(Report(failures=[what]))
    warnings.warn(f"xfcompile: {what}", RuntimeWarning, stacklevel=3)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@dataclass(frozen=True)
class Candidates:
    """preferred: those of which the best is taken. smaller: what is tried if the device has too little memory for all
    of them. besides: what is timed as well, where tiles are timed."""

    preferred: Iterable[Tiles]
    smaller: Iterable[Tiles] = ()
    besides: Iterable[Tiles] = ()


def launch(launch_with: Callable[[Tiles], Any], candidates: Candidates, q: Tensor, dv: int) -> Tiles:
    """Finds by launching; returns the tiles to launch with from now on. Raises `Unavailable` where there are none.

    launch_with: returns what Triton made.
    """
    faults: dict[Tiles, tuple[int, bool]] = {}
    errors: list[DoesNotCompile] = []
    for tiles in candidates.preferred:
        found = _try(launch_with, tiles, q.device, errors)
        if found is not None:
            faults[tiles] = found
            if found == FAULTLESS:
                break
    for tiles in () if faults else candidates.smaller:
        found = _try(launch_with, tiles, q.device, errors)
        if found is not None:
            faults[tiles] = found
            break
    if errors:
        log.warning("a kernel does not compile with some tiles: %s", errors[0])
    if not faults and errors:
        raise errors[0].again()
    if not faults:
        raise NoTilesFit(
            f"no tile size of attention fits {name_of(q.device)} with head dims {q.shape[3]} and {dv} in {q.dtype}"
        )
    best = min(faults, key=lambda tiles: faults[tiles])
    log.debug("%s, spilled registers and crowding: %s", best, faults[best])
    return best


def remembered(
    known: dict[Any, Tiles | Unavailable],
    kind: tuple[object, ...],
    launch_with: Callable[[Tiles], Any],
    candidates: Callable[[], Candidates],
    q: Tensor,
    dv: int,
    name: str,
) -> Tiles:
    """Launches with the tiles that are known of a kind of tensors; at first with those that are found by launching, or
    by timing where that is asked for. Raises `Unavailable`, from then on at once.

    name: as operators call the kernel.
    """
    tiles = known.get(kind)
    if isinstance(tiles, Unavailable):
        raise tiles.again()
    timed = times.wanted(name, kind)
    if tiles is not None and not timed:
        launch_with(tiles)
        return tiles
    try:
        found = candidates()
        if timed:
            tiles = known[kind] = times.Search(Tiles, name, kind, q.device).chosen(
                lambda: launch(launch_with, found, q, dv),
                lambda usual: found.besides,
                lambda t: _try(launch_with, t, q.device, []) is not None,
                launch_with,
            )
        else:
            tiles = known[kind] = launch(launch_with, found, q, dv)
    except Unavailable as error:
        known[kind] = error.again()
        raise
    return tiles


def _try(
    launch_with: Callable[[Tiles], Any], tiles: Tiles, device: torch.device, errors: list[DoesNotCompile]
) -> tuple[int, bool] | None:
    """Registers spilled, where they are more than a few, and whether four warps have a multiprocessor to themselves.

    None if the tiles need more shared memory than there is, or if Triton has an error with them, which is added to
    `errors`: it may have none with others.
    """
    from triton.runtime.errors import OutOfResources

    try:
        compiled = launch_with(tiles)
    except OutOfResources as error:
        log.debug("%s does not fit: %s", tiles, error)
        return None
    except DoesNotCompile as error:
        errors.append(error.again())  # type: ignore[arg-type]
        return None
    spills = int(compiled.n_spills)
    crowded = tiles.num_warps == 4 and not fits_twice(compiled.metadata.shared, device)
    return (spills if spills > FEW_SPILLS else 0), crowded
