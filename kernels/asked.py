"""For which of the user's lines a kernel was made last, whether its failure is to be an error, and whether its tiles
are timed: all that is known of it when it is compiled, at its first launch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """what: "attention at model.py:12". strict, autotune: the options."""

    what: str
    strict: bool
    autotune: bool = False


_asked: dict[str, Asked] = {}


def ask(name: str, what: str, strict: bool, autotune: bool = False) -> None:
    """Remember it of a kernel, by what operators call it (a hash, or a formula)."""
    _asked[name] = Asked(what, strict, autotune)


@contextmanager
def tried(names: Iterable[str], what: str) -> Iterator[None]:
    """For a while errors with some kernels are raised, and their tiles timed."""
    before = {name: _asked.get(name) for name in names}
    for name in before:
        ask(name, what, strict=True, autotune=True)
    try:
        yield
    finally:
        for name, known in before.items():
            if known is None:
                _asked.pop(name, None)
            else:
                _asked[name] = known


def asked(name: str) -> Asked:
    """What is remembered of a kernel; of one that another process has put into a program, nothing."""
    return _asked.get(name, Asked("a program that was loaded", False))
