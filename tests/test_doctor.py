"""The doctor: says what is there, and fails only where something is broken."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from xfcompile import __main__ as command_line
from xfcompile import doctor
from xfcompile.doctor import Finding


def find(findings: list[Finding], name: str, topic: str = "") -> Finding:
    return next(f for f in findings if f.name == name and f.topic.startswith(topic))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process that runs a Triton kernel."""
    monkeypatch.setattr(doctor, "_run", lambda command, env: None)


@pytest.fixture
def run() -> CliRunner:
    return CliRunner(env={"COLUMNS": "160"})


@pytest.mark.usefixtures("quick")
def test_it_finds_versions_devices_and_routes(run: CliRunner) -> None:
    result = run.invoke(command_line.app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("python", "torch", torch.__version__, "sympy", "cpu", "sdpa", "flash", "triton", "inductor", "cache"):
        assert word in result.output


@pytest.mark.usefixtures("quick")
def test_json_says_the_same(run: CliRunner) -> None:
    found = json.loads(run.invoke(command_line.app, ["doctor", "--json"]).output)
    assert found["healthy"] is True
    assert [Finding(**f) for f in found["findings"]] == doctor.examine()


def test_a_triton_kernel_really_runs() -> None:
    found = doctor._triton(torch.device("cpu"))
    assert (found.verdict, found.found) == ("note", "interpreted only (TRITON_INTERPRET=1), for tests")


def test_a_broken_triton_is_said_and_fails(monkeypatch: pytest.MonkeyPatch, run: CliRunner) -> None:
    real = doctor._run
    broken = [sys.executable, "-c", "raise SystemExit('no driver')"]
    monkeypatch.setattr(doctor, "_run", lambda command, env: real(broken, env))
    result = run.invoke(command_line.app, ["doctor"])
    assert result.exit_code == 1
    assert "a small kernel fails: no driver" in result.output


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    assert find(doctor.examine(), "cache").verdict == "broken"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
    assert find(doctor.examine(), "cache") == Finding("surroundings", "cache", f"{tmp_path / 'new'} (writable)")


def test_a_torch_that_is_too_old_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"torch": "2.9.1+cpu", "triton": "3.6.0", "sympy": "1.14"}.get)
    found = doctor._versions()
    assert find(found, "torch") == Finding("versions", "torch", "2.9.1+cpu (needs 2.11 or later)", "broken")
    assert find(found, "triton").verdict == "ok"
    assert find(found, "xfcompile").verdict == "broken"


def test_without_a_compiler_inductor_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("No working C++ compiler found\nin many places")

    monkeypatch.setattr(doctor, "_cpp_compiler", none)
    found = doctor._inductor(torch.device("cpu"))
    assert (found.found, found.verdict) == ("No working C++ compiler found", "broken")


@pytest.mark.usefixtures("quick")
def test_examining_changes_nothing() -> None:
    before = (dict(os.environ), torch.backends.cuda.flash_sdp_enabled(), torch.get_default_dtype())
    doctor.examine()
    assert (dict(os.environ), torch.backends.cuda.flash_sdp_enabled(), torch.get_default_dtype()) == before
