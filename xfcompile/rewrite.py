"""Replaces the sites of a graph by fused calls, in place, and says what it did."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import fx

from xfcompile import families
from xfcompile.aten import export_again, is_exported, output_names
from xfcompile.emit import Emitter
from xfcompile.family import Candidate, Family, Route, Setting, Words, needs_grad
from xfcompile.liveness import erase_orphans, live_nodes
from xfcompile.makers import holding, makers_of
from xfcompile.meaning import About, Kernel, program_of
from xfcompile.options import Options
from xfcompile.read import Reading
from xfcompile.report import Report, SiteReport
from xfcompile.search import Search
from xfcompile.site import Miss
from xfcompile.source import frames_of, source_of
from xfcompile.telling import tell_kernels
from xfcompile.tuning import Tuner
from xfcompile.unfold import unfold
from xfcompile.values import Value
from xfcompile.verification import Verification

log = logging.getLogger(__name__)

_TRANSPARENT = frozenset(
    "tag_activation_checkpoint wrap_activation_checkpoint wrap invoke_subgraph cond wrap_with_set_grad_enabled "
    "wrap_with_autocast".split()
)
"""Higher-order operations whose bodies run as if they stood in the graph."""

_CHECKPOINTS = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint"})


@dataclass
class Changes:
    """What has been done to a graph so far: the candidates replaced, the nodes put in place of theirs, all nodes added,
    and the values that are no part of any other family's site any more, each with the family that it belongs to."""

    done: list[Candidate] = field(default_factory=list)
    instead: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inserted: list[fx.Node] = field(default_factory=list)
    taken: dict[Value, Family[Any, Any]] = field(default_factory=dict)


def rewrite_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: Report, tuner: Tuner | None = None
) -> Verification | None:
    """Recognise and replace the sites of `gm`, and of the graphs inside it, in place; record each in `report`.

    example_inputs: the graph's inputs, fake or real, for placeholders without metadata of their own.
    tuner: times sites.
    Returns what runs the replaced sites beside their originals, if `options` says `verify` and there are any.
    """
    wanted = [family for family in families.known() if family.name in options.patterns]
    if not wanted:
        return None
    reading, search = Reading(gm, example_inputs), Search(wanted)
    if unfold(reading, search):
        reading, search = Reading(gm, example_inputs, programs=reading.programs), Search(wanted)
    verification = Verification(reading) if options.verify else None
    _rewrite(reading, search, options, report, verification, tuner)
    return verification


def _rewrite(
    reading: Reading,
    search: Search,
    options: Options,
    report: Report,
    verification: Verification | None,
    tuner: Tuner | None,
    *,
    recomputed: bool = False,
    place: tuple[int, ...] = (0,),
) -> None:
    for node, child in reading.children:
        name = getattr(node.target, "__name__", str(node.target))
        inside = (*place, reading.time[node])
        if name in _TRANSPARENT and not child.modes_differ:
            again = recomputed or name in _CHECKPOINTS
            _rewrite(child, search, options, report, verification, tuner, recomputed=again, place=inside)
        else:
            why = "which is called in several modes" if child.modes_differ else "whose body is not ours to change"
            _decline_all(child, search, report, f"inside of {name}, {why}", inside)
    before, changes = live_nodes(reading), Changes()
    names = output_names(reading.gm.graph) if is_exported(reading.gm.graph) else None
    replaced: list[tuple[fx.Node, SiteReport]] = []
    if tuner is not None:
        tuner.watch(reading)
    for family in search.families:
        candidates, misses = _candidates(reading, search, family, options, report)
        live = _live(reading, changes)
        for anchor, miss in misses:
            if reading.steps[anchor] in live:
                report.add(_missed(family, reading, reading.steps[anchor], miss.reason, place))
        # In the order of the graph, for what is made once stands before the first that needs it.
        candidates = sorted((c for c in candidates if c.node in live), key=lambda c: reading.time[c.node])
        candidates = [_planned(reading, family, c, options, recomputed, report) for c in candidates]
        if tuner is not None:
            candidates = _tuned(tuner, reading, family, candidates, changes, options, recomputed, report)
        candidates = _apart(family, candidates, changes)
        candidates = _keep_shared(reading, family, candidates, changes)
        shared: dict[Any, fx.Node] = {}
        for candidate in candidates:
            if candidate.route.replaces and candidate.node in changes.instead:
                candidate = _left(candidate, "another site with the same result is replaced")
            before_it = len(changes.inserted)
            if candidate.route.replaces:
                candidate = _by_some_route(reading, family, candidate, shared, changes, options, recomputed, report)
            entry = _matched(family, reading, candidate, changes.inserted[before_it:], place, options, report)
            report.add(entry)
            if candidate.route.replaces:
                replaced.append((candidate.node, entry))
        for candidate in changes.done:
            for value in (candidate.site.root, *candidate.site.interior):
                changes.taken.setdefault(value, family)
    if verification is not None:
        verification.watch(reading, replaced, changes.instead, changes.inserted)
    if changes.done:
        erase_orphans(before, _live(reading, changes), reading.gm.graph)
        if names is not None:
            export_again(reading, changes.inserted, names)
        reading.gm.graph.lint()
        reading.gm.recompile()


