"""Runs what `python -m xfcompile explain` is given, a script or a function, and gathers what is reported of it."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from xfcompile.report import Report, collect


@dataclass(frozen=True)
class Ran:
    """What came of it. code: how the program ended, 0 if it did so by itself. problem: what a user has to know where
    there is nothing to report."""

    report: Report
    code: int = 0
    problem: str | None = None


class WrongTarget(ValueError):
    """What was asked for is not there, or is nothing that can be run; the message says so."""


def run(target: str, arguments: Sequence[str] = (), *, no_grad: bool = False) -> Ran:
    """Run `path/to/script.py` as `__main__` with `arguments`, or call `module:function` (`path/to/file.py:function`).

    An error of the user's program is printed with its own traceback, and what was collected up to there is returned.
    no_grad: for what a function returns, which then is explained as in inference. Raises WrongTarget.
    """
    name, colon, function = target.rpartition(":")
    if target.endswith(".py") or Path(target).is_file():
        if no_grad:
            raise WrongTarget(
                "explain: --no-grad is for what a function returns; scripts say themselves, by torch.no_grad()."
            )
        return _script(Path(target), arguments)
    if colon and function.isidentifier():
        return _function(name, function, arguments, no_grad)
    raise WrongTarget(
        f"explain: {target!r} is no file, and no 'module:function'. Give the path of a script, or a module and a "
        "function in it, as in 'package.models:build'."
    )


# -- a script -----------------------------------------------------------------------------------------------------


def _script(path: Path, arguments: Sequence[str]) -> Ran:
    if not path.is_file():
        raise WrongTarget(f"explain: there is no file {str(path)!r} (looked for from {os.getcwd()}).")
    before = _graphs()
    with _as_main(path, arguments), collect() as report:
        code = _guarded(lambda: runpy.run_path(str(path), run_name="__main__"))
    if code or report.graphs:
        return Ran(report, code)
    return Ran(report, 1, _nothing_in(path, max(0, _graphs() - before)))


@contextlib.contextmanager
def _as_main(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    """What Python does for a script: its own arguments, and its folder first on the path."""
    argv, paths = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = paths


def _guarded(program: Callable[[], object]) -> int:
    """Run the user's program; how it ended."""
    try:
        program()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nexplain: interrupted", file=sys.stderr)
        return 130
    except WrongTarget:
        raise
    except Exception as error:
        _print_own(error)
        return 1
    finally:
        sys.stdout.flush()
    return 0


def _print_own(error: Exception) -> None:
    """The traceback as the user's program would have it: without the frames that ran it."""
    at: TracebackType | None = error.__traceback__
    ours = (__file__, str(Path(__file__).with_name("explain.py")), runpy.__file__, "<frozen runpy>")
    while at is not None and (at.tb_frame.f_code.co_filename in ours or _imports(at)):
        at = at.tb_next
    traceback.print_exception(type(error), error, at)


def _imports(at: TracebackType) -> bool:
    return at.tb_frame.f_code.co_filename.startswith("<frozen importlib") or at.tb_frame.f_code == _IMPORT


_IMPORT = importlib.import_module.__code__


def _graphs() -> int:
    """How many graphs Dynamo has handed to any backend so far."""
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["stats"]["unique_graphs"])


