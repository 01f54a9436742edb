"""One route of a site as a call of its own: cut out of the program, compiled by Inductor, and compared with fp64."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode

from xfcompile.checks import Difference
from xfcompile.excerpt import Excerpt, Excerpts
from xfcompile.rounding import nearby
from xfcompile.scope import Scope
from xfcompile.verification import InDouble, _difference, _evaluate, _larger, _rounding

log = logging.getLogger(__name__)

LARGEST = 2**30
"""Bytes of the largest tensor of a site in fp64 up to which it is computed in fp64; a few of that size are made."""


class Wrong(Exception):
    """A variant computes something else than the program."""


@dataclass(frozen=True)
class Settings:
    """How excerpts are compiled: Inductor's settings, the identity of what we put in them, and the autocast around."""

    patches: Mapping[str, Any]
    fingerprint: str | None
    autocast: tuple[str, torch.dtype, bool]

    def around(self) -> AbstractContextManager[Any]:
        device, dtype, enabled = self.autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def autocast_of(scope: Scope, device: torch.device) -> tuple[str, torch.dtype, bool]:
    """What autocast does at a node: that of the regions around it in the graph, or what is around the program."""
    if scope.autocast:
        kind, dtype, enabled = (*scope.autocast[-1], None, None)[:3]
        return kind, dtype or torch.get_autocast_dtype(kind), enabled is not False
    return device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)


@dataclass(frozen=True)
class Problem:
    """A site's numbers: those of the operands by position, of which gradients are wanted, and what comes back."""

    operands: tuple[Any, ...]
    wanted: tuple[int, ...]
    dout: Tensor


def specialised(part: Excerpt, operands: Sequence[Any]) -> Excerpt:
    """The same with the numbers among its inputs written into it: it is compiled for these sizes."""
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    inputs = [n for n in part.gm.graph.nodes if n.op == "placeholder"]
    slots = []
    for node, slot in zip(inputs, part.slots, strict=True):
        value = operands[slot[0]]
        if isinstance(value, Tensor):
            made[node] = graph.placeholder(node.name)
            slots.append(slot)
        else:
            made[node] = value
    for node in part.gm.graph.nodes:
        if node.op == "placeholder":
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
    return Excerpt(fx.GraphModule(part.gm, graph), tuple(slots))


def without(part: Excerpt, names: Collection[str], problem: Problem, settings: Settings) -> tuple[Excerpt, Problem]:
    """The excerpt without what is made once for all sites of a program, by its nodes' names; and the problem, with the
    values of it after the operands that there were. What needs a gradient stays."""
    placeholders = [n for n in part.gm.graph.nodes if n.op == "placeholder"]
    positions = [p for p, _ in part.slots]
    learned = {n for n, p in zip(placeholders, positions, strict=True) if p in problem.wanted}
    for node in part.gm.graph.nodes:
        if not learned.isdisjoint(node.all_input_nodes):
            learned.add(node)
    once = {n for n in part.gm.graph.nodes if n.name in names} - learned
    with settings.around():
        found = _values(part.gm, [problem.operands[p] for p in positions], once)
    given: list[Tensor] = []
    graph, made, slots = fx.Graph(), dict[fx.Node, fx.Node](), list(part.slots)
    for node in placeholders:
        made[node] = graph.placeholder(node.name)
    for node, value in found.items():
        if isinstance(value, Tensor):
            made[node] = graph.placeholder(node.name)
            slots.append((len(problem.operands) + len(given), False))
            given.append(value)
    for node in part.gm.graph.nodes:
        if node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.eliminate_dead_code()  # what nothing but these needed
    return Excerpt(fx.GraphModule(part.gm, graph), tuple(slots)), replace(problem, operands=(*problem.operands, *given))


