"""Generated modules on disk: one file a content hash, shared by processes, for people and debuggers to read.

What runs is never a file's text as it happens to be: either this process has made the text, or it has read it and found
it to have the hash that it is named by. Files and their folder are the user's own (modes 0600 and 0700).
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import sympy
import torch
import torch.utils._sympy.functions as torch_functions
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from xfcompile.score import Load, Rounded, Where
from xfcompile.site import Band, MaskSpec, Operand, ScoreSpec
from xfcompile.written import formula_of

log = logging.getLogger(__name__)

PREFIX = "attention_"


_sources: dict[str, str] = {}
"""The texts that this process has stored or found, by their files."""


def key_of(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def directory() -> Path:
    """Beside Inductor's own generated code, so that one variable (TORCHINDUCTOR_CACHE_DIR) moves both."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()) / "xfcompile"


@functools.cache
def _private_directory() -> Path:
    """Where generated code goes when the cache directory cannot be written; the process's own, so safe to import."""
    return Path(tempfile.mkdtemp(prefix="xfcompile-"))


def store(source: str, prefix: str = PREFIX) -> Path:
    """Writes the source where it is not there yet, whole or not at all; returns a file that holds exactly it.

    A file that holds something else, though its name is the hash of what it should, is written anew with a warning.
    """
    path = directory() / f"{prefix}{key_of(source)}.py"
    try:
        if not _holds(path, source):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _replace(path, source)
    except OSError as error:
        log.debug("%s cannot be used (%s): writing to a temporary directory", path, error)
        path = _private_directory() / path.name
        _replace(path, source)
    _sources[str(path)] = source
    return path


def _holds(path: Path, source: str) -> bool:
    try:
        found = path.read_bytes()
    except OSError:
        return False
    if found != source.encode():
        _warn_of_a_change(path)
        return False
    return True


@functools.cache
def _warn_of_a_change(path: Path) -> None:
    """Once for each file."""
    warnings.warn(
        f"{path} is not what xfcompile wrote there: its text has another hash than its name says. It is not used.",
        RuntimeWarning,
        stacklevel=4,
    )


def _replace(path: Path, source: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # of mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source.encode())
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def find(key: str, prefix: str = PREFIX) -> str | None:
    """The source that has this key, if a process has stored it."""
    path = directory() / f"{prefix}{key}.py"
    try:
        source = path.read_text()
    except UnicodeDecodeError:
        source = ""
    except OSError:
        return None
    if key_of(source) == key:
        return source
    _warn_of_a_change(path)
    return None


def stored(key: str, op: str, prepare: str, prefix: str = PREFIX) -> str:
    """The source that another process has stored; raises RuntimeError where none has. prepare: the call that does."""
    source = find(key, prefix)
    if source is None:
        raise RuntimeError(
            f"xfcompile::{op}: no kernel {key!r} was prepared in this process and none is stored in "
            f"{directory()}; call xfcompile.kernels.{prepare} first"
        )
    return source


def read_back(key: str, op: str, prepare: str) -> tuple[str, ScoreSpec | MaskSpec]:
    """The source that another process has stored, and its spec."""
    source = stored(key, op, f"attention.{prepare}(spec)")
    return source, parse(load(store(source), f"xfcompile_{op}_{key}_spec").SPEC)


def canonical_names(scalars: Sequence[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Symbol]:
    """Names that do not depend on the program: n0, n1 … for integers, a0, a1 … for reals. The text of a kernel is then
    its identity."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    for x in scalars:
        stem = "n" if x.is_integer else "a"
        number = sum(new.name.startswith(stem) for new in names.values())
        assumptions = {"integer": True} if x.is_integer else {"real": True}
        # What is known of signs is kept: it makes divisions and scales cheaper.
        assumptions |= {fact: True for fact in ("positive", "nonnegative") if getattr(x, f"is_{fact}")}
        names[x] = sympy.Symbol(f"{stem}{number}", **assumptions)
    return names


def load(path: Path, name: str) -> ModuleType:
    """Imports a file that `store` returned, under a name of its own; `triton.jit` decides here whether it will be
    interpreted.

    It runs the text that was stored, which is not read again: what has changed in the file since has no effect.
    """
    source = _sources[str(path)]
    module = ModuleType(name)
    module.__file__ = str(path)
    # Triton, and tracebacks, ask Python for the lines of a function: those that run, not those of the file by then.
    # (None in the place of the time at which the file was changed: these lines are not compared with a file.)
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def parse(fields: Mapping[str, object]) -> ScoreSpec | MaskSpec:
    """The spec that a generated module carries as `SPEC`."""
    # Min, Max and Mod are names of torch's functions and of sympy's: sympy's, which mean the same, win.
    functions = {**vars(torch_functions), "Load": Load, "Where": Where, "Rounded": Rounded}

    def expression(text: object) -> sympy.Basic | None:
        return None if text is None else formula_of(str(text), functions)

    def many(name: str) -> tuple[sympy.Basic | None, ...]:
        return tuple(expression(x) for x in fields[name])  # type: ignore[attr-defined]

    operands = tuple(Operand(getattr(torch, dtype), ndim) for dtype, ndim in fields["operands"])  # type: ignore
    if "even" in fields:
        return MaskSpec(expression(fields["keep"]), many("even"), operands, many("scalars"))
    return ScoreSpec(
        score=expression(fields["score"]),
        keep=expression(fields["keep"]),
        dead=fields["dead"],  # type: ignore[arg-type]
        operands=operands,
        scalars=many("scalars"),
        sink=expression(fields["sink"]),
        band=Band(expression(fields["lower"]), expression(fields["upper"]), bool(fields["exact"])),
        far=bool(fields["far"]),
        full=expression(fields["full"]),
        floor=expression(fields["floor"]),
        coarse=bool(fields["coarse"]),
        dropout=float(fields["dropout"]),  # type: ignore[arg-type]
        leaks=bool(fields["leaks"]),
    )
