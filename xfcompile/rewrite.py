"""Replaces the sites of a graph by fused calls, in place, and says what it did."""

from __future__ import annotations

import logging
import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from xfcompile.emit import Emitter
from xfcompile.liveness import erase_orphans, live_nodes
from xfcompile.options import Options
from xfcompile.patterns import attention
from xfcompile.plan import UNKNOWN, Route, Told, choose
from xfcompile.read import Reading
from xfcompile.replace import replace_attention
from xfcompile.report import Report, SiteReport
from xfcompile.score import S
from xfcompile.site import AttentionSite, Miss, Placed
from xfcompile.sparsity import describe
from xfcompile.trace import Constant, Ref
from xfcompile.values import Value

log = logging.getLogger(__name__)

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
"""Where no line is the user's: `explain` calls what it explains from here."""

_TRANSPARENT = frozenset(
    "tag_activation_checkpoint wrap_activation_checkpoint wrap invoke_subgraph cond wrap_with_set_grad_enabled "
    "wrap_with_autocast".split()
)
"""Higher-order operations whose bodies run as if they stood in the graph."""

_CHECKPOINTS = frozenset({"tag_activation_checkpoint", "wrap_activation_checkpoint"})


@dataclass
class Candidate:
    """A site at one node of the graph."""

    site: AttentionSite
    node: fx.Node
    q: Placed
    k: Placed
    v: Placed
    score: sympy.Expr
    route: Route = field(default_factory=lambda: Route("inductor"))
    words: Told | None = None
    training: bool = False


Known = dict[Reading, tuple[list[AttentionSite], list[tuple[Value, Miss]]]]
"""What has been found in each reading so far."""


def rewrite_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: Report) -> None:
    """Recognise and replace the sites of `gm`, and of the graphs inside it, in place; record each in `report`.

    example_inputs: the graph's inputs, fake or real, for placeholders without metadata of their own.
    """
    if attention.FAMILY not in options.patterns:
        return
    reading = Reading(gm, example_inputs)
    known: Known = {}
    if _unfold(reading, known):
        reading, known = Reading(gm, example_inputs, programs=reading.programs), {}
    _rewrite(reading, known, options, report)


def _rewrite(reading: Reading, known: Known, options: Options, report: Report, *, recomputed: bool = False) -> None:
    for node, child in reading.children:
        name = getattr(node.target, "__name__", str(node.target))
        if name in _TRANSPARENT:
            _rewrite(child, known, options, report, recomputed=recomputed or name in _CHECKPOINTS)
        else:
            _decline_all(child, report, f"inside of {name}, whose body is not ours to change")
    candidates, misses = _candidates(reading, known)
    live = live_nodes(reading)
    for anchor, miss in misses:
        if reading.steps[anchor] in live:
            report.add(_missed(reading, anchor, miss.reason))
    candidates = [c for c in candidates if c.node in live]
    for candidate in candidates:
        _plan(reading, candidate, options)
        if (
            recomputed
            and candidate.route.name == "sdpa"
            and candidate.words
            and not _needs_grad(candidate.node, reading)
        ):
            # torch refuses to compile it: SDPA counts as random, which no forward without a backward may recompute.
            candidate.route = Route("inductor", "SDPA can't be checkpointed where nothing needs a gradient")
    _keep_shared(reading, candidates)
    shared: dict[Any, fx.Node] = {}
    inserted: list[fx.Node] = []
    replaced: set[fx.Node] = set()
    for candidate in candidates:
        if candidate.route.name != "inductor":
            _replace(reading, candidate, shared, inserted, replaced, options, report)
        report.add(_matched(candidate))
    if replaced:
        needed = {n for new in inserted for n in new.all_input_nodes}
        done = [c for c in candidates if c.node in replaced]
        after = live_nodes(reading, without=replaced, needed=needed, dispensable=_dropouts(reading, done))
        erase_orphans(live, after, reading.gm.graph)
        reading.gm.graph.lint()
        reading.gm.recompile()