def _candidates(
    reading: Reading, search: Search, family: Family[Any, Any], options: Options, report: Report
) -> tuple[list[Candidate], list[tuple[Value, Miss]]]:
    """Every site of a family at every node that computes it, and every anchor around which there is none."""
    known = search.found(reading, family)
    misses = list(known.misses)
    found: list[Candidate] = []

    def failed(error: Exception, anchor: Value | None) -> None:
        doing = f"looking for {family.title}" + (f" at {_place(reading.steps[anchor])}" if anchor is not None else "")
        reason = report.failed(doing, error, strict=options.strict)
        misses.extend([(anchor, Miss(reason))] if anchor is not None else ())

    for anchor, error in known.failures:
        failed(error, anchor)
    for site in known.sites:
        # Of what a single call computes (baddbmm), only the result is a step.
        part = next((v for v in (*site.interior, site.root) if v in reading.steps), None)
        try:
            found += [family.at_node(reading, site, node) for node in makers_of(reading, family, site)]
        except Miss as miss:
            misses.extend([(part, miss)] if part is not None else ())
        except Exception as error:
            failed(error, part)
    return found, misses


def _live(reading: Reading, changes: Changes, planned: Iterable[Candidate] = ()) -> set[fx.Node]:
    """The nodes of the program that still matter, and those that will when the planned candidates are replaced too."""
    planned = list(planned)
    gone = [*changes.done, *planned]
    # What stands for a replaced node lies where the reading saw that node: writes to it still count.
    replaced = {new: old for old, new in changes.instead.items()}
    needed = {replaced.get(n, n) for new in changes.inserted for n in new.all_input_nodes}
    # What holds a result that is written in place is replaced with it, however old it is.
    written = {c.site.root for c in planned if reading.effects[c.node].writes}
    held = (reading.holder(v, reading.time[c.node]) for c in planned for v in c.operands if v not in written)
    needed |= {node for node in held if node is not None}
    drawn = {reading.steps[v] for c in gone for v in c.drawn if v in reading.steps}
    return live_nodes(reading, without={c.node for c in gone}, needed=needed, dispensable=drawn)


# -- the choice ---------------------------------------------------------------------------------------------------


def _setting(
    reading: Reading,
    candidate: Candidate,
    options: Options,
    recomputed: bool,
    routes: Mapping[str, str] = MappingProxyType({}),
) -> Setting:
    """routes: in place of the user's."""
    from torch._inductor import config

    training = needs_grad(candidate.node, reading)
    return Setting(training, recomputed, {**options.routes, **routes}, bool(config.cpp_wrapper))


def _planned(
    reading: Reading, family: Family[Any, Any], candidate: Candidate, options: Options, recomputed: bool, report: Report
) -> Candidate:
    setting = _setting(reading, candidate, options, recomputed)
    try:
        return family.plan(reading, candidate, setting)
    except Exception as error:
        doing = f"planning {family.title} at {_place(candidate.node)}"
        return _left(candidate, report.failed(doing, error, strict=options.strict))


