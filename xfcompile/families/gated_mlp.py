"""Gated MLPs as a family: what is found by its pattern, planned by `gated_routes` and written as one call."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from xfcompile.aten import is_exported
from xfcompile.emit import Emitter
from xfcompile.family import Candidate, Family, Setting, Words, needs_grad
from xfcompile.gated_routes import CHANGING, RECOMPUTE, ROUTES, TIMED, UNKNOWN, choose, most_rows
from xfcompile.layout import with_layout
from xfcompile.meaning import GatedMeaning, Kernel, called, dtype_name
from xfcompile.patterns import gated_mlp
from xfcompile.projections import PROJECTIONS
from xfcompile.read import Reading
from xfcompile.site import Bias, Down, GatedMLPSite, Miss, Weight
from xfcompile.values import Value


@dataclass(frozen=True, kw_only=True)
class GatedMLPCandidate(Candidate):
    """A gated MLP at a node. down: the linear after it, which then is part of the site: its backward needs the product,
    which ours makes again. training: whether its result needs a gradient."""

    site: GatedMLPSite
    down: Down | None = None
    training: bool = False


def _at_node(reading: Reading, site: GatedMLPSite, node: fx.Node) -> GatedMLPCandidate:
    """The site at the node of its product; where a gradient is needed, at that of the linear after it, if it can be."""
    if site.down is not None and needs_grad(node, reading):
        below = _after(reading, site.down, node)
        try:
            if below is not None:
                larger = replace(site, root=site.down.root, interior=(*site.interior, site.root))
                return _candidate(reading, larger, below, site.down)
        except Miss:
            pass  # an operand is changed in between
    return _candidate(reading, site, node, None)


def _candidate(reading: Reading, site: GatedMLPSite, node: fx.Node, down: Down | None) -> GatedMLPCandidate:
    emitter = Emitter(reading, node, {})
    values = [site.x, *(w.value for w in site.weights), *(b.value for b in site.biases if b is not None)]
    if down is not None:
        values += [down.weight.value, *([down.bias] if down.bias is not None else [])]
    return GatedMLPCandidate(
        site=site,
        node=node,
        operands=tuple(_reached(emitter, value)[0] for value in values),
        costly=tuple(v for v in site.interior if v.op in PROJECTIONS),
        drawn=tuple(v for v in (*site.interior, site.root) if v.op == "dropout"),
        down=down,
    )


def _after(reading: Reading, down: Down, node: fx.Node) -> fx.Node | None:
    """The one node that computes the linear after the product, if that is all that the product is for and all that it
    does, in the same modes."""
    makers = reading.makers.get(down.root, [])
    if len(makers) != 1 or reading.value(makers[0]) is not down.root or list(node.users) != makers:
        return None
    effects = reading.effects[makers[0]]
    if effects.writes or reading.scope[makers[0]] != reading.scope[node]:
        return None
    return makers[0]


def _plan(reading: Reading, candidate: GatedMLPCandidate, setting: Setting) -> GatedMLPCandidate:
    forced = setting.routes.get(gated_mlp.FAMILY)
    route = choose(candidate.site, training=setting.training, forced=forced)
    if route.reason == UNKNOWN:
        candidate = _specialised(candidate)
        route = choose(candidate.site, training=setting.training, forced=forced)
    if route.reason == CHANGING and not is_exported(reading.gm.graph):  # which has no guards
        most = most_rows(candidate.site, setting.training)
        if _no_more_rows(candidate, most):
            route = choose(candidate.site, training=setting.training, forced=forced, most=most)
    return replace(candidate, route=route, training=setting.training)


def _no_more_rows(candidate: GatedMLPCandidate, most: int) -> bool:
    """Whether there are no more rows, as far as is known now; if so, what is compiled is held to that."""
    example = candidate.node.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return False
    *sizes, _ = example.shape
    hints = [n.node.hint if isinstance(n, torch.SymInt) else n for n in sizes]
    if any(n is None for n in hints) or math.prod(hints) > most:
        return False
    return bool(math.prod(sizes) <= most)


def _specialised(candidate: GatedMLPCandidate) -> GatedMLPCandidate:
    """Holds the numbers of features to what they are: kernels are made for these, rows stay symbols."""
    site, example = candidate.site, candidate.node.meta.get("example_value")
    symbols: list[Any] = [n for n in getattr(example, "shape", ()) if isinstance(n, torch.SymInt)]
    if not symbols:
        return candidate
    try:
        features, inner = (symbols[0].node.shape_env.evaluate_expr(n) for n in (site.features, site.inner))
    except GuardOnDataDependentSymNode:
        return candidate
    return replace(candidate, site=replace(site, features=features, inner=inner))


# -- the operands -------------------------------------------------------------------------------------------------

_STEPS = ("to", "permute")


def _reached(emitter: Emitter, value: Value) -> tuple[Value, list[Value]]:
    """The value behind casts and transpositions that a node holds, and these, the first of them first."""
    steps: list[Value] = []
    while emitter.holder(value) is None:
        if value.op not in _STEPS:
            emitter.held(value)  # says why not
        steps.insert(0, value)
        value = value["self"]
    return value, steps


def _operand(emitter: Emitter, value: Value, dtype: torch.dtype) -> fx.Node:
    """A node of a value, in that dtype: what autocast does to it in the products that are replaced."""
    source, steps = _reached(emitter, value)
    node = emitter.held(source)
    for step in steps:
        node = emitter.call("to", node, step.dtype) if step.op == "to" else emitter.call("permute", node, *step["dims"])
    return node if value.dtype == dtype else emitter.call("to", node, dtype)


def _weight(emitter: Emitter, weight: Weight, dtype: torch.dtype) -> fx.Node:
    node = _operand(emitter, weight.value, dtype)
    return node if weight.order == tuple(range(len(weight.order))) else emitter.call("permute", node, *weight.order)


def _input(emitter: Emitter, site: GatedMLPSite) -> fx.Node:
    """[rows, inner], or [experts, rows, inner]; a view where that is one."""
    node = _operand(emitter, site.x, site.dtype)
    if site.x_order != tuple(range(len(site.x_order))):
        node = emitter.call("permute", node, *site.x_order)
    ndim, wanted = len(site.x_order), 2 if site.experts is None else 3
    if ndim == wanted:
        return node
    if site.experts is None:
        return emitter.call("reshape", node, -1, emitter.size(site.inner))
    return emitter.call("reshape", node, emitter.size(site.experts), -1, emitter.size(site.inner))


def _bias(emitter: Emitter, site: GatedMLPSite, bias: Bias) -> fx.Node:
    """[features], or [experts, features]: a view."""
    node = _operand(emitter, bias.value, site.dtype)
    kept = [bias.dim] if bias.expert is None else [bias.expert[0], bias.dim]
    for d in reversed(range(bias.value.ndim)):
        if d not in kept:
            node = emitter.call("select", node, d, 0)
    if kept != sorted(kept):
        node = emitter.call("transpose", node, 0, 1)
    # Of the feature and of nothing else: `Reader._bias` takes no others.
    start, step = bias.feature.xreplace({gated_mlp.FEATURE: sympy.S.Zero}), bias.feature.coeff(gated_mlp.FEATURE)
    start, step, features = int(start), int(step), int(site.features)
    if (start, step) != (0, 1) or bias.value.shape[bias.dim] != features:
        node = emitter.call(operator.getitem, node, (..., slice(start, start + step * (features - 1) + 1, step)))
    if site.experts is not None and bias.expert is None:
        node = emitter.call("expand", node, emitter.size(site.experts), -1)
    return node


# -- the call -----------------------------------------------------------------------------------------------------


def _replace(emitter: Emitter, candidate: GatedMLPCandidate) -> fx.Node:
    from xfcompile.kernels.gated_mlp import gated_mlp as op
    from xfcompile.kernels.gated_mlp import gated_mlp_down, prepare

    site, down = candidate.site, candidate.down
    weights = [_weight(emitter, w, site.dtype) for w in site.weights]
    x = _input(emitter, site)
    biases = [None if b is None else _bias(emitter, site, b) for b in site.biases]
    product = site.root.dtype
    second: list[Any] = []
    if down is not None:
        bias = None if down.bias is None else _operand(emitter, down.bias, product)
        second = [_weight(emitter, down.weight, product), bias]
    route = candidate.route.name
    form = "packed" if route.startswith("cublas") else "dual"
    save = candidate.training and not route.endswith(RECOMPUTE)
    about = (prepare(site.formula), site.layout, form, save, product)
    made = emitter.call(
        op.default if down is None else gated_mlp_down.default,
        x,
        *(weights if len(weights) == 2 else [weights[0], None]),
        *biases,
        *second,
        *about,
        *_dropout(emitter, site),
    )
    out = emitter.call(operator.getitem, made, 0)
    if site.root.ndim != (2 if site.experts is None else 3):
        out = emitter.call("view", out, *(emitter.size(n) for n in site.root.shape))
    return with_layout(emitter, emitter.anchor, out)


def _dropout(emitter: Emitter, site: GatedMLPSite) -> Iterator[Any]:
    """A seed, drawn in the graph, so that a recomputation has it too; and p."""
    if site.dropout:
        yield emitter.call(torch.randint, 2**62, (1,), dtype=torch.int64, device=site.root.meta.device)
        yield site.dropout


def _words(candidate: GatedMLPCandidate) -> Words:
    formula = candidate.site.formula
    short = formula.xreplace({f: sympy.Float(f, 6) for f in formula.atoms(sympy.Float)})
    dropout = f", dropout {candidate.site.dropout}" if candidate.site.dropout else ""
    return Words(expression=f"{short}, {candidate.site.layout}{dropout}", meaning=_meaning(candidate))


def _meaning(candidate: GatedMLPCandidate) -> GatedMeaning:
    site = candidate.site
    gate, up = (bias is not None for bias in site.biases)
    return GatedMeaning(
        formula=site.formula,
        layout=site.layout,
        rows=site.rows,
        inner=site.inner,
        features=site.features,
        experts=site.experts,
        biases=(gate, up),
        down=candidate.down is not None,
        dropout=site.dropout,
        dtype=dtype_name(site.dtype),
    )


def _kernels(nodes: Sequence[fx.Node]) -> tuple[Kernel, ...]:
    call = called(nodes, "xfcompile::gated_mlp", "xfcompile::gated_mlp_down")
    if call is None:
        return ()
    from xfcompile.kernels.gated_mlp import source_of_kernel

    return (Kernel("gated MLP, forward and backward", source_of_kernel(call["kernel"])),)


def _timed_routes(candidate: GatedMLPCandidate) -> tuple[str, ...]:
    """None on CPUs, where an op's definition runs in place of its kernel."""
    return TIMED if candidate.site.root.meta.device.type == "cuda" else ()


GATED_MLP: Family[GatedMLPSite, GatedMLPCandidate] = Family(
    name=gated_mlp.FAMILY,
    routes=ROUTES,
    anchors=gated_mlp.anchors,
    match=gated_mlp.match,
    at_node=_at_node,
    plan=_plan,
    replace=_replace,
    words=_words,
    costly="its projections",
    timed_routes=_timed_routes,
    kernels=_kernels,
)
