"""Values: what the program computes, as a hash-consed graph of canonical operations, whatever their spelling."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from xfcompile.trace import Constant, Meta


class Value:
    """One tensor's contents: a canonical operation on other values. Two equal values are one object.

    `op` is an ATen name without overload and without the in-place underscore, made canonical by `Values.make`
    ("reshape" for every view, "permute" for every transposition, "where" for masked_fill ...), or "leaf".
    """

    __slots__ = ("args", "meta", "op", "order")

    def __init__(self, op: str, args: dict[str, Any], meta: Meta, order: int) -> None:
        self.op = op
        self.args = args
        self.meta = meta
        self.order = order

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.meta.shape

    @property
    def ndim(self) -> int:
        return len(self.meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def inputs(self) -> Iterator[Value]:
        """The values that this one is computed from."""
        for x in self.args.values():
            yield from _values_in(x)

    def __repr__(self) -> str:
        return f"<{self.op} {self.dtype} {list(self.shape)}>"


def depends(value: Value, source: Value, known: dict[Value, bool]) -> bool:
    """Whether `value` is computed from `source`; `known` keeps the same of all on the way, inputs first."""
    known.setdefault(source, True)
    todo = [value]
    while todo:
        top = todo[-1]
        if top in known:
            todo.pop()
            continue
        pending = [v for v in top.inputs() if v not in known and v.order > source.order]
        if pending:
            todo.extend(pending)
            continue
        known[todo.pop()] = any(known.get(v, False) for v in top.inputs())
    return known[value]


def _values_in(x: Any) -> Iterator[Value]:
    if isinstance(x, Value):
        yield x
    elif isinstance(x, tuple):
        for y in x:
            yield from _values_in(y)


_RESHAPES = frozenset(
    "view _unsafe_view reshape unsqueeze squeeze flatten unflatten view_as reshape_as ravel view_copy".split()
)
_PERMUTES = frozenset("transpose permute t mT numpy_T matrix_H adjoint movedim swapaxes swapdims moveaxis T".split())
_EXPANDS = frozenset("expand expand_as broadcast_to".split())
_SAME = frozenset("contiguous clone alias lift_fresh lift_fresh_copy positive".split())
_CASTS = frozenset("to type_as _to_copy float double half bfloat16 type".split())
_PARTS = frozenset("slice select narrow unbind chunk split split_with_sizes tensor_split detach dropout".split())


def computes(op: torch._ops.OpOverload) -> bool:
    """Whether an ATen call computes new numbers, rather than looking at old ones in another way."""
    base = op._schema.name.split("::")[1].rstrip("_")
    return base not in _RESHAPES | _PERMUTES | _EXPANDS | _SAME | _CASTS | _PARTS


_FILLS = {
    "zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1, "zero": 0,
}  # fmt: skip
_RENAMED = {
    "bitwise_and": "and", "logical_and": "and", "__and__": "and", "bitwise_or": "or", "logical_or": "or",
    "__or__": "or", "bitwise_xor": "xor", "logical_xor": "xor", "__xor__": "xor", "bitwise_not": "not",
    "logical_not": "not",
    "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "special_softmax": "softmax",
    "_softmax": "softmax", "less_equal": "le", "less": "lt", "greater": "gt", "greater_equal": "ge",
    "not_equal": "ne", "negative": "neg", "absolute": "abs", "remainder": "mod", "__rsub__": "rsub",
    "special_logsumexp": "logsumexp", "concat": "cat", "concatenate": "cat",
}  # fmt: skip


class Values:
    """Makes values: canonical forms, and one object for equal computations."""

    def __init__(self) -> None:
        self._interned: dict[Any, Value] = {}
        self._count = 0

    def leaf(self, meta: Meta, why: str = "input") -> Value:
        """Contents that are not read any further: an input (a "learned" one is a parameter, or needs a gradient), an
        opaque result, memory after an unknown write."""
        return self._new("leaf", {"why": why}, meta)

    def make(self, op: torch._ops.OpOverload, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        """The value of output `item` of an ATen call. `sizes` are the shapes of all outputs."""
        name = op._schema.name.split("::")
        if name[0] != "aten":
            return self._other(op, op._schema.name, args, meta, item)
        base = name[1].rstrip("_") if op._schema.is_mutable else name[1]
        base = _RENAMED.get(base, base)
        canonical = getattr(self, f"_make_{base}", None)
        if base in _RESHAPES and "dtype" not in args:  # `x.view(torch.int32)` has other numbers than x
            return self.reshape(args["self"], meta)
        if base in _PERMUTES:
            return self._permutation(base, args, meta)
        if base in _EXPANDS:
            return self.intern("expand", {"self": args["self"]}, meta)
        if base in _SAME:
            return args["self"]
        if base in _CASTS:
            return self.cast(args["self"], meta)
        if base in _FILLS:
            return self.intern("full", {"fill": _FILLS[base]}, meta)
        if canonical is not None:
            return canonical(args, meta, item, sizes)
        return self._other(op, base, args, meta, item)

    def constant(self, c: Constant) -> Value:
        return self.intern("full", {"fill": c.value}, c.meta)

    def intern(self, op: str, args: dict[str, Any], meta: Meta) -> Value:
        key = (op, tuple((k, _key(v)) for k, v in args.items()), meta.shape, meta.dtype, meta.device)
        known = self._interned.get(key)
        if known is None:
            known = self._interned[key] = self._new(op, args, meta)
        return known

    def _new(self, op: str, args: dict[str, Any], meta: Meta) -> Value:
        self._count += 1
        return Value(op, args, meta, self._count)

    def _other(self, op: torch._ops.OpOverload, name: str, args: dict[str, Any], meta: Meta, item: int) -> Value:
        named = {**args, "item": item} if len(op._schema.returns) > 1 or item else dict(args)
        if torch.Tag.nondeterministic_seeded in op.tags:
            return self._new(name, named, meta)
        return self.intern(name, named, meta)

    # -- canonical forms ------------------------------------------------------------------------------------

    def reshape(self, x: Value, meta: Meta) -> Value:
        if x.shape == meta.shape:
            return x
        if x.op == "reshape":
            return self.reshape(x["self"], meta)
        return self.intern("reshape", {"self": x}, meta)

    def permute(self, x: Value, dims: tuple[int, ...], meta: Meta) -> Value:
        if dims == tuple(range(x.ndim)):
            return x
        if x.op == "permute":
            return self.permute(x["self"], tuple(x["dims"][d] for d in dims), meta)
        return self.intern("permute", {"self": x, "dims": dims}, meta)

    def cast(self, x: Value, meta: Meta) -> Value:
        if x.dtype == meta.dtype and x.meta.device == meta.device:
            return x
        # What is left of a number in 8 bits is another number: no pattern looks through that.
        coarse = meta.dtype.is_floating_point and meta.dtype.itemsize == 1
        return self.intern("quantize" if coarse else "to", {"self": x, "dtype": meta.dtype}, meta)

    def _permutation(self, base: str, args: dict[str, Any], meta: Meta) -> Value:
        x = args["self"]
        n = x.ndim
        dims = list(range(n))
        if base == "permute":
            dims = [d % n for d in args["dims"]]
        elif base in ("movedim", "moveaxis"):
            source = args["source"] if isinstance(args["source"], tuple) else (args["source"],)
            target = args["destination"] if isinstance(args["destination"], tuple) else (args["destination"],)
            moved = {t % n: s % n for s, t in zip(source, target, strict=True)}
            rest = iter(d for d in range(n) if d not in moved.values())
            dims = [moved[d] if d in moved else next(rest) for d in range(n)]
        elif base in ("mT", "matrix_H", "adjoint"):
            dims[-1], dims[-2] = dims[-2], dims[-1]
        elif base in ("numpy_T", "T"):
            dims.reverse()
        elif base == "t":
            dims = dims[::-1]
        else:
            a, b = (args[k] for k in ("dim0", "dim1")) if "dim0" in args else (args["axis0"], args["axis1"])
            dims[a % n], dims[b % n] = dims[b % n], dims[a % n]
        if base in ("matrix_H", "adjoint") and x.dtype.is_complex:
            return self.intern(base, {"self": x}, meta)
        return self.permute(x, tuple(dims), meta)

    def _make_dropout(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        x = args["self"] if "self" in args else args["input"]
        if not args["train"] or args["p"] == 0:
            return x
        return self._new("dropout", {"self": x, "p": args["p"]}, meta)

    def _make_native_dropout(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        if item == 0:
            return self._make_dropout({**args, "train": args["train"] is not False}, meta, item, sizes)
        return self._new("native_dropout", {**args, "item": item}, meta)

    def _make_full(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        fill = args["fill_value"] if "fill_value" in args else args["value"]
        if isinstance(fill, Value):
            return self.intern("expand", {"self": self.cast(fill, _with(fill.meta, meta.dtype))}, meta)
        return self.intern("full", {"fill": fill}, meta)

    _make_full_like = _make_new_full = _make_fill = _make_full

    def _make_scalar_tensor(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        return self.intern("full", {"fill": args["s"]}, meta)

    def _make_empty(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        return self._new("empty", {}, meta)

    _make_empty_like = _make_new_empty = _make_empty_strided = _make_new_empty_strided = _make_empty

    def _make_hstack(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        dim = 0 if meta.shape and len(meta.shape) == 1 else 1
        return self.intern("cat", {"tensors": args["tensors"], "dim": dim}, meta)

    def _make_vstack(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        if any(t.ndim < 2 for t in args["tensors"]):
            return self.intern("vstack", args, meta)
        return self.intern("cat", {"tensors": args["tensors"], "dim": 0}, meta)

    def _make_copy(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        source = args["src"]
        source = self.cast(source, Meta(source.shape, (), meta.dtype, meta.device))
        return source if source.shape == meta.shape else self.intern("expand", {"self": source}, meta)

    def _make_masked_fill(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        fill = args["value"]
        if isinstance(fill, Value):
            fill = self.cast(fill, _with(fill.meta, meta.dtype))
        return self.intern("where", {"condition": args["mask"], "self": fill, "other": args["self"]}, meta)

    def _make_where(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        if args.get("other") is None:
            return self._new("where_indices", args, meta)
        return self.intern("where", args, meta)

    def _make_softmax(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        x = args["self"]
        return self.intern("softmax", {"self": x, "dim": args["dim"] % max(x.ndim, 1)}, meta)

    def _make_rsub(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        if args.get("alpha", 1) != 1:
            return self.intern("rsub", args, meta)
        return self.intern("sub", {"self": args["other"], "other": args["self"], "alpha": 1}, meta)

    def _make_baddbmm(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        names = ("batch1", "batch2") if "batch1" in args else ("mat1", "mat2")
        product = self.intern("matmul", {"self": args[names[0]], "other": args[names[1]]}, meta)
        if args["alpha"] != 1:
            product = self.intern("mul", {"self": product, "other": args["alpha"]}, meta)
        added = args["self"]
        if args["beta"] == 0:
            return product
        if args["beta"] != 1:
            added = self.intern("mul", {"self": added, "other": args["beta"]}, added.meta)
        return self.intern("add", {"self": product, "other": added, "alpha": 1}, meta)

    _make_addmm = _make_baddbmm

    def _make_matmul(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        other = args["other"] if "other" in args else args["mat2"]
        return self.intern("matmul", {"self": args["self"], "other": other}, meta)

    _make_bmm = _make_mm = _make_matmul

    def _make_slice(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        x, dim = args["self"], args["dim"] % args["self"].ndim
        if x.shape == meta.shape:
            return x
        start = _slice_start(args["start"] or 0, args["end"], x.shape[dim], meta.shape[dim], args["step"])
        if start is None:
            return self.intern("slice_of", args, meta)
        return self._part(x, dim, start, args["step"], meta)

    def _part(self, x: Value, dim: int, start: Any, step: Any, meta: Meta) -> Value:
        if x.shape == meta.shape:
            return x
        return self.intern("slice", {"self": x, "dim": dim, "start": start, "step": step}, meta)

    def _make_narrow(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        x, dim = args["self"], args["dim"] % args["self"].ndim
        start = None if isinstance(args["start"], Value) else _from_front(args["start"], x.shape[dim])
        return self._part(x, dim, start, 1, meta) if start is not None else self.intern("narrow", args, meta)

    def _make_select(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        x, dim = args["self"], args["dim"] % args["self"].ndim
        index = _from_front(args["index"], x.shape[dim])
        if index is None:
            return self.intern("select_of", args, meta)
        return self.intern("select", {"self": x, "dim": dim, "index": index}, meta)

    def _make_unbind(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        return self._make_select({"self": args["self"], "dim": args["dim"], "index": item}, meta, 0, sizes)

    def _make_split(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        dim = args["dim"] % args["self"].ndim
        return self._part(args["self"], dim, sum(s[dim] for s in sizes[:item]), 1, meta)

    _make_chunk = _make_split_with_sizes = _make_tensor_split = _make_split

    def _make_detach(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        return self.detach(args["self"], meta)

    def detach(self, x: Value, meta: Meta) -> Value:
        return x if x.op == "full" or not x.dtype.is_floating_point else self.intern("detach", {"self": x}, meta)

    def _make_is_nonzero(self, args: dict[str, Any], meta: Meta, item: int, sizes: Any) -> Value:
        return self._new("is_nonzero", args, meta)


def _from_front(index: Any, size: Any) -> Any:
    """An index counted from the front; None if its sign is not known."""
    sign = sympy.sympify(index).is_nonnegative
    return None if sign is None else index if sign else size + index


def _slice_start(start: Any, end: Any, size: Any, length: Any, step: Any) -> Any:
    """Where a slice of some length begins, counted from the front; None if that is not known: of symbols, not even the
    length may tell from where it is counted, and whether there are as many elements."""
    if isinstance(start, int) and (start >= 0 or isinstance(size, int)):
        return max(0, size + start) if start < 0 else start
    if sympy.sympify(start).is_nonnegative:
        return start
    starts, ends = _counted(start, size), {size} if end is None or end == sys.maxsize else _counted(end, size)
    fitting = [s for s in starts if any(_is_length(length, s, e, step) for e in ends)]
    return fitting[0] if len(fitting) == 1 else None


def _counted(bound: Any, size: Any) -> set[Any]:
    """What a slice's bound may be, counted from the front: no less than 0, and no more than the size."""
    sign = sympy.sympify(bound).is_nonnegative
    return ({bound, size} if sign is not False else set()) | ({size + bound, 0} if not sign else set())


def _is_length(length: Any, start: Any, end: Any, step: Any) -> bool:
    return bool(sympy.expand(length - FloorDiv(end - start + step - 1, step)) == 0)


def _with(meta: Meta, dtype: torch.dtype) -> Meta:
    return Meta(meta.shape, meta.stride, dtype, meta.device)


def _key(x: Any) -> Any:
    if isinstance(x, Value):
        return x.order
    if isinstance(x, tuple):
        return tuple(_key(y) for y in x)
    if isinstance(x, float):
        return (float, x if not math.isnan(x) else "nan", math.copysign(1, x))
    return (type(x), x)
