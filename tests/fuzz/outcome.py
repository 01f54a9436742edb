"""Runs one random program: the compiled one equals eager within eager's own error, whatever was matched in it."""

from __future__ import annotations

import warnings

import torch
from equivalence import check, run, tensors
from programs import Program


def fate(program: Program) -> str:
    """What became of a program: "invalid" (eager refuses it), "no candidate", "declined", "left" or "fused".

    Raises whatever the comparison or the compiler raises.
    """
    fn = program.function()
    inputs = tensors(*program.shapes, dtype=program.dtype, grad=program.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(fn, inputs, grad=program.grad, double=False)
            run(fn, inputs, grad=program.grad, double=True)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return "invalid"
        outcome = check(fn, *inputs, grad=program.grad, dynamic=program.dynamic)
    torch._dynamo.reset()
    if any(site.matched and site.route != "inductor" for site in outcome.sites):
        return "fused"
    if outcome.matched:
        return "left to Inductor"
    return "declined" if outcome.sites else "without a candidate"
