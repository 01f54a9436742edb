"""Runs one random program: the compiled one equals eager within eager's own error, whatever was matched in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from equivalence import check, run, tensors
from programs import Program


def fate(program: Program, route: str | None = None) -> tuple[str, list[str]]:
    """What became of a program, in a word ("invalid" where eager refuses it), and the reasons that its sites give.

    route: the one to force ("triton", interpreted). Raises whatever the comparison or the compiler raises.
    """
    fn = program.function()
    inputs = tensors(*program.shapes, dtype=program.dtype, grad=program.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(fn, inputs, grad=program.grad, double=False)
            run(fn, inputs, grad=program.grad, double=True)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return "invalid", []
        try:
            routes = {"attention": route} if route else None
            with _interpreting(route == "triton"):
                outcome = check(fn, *inputs, grad=program.grad, dynamic=program.dynamic, routes=routes)
        except Exception:
            if _fails_without_us(program):
                return "wrong without us too", []
            raise
    torch._dynamo.reset()
    reasons = [str(site.reason) for site in outcome.sites if site.reason]
    if any(site.matched and site.route != "inductor" for site in outcome.sites):
        return "fused", reasons
    if outcome.matched:
        return "left to Inductor", reasons
    return "declined" if outcome.sites else "without a candidate", reasons


@contextmanager
def _interpreting(on: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if on:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def _fails_without_us(program: Program) -> bool:
    """Whether torch compiles the program wrongly by itself (it does where overlapping views are written)."""
    inputs = tensors(*program.shapes, dtype=program.dtype, grad=program.grad)
    try:
        check(program.function(), *inputs, grad=program.grad, dynamic=program.dynamic, rewrite=False)
    except Exception:
        return True
    return False
