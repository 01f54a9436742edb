"""The product of queries and keys below a softmax, and what is computed of it there: the score as a formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy

from xfcompile.contraction import CONTRACTIONS, Contraction, contraction
from xfcompile.elementwise.constants import as_number
from xfcompile.elementwise.elements import Elements
from xfcompile.elementwise.positions import Index
from xfcompile.elementwise.rules import RULES
from xfcompile.indexing import integer
from xfcompile.operands import D, Walk, place
from xfcompile.score import I, J, S
from xfcompile.site import Miss
from xfcompile.values import Value


def score_of(
    scores: Value,
    index: Index,
    ranges: dict[sympy.Symbol, Any],
    columns: sympy.Expr,
    lead: tuple[sympy.Symbol, ...],
) -> tuple[Contraction, Elements, sympy.Expr, tuple[Any, Any]]:
    """The product of queries and keys, the score as a formula of it, and both operands (see `_query_and_key`)."""
    found = list(_dots(scores))
    if not found:
        raise Miss("no product of queries and keys below the softmax", scores)
    reasons: list[Miss] = []
    for dot in found:
        elements = Elements(RULES, ranges, dot.value, columns)
        try:
            score = as_number(elements.at(scores, index))
            if S not in score.free_symbols:
                raise Miss("the softmax does not see the product of queries and keys", scores)
            return dot, elements, score, _query_and_key(dot, elements, Walk(ranges), lead)
        except Miss as miss:
            reasons.append(miss)
    raise reasons[0]


def _dots(scores: Value) -> Iterator[Contraction]:
    """Products below the softmax that are not below another product, the largest feature size first."""
    found: list[Contraction] = []
    todo, seen = [scores], set()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.op in CONTRACTIONS:
            product = contraction(value)
            if product is not None:
                found.append(product)
            continue
        todo.extend(value.inputs())

    def weight(c: Contraction) -> tuple[int, int]:
        size = label_sizes(c)
        features = integer(sympy.prod([integer(size[x]) for x in c.summed]))
        return (-int(features) if features.is_Integer else 0, c.value.order)

    yield from sorted(found, key=weight)


def _query_and_key(dot: Contraction, elements: Elements, walk: Walk, lead: tuple[sympy.Symbol, ...]) -> tuple[Any, Any]:
    """Which operand of the product is the query, and what each dimension of both is."""
    if not dot.value.dtype.is_floating_point:
        raise Miss("a product of whole numbers, which may overflow", dot.value)
    if len(dot.summed) != 1:
        raise Miss("queries and keys are contracted over more than one axis", dot.value)
    index = elements.dot_index
    assert index is not None
    place_of = dict(zip(dot.out_labels, index, strict=True)) | {next(iter(dot.summed)): D}
    size = label_sizes(dot)

    def at(value: Value, labels: str) -> Index:
        return tuple(
            sympy.S.Zero if n == 1 and size[c] != 1 else place_of[c] for c, n in zip(labels, value.shape, strict=True)
        )

    lhs, rhs = at(dot.lhs, dot.lhs_labels), at(dot.rhs, dot.rhs_labels)
    sides = [(dot.lhs, lhs), (dot.rhs, rhs)]
    for (a, at_a), (b, at_b) in (sides, sides[::-1]):
        rows = [set().union(*(x.free_symbols for x in at_x)) for at_x in (at_a, at_b)]
        if J in rows[0] or I in rows[1]:
            continue
        return place(a, at_a, I, lead, walk, scale=True, widened=True), place(
            b, at_b, J, lead, walk, scale=True, widened=True
        )
    raise Miss("the product below the softmax is not one of queries with keys", dot.value)


def label_sizes(product: Contraction) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for labels, value in ((product.lhs_labels, product.lhs), (product.rhs_labels, product.rhs)):
        for label, n in zip(labels, value.shape, strict=True):
            if label not in sizes or sizes[label] == 1:
                sizes[label] = n
    return sizes
