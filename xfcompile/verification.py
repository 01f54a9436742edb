"""Runs every replaced site of a program once beside its original, on the program's own numbers, both against fp64.

The program as it was written is kept beside the rewritten one, and run once, without Inductor, on the inputs of the
first run: at each site that was replaced stands a probe, which is given what the replacement reads and what the program
got. The run changes nothing: inputs that the program writes into are copied, and random states are put back.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from xfcompile.checks import Check, Difference, VerificationError
from xfcompile.excerpt import Excerpt, Excerpts, excerpts
from xfcompile.memory import Memory
from xfcompile.read import Reading
from xfcompile.report import Report, SiteReport, publish
from xfcompile.rounding import Rounded, nearby
from xfcompile.site import Miss
from xfcompile.unseen import unseen

log = logging.getLogger(__name__)


class Verification:
    """The program before anything was replaced in it, with a probe at each site that was."""

    def __init__(self, reading: Reading) -> None:
        self.checks: list[Check] = []
        self.twins: dict[fx.Node, fx.Node] = {}
        self._copies: dict[fx.GraphModule, fx.GraphModule] = {}
        self.program = self._copy(reading)
        self._written = _written(reading)
        self._lock = threading.Lock()
        self._done = False

    def _copy(self, reading: Reading) -> fx.GraphModule:
        graph = copy.deepcopy(reading.gm.graph)
        self.twins.update(zip(reading.gm.graph.nodes, graph.nodes, strict=True))
        made = self._copies[reading.gm] = fx.GraphModule(reading.gm, graph)
        for _, child in reading.children:
            self._copy(child)
        # Among its modules are bodies that are children of another one that calls them.
        for name, module in list(made.named_modules()):
            if module in self._copies:
                parent, _, last = name.rpartition(".")
                setattr(made.get_submodule(parent), last, self._copies[module])
        return made

    def watch(
        self,
        reading: Reading,
        sites: Sequence[tuple[fx.Node, SiteReport]],
        instead: Mapping[fx.Node, fx.Node],
        inserted: Sequence[fx.Node],
    ) -> None:
        """Put probes where the nodes of `sites` stood, when all that is replaced in their graph is replaced, and is
        not erased yet. instead: what stands for each of them. inserted: all nodes added."""
        old, added = {new: node for node, new in instead.items()}, set(inserted)
        for node, site in sites:
            try:
                parts = excerpts(reading, self.twins, node, instead[node], added, old)
            except Miss as miss:
                self.checks.append(_check(site, reason=miss.reason))
                continue
            twin = self.twins[node]
            program = self._copies[reading.gm]
            name = f"xfcompile_probe_{len(list(program.children()))}"
            program.add_module(name, _Probe(parts, functools.partial(self._checked, site)))
            with program.graph.inserting_after(twin):
                program.graph.call_module(name, (twin, *[self.twins[n] for n in parts.operands]))
            program.recompile()

    def _checked(self, site: SiteReport, differences: tuple[Difference, ...], reason: str | None) -> None:
        self.checks.append(_check(site, differences, reason))

    def before(self, run: Callable[..., Any], *, strict: bool) -> Callable[..., Any]:
        """`run`, at whose first call all sites are checked first; what is found is published as a report.

        strict: raise `VerificationError` for a site that is wrong, and errors of ours.
        """

        @functools.wraps(run, updated=())
        def verified(*args: Any) -> Any:
            with self._lock:
                first, self._done = not self._done, True
                report = self._run(args, strict) if first else None
            if report is not None:
                publish(report)
                if strict and any(check.wrong for check in report.checks):
                    raise VerificationError(_words(report))
                if any(check.wrong for check in report.checks):
                    warnings.warn(_words(report), RuntimeWarning, stacklevel=2)
            return run(*args)

        return verified

    @torch._dynamo.disable
    def _run(self, args: Sequence[Any], strict: bool) -> Report:
        report = Report(checks=self.checks)
        # The program may be run while gradients are on, and leave a mode behind that it sets.
        try:
            with _undisturbed(args), unseen(), torch.set_grad_enabled(False):
                self.program(*_without_writes(self.program, args, self._written))
        except Exception as error:
            if strict:
                raise
            log.debug("verifying failed", exc_info=True)
            report.failed("verifying a graph", error)
            warnings.warn(
                f"xfcompile failed at {report.failures[0]}: it was not compared", RuntimeWarning, stacklevel=4
            )
        finally:
            self.program = fx.GraphModule({}, fx.Graph())
            self._copies.clear()
            self.twins.clear()
        return report


def _check(site: SiteReport, differences: tuple[Difference, ...] = (), reason: str | None = None) -> Check:
    return Check(site.family, site.route or "", site.source, site.module, differences, reason)


def _words(report: Report) -> str:
    wrong = [str(check) for check in report.checks if check.wrong]
    return f"xfcompile: a replaced site is not what the program computes: {'; '.join(wrong)}. Please report it."


# -- the run ------------------------------------------------------------------------------------------------------


def _written(reading: Reading) -> frozenset[str]:
    """The names of the inputs, parameters and buffers whose memory the program is seen to write into."""
    written: set[Memory] = set()
    for effects in reading.effects.values():
        written |= effects.writes | (effects.reads if effects.opaque else set())
    leaves = [n for n in reading.gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    return frozenset(n.name for n in leaves if not written.isdisjoint(reading.memories([n])))


def _without_writes(program: fx.GraphModule, args: Sequence[Any], written: frozenset[str]) -> list[Any]:
    """The arguments, and in `program` the buffers, with copies of all that it may write into: whatever is no parameter,
    for some operations (batch_norm) write and do not say so, and parameters that it is seen to write into."""
    storages: dict[int, torch.UntypedStorage] = {}

    def guarded(name: str, x: Any) -> Any:
        kept = not isinstance(x, Tensor) or (isinstance(x, torch.nn.Parameter) and name not in written)
        return x if kept else _copied(x, storages)

    for node in program.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            tensor = getattr(program.get_submodule(owner), name)
            mine = guarded(node.name, tensor)
            if mine is not tensor:
                setattr(program, f"xfcompile_{node.name}", mine)
                node.target = f"xfcompile_{node.name}"
    program.recompile()
    names = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    return [guarded(name, x) for name, x in zip(names, args, strict=False)]


def _copied(x: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A copy of a tensor in memory of its own; tensors that share memory do so as copies too."""
    x = x.detach()
    if type(x) is not Tensor or x.layout is not torch.strided:
        return x.clone()
    storage = x.untyped_storage()
    if storage.data_ptr() not in storages:
        storages[storage.data_ptr()] = storage.clone()
    made = torch.empty(0, dtype=x.dtype, device=x.device)
    return made.set_(storages[storage.data_ptr()], x.storage_offset(), x.shape, x.stride())