def _tuned(
    tuner: Tuner,
    reading: Reading,
    family: Family[Any, Any],
    candidates: list[Candidate],
    changes: Changes,
    options: Options,
    recomputed: bool,
    report: Report,
) -> list[Candidate]:
    """The candidates by the routes that are the fastest when they are timed."""

    def setting(candidate: Candidate, routes: Mapping[str, str]) -> Setting:
        return _setting(reading, candidate, options, recomputed, routes)

    def failed(candidate: Candidate, error: Exception) -> str:
        return report.failed(f"timing {family.title} at {_place(candidate.node)}", error, strict=options.strict)

    return tuner.tuned(reading, family, candidates, setting, changes.instead, failed)


def _other_routes(
    reading: Reading, family: Family[Any, Any], candidate: Candidate, options: Options, recomputed: bool
) -> Iterator[Candidate]:
    """The candidate by each of the routes that its family names after the one that it has."""
    later = (
        family.routes[family.routes.index(candidate.route.name) + 1 :] if candidate.route.name in family.routes else ()
    )
    for name in later:
        setting = _setting(reading, candidate, options, recomputed, {family.name: name})
        try:
            planned = family.plan(reading, candidate, setting)
        except Exception:
            log.debug("planning %s by %s failed", family.title, name, exc_info=True)
            continue
        if planned.route.replaces and planned.route.name == name:
            yield planned


def _apart(family: Family[Any, Any], candidates: list[Candidate], changes: Changes) -> list[Candidate]:
    """Leave a site to Inductor if a part of it belongs to another family's that is replaced."""

    def apart(candidate: Candidate) -> Candidate:
        parts = (candidate.site.root, *candidate.site.interior)
        other = next((changes.taken[v] for v in parts if v in changes.taken), None)
        if other is None or not candidate.route.replaces:
            return candidate
        return _left(candidate, f"a part of it belongs to the {other.title} that is replaced")

    return [apart(candidate) for candidate in candidates]


def _keep_shared(
    reading: Reading, family: Family[Any, Any], candidates: list[Candidate], changes: Changes
) -> list[Candidate]:
    """Leave a site to Inductor if something else needs what is costly of it, which would be computed twice."""
    while True:
        live = _live(reading, changes, [c for c in candidates if c.route.replaces])

        def kept(c: Candidate, live: set[fx.Node] = live) -> bool:
            makers = {reading.steps[v] for v in c.costly if v in reading.steps} - {c.node}
            return c.route.replaces and not live.isdisjoint(makers)

        leaving = [c for c in candidates if kept(c)]
        if not leaving:
            return candidates
        reason = f"{family.costly} are used elsewhere too"
        # Two sites with one result may be all that needs each other's parts, of a sum of two activations, say.
        nodes = Counter(c.node for c in candidates if c.route.replaces)
        rivals = [c for c in leaving if nodes[c.node] > 1]
        if rivals:
            leaving, reason = rivals[-1:], "another site with the same result is replaced"
        candidates = [_left(c, reason) if any(c is x for x in leaving) else c for c in candidates]


def _left(candidate: Candidate, reason: str) -> Candidate:
    return replace(candidate, route=Route("inductor", reason))


# -- the replacement ----------------------------------------------------------------------------------------------


def _by_some_route(
    reading: Reading,
    family: Family[Any, Any],
    candidate: Candidate,
    shared: dict[Any, fx.Node],
    changes: Changes,
    options: Options,
    recomputed: bool,
    report: Report,
) -> Candidate:
    """Replace a candidate; if its route fails, by one that its family names after it, unless the user chose."""
    replaced, failed = _replaced(reading, family, candidate, shared, changes, options, report)
    if not failed or family.name in options.routes:
        return replaced
    for other in _other_routes(reading, family, candidate, options, recomputed):
        found, _ = _replaced(reading, family, other, shared, changes, options, report)
        if found.route.replaces:
            reason = f"{candidate.route.name} failed: {replaced.route.reason}"
            return replace(found, route=replace(found.route, reason=reason))
    return replaced