# -- where there is nothing to report -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What a script says of compilation. compiles: the lines that call torch.compile, each with the backend that it
    names (None: it names none). callables: functions and modules that it defines at its outermost level."""

    compiles: tuple[tuple[int, str | None], ...]
    callables: tuple[str, ...]


def _look(path: Path) -> _Found:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    compiles = []
    for node in ast.walk(tree):
        named = node.func if isinstance(node, ast.Call) else None
        if isinstance(named, (ast.Attribute, ast.Name)) and ast.unparse(named) in ("torch.compile", "compile"):
            assert isinstance(node, ast.Call)
            backend = next((ast.unparse(k.value) for k in node.keywords if k.arg == "backend"), None)
            if ast.unparse(named) == "torch.compile" or backend is not None:
                compiles.append((node.lineno, backend))
        for decorator in getattr(node, "decorator_list", ()):
            if not isinstance(decorator, ast.Call) and ast.unparse(decorator) == "torch.compile":
                compiles.append((decorator.lineno, None))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return _Found(
        tuple(sorted(set(compiles), key=lambda found: found[0])),
        tuple(node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")),
    )


def _nothing_in(path: Path, graphs: int) -> str:
    """Why there is no report of a script that ended well, and what to do."""
    found = _look(path)
    lines = [f"explain: {path} ran, and compiled nothing with backend='xformers'."]
    for line, backend in found.compiles:
        lines.append(f"  {path}:{line} calls torch.compile with {f'backend={backend}' if backend else 'no backend'}.")
    if graphs:
        lines.append(f"  {graphs} graph{'s were' if graphs > 1 else ' was'} compiled by another backend.")
        lines.append("Pass backend='xformers' there, and run this again.")
    elif found.compiles:
        lines.append("Nothing was compiled by it: torch.compile only compiles when its result is called with tensors.")
    elif found.callables:
        names = ", ".join(found.callables[:8])
        lines.append(f"  It defines {names}, and calls torch.compile nowhere.")
    else:
        lines.append("  It calls torch.compile nowhere.")
    if not found.compiles:
        name = next(iter(found.callables), "build")
        lines.append(
            "Compile something with torch.compile(model, backend='xformers') and call it, or give a function that "
            f"takes no arguments and returns (model, args) or (model, args, kwargs): explain {path}:{name}"
        )
    return "\n".join(lines)


# -- a function ---------------------------------------------------------------------------------------------------


def _function(module: str, name: str, arguments: Sequence[str], no_grad: bool) -> Ran:
    results: list[Any] = []
    with _arguments([module, *arguments]), collect() as report:
        code = _guarded(lambda: results.append(_found(module, name)()))
        if code or not results:
            return Ran(report, code)
        parts = _parts(results[0])
        if parts is not None:
            code = _guarded(lambda: _explain(*parts, no_grad))
    if parts is None and not report.graphs:
        return Ran(report, 1, _nothing_from(module, name, results[0]))
    return Ran(report, code)


def _explain(model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], no_grad: bool) -> None:
    import torch

    from xfcompile.explain import explain

    with torch.no_grad() if no_grad else contextlib.nullcontext():
        explain(model, *args, **kwargs)  # reports to whoever collects


@contextlib.contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


def _found(module: str, name: str) -> Callable[[], Any]:
    loaded = _module(module)
    function = getattr(loaded, name, None)
    if function is None:
        known = sorted(k for k, x in vars(loaded).items() if callable(x) and not k.startswith("_"))
        listed = f"; it has {', '.join(known[:12])}" if known else ""
        raise WrongTarget(f"explain: {module} has no function {name!r}{listed}.")
    if not callable(function):
        raise WrongTarget(f"explain: {module}:{name} is no function, but of the type {type(function).__name__}.")
    if needed := _needed(function):
        raise WrongTarget(
            f"explain: {module}:{name} needs {', '.join(needed)}, and is called without arguments. Give a function "
            "that needs none, and returns (model, args) or (model, args, kwargs)."
        )
    return function


def _needed(function: Callable[..., Any]) -> list[str]:
    """The arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # nothing is known of it
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _module(name: str) -> ModuleType:
    path = Path(name)
    if name.endswith(".py") or path.is_file():
        if not path.is_file():
            raise WrongTarget(f"explain: there is no file {name!r} (looked for from {os.getcwd()}).")
        sys.path.insert(0, str(path.resolve().parent))
        name = path.stem if path.stem not in sys.modules else f"{path.stem}_explained"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # a module that the user's own needs
        raise WrongTarget(f"explain: there is no module {name!r} (looked for from {os.getcwd()}).") from error


def _parts(result: Any) -> tuple[Callable[..., Any], Sequence[Any], dict[str, Any]] | None:
    """(model, args) or (model, args, kwargs); None of anything else."""
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        return None
    model, args, kwargs = (*result, {}) if len(result) == 2 else result
    if not callable(model) or not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        return None
    return model, args, kwargs


def _nothing_from(module: str, name: str, result: Any) -> str:
    kind = type(result).__name__
    if isinstance(result, tuple):
        kind = f"a tuple of {', '.join(type(x).__name__ for x in result) or 'nothing'}"
    return (
        f"explain: {module}:{name} was called without arguments. It returned {kind}, and compiled nothing with "
        "backend='xformers'.\nIt should return (model, args) or (model, args, kwargs), args being a tuple of what the "
        "model is called with; or call what torch.compile(model, backend='xformers') returns."
    )
