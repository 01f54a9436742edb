"""Tile sizes that are timed: where the routes of a site are, and kept on disk as their times are, for all processes.

A kernel looks for its tiles at its first launch (`fit.py`). If it was asked for with the option `autotune`, that launch
takes what was the fastest before, on such a device with such versions; and while a route that launches it is being
timed (`xfcompile.tuning`) and nothing is known yet, it times those that fit, on the tensors that are there.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, Generic, TypeVar

import torch

from xfcompile.kernels.asked import asked

log = logging.getLogger(__name__)

SHARE = 0.25
"""Of the time that is left, one kernel may take so much: a route launches up to three."""

_lock = threading.Lock()
_until: list[float] = []
"""When the routes that are being timed have to be (by `time.monotonic`): of the process, for gradients are computed in
threads of their own."""
_found: set[tuple[str, tuple[object, ...]]] = set()
"""Kernels and kinds of tensors of which the fastest tiles are known to this process."""


@contextmanager
def timing(seconds: float) -> Iterator[None]:
    """Meanwhile tiles that are looked for are timed, as long as there is time."""
    end = time.monotonic() + seconds
    with _lock:
        _until.append(end)
    try:
        yield
    finally:
        with _lock:
            _until.remove(end)


def wanted(name: str, kind: tuple[object, ...]) -> bool:
    """Whether a kernel's tiles were asked to be timed, and are still to be looked for."""
    return asked(name).autotune and (name, kind) not in _found


Tiles = TypeVar("Tiles")
"""A dataclass of numbers, powers of two but for `num_stages`."""


class Search(Generic[Tiles]):
    """The fastest tiles of a kernel for a kind of tensors. sort: their class."""

    def __init__(self, sort: type[Tiles], name: str, kind: tuple[object, ...], device: torch.device) -> None:
        from xfcompile.tuning import store

        self.sort, self.name, self.kind, self.device = sort, name, kind, device
        # Devices of one sort are told apart by nothing.
        described = [str(x) for x in kind if not isinstance(x, torch.device)]
        self.about = store.identity(device, f"tiles of {name}: {', '.join(described)}", "")

    def chosen(
        self,
        usual: Callable[[], Tiles],
        besides: Callable[[Tiles], Iterable[Tiles]],
        fits: Callable[[Tiles], bool],
        launch_with: Callable[[Tiles], Any],
    ) -> Tiles:
        """Launches with the tiles that are kept, or with the fastest of the usual ones and those besides them that fit.

        usual: finds them by launching. fits: launches too.
        """
        before = self.stored()
        if before is not None and fits(before):
            return before
        first = usual()
        best = self.fastest(first, (t for t in besides(first) if t != first and fits(t)), launch_with)
        launch_with(best)  # what the others have written is not looked at
        return best

    def stored(self) -> Tiles | None:
        """What this or another process has found; from then on nothing is looked for in this one."""
        from xfcompile.tuning import store

        timings = store.find(self.about)
        if timings is None:
            return None
        try:
            tiles = _tiles_of(self.sort, timings.winner())
        except ValueError:
            store.refused(self.about, "they are of no tiles")
            return None
        self._done()
        return tiles

    def fastest(self, usual: Tiles, others: Iterable[Tiles], launch_with: Callable[[Tiles], Any]) -> Tiles:
        """By time, if routes are being timed; else those that were found without."""
        from xfcompile.tuning import store, timer
        from xfcompile.tuning.facts import Timings, Trial

        left = min(_until, default=0.0) - time.monotonic()
        if left <= 0:
            return usual
        end, tried, complete = time.monotonic() + SHARE * left, [usual], True
        for tiles in others:
            tried.append(tiles)
            if time.monotonic() > end:
                complete = False
                break
        calls = {_words(tiles): functools.partial(launch_with, tiles) for tiles in tried}
        found = timer.current()(calls, self.device, False)
        timings = Timings(tuple(Trial(words, float(found[words])) for words in calls), complete)
        log.info("tiles of %s (%s): %s", self.name, self.about["site"], timings.words())
        if complete:
            store.store(self.about, timings)
            self._done()
        return _tiles_of(self.sort, timings.winner())

    def _done(self) -> None:
        _found.add((self.name, self.kind))


def _words(tiles: Any) -> str:
    return ", ".join(f"{name} {int(n)}" for name, n in asdict(tiles).items())


def _tiles_of(sort: type[Tiles], words: str) -> Tiles:
    """Raises ValueError for what are none."""
    numbers = dict(part.split(" ") for part in words.split(", "))
    of: dict[str, Any] = {f.name: f for f in fields(sort)}  # type: ignore[arg-type]
    if numbers.keys() != of.keys():
        raise ValueError(f"no tiles: {words!r}")
    made = sort(**{name: bool(int(n)) if of[name].type == "bool" else int(n) for name, n in numbers.items()})
    sizes = [n for name, n in asdict(made).items() if of[name].type != "bool"]  # type: ignore[call-overload]
    two = [n for name, n in asdict(made).items() if of[name].type != "bool" and name != "num_stages"]  # type: ignore
    if _words(made) != words or min(sizes) < 1 or any(n & (n - 1) for n in two):
        raise ValueError(f"no tiles: {words!r}")
    return made
