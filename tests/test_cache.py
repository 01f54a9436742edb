"""Kernels on disk: private, whole, and never run unless they are what their name says; any folder will do."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fresh import forget
from torch import Tensor

import xfcompile
from xfcompile.kernels.attention import cache

ROOT = Path(__file__).parents[1]
ROUTES = {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": "epilogue"}


def attention(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (19 * torch.tanh(x @ y.mT / 81)).softmax(-1) @ z


def gated(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.silu(F.linear(x, y)) * F.linear(x, z)


def activated(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.gelu(F.linear(x, y, z[0]))


FAMILIES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "attention": (attention, (1, 2, 9, 16)),
    "gated_mlp": (gated, (16, 16)),
    "bias-act-dropout": (activated, (16, 16)),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where kernels will be stored; a process that has made none."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    forget()
    yield tmp_path / "cache" / "xfcompile"
    forget()


def trained(family: str) -> None:
    """One training step by the family's kernels, compared with eager."""
    fn, shape = FAMILIES[family]

    def backend(gm: Any, examples: Any) -> Any:
        report = xfcompile.rewrite(gm, examples, {"strict": True, "routes": ROUTES})
        assert [site.route for site in report.sites if site.matched] == [ROUTES[family]]
        return torch._dynamo.lookup_backend("aot_eager")(gm, examples)

    def step(run: Callable[..., Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]
        out = run(*inputs)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    torch._dynamo.reset()
    torch.testing.assert_close(step(torch.compile(fn, backend=backend)), step(fn), atol=1e-5, rtol=1e-4)


def kernels(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.py"))


# -- private --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_their_folder_are_the_users_own(family: str, folder: Path) -> None:
    before = os.umask(0)  # which would let anybody write
    try:
        trained(family)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert kernels(folder)
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert cache.key_of(path.read_text()) == path.stem.rpartition("_")[2]


# -- what runs is what the name says --------------------------------------------------------------------------------

MALICE = "raise SystemExit('a changed kernel was run')\n"


@pytest.mark.parametrize("how", ["replaced", "appended", "not text", "empty", "linked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_kernel_is_seen_before_it_runs(family: str, how: str, folder: Path, tmp_path: Path) -> None:
    trained(family)
    texts = {path: path.read_text() for path in kernels(folder)}
    for path, text in texts.items():
        if how == "linked":
            path.unlink()
            (tmp_path / "elsewhere.py").write_text(MALICE)
            path.symlink_to(tmp_path / "elsewhere.py")
        else:
            changed = {"replaced": MALICE.encode(), "appended": text.encode() + MALICE.encode()}
            path.write_bytes(changed.get(how, b"" if how == "empty" else b"\xff\xfe\x00"))
    forget()
    with pytest.warns(RuntimeWarning, match="is not what xfcompile wrote there") as given:
        trained(family)
    told = [str(w.message) for w in given if "xfcompile wrote" in str(w.message)]
    assert len(told) == len(set(told)) == len(texts), told
    for path, text in texts.items():
        assert path.read_text() == text and not path.is_symlink()
    if how == "linked":
        assert (tmp_path / "elsewhere.py").read_text() == MALICE
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trained(family)


def test_what_changes_after_it_was_looked_at_has_no_effect(folder: Path) -> None:
    path = cache.store("def f():\n    return 1\n")
    path.write_text(MALICE)
    assert cache.load(path, "xfcompile_test_changed").f() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_bytecode_beside_a_kernel_is_run(family: str, folder: Path) -> None:
    """Python would take it for the module's, whatever the module says."""
    import importlib.util
    import marshal

    trained(family)
    for path in kernels(folder):
        at = Path(importlib.util.cache_from_source(str(path)))
        at.parent.mkdir(exist_ok=True)
        about = path.stat()
        header = importlib.util.MAGIC_NUMBER + bytes(4) + int(about.st_mtime).to_bytes(4, "little")
        header += about.st_size.to_bytes(4, "little")
        at.write_bytes(header + marshal.dumps(compile(MALICE, str(path), "exec")))
    forget()
    trained(family)


def test_a_program_that_names_a_changed_kernel_is_told_so(folder: Path) -> None:
    path = cache.store("# a kernel\n")
    path.write_text(MALICE)
    with pytest.warns(RuntimeWarning, match="is not what xfcompile wrote"):
        assert cache.find(cache.key_of("# a kernel\n")) is None


def test_python_shows_the_lines_that_run(folder: Path) -> None:
    import inspect

    path = cache.store("def f():\n    return 1\n")
    f = cache.load(path, "xfcompile_test_lines").f
    path.write_text("# another\n" * 9)
    assert inspect.getsource(f) == "def f():\n    return 1\n"


# -- any folder will do ---------------------------------------------------------------------------------------------


def no_space(path: Path, patch: pytest.MonkeyPatch) -> None:
    _refuse(path, patch, OSError(28, "No space left on device"))


def read_only(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.mkdir(parents=True)
    _refuse(path, patch, PermissionError(13, "Permission denied"))  # a mode alone does not stop root


def _refuse(path: Path, patch: pytest.MonkeyPatch, error: OSError) -> None:
    make = cache.tempfile.mkstemp

    def refused(*args: Any, dir: Any = None, **kwargs: Any) -> Any:
        if Path(dir).is_relative_to(path):
            raise error
        return make(*args, dir=dir, **kwargs)

    patch.setattr(cache.tempfile, "mkstemp", refused)


def a_file(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("not a folder")


def folders_for_files(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Each kernel's name is taken by a folder."""
    replace = cache.os.replace

    def taken(source: Any, target: Any) -> None:
        if Path(target).parent == path:
            Path(target).mkdir(exist_ok=True)
        replace(source, target)

    patch.setattr(cache.os, "replace", taken)


def a_dangling_link(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to(path.parent / "nowhere")


BROKEN = [no_space, read_only, a_file, folders_for_files, a_dangling_link]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_cannot_be_used_costs_nothing_else(
    family: str, broken: Callable[..., None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(folder, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trained(family)
    assert not folder.is_dir() or [p for p in folder.iterdir() if p.is_file()] == []
    own = cache._private_directory()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert kernels(own)


STEP = """
import sys, time, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("error", RuntimeWarning)
import test_cache
time.sleep(max(0, float(sys.argv[1]) - time.time()))
for family in test_cache.FAMILIES:
    test_cache.trained(family)
"""


@pytest.mark.slow
def test_two_processes_begin_with_an_empty_folder_at_once(folder: Path) -> None:
    import time

    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STEP.format(tests=str(ROOT / "tests")), str(time.time() + 12)]
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert kernels(folder) == sorted(folder.iterdir())
    for path in kernels(folder):
        assert cache.key_of(path.read_text()) == path.stem.rpartition("_")[2]
