"""Times the variants of planned sites, one site of a kind in a graph, and gives each its fastest right one."""

from __future__ import annotations

import contextvars
import copy
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor, fx

from xfcompile.emit import Emitter
from xfcompile.example import example_of
from xfcompile.excerpt import Excerpts, excerpts
from xfcompile.family import Candidate, Family, Route, Setting
from xfcompile.kernels.attention import times
from xfcompile.options import Options
from xfcompile.read import Reading
from xfcompile.site import Miss
from xfcompile.source import source_of
from xfcompile.telling import tried
from xfcompile.tuning import store, timer
from xfcompile.tuning.facts import Timings, Trial
from xfcompile.tuning.inputs import Inputs
from xfcompile.tuning.progress import progress
from xfcompile.tuning.trial import (
    Problem,
    Reference,
    Run,
    Settings,
    Wrong,
    autocast_of,
    call_of,
    check_kind,
    text_of,
    without,
)

log = logging.getLogger(__name__)

PATIENCE = 600.0
"""Seconds beyond the budget after which a compiler that does not come back is left alone."""

T = TypeVar("T")


@dataclass(frozen=True)
class Cut:
    """A variant's excerpts, and the names of those of its nodes that are made once for all sites of a graph."""

    candidate: Candidate
    parts: Excerpts
    once: frozenset[str]