def _candidates(reading: Reading, known: Known) -> tuple[list[Candidate], list[tuple[Value, Miss]]]:
    """Every site at every node that computes it, and every anchor around which there is none."""
    sites, unmatched = _sites(reading, known)
    misses = list(unmatched)
    found: list[Candidate] = []
    for site in sites:
        try:
            found += _at_nodes(reading, site)
        except Miss as miss:
            # Of what a single call computes (baddbmm), only the result is a step.
            misses.append((next(v for v in (*site.interior, site.root) if v in reading.steps), miss))
    return found, misses


def _sites(reading: Reading, known: Known) -> tuple[list[AttentionSite], list[tuple[Value, Miss]]]:
    """The attentions of a reading, and the anchors around which there is none; looked for once."""
    if reading in known:
        return known[reading]
    values = list(reading.steps)
    users: dict[Value, list[Value]] = {}
    for value in values:
        for source in dict.fromkeys(value.inputs()):
            users.setdefault(source, []).append(value)
    found: list[AttentionSite] = []
    misses: list[tuple[Value, Miss]] = []
    for anchor in attention.anchors(values):
        try:
            found += attention.match(anchor, users)
        except Miss as miss:
            log.debug("no attention at %s: %s", anchor, miss.reason)
            misses.append((anchor, miss))
    known[reading] = found, misses
    return found, misses


def _at_nodes(reading: Reading, site: AttentionSite) -> list[Candidate]:
    """The site at each node that computes its root."""
    found = []
    makers = [n for n in reading.makers.get(site.root, ()) if not reading.effects[n].writes & reading.effects[n].reads]
    if not makers:
        raise Miss("the product is written into a tensor that is there already", site.root)
    for node in makers:
        scopes = {reading.scope[reading.steps[v]] for v in site.interior if v in reading.steps}
        if scopes - {reading.scope[node]}:
            raise Miss("the attention crosses the border of an autocast or no_grad region", site.root)
        emitter = Emitter(reading, node, {})
        q, k, v = (emitter.choose(readings) for readings in (site.q, site.k, site.v))
        factor = q.factor * k.factor
        score = site.score.xreplace({S: factor * S}) if factor != 1 else site.score
        if v.factor != 1:
            raise Miss("the values carry a factor", site.root)
        found.append(Candidate(site, node, q, k, v, score))
    return found


def _plan(reading: Reading, candidate: Candidate, options: Options) -> None:
    site, node = candidate.site, candidate.node
    training = _needs_grad(node, reading)
    bias_grad = training and any(_needs_grad(h, reading) for v in site.loads if (h := _first(reading, v)) is not None)
    candidate.training = training

    def chosen() -> tuple[Route, Told | None]:
        return choose(candidate.site, candidate.score, training=training, bias_grad=bias_grad, forced=options.routes)

    candidate.route, candidate.words = chosen()
    if candidate.route.reason == UNKNOWN and _specialise(candidate):
        candidate.route, candidate.words = chosen()
    unchanged = candidate.route.name == "sdpa" and site.call is not None and _says_it_already(site, candidate.words)
    if unchanged:
        candidate.route = Route("sdpa", "as it was: SDPA is told all there is to tell")
        candidate.words = None
    if reading.scope[node].chosen:
        reason = "SDPA's backends are chosen here by sdpa_kernel(...)"
        candidate.route = Route("inductor", reason) if site.call is None else Route("sdpa", f"as it was: {reason}")
        candidate.words = None


def _specialise(candidate: Candidate) -> bool:
    """Holds the head dimensions to the numbers that they are: kernels are made for these, lengths stay symbols."""
    site, example = candidate.site, candidate.node.meta.get("example_value")
    sizes = example.shape if isinstance(example, torch.Tensor) else ()
    symbols: list[Any] = [n for n in sizes if isinstance(n, torch.SymInt)]
    if not symbols:
        return False
    try:
        dims = [symbols[0].node.shape_env.evaluate_expr(sympy.sympify(n)) for n in (site.head_dim, site.value_dim)]
    except GuardOnDataDependentSymNode:
        return False
    candidate.site = replace(site, head_dim=dims[0], value_dim=dims[1])
    return True


