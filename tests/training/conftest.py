"""Puts this folder on the path of its own tests, and runs kernels in Triton's interpreter where a test asks for it."""

from __future__ import annotations

import sys
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
    from xfcompile.kernels.attention import programs

    for program in programs.known.values():
        program.calls.clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts from here on. (A dispatch mode would see calls of the ops, but Dynamo compiles nothing under one.)"""
    from step import Launches

    from xfcompile.kernels.attention import launch, launch_backward
    from xfcompile.kernels.attention.backward_layout import Needs

    seen = Launches()
    forward, backward = launch.run, launch_backward.run

    def counted_forward(*args: Any, **kwargs: Any) -> Any:
        seen.forwards += 1
        return forward(*args, **kwargs)

    def counted_backward(*args: Any, **kwargs: Any) -> Any:
        seen.needs += [x for x in (*args, *kwargs.values()) if isinstance(x, Needs)]
        return backward(*args, **kwargs)

    monkeypatch.setattr(launch, "run", counted_forward)
    monkeypatch.setattr(launch_backward, "run", counted_backward)
    return seen
