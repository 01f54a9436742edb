"""Compile times are asked of processes that begin with nothing compiled, and with what the one before left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from xfcompile.bench import startup
from xfcompile.bench.job import Start


def fake(arguments: dict[str, Any]) -> dict[str, Any]:
    """In the place of `startup.main`: what a process sees of where it is."""
    if arguments["column"] == "breaks":
        raise RuntimeError("no model\nof that name")
    if arguments["column"] == "ends":
        os._exit(3)
    print("a library's words")
    folder = Path(os.environ["TRITON_CACHE_DIR"]).parent
    before = sorted(x.name for x in folder.iterdir())
    (folder / "left").touch()
    return {"seconds": float(len(before)), "before": before, "process": os.getpid()}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Of processes that are forked for requests, here with a function of the test's."""
    monkeypatch.setattr(startup, "main", fake)
    monkeypatch.setattr(startup, "IMPORTED", ("json", "no_such_library"))

    def served(*columns: str) -> list[dict[str, Any]]:
        requests = [
            json.dumps({"arguments": {"column": c, "device": "cpu"}, "folder": str(tmp_path)}) + "\n" for c in columns
        ]
        reading, writing = os.pipe()
        startup.serve(iter(requests), writing)  # type: ignore[arg-type]
        os.close(writing)
        with os.fdopen(reading) as file:
            return [json.loads(line) for line in file]

    return served


def test_each_request_has_a_process_with_the_folders_caches(answers: Any) -> None:
    first, second = answers("x", "x")
    assert first["before"] == [] and second["before"] == ["left"]
    assert len({os.getpid(), first["process"], second["process"]}) == 3


def test_what_breaks_there_is_an_answer_and_the_next_is_served(answers: Any) -> None:
    breaks, ends, fine = answers("breaks", "ends", "x")
    assert breaks == {"failed": "RuntimeError: no model"}
    assert ends == {"failed": "exit code 3"}
    assert fine["seconds"] == 0


def test_a_process_that_can_use_no_gpu_begins_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A forked process cannot, where a library has asked for GPUs before: PyTorch says so."""
    monkeypatch.setattr(startup, "_can_use_gpus", lambda: False)
    monkeypatch.setattr(startup, "IMPORTED", ())
    arguments = {"name": "no such model", "mode": "infer", "attention": "sdpa", "scale": "quick", "column": "inductor"}
    request = json.dumps({"arguments": {**arguments, "device": "cuda"}, "folder": str(tmp_path)})
    reading, writing = os.pipe()
    startup.serve(iter([request]), writing)  # type: ignore[arg-type]
    os.close(writing)
    with os.fdopen(reading) as file:
        assert json.loads(file.readline())["failed"].startswith("KeyError: 'no such model'")


def test_a_server_that_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(startup.sys, "executable", "/bin/false")
    monkeypatch.setattr(startup, "read_from_disk", lambda *about: None)
    said: list[str] = []
    work = Start({"name": "GPT-2", "device": "cpu"})
    cells = startup.started(work, ["eager", "inductor", "xformers"], said.append)["cells"]
    assert said == ["inductor, cold", "xformers, cold"]
    assert "default mode" in cells["eager"]["skipped"]
    assert cells["inductor"]["failed"].startswith("cold: the process that others are forked from ended")


def test_libraries_are_read_once_for_each_column(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a tiny size, by a process whose caches are not those that are measured."""
    monkeypatch.setattr(startup.tempfile, "tempdir", str(tmp_path))
    asked: list[tuple[str, str, Path]] = []
    said: list[str] = []
    work = Start({"name": "GPT-2", "device": "cpu", "scale": "gpu"})

    def ask(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
        asked.append((arguments["column"], arguments["scale"], folder))
        return {"failed": "what it says does not matter"}

    for columns in (["inductor"], ["inductor", "xformers"], ["xformers"]):
        startup.read_from_disk(work, columns, ask, said.append)
    assert [(column, scale) for column, scale, _ in asked] == [("inductor", "quick"), ("xformers", "quick")]
    assert not any(folder.exists() for *_, folder in asked)
    assert said == ["inductor, its libraries", "xformers, its libraries"]
