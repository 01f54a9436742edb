"""`python -m xfcompile explain`: runs a script or a function as Python would, and says what was found, or why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import xfcompile
from xfcompile import __main__ as command_line

Explain = Callable[..., Any]

ROOT = Path(xfcompile.__file__).parents[1]

HEAD = """
import sys
import torch

def attention(q, k, v):
    return (q @ k.mT / 8).softmax(-1) @ v

QKV = torch.randn(3, 1, 2, 16, 8)
"""


def in_a_process(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "xfcompile", "explain", *arguments]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The same in this process, which takes seconds less."""
    modules, path = set(sys.modules), list(sys.path)

    def run(tmp_path: Path, *arguments: str) -> Any:
        monkeypatch.chdir(tmp_path)
        torch._dynamo.reset()
        for name in ("mine", "mine_explained"):
            sys.modules.pop(name, None)
        result = CliRunner(env={"COLUMNS": "120"}).invoke(command_line.app, ["explain", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return SimpleNamespace(returncode=result.exit_code, stdout=result.stdout, stderr=result.stderr)

    yield run
    for name in set(sys.modules) - modules:
        if name.startswith("mine"):
            del sys.modules[name]
    sys.path[:] = path


def script(tmp_path: Path, text: str, name: str = "mine.py") -> str:
    (tmp_path / name).write_text(HEAD + dedent(text))
    return name


def test_a_script_runs_as_main_with_its_own_arguments_and_output(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'beside'")
    name = script(
        tmp_path,
        """
        import beside
        if __name__ == "__main__":
            print("arguments", sys.argv, beside.WORD, sys.modules["__main__"].HERE)
            with torch.no_grad():
                torch.compile(attention, backend="xformers")(*QKV)
        """.replace("import beside", "import beside\n        HERE = 'main'"),
    )
    done = in_a_process(tmp_path, name, "--html", "page.html", "--json", "report.json", "--", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    assert "arguments ['mine.py', '--epochs', '3'] beside main" in done.stdout
    assert "1 attention site: 1 matched (1 sdpa)" in done.stdout and "mine.py:6" in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert (
        page.startswith("<!doctype html>")
        and "<h1>mine.py</h1>" in page
        and "return (q @ k.mT"
        in page.replace("<span class=&quot;", "").replace('<span class="k">return</span>', "return")
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [s["route"] for s in report["sites"]] == ["sdpa"]


def test_an_error_of_the_script_is_its_own_and_what_was_found_is_reported(tmp_path: Path) -> None:
    name = script(
        tmp_path,
        """
        def main():
            with torch.no_grad():
                torch.compile(attention, backend="xformers")(*QKV)
            raise KeyError("mine")
        main()
        """,
    )
    done = in_a_process(tmp_path, name, "--html", "page.html")
    assert done.returncode == 1
    assert "1 attention site: 1 matched (1 sdpa)" in done.stdout
    assert (tmp_path / "page.html").exists()
    lines = done.stderr.splitlines()
    start = lines.index("Traceback (most recent call last):")
    assert "mine.py" in lines[start + 1] and "in <module>" in lines[start + 1]
    assert "KeyError: 'mine'" in lines
    assert "xfcompile" not in "".join(lines[start : lines.index("KeyError: 'mine'")])


@pytest.mark.parametrize("ending, code", [("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit('no more')", 1)])
def test_the_exit_code_is_the_scripts(explain: Explain, tmp_path: Path, ending: str, code: int) -> None:
    done = explain(tmp_path, script(tmp_path, f"torch.compile(attention, backend='xformers')(*QKV)\n{ending}\n"))
    assert done.returncode == code
    assert "1 attention site" in done.stdout
    assert ("no more" in done.stderr) == (code == 1)


@pytest.mark.parametrize("option", ["--html", "--json"])
@pytest.mark.parametrize("path, why", [(".", "is a folder"), ("mine.py/page", "cannot be made")])
def test_what_cannot_be_written_is_said_before_anything_runs(
    explain: Explain, tmp_path: Path, option: str, path: str, why: str
) -> None:
    done = explain(tmp_path, script(tmp_path, "print('it ran')\n"), option, path)
    assert done.returncode == 2 and "it ran" not in done.stdout
    assert f"explain: {option}: " in done.stderr and why in done.stderr


def test_files_are_where_they_were_asked_for_when_a_script_goes_elsewhere(explain: Explain, tmp_path: Path) -> None:
    text = "import os\nos.mkdir('there')\nos.chdir('there')\ntorch.compile(attention, backend='xformers')(*QKV)\n"
    done = explain(tmp_path, script(tmp_path, text), "--html", "new/p.html", "--json", "r.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "p.html").exists() and (tmp_path / "r.json").exists()


def test_one_file_that_fails_in_the_end_costs_no_other(explain: Explain, tmp_path: Path) -> None:
    text = "import os\ntorch.compile(attention, backend='xformers')(*QKV)\nos.mkdir('p.html')\n"
    done = explain(tmp_path, script(tmp_path, text), "--html", "p.html", "--json", "r.json")
    assert done.returncode == 1 and "could not write" in done.stderr and "1 attention site" in done.stdout
    assert [s["route"] for s in json.loads((tmp_path / "r.json").read_text())["sites"]] == ["sdpa"]


def test_a_script_for_another_backend_is_told_so(explain: Explain, tmp_path: Path) -> None:
    done = explain(tmp_path, script(tmp_path, "torch.compile(attention, backend='eager')(*QKV)\n"), "--html", "p.html")
    assert done.returncode == 1 and not (tmp_path / "p.html").exists()
    assert "mine.py ran, and compiled nothing with backend='xformers'" in done.stderr
    assert "mine.py:9 calls torch.compile with backend='eager'" in done.stderr
    assert "1 graph was compiled by another backend" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_that_calls_nothing_it_compiled_is_told_so(explain: Explain, tmp_path: Path) -> None:
    done = explain(tmp_path, script(tmp_path, "f = torch.compile(attention, backend='xformers')\n"))
    assert done.returncode == 1
    assert "only compiles when its result is called" in done.stderr


def test_a_script_that_only_defines_things_is_told_how_to_go_on(explain: Explain, tmp_path: Path) -> None:
    done = explain(tmp_path, script(tmp_path, "class Net(torch.nn.Module): pass\n"))
    assert done.returncode == 1
    assert "It defines attention, Net, and calls torch.compile nowhere" in done.stderr
    assert "explain mine.py:attention" in done.stderr


@pytest.mark.parametrize(
    "body, route",
    [
        ("return attention, (q, k, v)", "sdpa"),
        ("return attention, [q], dict(k=k, v=v)", "sdpa"),
        ("return torch.compile(attention), (q, k, v)", "sdpa"),
        ("torch.compile(attention, backend='xformers')(q, k, v)", "sdpa"),
    ],
)
def test_a_function_returns_a_model_or_compiles_one(explain: Explain, tmp_path: Path, body: str, route: str) -> None:
    script(tmp_path, f"def build():\n    q, k, v = QKV\n    {body}\n")
    for target in ("mine:build", "mine.py:build"):
        done = explain(tmp_path, target, "--json", "report.json")
        assert done.returncode == 0, done.stderr
        assert [s["route"] for s in json.loads((tmp_path / "report.json").read_text())["sites"]] == [route]


def test_no_grad_is_inference(explain: Explain, tmp_path: Path) -> None:
    text = """
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(16, 16))
        def forward(self, q, k, v):
            return (q @ k.mT + self.bias).softmax(-1) @ v
    def build():
        return Net(), tuple(QKV)
    """
    script(tmp_path, text)
    routes = []
    for more in ([], ["--no-grad"]):
        explain(tmp_path, "mine:build", "--json", "report.json", *more)
        routes.append(json.loads((tmp_path / "report.json").read_text())["sites"][0]["route"])
    assert routes == ["inductor", "sdpa"]  # SDPA on CPUs has no fused gradient of a bias


@pytest.mark.parametrize(
    "target, words",
    [
        ("mine:build", "It returned NoneType, and compiled nothing with backend='xformers'"),
        ("mine:pair", "It returned a tuple of int, int, and compiled nothing"),
        ("mine:nowhere", "mine has no function 'nowhere'; it has attention, build, pair"),
        ("mine:QKV", "mine:QKV is no function, but of the type Tensor"),
        ("mine:attention", "mine:attention needs q, k, v, and is called without arguments"),
        ("nomodule:f", "there is no module 'nomodule'"),
        ("none.py", "there is no file 'none.py'"),
        ("none.py:f", "there is no file 'none.py'"),
        ("what is this", "is no file, and no 'module:function'"),
    ],
)
def test_what_cannot_be_explained_is_said(explain: Explain, tmp_path: Path, target: str, words: str) -> None:
    script(tmp_path, "def build():\n    pass\ndef pair():\n    return 1, 2\n")
    done = explain(tmp_path, target)
    assert done.returncode == (1 if target.endswith(("build", "pair")) else 2)
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_module_that_cannot_be_imported_shows_its_own_error(explain: Explain, tmp_path: Path) -> None:
    script(tmp_path, "import nothing_of_this_name\n")
    assert "--no-grad is for what a function returns" in explain(tmp_path, "mine.py", "--no-grad").stderr
    for target in ("mine:build", "mine.py:build", "mine.py"):
        done = explain(tmp_path, target)
        assert done.returncode == 1
        assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in done.stderr
        assert "running.py" not in done.stderr and "importlib" not in done.stderr


def test_a_script_with_only_misses_is_reported(explain: Explain, tmp_path: Path) -> None:
    text = "torch.compile(lambda q, k, v: (q @ k.mT).softmax(-2) @ v, backend='xformers')(*QKV)\n"
    done = explain(tmp_path, script(tmp_path, text), "--html", "page.html")
    assert done.returncode == 0
    assert "1 attention site: 0 matched, 1 not matched" in done.stdout
    assert "Near misses" in (tmp_path / "page.html").read_text()
