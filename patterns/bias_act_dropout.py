"""Recognises dropout(act(x + b)), with the linear that makes x and the residual that is added after."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from xfcompile import activation
from xfcompile.activation import KEEP, X
from xfcompile.contraction import contraction
from xfcompile.patterns.pointwise import Near, Reader, Users, is_vector, users_of
from xfcompile.site import BiasActDropoutSite, Miss, Product
from xfcompile.values import Value, depends

FAMILY = BiasActDropoutSite.family


def anchors(values: list[Value]) -> Iterator[Value]:
    """Projections, and sums with a bias of what is none, or is no value of its own (addmm's)."""
    known = set(values)
    for value in values:
        if product(value) is not None:
            yield value
            continue
        pair = biased(value)
        if pair is not None and (product(pair[0]) is None or pair[0] not in known):
            yield value


def match(anchor: Value, users: Users) -> list[BiasActDropoutSite]:
    """The largest site that starts at a projection or a biased sum; none where nothing is activated or dropped out."""
    made, x = product(anchor), None
    if made is None:
        pair = biased(anchor)
        assert pair is not None
        made = product(pair[0])
        x = pair[0] if made is None else None
        reader = Reader(anchor, users, pair[1])
    else:
        reader = Reader(anchor, users, anchor["bias"] if anchor.op == "linear" else None)
    reader.run()
    reasons: list[Miss] = list(reader.near)
    for root in sorted(reader.found, key=lambda v: -v.order):
        if root is anchor or root.op in ("reshape", "to", "permute"):
            continue
        formula = reader.found[root]
        if not _worthwhile(formula):
            continue
        interior = reader.between(root)
        outside = next((v for v in interior if not users_of(users, v) <= {*interior, root}), None)
        if outside is not None:
            reasons.append(Near("what is activated is used elsewhere too", outside))
            continue
        if activation.too_large(formula):
            reasons.append(Near("a number with which fp32 overflows", root))
            continue
        if root in reader.gates:
            return []  # of a gated MLP, or of the like
        return [_site(reader, root, formula, made, x, tuple(interior))]
    if reasons:
        raise reasons[0]
    return []


def _worthwhile(formula: sympy.Expr) -> bool:
    """Whether anything is activated or dropped out; the square in a norm is no activation."""
    return KEEP in formula.free_symbols or not formula.is_polynomial(X)


def _site(
    reader: Reader, root: Value, formula: sympy.Expr, made: Product | None, x: Value | None, interior: tuple[Value, ...]
) -> BiasActDropoutSite:
    symbols = formula.free_symbols
    vectors = [n for n in range(len(reader.vectors)) if activation.vector(n) in symbols]
    tensors = [n for n in range(len(reader.tensors)) if activation.tensor(n) in symbols]
    renamed = {activation.vector(n): activation.vector(k) for k, n in enumerate(vectors)}
    renamed |= {activation.tensor(n): activation.tensor(k) for k, n in enumerate(tensors)}
    drops = KEEP in symbols
    bias = reader.bias
    if reader.moved is not None and reader.moved in interior:
        # Rows in another order than the projection has them: what is read is the projection, as it is seen there.
        x, made, bias = reader.moved, None, None
        interior = after(x, interior)
    return BiasActDropoutSite(
        root=root,
        formula=formula.xreplace(renamed),
        product=made,
        x=x,
        bias=bias,
        vectors=tuple(reader.vectors[n] for n in vectors),
        tensors=tuple(reader.tensors[n] for n in tensors),
        features=reader.features,
        dropout=reader.dropouts[0][1] if drops else 0.0,
        dtype=reader.start.dtype,
        interior=interior,
        drawn=tuple(v for v, _ in reader.dropouts if drops and (v is root or v in interior)),
    )


def after(x: Value, interior: tuple[Value, ...]) -> tuple[Value, ...]:
    """The values between, where the replacement reads x."""
    known: dict[Value, bool] = {}
    return tuple(v for v in interior if v is not x and v.order > x.order and depends(v, x, known))


def product(value: Value) -> Product | None:
    """x [.., K] times a weight of two dimensions, if that is what a value is; a linear's without its bias."""
    if value.op == "linear":
        x, weight = value["input"], value["weight"]
        return Product(x, weight, False, value.dtype) if weight.ndim == 2 and _usable(value) else None
    try:
        made = contraction(value)
    except Miss:
        return None
    if made is None or not _usable(value):
        return None
    for side in (made, made.swapped()):
        if len(side.rhs_labels) != 2 or len(side.summed) != 1:
            continue
        summed = next(iter(side.summed))
        other = side.rhs_labels.replace(summed, "")
        if len(other) == 1 and side.lhs_labels[-1] == summed and side.out_labels == side.lhs_labels[:-1] + other:
            if _is_weight(side.rhs):
                return Product(side.lhs, side.rhs, side.rhs_labels[0] == summed, value.dtype)
    return None


def _usable(value: Value) -> bool:
    return (
        value.ndim >= 2 and value.dtype.is_floating_point and isinstance(value.shape[-1], int) and value.shape[-1] > 1
    )


_VIEWS = frozenset("permute reshape expand to detach".split())


def _is_weight(value: Value) -> bool:
    """Whether a matrix is an input of the program: one that is computed (keys, say) makes scores, no projection."""
    while value.op in _VIEWS:
        value = value["self"]
    return value.op == "leaf"


def biased(value: Value) -> tuple[Value, Value] | None:
    """x and a bias, where a value is their sum."""
    if value.op != "add" or value.args.get("alpha", 1) != 1 or not _usable(value):
        return None
    for x, bias in ((value["self"], value["other"]), (value["other"], value["self"])):
        if not (isinstance(x, Value) and isinstance(bias, Value)) or x.shape != value.shape or x.op == "full":
            continue
        if bias.ndim == 0 or bias.shape[-1] != value.shape[-1] or not is_vector(bias, value.shape[-1]):
            continue
        if _is_weight(bias) and not _of_projection(x):
            return x, bias
    return None


def _of_projection(x: Value) -> bool:
    """Whether a tensor is another view of a projection, at which a site starts."""
    inner = x
    while inner.op in ("reshape", "to"):
        inner = inner["self"]
    return inner is not x and product(inner) is not None