def _says_it_already(site: AttentionSite, words: Told | None) -> bool:
    """Whether rewriting an SDPA call would tell SDPA nothing new."""
    assert site.call is not None
    if words is None:
        return True
    if words.plain:
        return site.call["attn_mask"] is None
    return True


def _first(reading: Reading, value: Value) -> fx.Node | None:
    holders = reading.holders.get(value)
    return holders[0][0] if holders else None


def _needs_grad(node: fx.Node, reading: Reading) -> bool:
    """Whether a gradient may flow into the node's result."""
    if reading.scope[node].grad is False or (reading.scope[node].grad is None and not torch.is_grad_enabled()):
        return False
    for key in ("example_value", "val"):
        example = node.meta.get(key)
        if isinstance(example, torch.Tensor):
            return example.requires_grad or (
                any(_requires_grad(n) for n in reading.time if n.op in ("placeholder", "get_attr"))
                and example.grad_fn is not None
            )
    return any(_requires_grad(n) for n in reading.time if n.op in ("placeholder", "get_attr"))


def _written_later(reading: Reading, node: fx.Node) -> bool:
    memories = set(reading.memories([node]))
    return any(reading.effects[n].writes & memories for n, time in reading.time.items() if time > reading.time[node])


def _requires_grad(node: fx.Node) -> bool:
    example = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(example, torch.Tensor) and example.requires_grad


def _keep_shared(reading: Reading, candidates: list[Candidate]) -> None:
    """Leave a site to Inductor if something else needs its weights: they would be computed twice."""
    while True:
        taken = [c for c in candidates if c.route.name != "inductor"]
        live = live_nodes(reading, without={c.node for c in taken}, dispensable=_dropouts(reading, taken))
        shared = [
            c
            for c in taken
            if c.site.call is None
            and any(reading.steps[v] in live and reading.steps[v] is not c.node for v in _weights(c.site))
        ]
        if not shared:
            return
        for c in shared:
            c.route = Route("inductor", "the attention weights are used elsewhere too")


def _dropouts(reading: Reading, candidates: list[Candidate]) -> set[fx.Node]:
    """The nodes that drop weights out, which the fused calls do themselves."""
    return {reading.steps[v] for c in candidates for v in c.site.interior if v.op == "dropout" and c.site.call is None}


def _weights(site: AttentionSite) -> list[Value]:
    return [v for v in site.interior if v.op == "softmax" or v.op == "exp"]


def _replace(
    reading: Reading,
    candidate: Candidate,
    shared: dict[Any, fx.Node],
    inserted: list[fx.Node],
    replaced: set[fx.Node],
    options: Options,
    report: Report,
) -> None:
    if candidate.words is None and candidate.route.name == "sdpa":
        return
    graph, node = reading.gm.graph, candidate.node
    before = set(graph.nodes)
    known = dict(shared)
    try:
        emitter = Emitter(reading, node, shared)
        new = replace_attention(emitter, candidate)
        if _needs_grad(node, reading) and _written_later(reading, node):
            new = emitter.call("clone", new)  # a fused call keeps its result for the backward, which a product does not
        node.replace_all_uses_with(new)
        shared["instead of", node] = new
    except Exception as error:
        for made in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(made)
        shared.clear()
        shared.update(known)
        if not isinstance(error, Miss):
            if options.strict:
                raise
            report.fail(f"replacing attention at {_source(node) or node.name}", error)
        candidate.route = Route("inductor", str(error))
        return
    inserted += [n for n in graph.nodes if n not in before]
    replaced.add(node)
    log.info("attention at %s: %s", _source(node), candidate.route.name)


# -- nodes that hold a whole attention ----------------------------------------------------------------------------


def _unfold(reading: Reading, known: Known) -> bool:
    """Spell out nodes that hold an attention inside (`multi_head_attention_forward`) as their ATen calls."""
    unfolded = False
    for _, child in reading.children:
        unfolded |= _unfold(child, known)
    live = live_nodes(reading)
    sites, _ = _sites(reading, known)
    makers = {node for site in sites for node in reading.makers.get(site.root, ()) if node in live}
    nodes = [n for n in reading.time if n in makers and not any(reading.value(n) is s.root for s in sites)]
    for node in nodes:
        unfolded |= _unfold_node(reading, node)
    if nodes:
        reading.gm.graph.lint()
        reading.gm.recompile()
    return unfolded


