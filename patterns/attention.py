"""Attention: softmax over the keys of a score of q·k, times v; written out, or as a call of SDPA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch

from xfcompile.contraction import Contraction
from xfcompile.elementwise.constants import as_boolean, as_number, literal
from xfcompile.elementwise.elements import Elements
from xfcompile.elementwise.positions import Index, broadcast
from xfcompile.elementwise.rows import ROW, takes_off
from xfcompile.elementwise.rules import RULES
from xfcompile.indexing import integer, linear, unravel
from xfcompile.magnitude import absorbs, adds_coarse, bends, is_coarse, overflows
from xfcompile.masking import Masked, adding, separate, without_row_shift
from xfcompile.masks import band, describe, has_live_key, prove
from xfcompile.operands import D, Walk, place
from xfcompile.order import BIASES_FIRST, Order, one_order
from xfcompile.plan import FEW_QUERIES
from xfcompile.query_key import label_sizes, score_of
from xfcompile.score import B, H, I, J, Load, S, Where
from xfcompile.site import AttentionSite, Band, Miss
from xfcompile.softmax import softmax_of, vanishing, written_out
from xfcompile.values import Value, depends
from xfcompile.weights import back_to, emptied, left_of_dead, products

FAMILY = "attention"
SDPA = "scaled_dot_product_attention"


def anchors(values: list[Value]) -> Iterator[Value]:
    """The values around which an attention may stand: every softmax, and every SDPA call."""
    for value in values:
        if value.op in ("softmax", SDPA) or written_out(value) is not None:
            yield value


def match(anchor: Value, users: dict[Value, list[Value]]) -> list[AttentionSite]:
    """The attentions around an anchor (one for each product with values); `Miss` if there is none."""
    if anchor.op == SDPA:
        return [_sdpa(anchor)]
    found = list(products(anchor, users))
    if not found:
        raise Miss("the softmax is not multiplied with values", anchor)
    return [_at_product(anchor, product) for product in found]


# -- one attention --------------------------------------------------------------------------------------------


def _at_product(anchor: Value, product: Contraction) -> AttentionSite:
    """The attention with the batch axes that the program sees: [b*h, i, j] weights may be a view of [b, h, i, j]."""
    reasons: list[Miss] = []
    for split in (*_splits(anchor, product), None):
        try:
            return _softmax(anchor, product, split)
        except Miss as miss:
            reasons.append(miss)
    raise reasons[-1]


def _splits(anchor: Value, product: Contraction) -> Iterator[tuple[Any, Any]]:
    """Ways to see one flattened batch axis of the product as (b, h)."""
    if product.value.ndim != 3:
        return
    sources = [softmax_of(anchor)[0], product.rhs["self"] if product.rhs.op == "reshape" else product.rhs]
    for source in sources:
        if source.ndim == 4 and integer(source.shape[0]) * integer(source.shape[1]) == integer(product.value.shape[0]):
            yield source.shape[0], source.shape[1]


def _softmax(anchor: Value, product: Contraction, split: tuple[Any, Any] | None) -> AttentionSite:
    weights, values = product.lhs, product.rhs
    summed = product.summed
    if len(summed) != 1:
        raise Miss("weights and values are contracted over more than one axis", product.value)
    key_label = next(iter(summed))
    if key_label not in product.lhs_labels or key_label not in product.rhs_labels:
        raise Miss("weights and values share no contracted axis", product.value)
    features = [c for c in product.rhs_labels if c not in product.lhs_labels]
    own = [c for c in product.lhs_labels if c not in product.rhs_labels and c != key_label]
    if len(features) != 1 or not own:
        raise Miss("the product of weights and values is not [.., queries, keys] x [.., keys, features]", product.value)
    query_label = own[-1]
    lead_labels = [c for c in product.out_labels if c not in (query_label, features[0])]
    size = label_sizes(product)
    lead: tuple[sympy.Symbol, ...]
    substitution: dict[sympy.Symbol, sympy.Expr]
    runs: dict[str, tuple[sympy.Symbol, ...]]
    if split is not None:
        (batch,) = lead_labels
        lead, substitution = (B, H), {}
        runs = {batch: (B, H)}
        sizes = {B: integer(split[0]), H: integer(split[1])}
    else:
        lead, substitution = _lead_axes([size[c] for c in lead_labels])
        runs = {c: (a,) for c, a in zip(lead_labels, lead, strict=True)}
        sizes = {a: integer(size[c]) for c, a in zip(lead_labels, lead, strict=True)}
    runs |= {query_label: (I,), key_label: (J,), features[0]: (D,)}
    sizes |= {I: integer(size[query_label]), J: integer(size[key_label]), D: integer(size[features[0]])}
    axis = {c: linear(run, tuple(sizes[a] for a in run)) for c, run in runs.items()}
    ranges = {symbol: n for symbol, n in sizes.items() if symbol != D}

    # From the weights back to the softmax: casts and views only, so that the index alone changes.
    walk = Walk(ranges)
    at = tuple(axis[c] for c in product.lhs_labels)
    index, dropout, zeroed, maskings = back_to(anchor, weights, at, walk)
    scores, softmax_axis = softmax_of(anchor)
    if index[softmax_axis] != J:
        raise Miss("softmax runs over another axis than the one that meets the values", anchor)
    others = (*index[:softmax_axis], *index[softmax_axis + 1 :])
    assert not any(J in x.free_symbols for x in others), "views put no axis into two dimensions"
    columns, keys = integer(scores.shape[softmax_axis]), sizes[J]
    dot, elements, score, (q, k) = score_of(scores, index, ranges, columns, lead)
    sink = None
    if columns != keys:
        if sympy.expand(columns - keys) != 1:
            raise Miss("the softmax has more columns than there are keys", anchor)
        extra = tuple(keys if k == softmax_axis else x for k, x in enumerate(index))
        sink = without_row_shift(as_number(elements.at(scores, extra)))
        assert not sink.free_symbols & {S, J}, "the scores are read at J alone, and nothing else was at it"

    v_index = tuple(
        sympy.S.Zero if values.shape[n] == 1 and size[c] != 1 else axis[c] for n, c in enumerate(product.rhs_labels)
    )
    v = place(values, v_index, J, lead, walk)
    score_dtype = next(iter(elements.masked_in)) if len(elements.masked_in) == 1 else scores.dtype
    exact = any(takes_off(score, maximum) for maximum in elements.maxima)
    if ROW in score.free_symbols and not exact and any(_is_far(x, elements, score_dtype) for x in elements.maxima):
        raise Miss("the maximum of other scores is taken off, which may be as low as a masked key", anchor)
    score = adding(without_row_shift(score), score_dtype)
    if anchor.op == "div" and not exact:
        score = vanishing(score, scores.dtype)
        if absorbs(score, elements.loads, finite=True):
            raise Miss("exp(x) / sum(exp(x)) of an x that may be too low as a whole is 0 / 0", anchor)
    score, sink = (x if x is None else x.xreplace(substitution) for x in (score, sink))
    left = [
        sympy.And(*(m.keep(elements) for m in maskings if m.multiplied == multiplied)).xreplace(substitution)
        for multiplied in (False, True)
    ]
    return _site(
        root=product.value,
        lead=lead,
        sizes=sizes,
        operands=(q, k, v),
        head_dim=integer(_feature_size(q[-1], D)),
        score=score,
        sink=sink,
        loads=tuple(elements.loads),
        dropout=dropout,
        layout=tuple(runs[c] for c in product.out_labels),
        dtype=dot.value.dtype,
        interior=tuple(_interior(product.value, dot.value)),
        ranges=_flat_ranges(lead, sizes),
        score_dtype=score_dtype,
        dead_bool="zero" if zeroed else "nan",
        chosen=left[0],
        multiplied=left[1],
        orders=elements.orders,
    )


def _is_far(score: sympy.Expr, elements: Elements, dtype: torch.dtype) -> bool:
    """Whether a whole row of scores may be as low as masked keys are."""
    return bool(separate(adding(score, dtype), dtype, rounded=True).fills) or absorbs(score, elements.loads)


def _sdpa(call: Value) -> AttentionSite:
    q, k, v = call["query"], call["key"], call["value"]
    if k.ndim != q.ndim or v.ndim != q.ndim:
        raise Miss("SDPA on tensors of different ranks", call)
    lead, substitution = _lead_axes([integer(n) for n in call.shape[:-2]])
    sizes = {s: integer(n) for s, n in zip(lead, call.shape[:-2], strict=True)}
    sizes |= {I: integer(q.shape[-2]), J: integer(k.shape[-2]), D: integer(v.shape[-1])}
    ranges = {s: n for s, n in sizes.items() if s != D}
    walk = Walk(ranges)

    def at(x: Value, row: sympy.Symbol) -> Index:
        position = []
        for n, (symbol, own) in enumerate(zip(lead, x.shape[:-2], strict=True)):
            group = integer(sizes[symbol]) / integer(own)
            if own == 1 and sizes[symbol] != 1:
                position.append(sympy.S.Zero)
            elif group == 1:
                position.append(symbol)
            elif n == len(lead) - 1 and call["enable_gqa"] and group.is_Integer:
                position.append(walk.floordiv(symbol, group))
            else:
                raise Miss("SDPA on batch sizes that do not broadcast", call)
        return (*position, row, D)

    elements = Elements(RULES, ranges)
    scale = call["scale"]
    factor = literal(scale) if scale is not None else 1 / sympy.sqrt(integer(q.shape[-1]))
    score: sympy.Expr = S * (sympy.Float(float(factor), 17) if factor.is_number else factor)
    if not factor.is_finite and factor.is_number:
        raise Miss("SDPA with a scale that is not finite", call)
    keep: Any = sympy.true
    if call["is_causal"]:
        keep = sympy.Le(J, I)
    mask = call["attn_mask"]
    dead_bool = "zero"
    if isinstance(mask, Value):
        element = elements.at(mask, broadcast((*lead, I, J), (*(sizes[s] for s in (*lead, I, J)),), mask.shape))
        if mask.dtype == torch.bool:
            keep = sympy.And(keep, as_boolean(element))
        else:
            score = adding(score + as_number(element), q.dtype)
    return _site(
        root=call,
        lead=lead,
        sizes=sizes,
        operands=(
            place(q, at(q, I), I, lead, walk),
            place(k, at(k, J), J, lead, walk),
            # With dynamic shapes keys and values may have a symbol each for the length that SDPA holds them to.
            place(v, at(v, J), J, lead, Walk({**ranges, J: integer(v.shape[-2])})),
        ),
        head_dim=integer(q.shape[-1]),
        score=score.xreplace(substitution),
        sink=None,
        loads=tuple(elements.loads),
        dropout=float(call["dropout_p"]),
        layout=tuple((a,) for a in (*lead, I, D)),
        dtype=call.dtype,
        interior=(call,),
        ranges=_flat_ranges(lead, sizes),
        score_dtype=q.dtype,
        dead_bool=dead_bool,
        keep=keep.xreplace(substitution),
        call=call,
        orders=elements.orders,
    )


def _site(
    *,
    root: Value,
    lead: tuple[sympy.Symbol, ...],
    sizes: dict[sympy.Symbol, sympy.Expr],
    operands: tuple[Any, Any, Any],
    head_dim: sympy.Expr,
    score: sympy.Expr,
    sink: sympy.Expr | None,
    loads: tuple[Value, ...],
    dropout: float,
    layout: tuple[tuple[sympy.Symbol, ...], ...],
    dtype: torch.dtype,
    interior: tuple[Value, ...],
    ranges: dict[sympy.Symbol, sympy.Expr],
    score_dtype: torch.dtype,
    dead_bool: str,
    keep: Any = sympy.true,
    call: Value | None = None,
    chosen: Any = sympy.true,
    multiplied: Any = sympy.true,
    orders: set[Order],
) -> AttentionSite:
    """chosen, multiplied: where weights are left, once they add up to 1; elsewhere they are 0, or times 0."""
    if bends(score, score_dtype, loads):
        raise Miss("what is left of scores beside large numbers goes through more than sums", root)
    if overflows(score, score_dtype):
        raise Miss("a large number that masks is multiplied by what is data, and may overflow", root)
    masked = separate(score, score_dtype)
    finite = [fill for fill, _ in masked.fills if fill.is_finite]
    predicate = prove(sympy.And(keep, masked.keep), ranges)
    full = None
    alive = has_live_key(predicate, ranges)
    added_in = score_dtype if call is None else torch.float32  # SDPA's kernels add masks to what they accumulate
    once_more = not alive and sink is None and _leaves_something(masked, added_in, sizes[I])
    if finite and predicate != sympy.true and (once_more or absorbs(masked.score, loads)):
        full = Where(keep, score, -sympy.oo)
    dead = masked.dead() if masked.fills and full is None else dead_bool
    dead = dead_bool if dead == "nan" else dead  # SDPA gives 0 where every score is -inf
    if masked.fills and keep != sympy.true and dead == "mean" and not alive:
        dead = "unknown"
    if sink is not None and not alive:
        dead = "zero" if dead in ("nan", "mean", "zero") else dead
    chosen, multiplied = (prove(x, ranges) for x in (chosen, multiplied))
    empty = emptied(root, predicate, prove(sympy.And(chosen, multiplied), ranges), alive, full is not None)
    if empty and not alive:
        dead = left_of_dead(root, dead, chosen, predicate)
    if dead == "unknown" and not alive:
        # Rows without keys can't be excluded, and what they get is no simple rule: keep the fills as numbers.
        if any(not fill.is_finite for fill, _ in masked.fills):
            raise Miss("a row may see no key, and the fills of its masks do not agree", root)
        masked, predicate, dead, alive = _separate_nothing(score), keep, dead_bool, keep == sympy.true
    if call is not None:  # it adds one tensor, which is a sum where that says so
        orders = {order for order in orders if order.summed is not None}
    rounding = added_in if _rounds(masked.score, predicate, loads, added_in, orders, ranges) else None
    if full is not None and any(added and adds_coarse(fill, added_in) for fill, added in masked.fills):
        rounding = added_in
    order = one_order(orders, score)
    if order is None and (rounding is not None or full is not None):
        if any(adds_coarse(score, dtype) for dtype in (added_in, *_summed(orders))):
            raise Miss("a row may see no key, and its masks and biases are added up in more than one order", root)
    # Beside a sink the weights of a row without keys are 0, and so are their gradients.
    bare = not alive and sink is None
    bounds = band(predicate) if predicate != sympy.true else Band()
    had = describe(predicate, ranges)
    told = masked.fills or any(v.op == "where" or (v.op == "add" and not _number(v["other"])) for v in interior)
    if had == "none" and (told or (call is not None and call["attn_mask"] is not None)):
        had = "all true (dropped)" if not _has_bias(masked.score) else "none"
    return AttentionSite(
        root=root,
        lead=lead,
        sizes=tuple(sizes[s] for s in lead),
        q=operands[0],
        k=operands[1],
        v=operands[2],
        queries=sizes[I],
        keys=sizes[J],
        head_dim=head_dim,
        value_dim=sizes[D],
        score=masked.score,
        keep=predicate,
        dead=dead,  # type: ignore[arg-type]
        alive=alive,
        sink=sink,
        band=bounds,
        loads=loads,
        dropout=dropout,
        layout=layout,
        product_dtype=dtype,
        interior=interior,
        mask=had,
        full=full,
        floor=max(finite) if full is not None else None,
        rounding=rounding,
        added_in=added_in,
        order=order or BIASES_FIRST,
        leaks=bare and not empty and any(added and fill.is_finite for fill, added in masked.fills),
        one_fill=len(masked.fills) == 1 and masked.fills[0][1] and keep == sympy.true,
        call=call,
    )


def _leaves_something(masked: Masked, dtype: torch.dtype, queries: sympy.Expr) -> bool:
    """Whether a number that is added leaves something of the scores of a row without keys, as fp16's least does: such
    rows are computed once more, of all keys. For a few queries against many keys no kernel does that."""
    fills = masked.fills
    if (queries.is_Integer and queries < FEW_QUERIES) or masked.dead() != "unknown":
        return False
    return all(x.is_finite for x, _ in fills) and any(added and adds_coarse(x, dtype) for x, added in fills)


def _rounds(
    score: sympy.Expr,
    keep: Any,
    loads: tuple[Value, ...],
    dtype: torch.dtype,
    orders: set[Order],
    ranges: dict[sympy.Symbol, Any],
) -> bool:
    """Whether a row may see no key, and keeps of its scores what a large number that is added leaves in that dtype, or
    of its biases in the one in which they are added up before."""
    for masked in (separate(score, x, rounded=True) for x in (dtype, *_summed(orders))):
        if any(added and fill.is_finite for fill, added in masked.fills):
            return not has_live_key(prove(sympy.And(keep, masked.keep), ranges), ranges)
    return any(is_coarse(loads[load.operand], dtype) for load in score.atoms(Load))


def _summed(orders: set[Order]) -> list[torch.dtype]:
    return [order.summed for order in orders if order.summed is not None]


def _separate_nothing(score: sympy.Expr) -> Masked:
    """The score as it is, masks and all."""
    return Masked(score, sympy.true)


def _number(x: Any) -> bool:
    return not isinstance(x, Value) or x.ndim == 0


def _has_bias(score: sympy.Expr) -> bool:
    return bool(score.free_symbols - {S}) or bool(score.atoms(sympy.Function))


def _lead_axes(sizes: list[Any]) -> tuple[tuple[sympy.Symbol, ...], dict[sympy.Symbol, sympy.Expr]]:
    """Symbols for the batch axes: (), (b,), (b, h), or (p0, .., h) with b the flattened p's."""
    if len(sizes) <= 2:
        return (B, H)[: len(sizes)], {}
    outer = tuple(sympy.Symbol(f"p{k}", integer=True, nonnegative=True) for k in range(len(sizes) - 1))
    flat = tuple(integer(n) for n in sizes[:-1])
    ranges = {B: sympy.prod(flat)}
    return (*outer, H), dict(zip(outer, unravel(B, flat, ranges), strict=True))


def _flat_ranges(lead: tuple[sympy.Symbol, ...], sizes: dict[sympy.Symbol, sympy.Expr]) -> dict[sympy.Symbol, Any]:
    ranges = {I: sizes[I], J: sizes[J]}
    if len(lead) >= 2:
        ranges[H] = sizes[lead[-1]]
        ranges[B] = sympy.prod([sizes[s] for s in lead[:-1]])
    elif lead:
        ranges[B] = sizes[lead[0]]
    return ranges


def _feature_size(placed: Any, axis: sympy.Symbol) -> Any:
    for n, axes in enumerate(placed.dims):
        if axes == (axis,):
            return placed.value.shape[n]
    return 1


def _interior(root: Value, dot: Value) -> Iterator[Value]:
    """The values on the way from the product of queries and keys to the replaced root."""
    known: dict[Value, bool] = {}
    depends(root, dot, known)
    yield from (v for v, inside in known.items() if inside)
