"""Kernel tests run in Triton's interpreter, whatever other tests do: kernels look at the variable per call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch's own: matrices of tiles are too small for several, which wait for each other instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