def _unfold_node(reading: Reading, node: fx.Node) -> bool:
    program = reading.program[node]
    picks = [u for u in node.users if u.target is operator.getitem and isinstance(u.args[1], int)]
    single = isinstance(program.result, Ref)
    if not single and len(picks) != len(node.users):
        return False
    emitter = Emitter(reading, node, {})
    inputs = [n for n, x in reading.tensor_arguments(node)]
    if any(n is None for n in inputs):
        return False
    results: list[Any] = []

    def operand(x: Any) -> Any:
        if isinstance(x, tuple):
            return [operand(y) for y in x]
        if isinstance(x, Ref):
            return inputs[x.index] if x.item is None else results[x.index][x.item]
        if isinstance(x, Constant):
            return emitter.call(torch.full, list(x.meta.shape), x.value, dtype=x.meta.dtype, device=x.meta.device)
        return emitter.size(x) if isinstance(x, sympy.Basic) else x

    for call in program.calls:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in call.op._schema.arguments:
            value = operand(call.args[parameter.name])
            if parameter.kwarg_only:
                kwargs[parameter.name] = value
            else:
                args.append(value)
        made = emitter.call(call.op, *args, **kwargs)
        many = len(call.outputs) > 1 or call.op._schema.returns[0].type.kind() == "ListType"
        results.append([emitter.call(operator.getitem, made, k) for k in range(len(call.outputs))] if many else [made])
    if single:
        node.replace_all_uses_with(operand(program.result))
    else:
        for pick in picks:
            chosen = program.result[pick.args[1]]
            if chosen is None:
                continue
            pick.replace_all_uses_with(operand(chosen))
            reading.gm.graph.erase_node(pick)
    if not node.users:
        reading.gm.graph.erase_node(node)
    return True


# -- the report ---------------------------------------------------------------------------------------------------


def _decline_all(reading: Reading, report: Report, reason: str) -> None:
    for _, child in reading.children:
        _decline_all(child, report, reason)
    for anchor in attention.anchors(list(reading.steps)):
        report.add(_missed(reading, anchor, reason))


def _missed(reading: Reading, anchor: Value, reason: str) -> SiteReport:
    return SiteReport(
        family=attention.FAMILY,
        matched=False,
        route=None,
        reason=reason,
        source=_source(reading.steps[anchor]),
        module=_module(reading.steps[anchor]),
    )


def _matched(candidate: Candidate) -> SiteReport:
    site = candidate.site
    return SiteReport(
        family=site.family,
        matched=True,
        route=candidate.route.name,
        reason=candidate.route.reason,
        source=_source(candidate.node),
        expression=expression(site, candidate.score),
        mask=site.mask,
        module=_module(candidate.node),
        tiles=describe(site.keep, site.band, site.queries, site.keys),
    )


def expression(site: AttentionSite, score: sympy.Expr) -> str:
    """The score in sympy's notation, floats short, with the mask predicate."""
    short = score.xreplace({f: sympy.Float(f, 6) for f in score.atoms(sympy.Float)})
    text = str(short)
    if site.keep != sympy.true:
        text += f" where {site.keep}"
    if site.sink is not None:
        text += f", sink {site.sink}"
    return text


def _source(node: fx.Node) -> str | None:
    """The user's line: the innermost frame of the node's stack."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    frames = [frame for frame in frames if not frame.startswith(f'File "{_OWN}')]
    if not frames:
        return None
    path, _, rest = frames[-1].removeprefix('File "').partition('"')
    line = rest.split("line ")[-1].split(",")[0]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def _module(node: fx.Node) -> str | None:
    """The innermost module that the node stands in, by its path in the one that was compiled."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return re.sub(r"^L\[[^\]]*\](\[\d+\])*\.?", "", names[-1]) or None if names else None
