"""The command: what it refuses, and a tiny run of each benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xfcompile.__main__ import app
from xfcompile.bench.models import STARTS
from xfcompile.bench.registry import NAMES, benchmark


def call(*arguments: str) -> tuple[int, str]:
    # As wide as an error of one line: click folds it otherwise.
    done = CliRunner().invoke(app, ["bench", *arguments], terminal_width=4000, env={"COLUMNS": "4000"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--backends", "inductr"], "there is no 'inductr' (did you mean 'inductor'?); there are eager, flex"),
        (["--backends", "liger"], "there is no 'liger'"),
        (
            ["--only", "nothing of the kind"],
            "--only 'nothing of the kind' leaves no row of attention; rows are called: no",
        ),
        (["--resume"], "give --json FILE too"),
        (["--budget", "0"], "--budget is a number of seconds above 0, not 0"),
        (["--limit", "-3"], "--limit is a number of seconds above 0, not -3"),
        (["--budget", "soon"], "'--budget'"),
        (["--device", "tpu"], "--device is auto, cpu or cuda, not 'tpu'"),
        (["--plot", "a.jpg"], "a plot is a .png, .svg or .pdf, not 'a.jpg'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(arguments: list[str], said: str) -> None:
    code, output = call("attention", "--quick", *arguments)
    assert code == 2
    assert said in output.replace(" │ │ ", " ")


def test_a_file_of_something_else_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("my thesis")
    code, output = call("attention", "--quick", "--json", str(path))
    assert code == 2 and "is there and is no file of results" in output
    code, output = call("attention", "--quick", "--json", str(path), "--resume", "--in-process", "--only", "causal")
    assert code == 2 and "is not JSON" in output
    code, output = call("show", str(tmp_path / "none.json"))
    assert code == 2 and "there is no file" in output
    assert path.read_text() == "my thesis"


def test_a_file_of_results_is_kept_by_whatever_begins_anew(tmp_path: Path) -> None:
    """Nothing that is refused moves it, and no second file takes the place of the first."""
    path, other = tmp_path / "a.json", tmp_path / "package.json"
    arguments = ["attention", "--quick", "--in-process", "--no-errors", "--seconds", "0.05", "--json", str(path)]
    once = [*arguments, "--backends", "eager", "--only", "no mask, forward,"]
    code, output = call(*once, "--resume")  # which begins where there is nothing to go on with
    assert code == 0, output
    first = path.read_text()
    for wrong in (["--budget", "0"], ["--only", "nothing"], ["--backends", "inductr"], ["--device", "tpu"]):
        code, output = call(*arguments, *wrong)
        assert code == 2 and path.read_text() == first and sorted(tmp_path.iterdir()) == [path], output
    for n in (1, 2):
        second = path.read_text()
        code, output = call(*once)
        kept = tmp_path / ("a.json.before" if n == 1 else "a.json.before-2")
        assert code == 0 and kept.name in output and kept.read_text() == second
    assert (tmp_path / "a.json.before").read_text() == first
    other.write_text('{"name": "mine"}')
    code, output = call("attention", "--quick", "--json", str(other))
    assert code == 2 and "no file of results" in output and other.read_text() == '{"name": "mine"}'
    code, output = call("all", "--quick", "--out", str(other))
    assert code == 2 and "--out is a folder" in output


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_measured(tmp_path: Path, option: str) -> None:
    (tmp_path / "a").write_text("my thesis")
    code, output = call("attention", "--quick", option, str(tmp_path / "a" / "b.png"))
    assert code == 2 and "cannot be made" in output


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_columns_can_be_listed(name: str) -> None:
    code, output = call(name, "--list", "--quick")
    assert code == 0 and all(column in output for column in benchmark(name).columns)
    titles = [row.title for row in benchmark(name).rows("quick")]
    assert len(set(titles)) == len(titles) and all(title in output for title in titles)


def test_sizes_on_gpus_are_those_that_the_goals_are_about() -> None:
    rows = benchmark("attention").rows("gpu")
    assert len(rows) == 12 * 2 * 2 * 3
    assert {(r.size("D"), r.size("S")) for r in rows} == {(d, s) for d in (64, 128) for s in (1024, 4096, 16384)}
    assert {r.size("B") * r.size("S") for r in rows} == {16384}
    models = benchmark("models").rows("gpu")
    assert {r.mode for r in models} == {"infer", "train", "decode", *STARTS}
    assert len({r.name for r in models}) == 16


@pytest.mark.parametrize(
    "name,row,columns",
    [
        ("attention", "sliding forward,", "eager,inductor,xformers"),
        ("gated-mlp", "swiglu", "eager,xformers"),
        ("bias-act-dropout", "up, inference", "eager,xformers"),
        ("decode", "j <= position filled64", "eager,xformers"),
        ("models", "GPT-2 infer, eager", "eager,xformers"),
    ],
)
def test_a_tiny_run_of_each_benchmark(tmp_path: Path, name: str, row: str, columns: str) -> None:
    path, plot = tmp_path / "a.json", tmp_path / "a.png"
    arguments = ["--quick", "--in-process", "--device", "cpu", "--json", str(path), "--only", row]
    code, output = call(name, *arguments, "--backends", columns, "--plot", str(plot))
    assert code == 0, output
    found = json.loads(path.read_text())
    (entry,) = found["rows"]
    assert found["benchmark"] == name and found["not_run"] == []
    for column in columns.split(","):
        cell = entry["cells"][column]
        assert cell["ms"] > 0 and cell["low"] <= cell["ms"] <= cell["high"], cell
        assert cell["error"] < 1e-5 and cell["error_by_eager"] < 20
    assert "1 matched" in entry["cells"]["xformers"]["sites"]
    assert entry["cells"]["xformers"]["failures"] == []
    (run,) = found["runs"]
    assert run["arguments"]["quick"] and run["versions"]["torch"] and run["hardware"]["device"].startswith("CPU")
    assert plot.stat().st_size > 10_000
    code, output = call(name, *arguments, "--backends", columns, "--resume")
    assert code == 0 and "1 of 1 rows are there already" in output
    assert json.loads(path.read_text())["rows"] == found["rows"]


def test_a_library_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "diffusers" else find(name, *a))
    path = tmp_path / "a.json"
    code, output = call(
        "models", "--quick", "--in-process", "--device", "cpu", "--json", str(path), "--only", "diffusion infer sdpa"
    )
    assert code == 0 and "diffusers is not installed" in output
    assert [row["skipped"] for row in json.loads(path.read_text())["rows"]] == ["diffusers is not installed"]


@pytest.mark.slow
def test_compile_times_are_those_of_processes_with_caches_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    code, output = call(
        "models", "--quick", "--device", "cpu", "--json", str(path), "--only", "GPT-2 start, eager",
        "--backends", "inductor,xformers,flex",
    )  # fmt: skip
    assert code == 0, output
    (entry,) = json.loads(path.read_text())["rows"]
    for column in ("inductor", "xformers"):
        assert entry["cells"][column]["cold_s"] > entry["cells"][column]["warm_s"] > 0
    assert "1 matched" in entry["cells"]["xformers"]["sites"]
    assert "skipped" in entry["cells"]["flex"]
