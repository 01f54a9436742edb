"""The attention kernel compiles for GPUs that are not here; its main configurations fit in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def compiled(path: Path, *options: str) -> list[dict[str, Any]]:
    # A process of its own: Triton must not have been imported for its interpreter.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples/cross_compile.py"), "--json", str(path), *options]
    subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(path.read_text())["results"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("cross") / "results.json")


def test_every_target_compiles(results: list[dict[str, Any]]) -> None:
    assert {(r["target"], r["dim"]) for r in results} == {
        (target, dim) for target in ("sm_80", "sm_90", "sm_100", "gfx942") for dim in (64, 128)
    }


def test_main_configurations_do_not_spill(results: list[dict[str, Any]]) -> None:
    assert [r for r in results if r["spills"]] == []


def test_hopper_multiplies_with_wgmma(results: list[dict[str, Any]]) -> None:
    assert [r["wgmma"] for r in results if r["target"] == "sm_90"] == [True, True]


@pytest.mark.slow
def test_every_program_compiles_for_hopper_and_hardly_spills(tmp_path: Path) -> None:
    results = compiled(tmp_path / "results.json", "--all", "--target", "sm_90")
    assert len({r["program"] for r in results}) == 12
    spilling = [(r["program"], r["dtype"], r["dim"], r["spills"]) for r in results if r["spills"] > 64]
    assert spilling == []
