"""Runs one random program: the compiled one equals eager within eager's own error, whatever was matched in it."""

from __future__ import annotations

import functools
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from equivalence import ALL, Outcome, Shown, assert_equivalent, check, lie_alike, rewriting, run, tensors
from writer import Program

from xfcompile.read import Reading
from xfcompile.rewrite import rewrite_graph

TRACES: dict[Any, Any] = {}
"""What each operation was read as, for all programs of static shapes: reading it is most of the time that one takes."""


@dataclass
class Tally:
    """How many elements dropouts kept, how many there were, and how many are expected to be kept, and the variance."""

    kept: int = 0
    elements: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def add(self, kept: int, elements: int, rate: float) -> None:
        self.kept += kept
        self.elements += elements
        self.expected += elements * (1 - rate)
        self.variance += elements * rate * (1 - rate)

    @property
    def likely(self) -> bool:
        """Whether as many were kept as one expects, within five standard deviations."""
        return abs(self.kept - self.expected) <= 5 * self.variance**0.5


TALLY = Tally()


def fate(program: Program, route: str | None = None, families: frozenset[str] = ALL) -> tuple[str, list[str]]:
    """What became of a program, in a word ("invalid" where eager refuses it), and the reasons that its sites give.

    route: "triton" forces the program's own routes to our kernels, interpreted; any other is forced for attention.
    Raises whatever the comparison or the compiler raises.
    """
    fn = program.function()
    inputs = tensors(*program.shapes, dtype=program.dtype, grad=program.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            eager = run(fn, inputs, grad=program.grad, double=False)
            exact = run(program.in_fp64(), inputs, grad=program.grad, double=True)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return "invalid", []
        routes = dict(program.routes) if route == "triton" else {"attention": route} if route else None
        try:
            with _interpreting(route == "triton"), _shared_traces(not program.dynamic):
                if program.kept:
                    outcome = _dropped_once(program, inputs, routes, families)
                elif program.dropped:
                    outcome = _dropped(program, inputs, routes, families)
                else:
                    outcome = check(
                        fn, *inputs, grad=program.grad, dynamic=program.dynamic, routes=routes, family=families,
                        aot=program.aot, known=(eager, exact), computed=program.computed,
                    )  # fmt: skip
        except Exception:
            if _fails_without_us(program):
                return "wrong without us too", []
            raise
    torch._dynamo.reset()
    reasons = [f"{site.family}: {site.reason}" for site in outcome.sites if site.reason]
    if any(site.matched and site.route != "inductor" for site in outcome.sites):
        return "fused", reasons
    if outcome.matched:
        return "left to Inductor", reasons
    return "declined" if outcome.sites else "without a candidate", reasons


def _compiled(
    program: Program, routes: dict[str, str] | None, families: frozenset[str]
) -> tuple[Callable[..., Any], Callable[..., Any], Outcome]:
    torch._dynamo.reset()
    outcome, fn = Outcome(), program.function()
    backend = rewriting(outcome, routes, True, families, program.aot)
    return fn, torch.compile(fn, backend=backend, dynamic=program.dynamic), outcome


def _dropped_once(
    program: Program, inputs: list[torch.Tensor], routes: dict[str, str] | None, families: frozenset[str]
) -> Outcome:
    """All that follows the dropout is done to single elements: each is what it is of one kept, or of one dropped. Which
    of them is which says what eager is to give, and its gradients."""
    fn, compiled, outcome = _compiled(program, routes, families)
    # Of one seed all programs would have the same masks, and more of these would say no more of how many are kept.
    seed = zlib.crc32(program.source.encode())
    ours = run(fn, inputs, grad=program.grad, double=False, called=compiled, seed=seed)
    kept = program.with_factors()

    def eager(factor: torch.Tensor, double: bool) -> Shown:
        given = [*inputs, factor]
        shown, gradients = run(kept, given, grad=program.grad, double=double)
        return shown[:-1], gradients

    scale = 1 / (1 - program.dropped)
    none, all_ = (eager(torch.full((), x, dtype=torch.float64), False)[0][0].double() for x in (0.0, scale))
    result = ours[0][0].double()
    whole = result.isfinite() & none.isfinite() & all_.isfinite()
    is_kept = ((result - all_).abs() <= (result - none).abs()) | ~whole
    tellable = whole & ((all_ - none).abs() > 1e-2 * (1 + all_.abs() + none.abs()))
    TALLY.add(int((is_kept & tellable).sum()), int(tellable.sum()), program.dropped)
    factor = is_kept.double() * scale
    theirs, exact = eager(factor, False), eager(factor, True)
    assert_equivalent(ours[0], theirs[0], exact[0], computed=program.computed)
    if whole.all():  # what is NaN either way may have been kept or not, and has a gradient if it was
        assert_equivalent(ours[1], theirs[1], exact[1], gradients=True, computed=program.computed)
    return outcome


def _dropped(
    program: Program, inputs: list[torch.Tensor], routes: dict[str, str] | None, families: frozenset[str]
) -> Outcome:
    """The same seed gives the same numbers, and gradients are those of the same masks: along a line, the result changes
    by as much as they say."""
    _, compiled, outcome = _compiled(program, routes, families)

    def once(xs: list[torch.Tensor], seed: int = 5) -> torch.Tensor:
        torch.manual_seed(seed)
        result = compiled(*xs)
        return result[0] if isinstance(result, tuple) else result

    out = once(inputs)
    again = once(inputs)
    assert torch.equal(out.isnan(), again.isnan()), "the same seed gives NaN elsewhere"
    assert torch.equal(out.nan_to_num(), again.nan_to_num()), "the same seed gives other numbers"
    if not out.isfinite().all():
        return outcome
    weights = torch.linspace(0.5, 1.5, out.numel()).view(out.shape)
    gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(x.shape, generator=generator) * 1e-3 for x in inputs]
    ahead, behind = (
        once([(x + k * d).detach().requires_grad_() for x, d in zip(inputs, steps, strict=True)]) for k in (1, -1)
    )
    change = ((ahead - behind) * weights).double().sum() / 2
    pairs = [(g, d) for g, d in zip(gradients, steps, strict=True) if g is not None]
    slope = sum((g * d).double().sum() for g, d in pairs)
    size = sum(float((g * d).abs().sum()) for g, d in pairs) + 1e-6 * float((out * weights).abs().sum())
    assert abs(change - slope) <= 1e-2 * size, f"gradients of other masks: {change} for {slope}, of {size}"
    return outcome


