"""Gated MLPs: two projections of one input, an activation, and their product; SwiGLU, GEGLU and what is like them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch

from xfcompile.activation import GATE, UP, Sigmoid, too_large
from xfcompile.contraction import Contraction
from xfcompile.indexing import integer, linear
from xfcompile.projections import POINTWISE, PROJECTIONS, Element, Reader, projection
from xfcompile.score import Where
from xfcompile.site import Bias, Down, GatedMLPSite, Layout, Miss, Weight
from xfcompile.values import Value

FAMILY = "gated_mlp"

FEATURE = sympy.Symbol("n", integer=True, nonnegative=True)
"""The last axis of the product."""

OTHER = object()
"""An end that is no projection."""

LARGEST_FORMULA = 200
"""Operations in a formula beyond which it is taken to be something else than an activation."""

GROUPED = frozenset({"_grouped_mm", "grouped_mm", "_scaled_grouped_mm", "transformers::grouped_mm_fallback"})
"""Products of rows that are sorted by expert, each group with the weight of its own: how transformers runs experts."""

_VIEWS = frozenset("reshape permute expand to".split())
_PARTS = frozenset("slice select".split())
_CHOICES = frozenset("masked_fill where".split())
_PICKING = frozenset("index index_select embedding".split())


def anchors(values: list[Value]) -> Iterator[Value]:
    """The products of what two projections were made into, each the last of its kind: silu(g) * u, no part of it."""
    ends: dict[Value, frozenset[Any]] = {}
    found: dict[Value, frozenset[Any]] = {}
    for value in sorted(values, key=lambda v: v.order):
        mine = _ends(value, ends)
        if OTHER in mine or len(mine) != 2 or not value.dtype.is_floating_point or not value.ndim:
            continue
        if value.op == "glu" or (value.op in ("mul", "div") and all(_both(value[k], ends) for k in ("self", "other"))):
            found[value] = mine
    inner = {v for anchor, mine in found.items() for v in _within(anchor, ends) if found.get(v) == mine}
    yield from (value for value in found if value not in inner)


def _both(x: Any, ends: dict[Value, frozenset[Any]]) -> bool:
    return isinstance(x, Value) and bool(_ends(x, ends))


def _ends(value: Value, known: dict[Value, frozenset[Any]]) -> frozenset[Any]:
    """The projections, or parts of one, from which a value is computed element by element; OTHER for anything else."""
    todo = [value]
    while todo:
        top = todo[-1]
        if top in known:
            todo.pop()
            continue
        sources = _sources(top)
        pending = [s for s in sources if s not in known]
        if pending:
            todo.extend(pending)
            continue
        known[todo.pop()] = _ends_of(top, sources, known)
    return known[value]


def _sources(value: Value) -> list[Value]:
    if value.op in POINTWISE:
        return list(value.inputs())
    if value.op in _CHOICES:
        return [v for v in value.inputs() if v.dtype.is_floating_point]
    return [value["self"]] if value.op in _VIEWS | _PARTS | {"glu"} else []


def _ends_of(value: Value, sources: list[Value], known: dict[Value, frozenset[Any]]) -> frozenset[Any]:
    if value.op in PROJECTIONS | GROUPED:
        return frozenset({value})
    if value.op == "full":
        return frozenset()
    if not sources:
        return frozenset({OTHER})
    mine = frozenset().union(*(known[s] for s in sources))
    if value.op in _PARTS and mine and OTHER not in mine:
        return frozenset({value})
    if value.op == "glu" and len(mine) == 1 and OTHER not in mine:
        return frozenset({(value, 0), (value, 1)})
    if value.op == "add" and OTHER in mine and len(mine) > 1:
        # A bias: smaller than what it is added to.
        others = [s for s in sources if OTHER in known[s]]
        if all(known[s] == {OTHER} and (_smaller(s, value) or _picked(s)) for s in others):
            return mine - {OTHER}
    if value.op in _CHOICES | {"add"} and any(map(_is_grouped, sources)):
        return mine - {OTHER}  # rows that belong to no expert, biases picked for each row
    return frozenset({OTHER}) if value.op in _CHOICES else mine


def _is_grouped(value: Value) -> bool:
    """Whether a value is computed, element by element, from a grouped product."""
    todo, seen = [value], set[Value]()
    while todo:
        top = todo.pop()
        if top.op in GROUPED:
            return True
        new = [s for s in _sources(top) if s not in seen]
        seen.update(new)
        todo.extend(new)
    return False


def _smaller(bias: Value, result: Value) -> bool:
    while bias.op == "expand":
        bias = bias["self"]
    sizes = [n for n in bias.shape if n != 1]
    return bias.ndim < result.ndim or len(sizes) < len([n for n in result.shape if n != 1]) or result.ndim == 1


def _picked(bias: Value) -> bool:
    """Whether each row has a bias of its own, that of its expert."""
    while bias.op in _VIEWS:
        bias = bias["self"]
    return bias.op in _PICKING


def _within(anchor: Value, ends: dict[Value, frozenset[Any]]) -> Iterator[Value]:
    """What an anchor is computed from, element by element."""
    todo, seen = _sources(anchor), set()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        yield value
        if value.op not in PROJECTIONS:
            todo.extend(s for s in _sources(value) if OTHER not in ends[s])


# -- one site -----------------------------------------------------------------------------------------------------


def match(anchor: Value, users: dict[Value, list[Value]]) -> list[GatedMLPSite]:
    """The gated MLP around an anchor; `Miss` if there is none."""
    if _is_grouped(anchor):
        raise Miss("its products are grouped by expert: they are left to the grouped kernels that they call", anchor)
    root, dropout = _extended(anchor, users)
    if integer(anchor.shape[-1]) == 1:
        raise Miss("a gate of one feature", anchor)
    lead = tuple(sympy.Symbol(f"r{k}", integer=True, nonnegative=True) for k in range(root.ndim - 1))
    axes = (*lead, FEATURE)
    sizes = tuple(integer(n) for n in root.shape)
    reader = Reader(dict(zip(axes, sizes, strict=True)), FEATURE)
    index = tuple(sympy.S.Zero if n == 1 else a for a, n in zip(axes, sizes, strict=True))
    inside = dropout["self"] if dropout is not None else root
    formula = sympy.sympify(reader.at(inside, index))
    used = sorted(formula.free_symbols & reader.elements.keys(), key=str)
    tensors = sorted(formula.free_symbols & reader.tensors.keys(), key=str)
    if tensors:
        raise Miss("a tensor that is no bias stands between the projections and their product", root)
    if formula.free_symbols - reader.elements.keys():
        raise Miss(f"the gate depends on {formula.free_symbols - reader.elements.keys()}, known at run time only", root)
    if len(used) != 2:
        raise Miss(f"a product of {len(used)} projections, not of two", root)
    if formula.has(sympy.exp, sympy.oo, -sympy.oo, sympy.nan, sympy.zoo) or formula.count_ops() > LARGEST_FORMULA:
        raise Miss("the activation is none that is known", root)
    if too_large(formula):
        raise Miss("a number with which fp32 overflows", root)
    gate, up = _gate_and_up(formula, used, reader.elements)
    elements = reader.elements[gate], reader.elements[up]
    interior = [v for v in reader.passed if v is not root]
    for value in interior:
        if any(_is_product(user) and user is not root and user not in reader.passed for user in users.get(value, ())):
            raise Miss("gate or up goes into another product too, for which it would be computed again", root)
    value = root
    while dropout is not None and value is not dropout:  # casts after dropout
        value = value["self"]
        interior.append(value)
    return [
        _site(root, formula.xreplace({gate: GATE, up: UP}), elements, lead, sizes, dropout, tuple(interior), users),
    ]


def _is_product(value: Value) -> bool:
    return value.op == "mul" and all(isinstance(value[k], Value) and value[k].ndim for k in ("self", "other"))


def _extended(anchor: Value, users: dict[Value, list[Value]]) -> tuple[Value, Value | None]:
    """The last value that is computed from the anchor alone, element by element, and the dropout on the way."""
    root, dropout = anchor, None
    while True:
        known = users.get(root, [])
        if len(known) != 1 or known[0].shape != root.shape or not known[0].dtype.is_floating_point:
            return root, dropout
        user = known[0]
        if user.op == "dropout" and dropout is None:
            dropout = user
        elif user.op == "to" or (dropout is None and user.op in POINTWISE and _unary(user, root)):
            pass
        else:
            return root, dropout
        root = user


def _unary(user: Value, source: Value) -> bool:
    """Whether all else that it takes are numbers, and an activation that is known is made of it."""
    others = [x for x in user.args.values() if isinstance(x, Value) and x is not source]
    return user.op in ("mul", "div", "add", "sub", "neg", "clamp", "clip", "clamp_min", "clamp_max") and all(
        x.op == "full" for x in others
    )


def _gate_and_up(
    formula: sympy.Expr, used: list[sympy.Symbol], elements: dict[sympy.Symbol, Element]
) -> tuple[sympy.Symbol, sympy.Symbol]:
    """The gate is the one that more functions are of; of two alike, the one that the formula is not linear in, or the
    first."""

    def weight(p: sympy.Symbol) -> tuple[int, int, int]:
        own = [f for f in formula.atoms(sympy.tanh, sympy.erf, Sigmoid) if p in f.free_symbols]
        choices = [w for w in formula.atoms(Where) if p in w.free_symbols]
        curved = sympy.diff(formula, p).has(p)
        return (-len(own), -int(curved or bool(choices)), elements[p].product.value.order)

    first, second = sorted(used, key=weight)
    return first, second


def _site(
    root: Value,
    formula: sympy.Expr,
    elements: tuple[Element, Element],
    lead: tuple[sympy.Symbol, ...],
    sizes: tuple[sympy.Expr, ...],
    dropout: Value | None,
    interior: tuple[Value, ...],
    users: dict[Value, list[Value]],
) -> GatedMLPSite:
    gate, up = (_Side(e, root, lead) for e in elements)
    if gate.x is not up.x:
        raise Miss("gate and up have different inputs", root)
    if gate.x_order != up.x_order or gate.offset != up.offset or gate.expert != up.expert:
        raise Miss("gate and up are of different rows of their input, or one is broadcast", root)
    if gate.product.value.dtype != up.product.value.dtype:
        raise Miss("gate and up have different dtypes", root)
    by_size = dict(zip(lead, sizes[:-1], strict=True))
    of_rows = [a for a in lead if a != gate.expert and by_size[a] != 1]
    if gate.expert is not None and lead.index(gate.expert) != 0:
        raise Miss("the experts are not the first axis of the result", root)
    if sympy.expand(gate.offset - linear(tuple(of_rows), tuple(by_size[a] for a in of_rows))) != 0:
        raise Miss("the rows of the result are not those of the input, in that order", root)
    layout = _layout(gate, up, sizes[-1])
    weights = (gate.weight, up.weight) if layout == "separate" else (gate.weight,)
    biases = tuple(_checked(e.bias, side.expert) for e, side in zip(elements, (gate, up), strict=True))
    return GatedMLPSite(
        root=root,
        formula=formula,
        x=gate.x,
        x_order=gate.x_order,
        weights=weights,
        layout=layout,
        biases=(biases[0], biases[1]),
        experts=by_size[gate.expert] if gate.expert is not None else None,
        rows=sympy.prod([by_size[a] for a in of_rows], sympy.S.One),
        features=sizes[-1],
        inner=gate.inner,
        dtype=gate.product.value.dtype,
        dropout=float(dropout["p"]) if dropout is not None else 0.0,
        interior=interior,
        down=_down(root, users) if gate.expert is None else None,
    )


class _Side:
    """One projection: its input and its weight, and where the element is in both."""

    def __init__(self, element: Element, root: Value, lead: tuple[sympy.Symbol, ...]) -> None:
        self.product = product = _oriented(element, root)
        summed = [c for c in product.lhs_labels if c in product.summed]
        if len(product.summed) != 1 or len(summed) != 1 or summed[0] not in product.rhs_labels:
            raise Miss("a projection is contracted over more than one axis, or over none that both have", root)
        k = summed[0]
        features = [c for c in product.rhs_labels if c not in product.lhs_labels]
        shared = [c for c in product.rhs_labels if c in product.lhs_labels and c != k]
        if len(features) != 1 or len(shared) > 1:
            raise Miss("a weight is not [features, features], nor that for each expert", root)
        size = dict(zip(product.rhs_labels, product.rhs.shape, strict=True))
        x_size = dict(zip(product.lhs_labels, product.lhs.shape, strict=True))
        if any(x_size[c] != size[c] for c in (k, *shared)):
            raise Miss("an input is broadcast against its weights", root)
        rows = [c for c in product.lhs_labels if c not in (k, *shared)]
        at = [lead.index(element.index(c)) for c in rows if element.index(c) in lead]
        if at != sorted(at):  # in the order of the result; where there is one element, there is no order
            rows.sort(key=lambda c: lead.index(element.index(c)) if element.index(c) in lead else -1)
        order = tuple(product.lhs_labels.index(c) for c in (*shared, *rows, k))
        self.x, self.x_order = _input(product.lhs, order, experts=bool(shared))
        self.offset = linear(tuple(element.index(c) for c in rows), tuple(integer(x_size[c]) for c in rows))
        expert = element.index(shared[0]) if shared else None
        if expert is not None and not expert.is_Symbol:
            raise Miss("an expert is picked out of several, or there is one only", root)
        self.expert = expert
        self.feature = element.index(features[0])
        self.width = integer(size[features[0]])
        self.inner = integer(size[k])
        order = tuple(product.rhs_labels.index(c) for c in (*shared, features[0], k))
        self.weight = _unpermuted(product.rhs, order)


def _oriented(element: Element, root: Value) -> Contraction:
    """The product with its input on the left: the operand along which the features of the result do not vary."""
    product = element.product
    varying = {c for c, x in element.at if FEATURE in x.free_symbols}
    if not varying:
        raise Miss("gate or up is the same for all features", root)
    for turned in (product, product.swapped()):
        if not varying & set(turned.lhs_labels) and varying & set(turned.rhs_labels):
            return turned
    raise Miss("the last axis of the result is not one of features", root)


def _unpermuted(value: Value, order: tuple[int, ...]) -> Weight:
    """The weight behind transpositions."""
    while value.op == "permute":
        order = tuple(value["dims"][d] for d in order)
        value = value["self"]
    return Weight(value, order)


def _input(x: Value, order: tuple[int, ...], *, experts: bool) -> tuple[Value, tuple[int, ...]]:
    """The input behind transpositions, and behind reshapes of its rows, which stay in their order."""
    while True:
        if x.op == "permute":
            order = tuple(x["dims"][d] for d in order)
        elif x.op == "reshape" and not experts and order == tuple(range(x.ndim)) and _keeps_features(x):
            order = tuple(range(x["self"].ndim))
        else:
            return x, order
        x = x["self"]


def _keeps_features(reshape: Value) -> bool:
    return bool(reshape["self"].ndim) and reshape["self"].shape[-1] == reshape.shape[-1]


def _layout(gate: _Side, up: _Side, features: sympy.Expr) -> Layout:
    start_gate, start_up = (side.feature.xreplace({FEATURE: sympy.S.Zero}) for side in (gate, up))
    steps = [sympy.expand(s.feature - z) for s, z in ((gate, start_gate), (up, start_up))]
    if steps[0] != steps[1]:
        raise Miss("gate and up read their features in different orders", gate.product.value)
    whole = steps[0] == FEATURE and gate.width == features and up.width == features
    if gate.weight != up.weight:
        if whole:
            return "separate"
        raise Miss("a projection has features that the product does not take", gate.product.value)
    if sympy.expand(gate.width - 2 * features) == 0 and gate.product.value is up.product.value:
        if steps[0] == FEATURE and {start_gate, start_up} == {sympy.S.Zero, features}:
            return "gate first" if start_gate == 0 else "up first"
        if steps[0] == 2 * FEATURE and {start_gate, start_up} == {sympy.S.Zero, sympy.S.One}:
            return "gate even" if start_gate == 0 else "up even"
    raise Miss("gate and up are parts of a projection that has other features too", gate.product.value)


def _checked(bias: Bias | None, expert: sympy.Expr | None) -> Bias | None:
    if bias is not None and bias.expert is not None and bias.expert[1] != expert:
        raise Miss("a bias varies along another axis than features and experts", bias.value)
    start = None if bias is None else bias.feature.xreplace({FEATURE: sympy.S.Zero})
    if bias is not None and sympy.expand(bias.feature - start) not in (FEATURE, 2 * FEATURE):
        raise Miss("a bias is read in another order than its features", bias.value)
    return bias


def _down(root: Value, users: dict[Value, list[Value]]) -> Down | None:
    """The linear that the product goes into, if that is all that it is for."""
    known = users.get(root, [])
    if len(known) != 1 or known[0].op not in PROJECTIONS:
        return None
    user = known[0]
    product = projection(user)
    if product is None or product.lhs is product.rhs:
        return None
    product = product if product.lhs is root else product.swapped()
    features = [c for c in product.rhs_labels if c not in product.lhs_labels]
    k = product.lhs_labels[-1]
    plain = product.lhs is root and product.rhs.ndim == 2 and product.summed == {k} and len(features) == 1
    if not plain or k not in product.rhs_labels or product.out_labels != product.lhs_labels[:-1] + features[0]:
        return None
    if user.dtype != root.dtype or product.rhs.dtype != root.dtype or root.dtype == torch.float64:
        return None
    order = tuple(product.rhs_labels.index(c) for c in (features[0], k))
    return Down(user, _unpermuted(product.rhs, order), user["bias"] if user.op == "linear" else None)
