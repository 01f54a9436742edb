"""Guards are found and can be broken; one is, and a test fails. `run.py` does it for all, in an hour or so."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import guards
import run

WRONG_WITHOUT = (
    "patterns/gated_mlp.py:_site: if gate.x is not up.x",
    "patterns/gated_mlp.py:_site: if gate.x_order != up.x_order",
    "patterns/bias_act_dropout.py:_usable: and value.ndim >= 2",
)


@pytest.mark.parametrize("file", guards.FILES)
def test_guards_have_names_of_their_own_and_recording_sources_are_python(file: str) -> None:
    names = [guard.name for guard in guards.guards(file)]
    assert len(names) == len(set(names))
    recorded = guards.recording(file)
    ast.parse(recorded)
    assert recorded.count(guards.RECORDER) >= len(names)


@pytest.mark.parametrize("name", WRONG_WITHOUT)
def test_a_broken_guard_is_another_program(name: str) -> None:
    file = name.split(":")[0]
    whole = ast.unparse(ast.parse(guards.source(file)))
    broken = guards.broken(file, name)
    ast.parse(broken)
    assert broken != whole


@pytest.mark.slow
def test_a_broken_guard_is_noticed(tmp_path: Path) -> None:
    """In a process of its own, which forks for each."""
    name = WRONG_WITHOUT[0]
    case = "test_left_alone_and_equal_to_eager[an input before and after a write]"
    test = f"tests/reading/test_gated_near_misses.py::{case}"
    trace = run.Trace(seconds={test: 5.0}, fired={name: [test]})
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(run.__file__).parent)!r})
import guards, run
(guard,) = [g for g in guards.guards("patterns/gated_mlp.py") if g.name == {name!r}]
(verdict,) = run.judge_all([guard], run.Trace(**json.loads({json.dumps(trace.__dict__)!r})), None)
print("VERDICT", verdict.fate, verdict.by)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=run.ROOT)
    assert f"VERDICT killed {test}" in said.stdout, said.stdout + said.stderr