@contextmanager
def _shared_traces(on: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if on:
            patch.setattr(sys.modules[rewrite_graph.__module__], "Reading", functools.partial(Reading, programs=TRACES))
        yield


@contextmanager
def _interpreting(on: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if on:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def _fails_without_us(program: Program) -> bool:
    """Whether torch compiles the program wrongly by itself (it does where overlapping views are written, and its rrelu
    lies in memory as its input, where eager's is dense)."""
    fn, inputs = program.function(), tensors(*program.shapes, dtype=program.dtype, grad=program.grad)
    try:
        if program.dropped:  # other elements are dropped out than in eager
            backend = rewriting(Outcome(), rewrite=False, aot=program.aot)
            torch._dynamo.reset()
            called = torch.compile(fn, backend=backend, dynamic=program.dynamic)
            found = run(fn, inputs, grad=program.grad, double=False, called=called)[0]
            eager = run(fn, inputs, grad=program.grad, double=False)[0]
            return not all(map(lie_alike, found, eager))
        else:
            known = (
                run(fn, inputs, grad=program.grad, double=False),
                run(program.in_fp64(), inputs, grad=program.grad, double=True),
            )
            check(fn, *inputs, grad=program.grad, dynamic=program.dynamic, rewrite=False, aot=program.aot,
                  known=known, computed=program.computed)  # fmt: skip
    except Exception:
        return True
    return False
