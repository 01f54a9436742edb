"""Writes FX nodes: operands laid out for a kernel, formulas as tensor arithmetic, and the result put back in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from xfcompile.example import example_of
from xfcompile.indexing import extreme
from xfcompile.operands import D
from xfcompile.read import Reading
from xfcompile.score import POSITION, B, H, I, J, Load, Where
from xfcompile.site import AttentionSite, Miss, Placed
from xfcompile.sums import summands
from xfcompile.unseen import unseen
from xfcompile.values import Value

HALF = (torch.float16, torch.bfloat16)


class Emitter:
    """Inserts nodes before `anchor`.

    shared: tensors made once, for emitters of the same family at later nodes. instead: the nodes that stand for those
    that were replaced.
    """

    def __init__(
        self,
        reading: Reading,
        anchor: fx.Node,
        shared: dict[Any, fx.Node],
        instead: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        self.reading = reading
        self.anchor = anchor
        self.graph = anchor.graph
        self.shared = shared
        self.instead = instead or {}
        self.scope = reading.scope[anchor]

    def call(self, fn: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call_function node, or a call_method node where `fn` is a string, before the anchor."""
        with self.graph.inserting_before(self.anchor):
            if isinstance(fn, str):
                node = self.graph.call_method(fn, args, kwargs)
            else:
                node = self.graph.call_function(fn, args, kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        self._tell_example(node, fn)
        return node

    def _tell_example(self, node: fx.Node, fn: Callable[..., Any] | str) -> None:
        """Give the node the fake value that the graph's nodes have: AOTAutograd caches no graph in which a method is
        called on something that has none, and no node of an exported program may be without."""
        mode = self.reading.mode
        inputs = node.all_input_nodes
        key = next((k for k in ("example_value", "val") if all(k in n.meta for n in inputs)), None)
        if key == "example_value" and not inputs and any("val" in n.meta for n in self.graph.nodes):
            key = "val"
        if mode is None or key is None:
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta[key])
        with mode, unseen(), torch.set_grad_enabled(self.scope.grad):
            node.meta[key] = getattr(args[0], fn)(*args[1:], **kwargs) if isinstance(fn, str) else fn(*args, **kwargs)

    def size(self, expr: Any) -> Any:
        """A size as an int, or the node that holds it."""
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return int(expr)
        known = self.reading.number_node(expr)
        if known is not None and self.reading.time.get(known, -1) < self.reading.time[self.anchor]:
            return known
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            combine = operator.add if isinstance(expr, sympy.Add) else operator.mul
            parts = [self.size(a) for a in expr.args]
            total = parts[0]
            for part in parts[1:]:
                total = self.call(combine, total, part)
            return total
        if isinstance(expr, FloorDiv):
            return self.call(operator.floordiv, self.size(expr.args[0]), self.size(expr.args[1]))
        if _is_extremum(expr):
            return self._chain(torch.sym_min if _is_least(expr) else torch.sym_max, [self.size(a) for a in expr.args])
        return self._size_of_input(expr)

    def _size_of_input(self, expr: sympy.Expr) -> fx.Node:
        for node, cell in self.reading.cells.items():
            value = getattr(cell, "value", None)
            if isinstance(value, Value) and self.reading.time[node] < self.reading.time[self.anchor]:
                for k, n in enumerate(value.shape):
                    if n == expr:
                        return self.call("size", self.instead.get(node, node), k)
        raise Miss(f"no node holds the size {expr}")

    def number(self, expr: sympy.Expr) -> Any:
        """A real number as a float, or as the node that holds it."""
        if expr.is_number:
            return float(expr)
        known = self.reading.number_node(expr)
        if known is not None:
            return known
        if isinstance(expr, sympy.Mul):
            return self._chain(operator.mul, [self.number(a) for a in expr.args])
        if isinstance(expr, sympy.Add):
            return self._chain(operator.add, [self.number(a) for a in expr.args])
        if isinstance(expr, sympy.Pow) and expr.exp == -1:
            return self.call(operator.truediv, 1.0, self.number(expr.base))
        if expr.is_integer:
            return self.size(expr)
        if isinstance(expr, sympy.Pow):
            return self.call(operator.pow, self.number(expr.base), self.number(expr.exp))
        raise Miss(f"no node holds the number {expr}")

    # -- operands -------------------------------------------------------------------------------------------

    def holder(self, value: Value) -> fx.Node | None:
        """The node that holds a value here, if there is one."""
        node = self.reading.holder(value, self.reading.time[self.anchor])
        return None if node is None else self.instead.get(node, node)

    def held(self, value: Value) -> fx.Node:
        """The node that holds an operand here; `Miss` if its memory holds something else by now, or if it stands in a
        transform."""
        node = self.holder(value)
        if node is None:
            raise Miss("an operand is changed before the result is computed, or stands in a transform alone", value)
        return node

    def indexed(self, table: fx.Node, at: list[Any]) -> fx.Node:
        """What a tensor holds at indices. Of a learned one in 16 bits many places read one element, whose gradients are
        added up one by one: in fp32 here, where they lose nothing and hardware adds them at once."""
        if not is_learned_half(table):
            return self.call(torch.ops.aten.index.Tensor, table, at)
        rows = self.call(torch.ops.aten.index.Tensor, self.call("float", table), at)
        return self.call("to", rows, table.meta["example_value"].dtype)

    def seed(self, device: torch.device) -> tuple[fx.Node, int]:
        """The seed of dropout's random numbers, one for a graph, and a stream of them that is this call's own.

        A node of the graph draws it, so that the backward, a checkpoint's recomputation and CUDA graphs see the same.
        """
        key = ("seed", device)
        if key not in self.shared:
            self.shared[key] = self.call(torch.randint, 2**63 - 1, (1,), dtype=torch.int64, device=device)
        stream = sum(k[:2] == ("stream", device) for k in self.shared if isinstance(k, tuple))
        self.shared["stream", device, stream] = self.shared[key]
        return self.shared[key], stream

    def choose(self, readings: tuple[Placed, ...]) -> Placed:
        """The deepest reading of an operand that a node still holds here."""
        for placed in readings:
            if self.holder(placed.value) is not None:
                return placed
        raise Miss("an operand is changed before the product with values", readings[-1].value)

    def operand(
        self, placed: Placed, site: AttentionSite, row: sympy.Symbol, dim: sympy.Expr, *, grouped: bool
    ) -> fx.Node:
        """A node of [b, h, row, dim]; b is 1 or whole, h is whole, or whole divided by its group if `grouped`."""
        x = self.holder(placed.value)
        assert x is not None
        axes: list[sympy.Symbol] = []
        sizes = {**dict(zip(site.lead, site.sizes, strict=True)), row: site.queries if row == I else site.keys, D: dim}
        groups = dict(placed.groups)
        # Flattened runs are split, single elements are picked, from the last dimension to the first.
        for d in range(len(placed.dims) - 1, -1, -1):
            here = placed.dims[d]
            if not here:
                x = self.call("select", x, d, self.size(placed.picks[d]))
            elif len(here) > 1:
                rest = [self.size(sizes[a]) for a in here[1:]]
                x = self.call("unflatten", x, d, (-1, *rest))
            axes = [*here, *axes]
        order = [a for a in (*site.lead, row, D) if a in axes]
        if order != axes:
            x = self.call("permute", x, *(axes.index(a) for a in order))
        for position, a in enumerate((*site.lead, row, D)):
            if a not in axes:
                x = self.call("unsqueeze", x, position)
        for a, group in groups.items():
            if not (grouped and a == H):
                x = self.call("repeat_interleave", x, group, site.lead.index(a))
        x = self._four(x, site, axes)
        return x

    def _four(self, x: fx.Node, site: AttentionSite, axes: list[sympy.Symbol]) -> fx.Node:
        """[..lead, row, d] to [b, h, row, d]."""
        n = len(site.lead)
        if n == 0:
            return self.call("unsqueeze", self.call("unsqueeze", x, 0), 0)
        if n == 1:
            return self.call("unsqueeze", x, 1)
        if n == 2:
            return x
        outer = site.lead[:-1]
        if any(a in axes for a in outer) and not all(a in axes for a in outer):
            sizes = [self.size(s) for s in site.sizes[:-1]]
            x = self.call("expand", x, *sizes, -1, -1, -1)
        return self.call("flatten", x, 0, n - 2)

    def whole_batch(self, x: fx.Node, site: AttentionSite, placed: Placed, *, heads: bool) -> fx.Node:
        """Expand a batch of 1 (and, with `heads`, one head) to all."""
        held = {a for axes in placed.dims for a in axes}
        needed = site.lead if heads else site.lead[:-1] if len(site.lead) >= 2 else site.lead
        if all(a in held for a in needed):
            return x
        batch = sympy.prod(site.sizes[:-1]) if len(site.lead) >= 2 else site.sizes[0] if site.lead else 1
        head = site.sizes[-1] if len(site.lead) >= 2 else 1
        return self.call("expand", x, self.size(batch), self.size(head) if heads else -1, -1, -1)

    def restore(self, out: fx.Node, site: AttentionSite, dtype: torch.dtype) -> fx.Node:
        """[b, h, i, d] back to the dimensions of the root, in its dtype."""
        n = len(site.lead)
        if n == 0:
            out = self.call("select", self.call("select", out, 0, 0), 0, 0)
        elif n == 1:
            out = self.call("select", out, 1, 0)
        elif n > 2:
            out = self.call("unflatten", out, 0, tuple(self.size(s) for s in site.sizes[:-1]))
        axes = (*site.lead, I, D)
        wanted = [a for run in site.layout for a in run]
        if wanted != list(axes):
            out = self.call("permute", out, *(axes.index(a) for a in wanted))
        for d, run in enumerate(site.layout):
            if len(run) > 1:
                out = self.call("flatten", out, d, d + len(run) - 1)
        if dtype != site.root.dtype:
            out = self.call("to", out, site.root.dtype)
        return out

    # -- formulas -------------------------------------------------------------------------------------------

    def tensor(self, expr: Any, site: AttentionSite) -> Any:
        """A formula over (b, h, i, j) as a node that broadcasts against [b, h, i, j], or a number."""
        key = (expr, site.loads, site.queries, site.keys, site.sizes, self.scope)
        if key not in self.shared:
            made = self._tensor(sympy.sympify(expr), site)
            if not isinstance(made, fx.Node):
                return made
            self.shared[key] = made
        return self.shared[key]

    def _tensor(self, expr: Any, site: AttentionSite) -> Any:
        def sub(x: Any) -> Any:
            return self.tensor(x, site)

        if expr in (sympy.true, sympy.false):
            return bool(expr)
        if expr.is_Integer:
            return int(expr)
        if expr.is_number:
            return float(expr)
        if expr in (B, H, I, J):
            return self._position(expr, site)
        if expr.is_Symbol:
            return self.size(expr) if expr.is_integer else self.number(expr)
        if _is_extremum(expr) and expr.is_integer and not expr.has(Load, *POSITION):
            return self.size(expr)
        if isinstance(expr, Load):
            return self._load(expr, site)
        if isinstance(expr, Where):
            if not expr.args[0].has(Load, *POSITION):
                raise Miss("a choice that sizes make has no tensor form here")
            return self.call(torch.where, *self._tensors(expr.args, site))
        if isinstance(expr, (sympy.And, sympy.Or, sympy.Xor)):
            combine = {sympy.And: torch.logical_and, sympy.Or: torch.logical_or, sympy.Xor: torch.logical_xor}[
                expr.func
            ]
            return self._chain(combine, [sub(a) for a in expr.args])
        if isinstance(expr, sympy.Not):
            return self.call(torch.logical_not, sub(expr.args[0]))
        if expr.func in _RELATIONS:
            return self.call(_RELATIONS[expr.func], *(sub(a) for a in expr.args))
        if isinstance(expr, sympy.Add):
            return self._chain(operator.add, [sub(a) for a in summands(expr)])
        if isinstance(expr, sympy.Mul):
            return self._chain(operator.mul, [sub(a) for a in expr.args])
        if isinstance(expr, sympy.Pow):
            return self.call(operator.pow, sub(expr.args[0]), sub(expr.args[1]))
        if isinstance(expr, (FloorDiv, Mod, PythonMod, sympy.Mod)):
            op = operator.floordiv if isinstance(expr, FloorDiv) else operator.mod
            return self.call(op, sub(expr.args[0]), sub(expr.args[1]))
        if isinstance(expr, sympy.Abs):
            return self.call(torch.abs, *self._tensors(expr.args, site))
        if _is_extremum(expr):
            extreme = torch.minimum if _is_least(expr) else torch.maximum
            return self._chain(extreme, self._tensors(expr.args, site))
        raise Miss(f"{expr.func.__name__} has no tensor form here")

    def _tensors(self, args: Any, site: AttentionSite) -> list[Any]:
        """Operands of functions that want tensors: numbers become 0-d tensors."""
        made = [self.tensor(a, site) for a in args]
        return [
            x
            if isinstance(x, fx.Node) and self.is_tensor(x)
            else self.call(torch.scalar_tensor, x, device=self._device(site), dtype=_width(x))
            if not (k == 0 and isinstance(x, bool))
            else self.call(torch.scalar_tensor, x, device=self._device(site), dtype=torch.bool)
            for k, x in enumerate(made)
        ]

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node holds a tensor, and not a number."""
        value = example_of(node)
        return node not in self.reading.numbers.values() if value is None else isinstance(value, torch.Tensor)

    def _device(self, site: AttentionSite) -> torch.device:
        return site.root.meta.device

    def _chain(self, op: Callable[..., Any], parts: list[Any]) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = self.call(op, total, part)
        return total

    def _position(self, symbol: sympy.Symbol, site: AttentionSite) -> fx.Node:
        n, trailing = self._extent(symbol, site)
        x = self.call(torch.arange, n, device=self._device(site))
        return self.call("view", x, -1, *[1] * trailing) if trailing else x

    def _extent(self, symbol: sympy.Symbol, site: AttentionSite) -> tuple[Any, int]:
        """How many positions an axis has, and how many axes follow it."""
        if symbol == J:
            return self.size(site.keys), 0
        if symbol == I:
            return self.size(site.queries), 1
        if symbol == H:
            return self.size(site.sizes[-1]), 2
        batch = sympy.prod(site.sizes[:-1]) if len(site.lead) >= 2 else site.sizes[0]
        return self.size(batch), 3

    def _load(self, load: Load, site: AttentionSite) -> fx.Node:
        value = site.loads[load.operand]
        x = self.holder(value)
        if x is None:
            raise Miss("a term of the score is changed before the product with values", value)
        axes: list[sympy.Symbol] = []
        simple = True
        for index, n in zip(load.indices, value.shape, strict=True):
            if index in (B, H, I, J) and index not in axes and sympy.sympify(n) == self.full_size(index, site):
                axes.append(index)
            elif index.is_Integer:
                pass
            else:
                simple = False
        if not simple:
            at = (self._index(index, n, site) for index, n in zip(load.indices, value.shape, strict=True))
            return self.call(operator.getitem, x, tuple(at))
        for d in range(len(load.indices) - 1, -1, -1):
            if load.indices[d].is_Integer:
                x = self.call("select", x, d, int(load.indices[d]))
        order = [a for a in (B, H, I, J) if a in axes]
        if order != axes:
            x = self.call("permute", x, *(axes.index(a) for a in order))
        for a in (H, I, J):
            if a not in axes and any(o in axes for o in (B, H, I, J)[: (B, H, I, J).index(a)]):
                x = self.call("unsqueeze", x, [o for o in (B, H, I, J) if o in axes or o == a].index(a))
                axes.append(a)
        return x

    def _index(self, index: sympy.Expr, size: Any, site: AttentionSite) -> Any:
        """An index as a tensor, held to the size that it indexes: of what was concatenated, say, each part is read
        where another one is chosen, too. What a program loads indices from is its own business."""
        made = self.tensor(index, site)
        if not (isinstance(made, fx.Node) and self.is_tensor(made)) or isinstance(index, Load):
            return made
        last = sympy.sympify(size) - 1
        ranges = {axis: self.full_size(axis, site) for axis in (*((B, H)[: len(site.lead)]), I, J)}
        low, high = (extreme(index, ranges, upper=upper) for upper in (False, True))
        if low is not None and high is not None and low.is_nonnegative and (last - high).is_nonnegative:
            return made
        return self.call(torch.clamp, made, 0, self.size(last))

    def full_size(self, axis: sympy.Symbol, site: AttentionSite) -> sympy.Expr:
        """How many positions the program has along an axis."""
        if axis in (I, J):
            return site.queries if axis == I else site.keys
        if axis == H:
            return site.sizes[-1]
        return sympy.prod(site.sizes[:-1]) if len(site.lead) >= 2 else site.sizes[0]


def is_learned_half(node: fx.Node) -> bool:
    """Whether a node is a tensor of 16 bits that needs a gradient."""
    example = node.meta.get("example_value")
    return isinstance(example, torch.Tensor) and example.requires_grad and example.dtype in HALF


def _is_extremum(expr: sympy.Basic) -> bool:
    """Whether it is sympy's Min or Max, or that of torch's sizes."""
    return type(expr).__name__ in ("Min", "Max")


def _is_least(expr: sympy.Basic) -> bool:
    return type(expr).__name__ == "Min"


def _width(x: Any) -> torch.dtype:
    """The dtype of a number beside tensors: fp32, but for one that fp32 does not hold (finfo(float64).min)."""
    wide = isinstance(x, float) and torch.finfo(torch.float32).max < abs(x) < float("inf")
    return torch.float64 if wide else torch.float32


_RELATIONS: dict[Any, Callable[..., Any]] = {
    sympy.Le: operator.le, sympy.Lt: operator.lt, sympy.Ge: operator.ge, sympy.Gt: operator.gt,
    sympy.Eq: operator.eq, sympy.Ne: operator.ne,
}  # fmt: skip
