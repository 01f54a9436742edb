"""Families of other packages: registered by a call or found by an entry point, and part of compiled code's identity."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from xfcompile.family import Family

log = logging.getLogger(__name__)

GROUP = "xfcompile.families"
"""The group of entry points that are families: `mine = "package.module:FAMILY"`."""

_registered: dict[str, tuple[Family[Any, Any], str | None]] = {}
"""The families by name, and a hash of all that each is made of when it was registered."""

_lock = threading.RLock()


def register_family(family: Family[Any, Any], sources: Iterable[ModuleType | Path | str] = ()) -> Family[Any, Any]:
    """Add a family to those that are looked for, after ours; returns it. `patterns=` names it as it does ours.

    sources: modules, or files and folders of Python, that compiled code depends on besides those in which the family's
    functions stand: kernels and operators. Compiled graphs are cached under a hash of all of these: of a module that
    belongs to a package the whole package counts. Registering a name again puts the new family in the old one's place.
    Raises ValueError for what is no family, or has the name of one of ours.
    """
    from xfcompile import families

    _check(family)
    if any(family.name == ours.name for ours in families.FAMILIES):
        raise ValueError(f"register_family: xfcompile has a family {family.name!r} of its own; give yours another name")
    with _lock:
        _registered[family.name] = family, _hash(_files(family, sources))
    return family


def unregister_family(name: str) -> None:
    """Forget a family that was registered; KeyError if there is none of this name."""
    with _lock:
        del _registered[name]


def registered() -> tuple[Family[Any, Any], ...]:
    """The families of other packages, in the order in which they came."""
    _installed()
    with _lock:
        return tuple(family for family, _ in _registered.values())


def identity(names: Iterable[str]) -> str | None:
    """What the families of other packages among these are made of; None if a source of one cannot be read, and what is
    compiled must not be cached."""
    with _lock:
        found = [(name, _registered[name][1]) for name in sorted(names) if name in _registered]
    return (
        None
        if any(made_of is None for _, made_of in found)
        else " ".join(f"{name}:{made_of}" for name, made_of in found)
    )


def _hash(files: Sequence[Path] | None) -> str | None:
    if files is None:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


@functools.cache
def _installed() -> None:
    """Registers what is installed, once. A package that cannot be imported costs its own family only."""
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            register_family(point.load())
        except Exception as error:
            log.debug("loading %s failed", point, exc_info=True)
            words = (
                f"xfcompile: the family {point.name} ({point.value}) cannot be loaded: {type(error).__name__}: {error}"
            )
            warnings.warn(words, RuntimeWarning, stacklevel=2)


def _check(family: Family[Any, Any]) -> None:
    if not isinstance(family, Family):
        raise ValueError(f"register_family takes an xfcompile.Family, not {type(family).__name__}")
    if not family.name.replace("-", "_").isidentifier():
        raise ValueError(f"register_family: the name {family.name!r} has to be a word, such as 'rms_norm'")
    if "inductor" not in family.routes:
        raise ValueError(f"register_family: {family.name} needs a route 'inductor', which leaves a site as it is")


def _files(family: Family[Any, Any], sources: Iterable[ModuleType | Path | str]) -> tuple[Path, ...] | None:
    """All files that the family is made of; None if a function of it stands in none (it was typed in, say)."""
    found: set[Path] = set()
    functions = [getattr(family, f.name) for f in fields(family)]
    for part in [*(_home(fn) for fn in functions if callable(fn)), *sources]:
        if isinstance(part, ModuleType):
            part = _path(part)
        if part is None or not Path(part).exists():
            return None
        path = Path(part)
        found.update(path.rglob("*.py") if path.is_dir() else (path,))
    own = Path(__file__).parent
    return tuple(sorted(path for path in found if not path.is_relative_to(own)))


def _home(fn: Callable[..., Any]) -> ModuleType | None:
    fn = inspect.unwrap(fn)
    while isinstance(fn, functools.partial):
        fn = fn.func
    named = fn if hasattr(fn, "__code__") or inspect.isclass(fn) else getattr(fn, "__func__", type(fn))
    return sys.modules.get(getattr(named, "__module__", None) or "")


def _path(module: ModuleType) -> Path | None:
    """The module's file, or the folder of the package that it belongs to."""
    top = sys.modules.get(module.__name__.partition(".")[0], module)
    package = getattr(top, "__file__", None) if hasattr(top, "__path__") else None
    if package is not None:
        return Path(package).parent
    file = getattr(module, "__file__", None)
    return Path(file) if file is not None else None
