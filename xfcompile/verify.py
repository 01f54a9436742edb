"""Runs a program once, with each replaced site beside its original, and reports their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from xfcompile.backend import rewritten
from xfcompile.explain import fresh_call, original
from xfcompile.options import Options
from xfcompile.report import Report, collect, publish


def verify(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Rewrite `fn` (a function or a module) for these arguments, run it once, and check every replaced site.

    Each site is run beside its original, forward and, where a gradient may flow into it, backward, both against the
    original in fp64, one site at a time: `Report.checks` has the errors. The rewritten graphs run as they are, without
    Inductor. The run is a real one: a module in train mode updates its statistics.
    """
    with collect() as report:
        torch.compile(fresh_call(), backend=_fresh_backend())(original(fn), args, kwargs)
    return report


def _fresh_backend() -> Callable[..., Any]:
    def verifying(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report, verification = rewritten(gm, example_inputs, Options(verify=True))
        publish(report)
        return gm.forward if verification is None else verification.before(gm.forward, strict=False)

    return verifying