def _values(gm: fx.GraphModule, inputs: Sequence[Any], nodes: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """What some nodes of a graph hold when it is run."""

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in nodes:
                kept[n] = result
            return result

    kept: dict[fx.Node, Any] = {}
    if nodes:
        with torch.no_grad():
            Watching(gm).run(*inputs)
    return kept


Run = Callable[[], tuple[Tensor, Sequence[Tensor | None]]]


def call_of(part: Excerpt, problem: Problem, settings: Settings) -> Run:
    """The excerpt, compiled: a call that runs it once, forward and, where gradients are wanted, backward, and returns
    its result and these gradients."""
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor.compile_fx import compile_fx

    from xfcompile.identity import identified

    part = specialised(part, problem.operands)
    grad = bool(problem.wanted)
    values = [
        x.detach().requires_grad_(k in problem.wanted) if isinstance(x, Tensor) else x
        for k, x in enumerate(problem.operands)
    ]
    leaves = [values[k] for k in problem.wanted]

    def inputs() -> list[Any]:
        return [values[p].clone() if written else values[p] for p, written in part.slots]

    # Recorded graphs would keep their memory; what their replay saves is left out by the timer.
    patches = identified({**settings.patches, "triton.cudagraphs": False}, settings.fingerprint)
    context = tracing(TracingContext(FakeTensorMode()))
    with compile_lock, torch.set_grad_enabled(grad), settings.around(), context:
        run: Any = compile_fx(part.gm, inputs(), config_patches=patches)

    def once() -> tuple[Tensor, Sequence[Tensor | None]]:
        with torch.set_grad_enabled(grad):
            out = run(*inputs())
            out = out[0] if isinstance(out, (tuple, list)) else out
            if not grad or not out.requires_grad:
                return out, [None] * len(leaves)
            return out, torch.autograd.grad(out, leaves, problem.dout, allow_unused=True)

    return once


class Reference:
    """What a site is to compute: in fp64, with eager's own error; where that takes too much memory what Inductor makes
    of the program, with what roundings of the operands make of that."""

    def __init__(self, parts: Excerpts, problem: Problem, settings: Settings, largest: int) -> None:
        self.parts, self.problem, self.settings = parts, problem, settings
        self.in_double = largest <= LARGEST
        if self.in_double:
            try:
                self._in_double()
                return
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        self.in_double = False
        self._compiled()

    def _in_double(self) -> None:
        original, problem = self.parts.original, self.problem
        wanted, operands, dout = problem.wanted, problem.operands, problem.dout
        with torch.autocast(dout.device.type, enabled=False):
            self.exact = _evaluate(original, operands, wanted, dout, InDouble)
            self.near = _evaluate(original, [nearby(x) for x in operands], wanted, nearby(dout), InDouble)
        with self.settings.around():
            self.eager = _evaluate(original, operands, wanted, dout, fx.Interpreter)

    def _compiled(self) -> None:
        def moved(x: Any) -> Any:
            return nearby(x).to(x.dtype) if isinstance(x, Tensor) else x

        problem = self.problem
        around = replace(problem, operands=tuple(map(moved, problem.operands)), dout=moved(problem.dout))
        self.exact, self.near = (_detached(call_of(self.parts.original, p, self.settings)()) for p in (problem, around))
        self.eager = self.exact

    def check(self, out: Tensor, grads: Sequence[Tensor | None], replacement: Excerpt | None) -> None:
        """Raises `Wrong` for what is further off than rounding explains. replacement: what made it, or None."""
        problem, dtype = self.problem, self.eager[0].dtype
        self._compare("out", out, self.eager[0], self.exact[0], (self.near[0] - self.exact[0]).abs())
        rounded: Sequence[Tensor | None] = [None] * len(problem.wanted)
        if replacement is not None and self.in_double:
            with self.settings.around():
                rounded = _rounding(replacement, problem.operands, problem.wanted, problem.dout, dtype)
        for n, (mine, eager, exact, near, moved) in enumerate(
            zip(grads, self.eager[1], self.exact[1], self.near[1], rounded, strict=True)
        ):
            if eager is None or exact is None or near is None:
                continue
            name = self.parts.operands[problem.wanted[n]].name
            spread = _larger((near - exact).abs(), moved)
            self._compare(f"grad of {name}", torch.zeros_like(eager) if mine is None else mine, eager, exact, spread)

    def _compare(self, what: str, ours: Tensor, eager: Tensor, exact: Tensor, spread: Tensor) -> None:
        found: Difference = _difference(what, ours.detach(), eager, exact, spread)
        if not found.ok:
            raise Wrong(f"{what} is wrong: error {found.error:.2g}, allowed {found.bound:.2g}")


def _detached(found: tuple[Tensor, Sequence[Tensor | None]]) -> tuple[Tensor, list[Tensor | None]]:
    return found[0].detach(), list(found[1])


def check_kind(out: Tensor, like: tuple[torch.Size, torch.dtype]) -> None:
    """All that can be said of a site that draws random numbers."""
    if (out.shape, out.dtype) != like:
        raise Wrong(f"its result is {out.dtype} {list(out.shape)}, not {like[1]} {list(like[0])}")


def text_of(part: Excerpt) -> str:
    """The excerpt in words that are the same in every process, whatever its nodes are called."""
    numbers: dict[fx.Node, str] = {}
    lines = []
    for k, node in enumerate(part.gm.graph.nodes):
        numbers[node] = f"%{k}"
        if node.op == "placeholder":
            continue
        target = node.target
        if node.op == "call_module":
            target = repr(part.gm.get_submodule(str(target)))
        elif callable(target):
            target = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', None) or target}"
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: _Named(numbers[n]))
        lines.append(f"%{k} {node.op} {target} {args}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Named(str):
    def __repr__(self) -> str:
        return str(self)
