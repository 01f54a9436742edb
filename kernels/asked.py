"""For which of the user's lines a kernel was made last, and whether its failure is to be an error: all that is known of
it when it is compiled, at its first launch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """what: "attention at model.py:12". strict: the option."""

    what: str
    strict: bool


_asked: dict[str, Asked] = {}


def ask(name: str, what: str, strict: bool) -> None:
    """Remember it of a kernel, by what operators call it (a hash, or a formula)."""
    _asked[name] = Asked(what, strict)


@contextmanager
def strictly(names: Iterable[str], what: str) -> Iterator[None]:
    """For a while errors with some kernels are raised."""
    before = {name: _asked.get(name) for name in names}
    for name in before:
        ask(name, what, True)
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
