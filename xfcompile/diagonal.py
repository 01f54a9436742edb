"""Terms that depend on how far a key is from its query and on nothing else: computed as vectors, as long as there are
distances, where the program computes one for each score. T5's bias of relative positions is one.

A vector is made by the program's own operations, applied to fewer elements: its numbers are the program's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from xfcompile.elementwise.elements import Elements
from xfcompile.elementwise.positions import Index, broadcast
from xfcompile.elementwise.rules import RULES
from xfcompile.emit import Emitter
from xfcompile.indexing import Ranges
from xfcompile.operands import Walk
from xfcompile.score import B, H, I, J, Load, Where
from xfcompile.site import AttentionSite, Miss
from xfcompile.values import Value

DISTANCE = sympy.Symbol("distance", integer=True)
"""j - i"""

Make = Callable[[], fx.Node]
"""Emits a tensor that broadcasts against [b, h, 1, distances]."""


def vector(emitter: Emitter, site: AttentionSite, load: Load) -> tuple[fx.Node, Load] | None:
    """What an element [b, h, i, j] of the score loads, as a tensor [b or 1, h or 1, 1, queries + keys - 1], and the
    indices of the load in it; None if it is no function of j - i, or is there already."""
    diagonal, value, index = _Diagonal(emitter, site), site.loads[load.operand], _moved(load)
    make = diagonal.plan(value, index) if {I, J} <= load.free_symbols else None
    if make is None:
        return None
    own = [a for a in (B, H) if a in load.free_symbols]
    key = ("diagonal", value, index, site.queries, site.keys, emitter.scope)
    if key not in emitter.shared:
        before = set(emitter.graph.nodes)
        try:
            sizes = [diagonal.size(a) if a in own else 1 for a in (B, H)]
            distances = emitter.size(diagonal.distances)
            made = emitter.call(torch.broadcast_to, make(), (*sizes, 1, distances))
            emitter.shared[key] = emitter.call("contiguous", made)
        except Miss:
            for node in reversed([n for n in emitter.graph.nodes if n not in before]):
                emitter.graph.erase_node(node)
            return None
    indices = [a if a in own else sympy.S.Zero for a in (B, H)]
    return emitter.shared[key], Load(load.args[0], *indices, sympy.S.Zero, J - I + site.queries - 1)


def of_distances(emitter: Emitter, site: AttentionSite, load: Load) -> bool:
    """Whether what is loaded depends on distances alone, and `vector` makes one of it."""
    plan = _Diagonal(emitter, site).plan
    return {I, J} <= load.free_symbols and plan(site.loads[load.operand], _moved(load)) is not None


def _moved(load: Load) -> Index:
    return tuple(sympy.expand(x.xreplace({J: I + DISTANCE})) for x in load.indices)


class _Diagonal:
    """Plans how elements at (b, h, distance) are computed."""

    def __init__(self, emitter: Emitter, site: AttentionSite) -> None:
        self.emitter = emitter
        self.distances = site.queries + site.keys - 1
        self.first = 1 - site.queries
        # To the emitter the distances are keys of a site with one query.
        self.site = replace(site, queries=sympy.S.One, keys=self.distances)
        self.ranges: Ranges = {I: site.queries}
        # Layers of a model ask for the same positions.
        key = ("elements along diagonals", site.queries)
        self.elements: Elements = emitter.reading.known.setdefault(key, Elements(RULES, self.ranges))
        self.walk = Walk(self.ranges)
        self.plans: dict[tuple[Value, Index], Make | None] = {}

    def size(self, axis: sympy.Symbol) -> Any:
        return self.emitter.size(self.emitter.full_size(axis, self.site))

    def plan(self, value: Value, index: Index) -> Make | None:
        """How to compute the element at `index`; None if that depends on more than the distance."""
        index = tuple(sympy.S.Zero if n == 1 else x for x, n in zip(index, value.shape, strict=True))
        key = (value, index)
        if key not in self.plans:
            self.plans[key] = self._once(self._plan(value, index))
        return self.plans[key]

    @staticmethod
    def _once(make: Make | None) -> Make | None:
        made: list[fx.Node] = []

        def first_time() -> fx.Node:
            if not made:
                assert make is not None
                made.append(make())
            return made[0]

        return None if make is None else first_time

    def _plan(self, value: Value, index: Index) -> Make | None:
        if not value.dtype.is_floating_point and not value.dtype.is_complex:
            position = self.elements.at(value, index)
            if not position.atoms(Load, Where, sympy.Min, sympy.Max) and I not in position.free_symbols:
                return lambda: self._tensor(position, value.dtype)
        step = self.walk.back(value, index)
        if step is not None:
            return self.plan(*step)
        if value.op == "full":
            return lambda: self._number(value["fill"], value.dtype)
        if value.op in POINTWISE:
            return self._pointwise(value, index)
        if value.op == "embedding":
            rows = self.plan(value["indices"], index[:-1])
            return None if rows is None else self._gather(value["weight"], [rows, index[-1]])
        if value.op == "index":
            return self._indexed(value, index)
        return self._gather(value, list(index))

    def _pointwise(self, value: Value, index: Index) -> Make | None:
        emit = POINTWISE[value.op]
        parts: dict[str, Any] = {}
        for name, x in value.args.items():
            if isinstance(x, Value):
                parts[name] = self.plan(x, broadcast(index, value.shape, x.shape))
                if parts[name] is None:
                    return None
            elif isinstance(x, (int, float, bool, str, torch.dtype)) or x is None:
                parts[name] = x
            else:
                return None

        def make() -> fx.Node:
            given = {name: x() if isinstance(value.args[name], Value) else x for name, x in parts.items()}
            return emit(self.emitter, value, given)

        return make

    def _indexed(self, value: Value, index: Index) -> Make | None:
        """Advanced indexing by integer tensors that stand next to each other."""
        x, tensors = value["self"], list(value["indices"])
        tensors += [None] * (x.ndim - len(tensors))
        used = [k for k, t in enumerate(tensors) if t is not None]
        if not used or any(tensors[k].dtype == torch.bool for k in used) or used != list(range(used[0], used[-1] + 1)):
            return None
        front, width = used[0], max(tensors[k].ndim for k in used)
        shape, at = value.shape[front : front + width], index[front : front + width]
        plans = [self.plan(tensors[k], broadcast(at, shape, tensors[k].shape)) for k in used]
        if None in plans:
            return None
        return self._gather(x, [*index[:front], *plans, *index[front + width :]])

    def _gather(self, table: Value, index: list[Any]) -> Make | None:
        """Elements of a tensor that a node holds, at planned or known positions."""
        known = [x for x in index if isinstance(x, sympy.Basic)]
        if any(I in x.free_symbols for x in known) or self.emitter.holder(table) is None:
            return None

        def make() -> fx.Node:
            held = self.emitter.holder(table)
            assert held is not None
            at = [self._tensor(x, torch.int64) if isinstance(x, sympy.Basic) else x() for x in index]
            return self.emitter.indexed(held, at)

        return make

    def _tensor(self, expr: Any, dtype: torch.dtype) -> fx.Node:
        made = self.emitter.tensor(expr.xreplace({DISTANCE: J + self.first}), self.site)
        if not isinstance(made, fx.Node) or not self.emitter.is_tensor(made):
            return self._number(made, dtype)
        return made if dtype in (torch.int64, torch.bool) else self.emitter.call("to", made, dtype)

    def _number(self, x: Any, dtype: torch.dtype) -> fx.Node:
        return self.emitter.call(torch.full, (1,), x, dtype=dtype, device=self.site.root.meta.device)


Emit = Callable[[Emitter, Value, dict[str, Any]], fx.Node]


def _function(fn: Callable[..., Any], *names: str) -> Emit:
    """A function of these arguments, in this order, and of no others that are not at their defaults."""

    def emit(emitter: Emitter, value: Value, given: dict[str, Any]) -> fx.Node:
        if any(x not in (None, 1) for name, x in given.items() if name not in names):
            raise Miss(f"an argument of {value.op} that is not accounted for", value)
        return emitter.call(fn, *(given[name] for name in names if name in given))

    return emit


def _division(emitter: Emitter, value: Value, given: dict[str, Any]) -> fx.Node:
    return emitter.call(torch.div, given["self"], given["other"], rounding_mode=given.get("rounding_mode"))


def _cast(emitter: Emitter, value: Value, given: dict[str, Any]) -> fx.Node:
    return emitter.call("to", given["self"], value.dtype)


def _clamp(emitter: Emitter, value: Value, given: dict[str, Any]) -> fx.Node:
    return emitter.call(torch.clamp, given["self"], given.get("min"), given.get("max"))


POINTWISE: dict[str, Emit] = {
    "add": _function(torch.add, "self", "other"), "sub": _function(torch.sub, "self", "other"),
    "mul": _function(torch.mul, "self", "other"), "div": _division,
    "pow": _function(torch.pow, "self", "exponent"), "where": _function(torch.where, "condition", "self", "other"),
    "minimum": _function(torch.minimum, "self", "other"), "maximum": _function(torch.maximum, "self", "other"),
    "min": _function(torch.min, "self", "other"), "max": _function(torch.max, "self", "other"),
    "lt": _function(torch.lt, "self", "other"), "le": _function(torch.le, "self", "other"),
    "gt": _function(torch.gt, "self", "other"), "ge": _function(torch.ge, "self", "other"),
    "eq": _function(torch.eq, "self", "other"), "ne": _function(torch.ne, "self", "other"),
    "to": _cast, "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp,
    **{
        name: _function(getattr(torch, name), "self")
        for name in ("abs", "neg", "log", "log2", "log1p", "exp", "sqrt", "rsqrt", "floor", "ceil", "trunc", "sign",
                     "sigmoid", "tanh", "square", "reciprocal")
    },
}  # fmt: skip