class Tuner:
    """The tuning of one compiled graph: its budget, what was found of its sites, and a copy of each graph in it from
    before anything was replaced."""

    def __init__(self, options: Options, patches: Mapping[str, Any]) -> None:
        self.options, self.patches = options, patches
        self.spent = 0.0
        self.known: dict[str, Timings] = {}
        self.twins: dict[fx.Node, fx.Node] = {}
        self._copies: list[fx.GraphModule] = []

    def watch(self, reading: Reading) -> None:
        """Keeps a copy of a graph; called before anything in it is replaced."""
        graph = copy.deepcopy(reading.gm.graph)
        self.twins.update(zip(reading.gm.graph.nodes, graph.nodes, strict=True))
        self._copies.append(fx.GraphModule(reading.gm, graph))

    def tuned(
        self,
        reading: Reading,
        family: Family[Any, Any],
        candidates: Sequence[Candidate],
        setting: Callable[[Candidate, Mapping[str, str]], Setting],
        instead: Mapping[fx.Node, fx.Node],
        failed: Callable[[Candidate, Exception], str],
    ) -> list[Candidate]:
        """The candidates of a family, planned, each by its fastest variant.

        setting: what the choice of a candidate's route depends on, given the routes that are asked for. instead: what
        stands for the nodes that are replaced already. failed: told of an error of ours, which costs the tuning only.
        """
        if family.name in self.options.routes:  # the user has chosen
            return list(candidates)
        sites = [_Site(self, reading, family, c, setting, instead) for c in candidates]
        for site in sites:
            try:
                site.prepare()
            except Miss as miss:
                site.reason = miss.reason
            except Exception as error:
                site.reason = failed(site.usual, error)
        alike: dict[str, int] = {}
        for site in sites:
            if site.key is not None:
                alike[site.key] = alike.get(site.key, 0) + 1
        made = []
        for site in sites:
            try:
                made.append(self._decided(site, alike))
            except Exception as error:
                made.append(_with_reason(site.usual, f"not timed: {failed(site.usual, error)}"))
        return made

    def _decided(self, site: _Site, alike: Mapping[str, int]) -> Candidate:
        if site.key is None:
            return site.usual if site.reason is None else _with_reason(site.usual, f"not timed: {site.reason}")
        key = f"{site.key} {'many' if alike[site.key] > 1 else 'one'}"
        if key in self.known:
            return site.chosen(self.known[key], before=False)
        about = self._about(site, key)
        if about is not None and (found := store.find(about)) is not None:
            unknown = sorted({t.route for t in found.trials if t.route not in site.family.routes})
            if not unknown:
                self.known[key] = found
                return site.chosen(found, before=True)
            store.refused(about, f"they are of {', '.join(map(repr, unknown))}, which is no route here")
        start = time.monotonic()
        try:
            timings = _in_a_thread(
                lambda: site.timed(alike[site.key or ""]), self.options.autotune_budget - self.spent + PATIENCE
            )
        finally:
            self.spent += time.monotonic() - start
        self.known[key] = timings
        if about is not None and timings.complete and any(t.ms is not None for t in timings.trials):
            store.store(about, timings)
        return site.chosen(timings, before=False)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left to the site that is being timed."""
        return self.options.autotune_budget - self.spent

    def _about(self, site: _Site, key: str) -> dict[str, Any] | None:
        """What timings are stored by; None if something that they depend on cannot be named."""
        fingerprint = self.options.fingerprint()
        if fingerprint is None or any(callable(x) for x in self.patches.values()):
            return None
        asked = f"{fingerprint} {sorted((k, repr(v)) for k, v in self.patches.items())}"
        return store.identity(site.device, key, asked)


def _in_a_thread(run: Callable[[], T], patience: float) -> T:
    """Runs in a thread of its own: of all that torch keeps for a thread while Dynamo compiles (modes, what is traced,
    what it measures of itself) nothing is seen there, and nothing is changed. Context variables are as here.

    Dynamo's lock, which this thread holds, is free meanwhile: backwards take it where they are compiled, on GPUs in
    threads of autograd's own.
    """
    from torch._dynamo.convert_frame import compile_lock

    found: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Condition(compile_lock)

    def target() -> None:
        try:
            found.append(run())
        except BaseException as error:
            errors.append(error)
        with ended:
            ended.notify()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(target,), name="xfcompile", daemon=True)
    with ended, _put_away():
        thread.start()
        ended.wait_for(lambda: found or errors, patience)
    if errors:
        raise errors[0]
    if not found:
        raise TimeoutError("timing did not come to an end")
    return found[0]


@contextmanager
def _put_away() -> Iterator[None]:
    """What torch keeps of a compilation for the whole process is as if there were none: others that compile while the
    lock is free take what they find for what was before them, and leave it behind."""
    from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr as modes

    flag, stack = torch.compiler._is_compiling_flag, modes.stack
    torch.compiler._is_compiling_flag, modes.stack = False, []
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, modes.stack = flag, stack


def _with_reason(candidate: Candidate, reason: str) -> Candidate:
    own = candidate.route.reason
    return replace(candidate, route=replace(candidate.route, reason=f"{own}; {reason}" if own else reason))


class _Site:
    """One candidate while it is being tuned."""

    def __init__(
        self,
        tuner: Tuner,
        reading: Reading,
        family: Family[Any, Any],
        usual: Candidate,
        setting: Callable[[Candidate, Mapping[str, str]], Setting],
        instead: Mapping[fx.Node, fx.Node],
    ) -> None:
        self.tuner, self.reading, self.family, self.usual = tuner, reading, family, usual
        self.setting, self.instead = setting, instead
        self.device: torch.device = usual.site.root.meta.device
        self.reason: str | None = None
        self.key: str | None = None
        self.cuts: dict[str, Cut] = {}
        self.inputs = Inputs(reading, usual.site, reading.time[usual.node], tuner.twins)

    @property
    def variant(self) -> str:
        return self.usual.route.name

    # -- what there is to choose from ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Cuts out all routes that replace the site, and makes the key by which it is known."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise Miss("its device is not here", self.usual.site.root)
        for planned in self._planned():
            variant = planned.route.name
            try:
                self.cuts[variant] = self._cut(planned)
            except Miss as miss:
                log.debug("%s cannot be timed: %s", variant, miss.reason)
                if variant == self.variant:
                    raise
        if not self.cuts:
            return  # nothing to choose from
        words = [self.family.name, str(self.usual.route.unchanged), str(torch.backends.cuda.matmul.fp32_precision)]
        for variant, cut in self.cuts.items():
            words += [variant, text_of(cut.parts.original), text_of(cut.parts.replacement)]
            words += [str(cut.parts.differentiated), *(self._class_of(n) for n in cut.parts.operands)]
        words.append(str(autocast_of(self.reading.scope[self.usual.node], self.device)))
        self.key = hashlib.sha256("\n".join(words).encode()).hexdigest()

    def _planned(self) -> Iterator[Candidate]:
        """The candidate by each route that replaces it, the usual one first."""
        if self.usual.route.replaces:
            yield self.usual
        timed = self.family.timed_routes
        for name in self.family.routes if timed is None else timed(self.usual):
            if name == "inductor" or (name == self.usual.route.name and self.usual.route.replaces):
                continue
            asked = self.setting(self.usual, {self.family.name: name})
            try:
                planned = self.family.plan(self.reading, self.usual, asked)
            except Exception:
                log.debug("planning %s by %s failed", self.family.title, name, exc_info=True)
                continue
            if planned.route.replaces and planned.route.name == name:
                yield planned

    def _cut(self, planned: Candidate) -> Cut:
        """Writes the replacement into the graph, cuts it out, and takes it back."""
        graph, node = self.reading.gm.graph, planned.node
        before = set(graph.nodes)
        shared: dict[Any, fx.Node] = {}
        try:
            new = self.family.replace(Emitter(self.reading, node, shared, self.instead), planned)
            inserted = {n for n in graph.nodes if n not in before}
            old = {new: node for node, new in self.instead.items()}
            parts = excerpts(self.reading, self.tuner.twins, node, new, inserted, old)
            return Cut(planned, parts, frozenset(n.name for n in shared.values() if n in inserted and n is not new))
        finally:
            for made in reversed([n for n in graph.nodes if n not in before]):
                graph.erase_node(made)

    def _class_of(self, node: fx.Node) -> str:
        """An operand by what its numbers do not matter for; symbolic sizes as powers of two."""
        value = self.inputs.of(node)
        if not isinstance(value, Tensor):
            return repr(_class(value))
        example = example_of(node)
        symbolic = isinstance(example, Tensor) and any(isinstance(n, torch.SymInt) for n in example.shape)
        shape, stride = (tuple(map(_class, x)) if symbolic else tuple(x) for x in (value.shape, value.stride()))
        return f"{value.dtype} {shape} {stride} {value.data_ptr() % 16}"

    # -- the times ----------------------------------------------------------------------------------------------

    def timed(self, alike: int) -> Timings:
        """Tries all variants, as far as there is time. alike: how many such sites there are in the graph."""
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    return _Trials(self, alike).all()
            return _Trials(self, alike).all()

    def chosen(self, timings: Timings, before: bool) -> Candidate:
        """The candidate by the variant that the timings speak for."""
        best, words = timings.winner(), timings.words(before)
        if best == self.variant:
            return replace(self.usual, route=replace(self.usual.route, reason=words))
        if best == "inductor":
            return replace(self.usual, route=Route("inductor", words))
        cut = self.cuts.get(best)
        if cut is None:  # stored by a process in which that route could be taken
            return _with_reason(self.usual, f"{best} cannot be taken here")
        return replace(cut.candidate, route=replace(cut.candidate.route, reason=words))


def _class(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length() if isinstance(n, int) and not isinstance(n, bool) else n


class _Trials:
    """The trials of one site."""

    def __init__(self, site: _Site, alike: int) -> None:
        self.site, self.alike = site, alike
        self.start = time.monotonic()
        tuner = site.tuner
        self.settings = Settings(
            tuner.patches,
            tuner.options.fingerprint(),
            autocast_of(site.reading.scope[site.usual.node], site.device),
        )
        self.replayed = bool(tuner.patches.get("triton.cudagraphs"))
        self.calls: dict[str, Run] = {}
        self.dropped: dict[str, str] = {}
        self.left: list[str] = []
        self.references: dict[Any, Reference] = {}
        self.shape: tuple[torch.Size, torch.dtype] | None = None

    def all(self) -> Timings:
        site = self.site
        names = ["inductor", *site.cuts]
        names.sort(key=lambda v: v != site.variant)  # the usual one first
        if site.usual.route.unchanged:
            names = [site.variant, *(v for v in site.cuts if v != site.variant)]
        where = f"{site.family.title} at {source_of(site.usual.node) or site.usual.node.name}"
        with progress(where, len(names)) as told:
            for variant in names:
                self._try(variant, told)
            times = self._times(list(self.calls))
        trials = [Trial(v, times.get(v), self.dropped.get(v)) for v in names]
        return Timings(tuple(trials), not self.left, self._about())

    def _about(self) -> str:
        words = [self.site.inputs.about]
        if self.alike > 1:
            words.append(f"for {self.alike} alike, without what they share")
        return ", ".join(filter(None, words))

    def _left(self) -> float:
        """Seconds."""
        return self.site.tuner.left - (time.monotonic() - self.start)

    def _over(self) -> bool:
        return self._left() <= 0

    def _try(self, variant: str, told: Callable[[str], None]) -> None:
        if self._over():
            self.left.append(variant)
            return
        told(variant)
        try:
            self.calls[variant] = self._compiled(variant)
        except Exception as error:
            words = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            log.debug("%s is dropped", variant, exc_info=True)
            self.dropped[variant] = words.strip().splitlines()[0][:200] if words.strip() else type(error).__name__
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()

    def _compiled(self, variant: str) -> Run:
        """Compiles a variant and compares what it computes."""
        site = self.site
        original = variant == "inductor" or (site.usual.route.unchanged and variant == site.variant)
        cut = next(iter(site.cuts.values())) if original else site.cuts[variant]
        parts = cut.parts
        problem = self._problem(parts)
        part, given = (parts.original, problem) if original else (parts.replacement, problem)
        with tried(part.gm.graph.nodes, f"{site.family.title}, to time it"):  # what does not compile is not timed
            if self.alike > 1 and not original:
                part, given = without(part, cut.once, problem, self.settings)
            call = call_of(part, given, self.settings)
            with times.timing(self._left()):
                out, grads = call()
        if parts.random:
            assert self.shape is not None
            check_kind(out, self.shape)
        else:
            self._reference(parts, problem).check(out, grads, None if original else parts.replacement)
        return call

    def _problem(self, parts: Excerpts) -> Problem:
        operands = tuple(self.site.inputs.of(n) for n in parts.operands)
        root = self.site.usual.site.root
        node = self.site.usual.node
        example = example_of(node)
        shape = example.shape if isinstance(example, Tensor) else root.shape
        sizes = [self.site.inputs._number(n) for n in shape]
        self.shape = torch.Size(sizes), root.dtype
        generator = torch.Generator(self.site.device).manual_seed(1)
        dout = torch.randn(sizes, generator=generator, device=self.site.device).to(root.dtype)
        return Problem(operands, parts.differentiated, dout)

    def _reference(self, parts: Excerpts, problem: Problem) -> Reference:
        key = (parts.operands, parts.differentiated, text_of(parts.original))
        if key not in self.references:
            self.references[key] = Reference(parts, problem, self.settings, self._largest())
        return self.references[key]

    def _largest(self) -> int:
        """Bytes of the site's largest tensor in fp64."""
        site, sizes = self.site.usual.site, self.site.inputs.sizes
        named = {sympy.Symbol(s): n for s, n in sizes.items()}

        def numel(shape: Collection[Any]) -> int:
            total = sympy.prod([sympy.sympify(n) for n in shape])
            total = total.xreplace({s: named.get(sympy.Symbol(str(s)), 1) for s in total.free_symbols})
            return int(total) if total.is_number else 0

        return 8 * max(numel(v.shape) for v in (site.root, *site.interior))

    def _times(self, variants: Sequence[str]) -> dict[str, float]:
        calls = {v: self.calls[v] for v in variants}
        found = timer.current()(calls, self.site.device, self.replayed) if calls else {}
        return {v: float(found[v]) for v in variants}
