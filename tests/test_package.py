"""The package: what installing and importing it do to the rest of a Python environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(program: str, *, cwd: Path, path: list[Path]) -> str:
    """The output of a program in a process of its own, with the working directory and `path` on sys.path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A normal installation of this checkout in a folder of its own."""
    target, source = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("source")
    # From a copy: setuptools leaves what it built beside the sources, and installs that again, files since deleted too.
    for name in ("xfcompile", "kernels", "patterns"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run([*pip, *options, str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def test_it_installs_one_package_with_kernels_and_patterns_in_it(installed: Path) -> None:
    assert {p.name.partition("-")[0] for p in installed.iterdir()} == {"xfcompile"}
    for name in ("py.typed", "backend.py", "patterns/attention.py", "kernels/attention/op.py"):
        found = installed / "xfcompile" / name
        assert found.is_file()
        assert not found.is_symlink()


def test_every_source_file_is_installed(installed: Path) -> None:
    def sources(root: Path) -> set[str]:
        walk = os.walk(root, followlinks=True)
        return {os.path.relpath(os.path.join(f, n), root) for f, _, names in walk for n in names if n.endswith(".py")}

    assert sources(installed / "xfcompile") == sources(ROOT / "xfcompile")


def test_compile_finds_the_backend_by_name_without_an_import(installed: Path, tmp_path: Path) -> None:
    program = """
        import sys, torch

        def attention(q, k, v):
            return torch.softmax(q @ k.mT / 8, -1) @ v

        q, k, v = torch.randn(3, 1, 2, 9, 64).unbind()
        assert not any(name.partition(".")[0] == "xfcompile" for name in sys.modules)
        compiled = torch.compile(attention, backend="xformers")
        # Before anything is traced, as of Inductor's own name.
        assert "torch._inductor.compile_fx" in sys.modules
        found = compiled(q, k, v)
        torch.testing.assert_close(found, attention(q, k, v))
        print(sys.modules["xfcompile"].__file__)
        print("xformers" in torch._dynamo.list_backends())
    """
    file, listed = run(program, cwd=tmp_path, path=[installed]).split()
    assert file == str(installed / "xfcompile" / "__init__.py")
    assert listed == "True"


@pytest.mark.parametrize(("gpu", "answer"), [(True, "ready"), (False, "None")])
def test_processes_that_compile_start_with_the_name_where_there_is_a_gpu(
    gpu: bool, answer: str, installed: Path, tmp_path: Path
) -> None:
    program = f"""
        import torch
        from torch._inductor import config
        from torch._inductor.async_compile import AsyncCompile

        config.compile_threads = 2
        torch.cuda.is_available = lambda: {gpu}
        torch.compile(lambda x: x, backend="xformers")
        started = AsyncCompile._ready_future
        print(None if started is None else started.result(timeout=100))
    """
    assert run(program, cwd=tmp_path, path=[installed]).split() == [answer]


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "xfcompile", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "TORCHINDUCTOR_CACHE_DIR is '/dev/null/cache'" in last and "name another one, or unset it" in last


IMPORTS = """
    import logging, os, sys, threading, warnings
    import torch, torch._inductor.config, torch._dynamo.config, torch._functorch.config

    def loggers():
        return {n: list(x.handlers) for n, x in logging.root.manager.loggerDict.items() if hasattr(x, "handlers")}

    def state():
        return {
            "modules": {name for name in sys.modules if name.partition(".")[0] in ("kernels", "patterns")},
            "path": list(sys.path),
            "environment": dict(os.environ),
            "filters": list(warnings.filters),
            "handlers": loggers(),
            "root": (logging.root.level, list(logging.root.handlers)),
            "inductor": torch._inductor.config.get_config_copy(),
            "dynamo": torch._dynamo.config.get_config_copy(),
            "functorch": torch._functorch.config.get_config_copy(),
            "backends": sorted(torch._dynamo.list_backends(exclude_tags=())),
            "dtype": torch.get_default_dtype(),
            "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()),
            "sdpa": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
            "threads": (torch.get_num_threads(), threading.active_count()),
            "random": torch.random.get_rng_state().tolist(),
            "excepthook": sys.excepthook,
            "printing": torch._tensor_str.PRINT_OPTS,
        }

    before = state()
    import xfcompile
    after = state()
    for key in before:
        new = {k: v for k, v in after[key].items() if k in before[key]} if key == "handlers" else after[key]
        assert new == before[key], key
    assert not any(after["handlers"][name] for name in after["handlers"].keys() - before["handlers"].keys())
    print("unchanged")
"""


def test_importing_it_changes_nothing(installed: Path, tmp_path: Path) -> None:
    assert run(IMPORTS, cwd=tmp_path, path=[installed]) == "unchanged\n"


def test_the_public_names_are_not_the_modules_of_the_same_name(installed: Path, tmp_path: Path) -> None:
    program = """
        import xfcompile.rewrite, xfcompile.explain
        from xfcompile.rewrite import rewrite_graph
        import xfcompile

        print(*(name for name in xfcompile.__all__ if not callable(getattr(xfcompile, name))))
    """
    assert run(program, cwd=tmp_path, path=[installed]) == "\n"


HUGGING_FACE = '''
"""Stands in for Hugging Face's package of this name."""
__version__ = "VERSION"

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    # A decorator that decorates nothing, or anything else that one can make and never look at.
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None, "__call__": lambda self, x: x})
'''


@pytest.mark.parametrize("hugging_face", [False, True], ids=["without Hugging Face's kernels", "with it"])
def test_transformers_works_from_the_repositorys_root(hugging_face: bool, tmp_path: Path) -> None:
    version = pytest.importorskip("transformers.utils.import_utils").KERNELS_MIN_VERSION
    if hugging_face:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(HUGGING_FACE.replace("VERSION", version))
        metadata = tmp_path / f"kernels-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    program = """
        import torch, transformers, xfcompile
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
        model = BertModel(BertConfig(vocab_size=9, attn_implementation="eager", **sizes)).eval()
        x = torch.ones(1, 5, dtype=torch.long)
        with torch.no_grad(), xfcompile.collect() as report:
            found = torch.compile(model, backend=xfcompile.xformers)(x).last_hidden_state
            torch.testing.assert_close(found, model(x).last_hidden_state)
        print(sum(s.family == "attention" for s in report.sites), report.failures)
        import kernels
        print(kernels.__file__)
        print(transformers.utils.import_utils.is_kernels_available())
    """
    sites, file, available = run(program, cwd=ROOT, path=[tmp_path]).splitlines()
    assert sites == "1 []"
    assert available == str(hugging_face)
    # Without Hugging Face's package the name is that of a folder, which Python lets any real package precede.
    assert file == (str(tmp_path / "kernels" / "__init__.py") if hugging_face else "None")
