"""Kernel tests run in Triton's interpreter, whatever other tests do: kernels look at the variable per call."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # attention_cases


@pytest.fixture(autouse=True)
def _forgotten_calls() -> None:
    """What a call depends on may have been changed by the test before."""
    from xfcompile.kernels.attention import programs
    from xfcompile.kernels.bias_act_dropout import calls as bias_calls

    for program in programs.known.values():
        program.calls.clear()
    bias_calls.known.clear()


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
