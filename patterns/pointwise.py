"""Reads what is computed of a projection, one element from one element, as formulas in sympy."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import sympy
import torch

from xfcompile import activation
from xfcompile.activation import KEEP, X
from xfcompile.elementwise.constants import as_number, literal, rounded
from xfcompile.evaluate import Evaluator
from xfcompile.site import Miss
from xfcompile.values import Value

log = logging.getLogger(__name__)

Users = dict[Value, list[Value]]

LONGEST = 200
"""Operations in a formula past which it is no activation."""

MOST = 64
"""Values that are computed from a projection, one element from one element, past which no more are looked at."""

OTHER_DROPOUTS = {
    "alpha_dropout": "alpha dropout keeps mean and variance, and does not drop elements to 0",
    "feature_alpha_dropout": "alpha dropout keeps mean and variance, and does not drop elements to 0",
    "feature_dropout": "a dropout of whole channels, not of elements",
}


class Near(Miss):
    """A `Miss` of what a user might have taken for a site."""


def users_of(users: Users, value: Value) -> set[Value]:
    """The users of a value, without the masks that `native_dropout` gives beside its result, and without views of which
    nothing is made."""
    return {v for v in users.get(value, ()) if v.op != "native_dropout" and (v.op != "reshape" or users.get(v))}


def is_vector(value: Value, features: int) -> bool:
    """One element for each channel, or a single one for all."""
    if not value.dtype.is_floating_point or any(n != 1 for n in value.shape[:-1]):
        return False
    return value.ndim == 0 or value.shape[-1] in (1, features)


class Reader:
    """Formulas of all that is computed, one element from one, of `start`, with a single dropout and what is added.

    start: the value of which one element is `X`: a projection with its bias, if it has one here.
    """

    def __init__(self, start: Value, users: Users, bias: Value | None) -> None:
        self.start = start
        self.users = users
        self.bias = bias
        self.features = int(start.shape[-1])
        self.found: dict[Value, sympy.Expr] = {start: X}
        self.vectors: list[Value] = []
        self.tensors: list[tuple[Value, tuple[Any, ...]]] = []
        self.dropouts: list[tuple[Value, float]] = []
        self.gates: set[Value] = set()
        self.moved: Value | None = None
        """The projection with its rows in another order."""
        self.near: list[Miss] = []

    def run(self) -> None:
        """In the order in which values were made, so that all that a value is made of has been read before."""
        waiting = set(self.users.get(self.start, ()))
        while waiting and len(self.found) < MOST:
            value = min(waiting, key=lambda v: v.order)
            waiting.remove(value)
            try:
                formula = self.read(value)
                self._check(formula, value)
            except Near as miss:
                self.near.append(miss)
            except Miss as miss:
                log.debug("no bias-act-dropout beyond %s: %s", value, miss.reason)
            else:
                self.found[value] = formula
                waiting.update(self.users.get(value, ()))

    def between(self, root: Value) -> list[Value]:
        """The values from the start to a root, without it."""
        inside: dict[Value, None] = {}
        todo = [root]
        while todo:
            for v in todo.pop().inputs():
                if v in self.found and v not in inside:
                    inside[v] = None
                    if v is not self.start:
                        todo.append(v)
        return sorted(inside, key=lambda v: v.order)

    def _check(self, formula: sympy.Expr, value: Value) -> None:
        reason = _why_no_activation(formula, len(self.tensors))
        if reason is not None:
            raise Miss(reason, value)

    def read(self, value: Value) -> sympy.Expr:
        if value.op in OTHER_DROPOUTS:
            raise Near(OTHER_DROPOUTS[value.op], value) if value.args.get("train") else Miss("no dropout", value)
        rule = _RULES.get(value.op)
        if rule is None or not value.dtype.is_floating_point:
            raise Miss(f"{value.op} is no function of one element", value)
        if any(isinstance(x, sympy.Basic) and not x.is_number for x in value.args.values()):
            raise Miss("a number that is not known at compile time", value)
        return rule(self, value)

    def operand(self, x: Any, value: Value) -> sympy.Expr:
        """One element of an operand of `value`, to whose shape it is broadcast."""
        if not isinstance(x, Value):
            return _known(literal(x), value)
        if x in self.found:
            if x.shape != value.shape:
                raise Miss("a projection is broadcast", value)
            return self.found[x]
        return self._other(x, value)

    def _other(self, x: Value, value: Value) -> sympy.Expr:
        if x.op == "full":
            return _known(rounded(as_number(literal(x["fill"])), x.dtype), value)
        if not x.dtype.is_floating_point or x.meta.device != value.meta.device:
            raise Miss(f"an operand of {x.dtype} on {x.meta.device}", x)
        while x.op == "expand":
            x = x["self"]
        if is_vector(x, self.features):
            if x not in self.vectors:
                self.vectors.append(x)
            return activation.vector(self.vectors.index(x))
        if (x, value.shape) not in self.tensors:
            self.tensors.append((x, value.shape))
        return activation.tensor(self.tensors.index((x, value.shape)))

    def is_tensor(self, formula: sympy.Expr) -> bool:
        return any(formula == activation.tensor(n) for n in range(len(self.tensors)))


@functools.lru_cache(4096)  # the layers of a model have the same formulas
def _why_no_activation(formula: sympy.Expr, tensors: int) -> str | None:
    """Why a formula is none of those that are looked for; None if it may be. tensors: how many are added in it."""
    if formula.count_ops(visual=False) > LONGEST:
        return "a formula of so many operations is no activation"
    if X not in formula.free_symbols:
        return "nothing is left of the projection"
    # Of a tensor that is but a number's factor in each term of a sum it is seen much sooner than by a derivative.
    terms = [term for term in sympy.Add.make_args(formula) if not term.as_coeff_Mul()[1].is_Symbol]
    within: set[sympy.Symbol] = set().union(*(term.free_symbols for term in terms))
    added = {activation.tensor(n) for n in range(tensors)}
    if not all(sympy.diff(formula, r).is_number for r in within & added):
        return "more than a number is done to what was added"
    return None


def _known(number: sympy.Basic, value: Value) -> sympy.Expr:
    if not number.is_number or not number.is_finite:
        raise Miss(f"{number} is no finite number that is known at compile time", value)
    return number


# -- rules: (reader, value) -> formula ------------------------------------------------------------------------------


def _add(r: Reader, v: Value) -> sympy.Expr:
    a, b = r.operand(v["self"], v), r.operand(v["other"], v)
    alpha = literal(v.args.get("alpha", 1))
    if v.op == "sub":
        return a - alpha * b
    if alpha == 1 and r.bias is None and r.users.get(r.start) == [v]:
        for x, other, symbol in ((a, v["other"], b), (b, v["self"], a)):
            if x == X and symbol.is_Symbol and is_vector(_bare(other), r.features) and _bare(other) in r.vectors:
                r.bias = _bare(other)
                return X
    return a + alpha * b


def _bare(value: Any) -> Any:
    while isinstance(value, Value) and value.op == "expand":
        value = value["self"]
    return value


def _mul(r: Reader, v: Value) -> sympy.Expr:
    a, b = r.operand(v["self"], v), r.operand(v["other"], v)
    for x, own in ((a, v["other"]), (b, v["self"])):
        if r.is_tensor(x):
            r.gates.add(own)
            raise Miss("multiplied by another tensor", v)
    return a * b


def _div(r: Reader, v: Value) -> sympy.Expr:
    if v.args.get("rounding_mode") is not None:
        raise Miss("divided into whole numbers", v)
    return activation.quotient(r.operand(v["self"], v), r.operand(v["other"], v))


def _reciprocal(r: Reader, v: Value) -> sympy.Expr:
    return activation.quotient(sympy.S.One, r.operand(v["self"], v))


def _pow(r: Reader, v: Value) -> sympy.Expr:
    return activation.power(r.operand(v["self"], v), v["exponent"])


def _clamp(r: Reader, v: Value) -> sympy.Expr:
    bounds = [x if x is None else r.operand(x, v) for x in (v.args.get("min"), v.args.get("max"))]
    if any(x is not None and not x.is_number for x in bounds):
        raise Miss("clamped by a tensor", v)
    return activation.clamp(r.operand(v["self"], v), *bounds)


def _function(r: Reader, v: Value) -> sympy.Expr:
    return activation.ALL[v.op](r.operand(v["self"], v), v.args)


def _itself(r: Reader, x: Value) -> sympy.Expr:
    """One element of what is seen in another shape or dtype; a constant is one too, in the body of a function."""
    return r.operand(x, x)


def _same(r: Reader, v: Value) -> sympy.Expr:
    x = v["self"]
    if x.meta.device != v.meta.device:
        raise Miss("moved to another device", v)
    return rounded(_itself(r, x), v.dtype)


def _reshape(r: Reader, v: Value) -> sympy.Expr:
    if v.ndim == 0 or v.shape[-1] != r.features:
        raise Miss("the last axis is reshaped", v)
    return _itself(r, v["self"])


def _permute(r: Reader, v: Value) -> sympy.Expr:
    if v["dims"][-1] != v.ndim - 1 or _itself(r, v["self"]) != X:
        raise Miss("moved in the middle of what is done to its elements", v)
    # Else what is computed of the projection in its own order would be taken for the same.
    inner = v["self"]
    if users_of(r.users, r.start) != ({v} if inner is r.start else {inner}) or users_of(r.users, inner) != {v}:
        raise Miss("seen in two orders", v)
    r.moved = v
    return X


def _custom_gradient(r: Reader, v: Value) -> sympy.Expr:
    """An autograd function whose backward is the derivative of its forward, as far as numbers can tell: those near 0,
    and, beyond any bound that it may have been clamped to, those far from it where all is finite."""
    x = v["args"][0]
    if len(v["args"]) != 1 or r.found.get(x) != X:
        raise Miss("an autograd function of more than a projection", v)
    upstream = sympy.Symbol("upstream", real=True)
    forward = _inside(r, v["forward"], {x: X})
    backward = _inside(r, v["backward"][0], {x: X, v["grad"]: upstream})
    factor, derivative = sympy.diff(backward, upstream), sympy.diff(forward, X)
    if upstream in factor.free_symbols:
        raise Near("an autograd function whose backward is not the derivative of its forward, nor any factor", v)
    if not (factor + derivative).free_symbols <= {X}:
        raise Miss("an autograd function of more than a projection", v)
    near, far = torch.linspace(-9, 9, 1001, dtype=torch.float64), torch.logspace(0.9, 30, 1001, dtype=torch.float64)
    points = torch.cat([near, far, -far])
    evaluated = Evaluator({X: points, upstream: torch.full_like(points, 0.7)}, (), torch.float64, points.device)

    def numbers(f: sympy.Expr) -> torch.Tensor:
        return torch.as_tensor(evaluated(f), dtype=points.dtype).expand(points.shape)

    wanted = numbers(derivative)
    little = 1e-6 * min(1.0, float(wanted[: len(near)].abs().max()))
    for written in (numbers(factor), numbers(backward) / 0.7):
        compared = (points.abs() <= 9) | (written.isfinite() & wanted.isfinite())
        if not torch.allclose(written[compared], wanted[compared], rtol=1e-6, atol=little):
            raise Near("an autograd function whose backward is not the derivative of its forward", v)
    return forward


def _inside(r: Reader, value: Value, known: dict[Value, sympy.Expr]) -> sympy.Expr:
    """A value as a formula of others, in the body of a function."""
    inner = Reader(r.start, {}, None)
    inner.found = dict(known)
    todo, needed = [value], set[Value]()
    while todo:
        v = todo.pop()
        if v in known or v in needed or v.op == "full":
            continue
        needed.add(v)
        todo.extend(v.inputs())
    for v in sorted(needed, key=lambda v: v.order):
        inner.found[v] = inner.read(v)
    return inner.found[value]


def _dropout(r: Reader, v: Value) -> sympy.Expr:
    if r.dropouts:
        raise Near("two dropouts of one projection", v)
    r.dropouts.append((v, float(v["p"])))
    return KEEP * r.operand(v["self"], v)


_RULES: dict[str, Callable[[Reader, Value], sympy.Expr]] = {
    "add": _add, "sub": _add, "mul": _mul, "div": _div, "reciprocal": _reciprocal, "pow": _pow,
    "clamp": _clamp, "clip": _clamp, "clamp_min": _clamp, "clamp_max": _clamp,
    "to": _same, "reshape": _reshape, "permute": _permute, "custom_gradient": _custom_gradient, "dropout": _dropout,
    **dict.fromkeys(activation.ALL, _function),
}  # fmt: skip
