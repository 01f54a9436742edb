"""Puts this folder on the path of its own tests, and runs the kernels of those that ask for it in Triton's interpreter."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # step


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _forget()


@pytest.fixture(params=["default", "kernel"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The default of CPUs, and our kernel in the interpreter."""
    if request.param == "kernel":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _forget()
    return str(request.param)


def _forget() -> None:
    """What a call of the op depends on may have been changed by the test before."""
    from xfcompile.kernels.attention import launch

    for program in launch._programs.values():
        program.calls.clear()


@dataclass
class Launches:
    """Kernels that were launched: how many forwards, and of each backward what it was to make."""

    forwards: int = 0
    needs: list[Any] = field(default_factory=list)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Counts from here on. (A dispatch mode would see calls of the ops, but Dynamo compiles nothing under one.)"""
    from xfcompile.kernels.attention import launch, launch_backward

    seen = Launches()
    forward, backward = launch.run, launch_backward.run

    def counted_forward(*args: Any) -> Any:
        seen.forwards += 1
        return forward(*args)

    def counted_backward(*args: Any) -> Any:
        seen.needs += [x for x in args if isinstance(x, launch_backward.Needs)]
        return backward(*args)

    monkeypatch.setattr(launch, "run", counted_forward)
    monkeypatch.setattr(launch_backward, "run", counted_backward)
    return seen