@contextmanager
def _undisturbed(args: Sequence[Any]) -> Iterator[None]:
    """Random states are afterwards what they were before."""
    tensors = [x for x in pytree.tree_leaves(list(args)) if isinstance(x, Tensor)]
    devices = sorted({x.device.index for x in tensors if x.device.type == "cuda" and x.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        yield


# -- one site -----------------------------------------------------------------------------------------------------


class _Probe(torch.nn.Module):
    """Stands behind a site's root in the program, and compares."""

    def __init__(self, parts: Excerpts, found: Callable[[tuple[Difference, ...], str | None], None]) -> None:
        super().__init__()
        # Lists, so that the excerpts do not become modules of the program.
        self.parts, self.found = [parts], found

    def forward(self, root: Tensor, *operands: Any) -> None:
        (parts,) = self.parts
        if parts.random:
            return self.found((), "random")
        if not (isinstance(root, Tensor) and root.dtype.is_floating_point):
            return self.found((), "its result is no real number")
        try:
            self.found(tuple(_compared(parts, root.detach(), operands)), None)
        except _NotComparable as error:
            self.found((), str(error))
        return None


class _NotComparable(Exception):
    """The original does not compute, outside of its program, what the program computed."""


def _compared(parts: Excerpts, root: Tensor, operands: Sequence[Any]) -> Iterator[Difference]:
    names = [node.name for node in parts.operands]
    dout = torch.randn(root.shape, dtype=torch.float32, device=root.device).to(root.dtype)
    wanted = parts.differentiated
    moved, moved_dout = [nearby(x) for x in operands], nearby(dout)
    with torch.autocast(root.device.type, enabled=False):
        exact, exact_grads = _evaluate(parts.original, operands, wanted, dout, InDouble)
        near, near_grads = _evaluate(parts.original, moved, wanted, moved_dout, InDouble)
    alone, eager_grads = _evaluate(parts.original, operands, wanted, dout, fx.Interpreter)
    spread = (near - exact).abs()
    again = _difference("out", root, alone, exact, spread)
    if not again.ok:
        raise _NotComparable("outside of its program the original computes something else")
    ours, grads = _evaluate(parts.replacement, operands, wanted, dout, fx.Interpreter)
    yield _difference("out", ours, root, exact, spread)
    grads_rounding = _rounding(parts.replacement, operands, wanted, dout, root.dtype)
    of_grads = zip(wanted, grads, eager_grads, exact_grads, near_grads, grads_rounding, strict=True)
    for position, mine, eager, reference, nearly, rounded in of_grads:
        if eager is not None:
            assert reference is not None and nearly is not None
            mine = torch.zeros_like(eager) if mine is None else mine
            spread = _larger((nearly - reference).abs(), rounded)
            yield _difference(f"grad of {names[position]}", mine, eager, reference, spread)


def _rounding(
    replacement: Excerpt, operands: Sequence[Any], wanted: Sequence[int], dout: Tensor, dtype: torch.dtype
) -> list[Tensor | None]:
    """How far the gradients of a replacement move under the roundings of its own way to compute them: the distance of
    its runs in fp64 with and without. That says nothing of the original; a wrong one is as wrong in both."""
    if not wanted:
        return []
    try:
        with torch.autocast(dout.device.type, enabled=False):
            exact = _evaluate(replacement, operands, wanted, dout, InDouble)[1]
            with Rounded(dtype):
                moved = _evaluate(replacement, operands, wanted, dout, InDouble)[1]
    except Exception as error:  # many kernels know no fp64; the original's own roundings are what is left then
        log.debug("the replacement does not run in fp64: %s", error)
        return [None] * len(wanted)
    return [None if x is None or y is None else (x - y).abs() for x, y in zip(moved, exact, strict=True)]


def _larger(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else torch.fmax(x, y)


def _evaluate(
    part: Excerpt, operands: Sequence[Any], wanted: Sequence[int], dout: Tensor, interpreter: type[fx.Interpreter]
) -> tuple[Tensor, list[Tensor | None]]:
    """The result, and the gradients of the operands at the positions `wanted`."""
    double = interpreter is InDouble

    def given(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().double() if double and x.dtype.is_floating_point else x.detach()

    values = [given(x) for x in operands]
    for position in wanted:
        values[position].requires_grad_()
    with torch.set_grad_enabled(bool(wanted)):
        inputs = [
            values[position].clone() if written and isinstance(values[position], Tensor) else values[position]
            for position, written in part.slots
        ]
        out = interpreter(part.gm).run(*inputs)
        grads: Sequence[Tensor | None] = ()
        if wanted and out.requires_grad:
            grads = torch.autograd.grad(out, [values[p] for p in wanted], dout.to(out.dtype), allow_unused=True)
        elif wanted:
            grads = [None] * len(wanted)
    return out.detach(), list(grads)


class InDouble(fx.Interpreter):
    """Runs a graph with fp64 in place of every floating dtype."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _in_double(super().call_function(target, *_doubled((args, kwargs))))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        target = "double" if target in ("float", "half", "bfloat16") else target
        return _in_double(super().call_method(target, *_doubled((args, kwargs))))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = copy.deepcopy(self.fetch_attr(target)).double()
        return _in_double(module(*_in_double(args), **_in_double(kwargs)))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _in_double(super().get_attr(target, args, kwargs))


def _doubled(x: Any) -> Any:
    return pytree.tree_map(lambda y: torch.float64 if isinstance(y, torch.dtype) and y.is_floating_point else y, x)


def _in_double(x: Any) -> Any:
    return pytree.tree_map(lambda y: y.double() if isinstance(y, Tensor) and y.dtype.is_floating_point else y, x)


def _difference(what: str, ours: Tensor, eager: Tensor, exact: Tensor, spread: Tensor) -> Difference:
    """exact: the original in fp64. spread: how far rounding moves each element of it.

    Errors where the original is finite in fp64 and in its own dtype. Where it is in neither, ours has to be the same;
    a number that is too large for the program's dtype only is compared with nothing."""
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return Difference(f"{what}, {ours.dtype} {list(ours.shape)},", math.inf, 0.0, 0.0)

    def alike(x: Tensor) -> Tensor:
        return (x == exact) | (x.isnan() & exact.isnan())

    finite = exact.isfinite()
    compared = finite & eager.isfinite()
    wrong = (compared & ~ours.isfinite()) | (~finite & alike(eager) & ~alike(ours))

    def largest(x: Tensor, where: Tensor) -> float:
        return torch.where(where, x, 0.0).amax().item() if x.numel() else 0.0

    error, own = (largest((x.double() - exact).abs(), compared & x.isfinite()) for x in (ours, eager))
    moved = largest(spread, finite & spread.isfinite())
    bound = 2 * max(own, moved) + 4 * torch.finfo(eager.dtype).eps * largest(exact.abs(), finite)
    return Difference(what, math.inf if bool(wrong.any()) else error, own, bound)