def _replaced(
    reading: Reading,
    family: Family[Any, Any],
    candidate: Candidate,
    shared: dict[Any, fx.Node],
    changes: Changes,
    options: Options,
    report: Report,
) -> tuple[Candidate, bool]:
    """Replace a candidate; the candidate as it then is, left to Inductor with the reason where it cannot be replaced,
    and whether that was for an error of ours."""
    graph, node = reading.gm.graph, candidate.node
    before = set(graph.nodes)
    known = dict(shared)
    try:
        emitter = Emitter(reading, node, shared, changes.instead)
        new = family.replace(emitter, candidate)
        if needs_grad(node, reading) and _written_later(reading, node):
            new = emitter.call("clone", new)  # a fused call keeps its result for the backward, which a product does not
        node.replace_all_uses_with(new)
    except Exception as error:
        for made in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(made)
        shared.clear()
        shared.update(known)
        if isinstance(error, Miss):
            return _left(candidate, str(error)), False
        doing = f"replacing {family.title} at {_place(node)}"
        return _left(candidate, report.failed(doing, error, strict=options.strict)), True
    changes.instead[node] = new
    # What held the result too because it was written there (see `makers.is_unseen`) does not any more.
    older = holding(reading, reading.effects[node].writes)
    changes.instead |= {n: new for n in older if reading.time[n] < reading.time[node]}
    added = [n for n in graph.nodes if n not in before]
    what = f"{family.title} at {_place(node)}"
    tell_kernels(added, what, strict=options.strict, autotune=options.autotune)
    changes.inserted += added
    changes.done.append(candidate)
    log.info("%s at %s: %s", family.title, source_of(node), candidate.route.name)
    return candidate, False


def _written_later(reading: Reading, node: fx.Node) -> bool:
    memories = set(reading.memories([node]))
    return any(reading.effects[n].writes & memories for n, time in reading.time.items() if time > reading.time[node])


# -- the report ---------------------------------------------------------------------------------------------------


def _decline_all(reading: Reading, search: Search, report: Report, reason: str, place: tuple[int, ...]) -> None:
    for node, child in reading.children:
        _decline_all(child, search, report, reason, (*place, reading.time[node]))
    for family in search.families:
        found = search.found(reading, family)
        for anchor in found.anchors:
            report.add(_missed(family, reading, reading.steps[anchor], reason, place))


def _missed(
    family: Family[Any, Any], reading: Reading, node: fx.Node, reason: str, place: tuple[int, ...]
) -> SiteReport:
    return SiteReport(
        family=family.name,
        matched=False,
        route=None,
        reason=reason,
        source=source_of(node),
        module=_module(node),
        about=About((*place, reading.time[node]), frames_of(node)),
    )


def _matched(
    family: Family[Any, Any],
    reading: Reading,
    candidate: Candidate,
    made: Sequence[fx.Node],
    place: tuple[int, ...],
    options: Options,
    report: Report,
) -> SiteReport:
    """The entry of a candidate; made: the nodes that were added for it."""
    node = candidate.node
    words, kernels = Words(), tuple[Kernel, ...]()
    try:
        words, kernels = family.words(candidate), family.kernels(made)
    except Exception as error:
        report.failed(f"describing {family.title} at {_place(node)}", error, strict=options.strict)
    return SiteReport(
        family=family.name,
        matched=True,
        route=candidate.route.name,
        reason=candidate.route.reason,
        source=source_of(node),
        expression=words.expression,
        mask=words.mask,
        module=_module(node),
        tiles=words.tiles,
        about=About((*place, reading.time[node]), frames_of(node), words.meaning, program_of(made), kernels),
    )


def _place(node: fx.Node) -> str:
    return source_of(node) or node.name


def _module(node: fx.Node) -> str | None:
    """The innermost module that the node stands in, by its path in the one that was compiled."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return re.sub(r"^L\[[^\]]*\](\[\d+\])*\.?", "", names[-1]) or None if names else None
