"""Attention as a family: what is found by its pattern, planned by `plan` and written into the graph by `replace`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from xfcompile.diagonal import of_distances
from xfcompile.emit import Emitter
from xfcompile.family import Family, Route, Setting, Words, value_needs_grad
from xfcompile.meaning import AttentionMeaning, Kernel, called, dtype_name, known_sizes, tensor_of
from xfcompile.patterns import attention
from xfcompile.plan import UNKNOWN, AttentionCandidate, Told, choose
from xfcompile.read import Reading
from xfcompile.replace import replace_attention
from xfcompile.score import Load, S
from xfcompile.site import AttentionSite
from xfcompile.sparsity import describe


def _at_node(reading: Reading, site: AttentionSite, node: fx.Node) -> AttentionCandidate:
    """The site with those readings of its operands, and that form of its score, that hold at a node."""
    emitter = Emitter(reading, node, {})
    q, k, v = (emitter.choose(readings) for readings in (site.q, site.k, site.v))
    factor = q.factor * k.factor
    score = site.score.xreplace({S: factor * S}) if factor != 1 else site.score
    assert v.factor == 1, "values are placed without looking through what scales them"
    written_out = site.interior if site.call is None else ()
    return AttentionCandidate(
        site=site,
        node=node,
        operands=(q.value, k.value, v.value, *site.loads),
        costly=tuple(x for x in written_out if x.op in ("softmax", "exp")),
        drawn=tuple(x for x in written_out if x.op == "dropout"),
        q=q,
        k=k,
        v=v,
        score=score,
        loads=tuple(tensor_of(reading, value) for value in site.loads),
    )


def _plan(reading: Reading, candidate: AttentionCandidate, setting: Setting) -> AttentionCandidate:
    training = setting.training
    learned = [n for n, v in enumerate(candidate.site.loads) if training and value_needs_grad(v, reading)]
    distances = bool(learned) and _of_distances(reading, candidate, learned)

    def chosen() -> tuple[Route, Told | None]:
        return choose(
            candidate.site,
            candidate.score,
            training=training,
            bias_grad=bool(learned),
            distances=distances,
            forced=setting.routes,
            why_no_backward=setting.why_no_backward,
        )

    route, words = chosen()
    if route.reason == UNKNOWN:
        candidate = _specialised(candidate)
        route, words = chosen()
    site = candidate.site
    if route.name == "sdpa" and words is not None and _says_it_already(site, words):
        route, words = Route("sdpa", "as it was: SDPA is told all there is to tell", unchanged=True), None
    if reading.scope[candidate.node].chosen:
        reason = "SDPA's backends are chosen here by sdpa_kernel(...)"
        own = Route("sdpa", f"as it was: {reason}", unchanged=True)
        route, words = Route("inductor", reason) if site.call is None else own, None
    if setting.recomputed and not training and route.name == "sdpa" and route.replaces:
        # torch refuses to compile it: SDPA counts as random, which no forward without a backward may recompute.
        route = Route("inductor", "SDPA can't be checkpointed where nothing needs a gradient")
    return replace(candidate, route=route, words=words, training=training)


def _of_distances(reading: Reading, candidate: AttentionCandidate, learned: Sequence[int]) -> bool:
    """Whether all that is loaded of what needs a gradient depends on how far a key is from its query."""
    emitter = Emitter(reading, candidate.node, {})
    loads = [load for load in candidate.score.atoms(Load) if load.operand in learned]
    return all(of_distances(emitter, candidate.site, load) for load in loads)


def _specialised(candidate: AttentionCandidate) -> AttentionCandidate:
    """Holds the head dimensions to the numbers that they are: kernels are made for these, lengths stay symbols."""
    site, example = candidate.site, candidate.node.meta.get("example_value")
    sizes = example.shape if isinstance(example, torch.Tensor) else ()
    symbols: list[Any] = [n for n in sizes if isinstance(n, torch.SymInt)]
    if not symbols:
        return candidate
    try:
        dims = [symbols[0].node.shape_env.evaluate_expr(sympy.sympify(n)) for n in (site.head_dim, site.value_dim)]
    except GuardOnDataDependentSymNode:
        return candidate
    return replace(candidate, site=replace(site, head_dim=dims[0], value_dim=dims[1]))


def _says_it_already(site: AttentionSite, words: Told) -> bool:
    """Whether it is an SDPA call, whose rewriting would tell SDPA nothing new: no mask where it has one is new."""
    return site.call is not None and (not words.plain or site.call["attn_mask"] is None)


def _words(candidate: AttentionCandidate) -> Words:
    site = candidate.site
    return Words(
        expression=expression(site, candidate.score),
        mask=site.mask,
        tiles=describe(site.keep, site.band, site.queries, site.keys),
        meaning=_meaning(candidate),
    )


def _meaning(candidate: AttentionCandidate) -> AttentionMeaning:
    site = candidate.site
    sizes = (*site.sizes, site.queries, site.keys, site.head_dim, site.value_dim)
    return AttentionMeaning(
        score=candidate.score,
        keep=sympy.sympify(site.keep),
        dead=site.dead,
        alive=site.alive,
        sink=site.sink,
        band=site.band,
        dropout=site.dropout,
        sizes=site.sizes,
        queries=site.queries,
        keys=site.keys,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        dtype=dtype_name(site.root.dtype),
        loads=candidate.loads,
        known=known_sizes(candidate.node, (candidate.score, site.keep, *sizes)),
    )


def _kernels(nodes: Sequence[fx.Node]) -> tuple[Kernel, ...]:
    """The kernel that a replacement calls, and the one that lists its tiles, where it is given such lists."""
    call = called(nodes, "xfcompile::attention")
    if call is None:
        return ()
    from xfcompile.kernels.attention import source_of_kernel, source_of_lists

    found = [Kernel("attention, forward", source_of_kernel(call["kernel"]))]
    if call.get("tiles") is not None:
        found.append(Kernel("lists of the tiles under its mask", source_of_lists(call["kernel"])))
    return tuple(found)


def expression(site: AttentionSite, score: sympy.Expr) -> str:
    """The score in sympy's notation, floats short, with the mask predicate."""
    short = score.xreplace({f: sympy.Float(f, 6) for f in score.atoms(sympy.Float)})
    text = str(short)
    if site.keep != sympy.true:
        text += f" where {site.keep}"
    if site.sink is not None:
        text += f", sink {site.sink}"
    return text


ATTENTION: Family[AttentionSite, AttentionCandidate] = Family(
    name=attention.FAMILY,
    routes=("triton", "sdpa", "inductor"),
    anchors=attention.anchors,
    match=attention.match,
    at_node=_at_node,
    plan=_plan,
    replace=replace_attention,
    words=_words,
    costly="the attention weights",
    kernels=_kernels,
)
