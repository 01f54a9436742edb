"""Tells kernels which of the user's lines they are called for, whether an error with one is to be raised, and whether
tiles are timed: they are compiled when they are launched first, when nothing is known any more of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import fx


def tell_kernels(added: Iterable[fx.Node], what: str, *, strict: bool, autotune: bool) -> None:
    """added: nodes, among them calls of our operators. what: "attention at model.py:12"."""
    from xfcompile.kernels.asked import ask

    for name in _names(added):
        ask(name, what, strict, autotune)


@contextmanager
def tried(nodes: Iterable[fx.Node], what: str) -> Iterator[None]:
    """While a graph is tried an error with one of its kernels is raised, and their tiles are timed; afterwards all is
    as it was."""
    from xfcompile.kernels import asked

    with asked.tried(list(_names(nodes)), what):
        yield


def _names(nodes: Iterable[fx.Node]) -> Iterator[str]:
    """What operators call the kernels that they launch."""
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "xfcompile":
            names = [argument.name for argument in node.target._schema.arguments]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            yield from (str(given[name]) for name in ("kernel", "formula") if isinstance(given.get(name), str))
