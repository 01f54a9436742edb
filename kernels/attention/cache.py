"""Generated modules on disk: one file a content hash, shared by processes, imported from where it can be read."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import sympy
import torch
import torch.utils._sympy.functions as torch_functions
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from xfcompile.score import Load, Rounded, Where
from xfcompile.site import Band, MaskSpec, Operand, ScoreSpec

log = logging.getLogger(__name__)

PREFIX = "attention_"


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
    """Writes the source where it is not there yet, whole or not at all; returns a file that holds exactly it."""
    key = key_of(source)
    path = directory() / f"{prefix}{key}.py"
    try:
        if _holds(path, source):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, source)
        if _holds(path, source):
            return path
    except OSError as error:
        log.debug("%s cannot be used (%s): writing to a temporary directory", path, error)
    path = _private_directory() / path.name
    _replace(path, source)
    return path


def _holds(path: Path, source: str) -> bool:
    try:
        return path.read_bytes() == source.encode()
    except OSError:
        return False


def _replace(path: Path, source: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source.encode())
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def find(key: str, prefix: str = PREFIX) -> str | None:
    """The source that has this key, if a process has stored it."""
    try:
        source = (directory() / f"{prefix}{key}.py").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return source if key_of(source) == key else None


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
    """Imports a stored file under a name of its own; `triton.jit` decides here whether it will be interpreted."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(fields: Mapping[str, object]) -> ScoreSpec | MaskSpec:
    """The spec that a generated module carries as `SPEC`."""
    scope = {**vars(torch_functions), **vars(sympy), "Load": Load, "Where": Where, "Rounded": Rounded}
    # Min, Max and Mod are names of torch's functions and of sympy's: sympy's, which mean the same, win.

    def expression(text: object) -> sympy.Basic | None:
        return None if text is None else eval(str(text), scope)  # the text is sympy.srepr's, of a file with our hash

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
    )
