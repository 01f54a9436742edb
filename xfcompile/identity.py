"""Makes this package's version part of the keys under which Inductor and AOTAutograd cache compiled graphs.

A graph in which our ops stand compiles to code that holds what those ops did when it was compiled: their backward,
their fake, their strides. After any of these changed, an entry made before must not be found again.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

FIELD = "joint_custom_pre_pass"
"""Both caches ask the pass in this field for its `uuid()`: the documented way to add to their keys."""


APART = ("bench", "page")
"""Folders of the package that nothing which compiles imports: what changes there changes no compiled code."""


@functools.cache
def package_hash(apart: tuple[str, ...] = APART) -> str:
    """A hash of the package's sources, kernels and patterns included, without the folders named."""
    digest = hashlib.sha256()
    root = os.path.dirname(os.path.abspath(__file__))
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if folder != root or f not in apart)
        for name in sorted(f for f in files if f.endswith(".py")):
            path = os.path.join(folder, name)
            digest.update(os.path.relpath(path, root).encode())
            with open(path, "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()


class Identified(CustomGraphPass):
    """The user's own passes, if there are any, under a name that says which xfcompile made the graph."""

    def __init__(self, identity: str | None, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self.identity = identity
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for apply in self.passes:
            apply(graph)

    def uuid(self) -> Any | None:
        """None, which is no caching at all, if we or one of the user's passes cannot be identified."""
        theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if self.identity is None or None in theirs else ("xfcompile", self.identity, *theirs)


def identified(patches: Mapping[str, Any], fingerprint: str | None) -> dict[str, Any]:
    """Inductor's patches, with our identity in them: the package's hash and the options it ran with. fingerprint: of
    the options (`Options.fingerprint`), None if what they ask for cannot be identified."""
    present = patches.get(FIELD, getattr(config, FIELD))
    passes = present if isinstance(present, (list, tuple)) else () if present is None else (present,)
    identity = None if fingerprint is None else f"{package_hash()} {fingerprint}"
    return {**patches, FIELD: Identified(identity, passes)}


def ours() -> bool:
    """Whether what Inductor compiles now is cached under our identity."""
    return isinstance(getattr(config, FIELD), Identified)
