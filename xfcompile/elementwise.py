"""Reads one element of a value as a formula: what stands in a score, a bias or a mask at position (b, h, i, j)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch

from xfcompile.indexing import Ranges, extreme, floordiv, integer, linear, mod, nonnegative, unravel
from xfcompile.magnitude import may_absorb
from xfcompile.score import J, Load, S, Where
from xfcompile.site import Miss
from xfcompile.values import Value, depends

Index = tuple[sympy.Expr, ...]

ROW = sympy.Symbol("row", real=True)
"""A number that is the same for a whole row of scores; softmax does not see it."""

LONGEST_TERM = 24
LONGEST_MASK = 64
"""Operations in a formula past which loading the tensor is taken to be cheaper than evaluating it again."""

SMALL = 64
"""Every floating dtype of 16 bits tells whole numbers up to here from all others."""

_COMPARISONS: dict[str, Callable[..., Any]] = {
    "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne,
}  # fmt: skip
_VIEWS = frozenset("reshape permute expand slice select repeat_interleave repeat flip roll".split())


class Elements:
    """Formulas of elements. `dot` is the value whose element at `dot_index` is the symbol `S`.

    Whatever depends on the dot must be read to the end (`Miss` if it cannot); anything else that is not index algebra
    becomes a `Load` of the value itself.
    """

    def __init__(self, ranges: Ranges, dot: Value | None = None, key_axis_size: Any = None) -> None:
        self.ranges = dict(ranges)
        self.dot = dot
        self.dot_index: Index | None = None
        self.loads: list[Value] = []
        self.key_axis_size = key_axis_size
        self.masked_in: set[torch.dtype] = set()
        """The dtypes that the scores have where a mask or a bias is put on them."""
        self.rounded: dict[Value, bool] = {}
        """The values that may not be what their formulas say, because their dtype has few digits; and whether they are
        where it is a small number."""
        self.wrapped: set[Value] = set()
        """The whole numbers that may have left the range of their dtype: they may be as large as it has any."""
        self._memo: dict[tuple[Value, Index], Any] = {}
        self._on_dot: dict[Value, bool] = {}

    def at(self, value: Value, index: Index) -> Any:
        """The element at `index`: a sympy expression, or a sympy boolean where the dtype is bool."""
        key = (value, index)
        if key not in self._memo:
            self._memo[key] = self._read(value, index)
        return self._memo[key]

    def load(self, value: Value, index: Index) -> Any:
        if value.dtype.is_complex:
            raise Miss("a complex tensor in the score", value)
        if value not in self.loads:
            self.loads.append(value)
        element = Load(self.loads.index(value), *index)
        return sympy.Ne(element, 0) if value.dtype == torch.bool else element

    def depends_on_dot(self, value: Value) -> bool:
        if self.dot is None:
            return False
        return depends(value, self.dot, self._on_dot)

    # -- reading --------------------------------------------------------------------------------------------

    def _read(self, value: Value, index: Index) -> Any:
        if value is self.dot:
            if self.dot_index is None:
                self.dot_index = index
            if index != self.dot_index:
                raise Miss("the scores are read at two different positions", value)
            return S
        index = tuple(sympy.S.Zero if n == 1 else x for x, n in zip(index, value.shape, strict=True))
        rule = _RULES.get(value.op)
        if self.depends_on_dot(value):
            if rule is None:
                raise Miss(f"{value.op} stands between the dot product and the softmax", value)
            result = rule(self, value, index)
            if result is None:
                raise Miss(f"this form of {value.op} stands between the dot product and the softmax", value)
            return result
        if rule is None:
            return self.load(value, index)
        mark = len(self.loads)
        result = rule(self, value, index)
        if is_mask(result):
            result = fold(lambda x: rounded(x, value.dtype), result)
        if result is not None and self._wraps(value, result):
            self.wrapped.add(value)
            result = None
        if result is None or not self._gained(value, index, result):
            if not any((v in self.loads[:mark]) for v in self.loads[mark:]):
                del self.loads[mark:]
                self._memo = {k: v for k, v in self._memo.items() if not _mentions(v, mark)}
            return self.load(value, index)
        self._note(value, result)
        return result

    def _wraps(self, value: Value, result: Any) -> bool:
        """Whether a formula may leave the range of an integer dtype."""
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            return False
        if is_mask(result) or (isinstance(result, Load) and value.op != "to"):
            return False
        info = torch.iinfo(value.dtype)
        if value.dtype.itemsize > 2:
            if isinstance(result, Load):
                return False
            full = any(self.loads[load.operand] in self.wrapped for load in result.atoms(Load))
            return full or self._leaves(result, info.max, info.max >> 16)
        return not self._within(result, info.min, info.max)

    def _within(self, expr: sympy.Expr, low: int, high: int) -> bool:
        return all(b is not None and low <= b <= high for b in self._bounds(expr))

    def _leaves(self, expr: sympy.Expr, most: int, factor: int) -> bool:
        """Whether a formula has numbers past a dtype of many digits: sizes and data that are not known are taken to be
        small enough, but for what has so large a factor or term."""
        bounds = [abs(b) for b in self._bounds(expr) if b is not None]
        return max(bounds) > most if len(bounds) == 2 else any(abs(n) > factor for n in expr.atoms(sympy.Integer))

    def _bounds(self, expr: sympy.Expr) -> list[sympy.Expr | None]:
        """The least and the greatest number that a formula has, where these are known."""
        bounds = [extreme(expr, self.ranges, upper=upper) for upper in (False, True)]
        return [b if b is not None and b.is_number else None for b in bounds]

    def _note(self, value: Value, result: Any) -> None:
        """Keep whether a value is rounded on the way to it: only formulas that are compared must be exact."""
        if not value.dtype.is_floating_point:
            return  # what is whole or a boolean is read of nothing that is rounded
        before = [self.rounded[v] for v in value.inputs() if v in self.rounded]
        digits = int(2 / torch.finfo(value.dtype).eps)
        if result.is_number or is_mask(result) or self._within(result, -digits, digits):
            here = False
        elif value.dtype.itemsize > 2:
            here = bool(result.is_integer) and self._leaves(result, digits, digits >> 4)
        elif isinstance(result, Load):
            here = value.op == "to" and value["self"].dtype != torch.bool
        else:
            here = bool(result.is_integer)
        mixed = value.op != "to" and _narrows(value)
        if here or before or mixed:
            shift, rest = result.as_coeff_Add()
            one = isinstance(rest, Load) or rest.is_Symbol or isinstance(-rest, Load) or (-rest).is_Symbol
            whole = not here or value.op != "to" or not value["self"].dtype.is_floating_point
            self.rounded[value] = one and whole and not mixed and bool(abs(shift) <= SMALL) and all(before)

    def told_apart(self, x: Any, other: Any = sympy.S.Zero) -> bool:
        """Whether a comparison with another formula may tell an operand from its own."""
        return x in self.rounded and not (self.rounded[x] and other.is_number and abs(other) <= SMALL)

    def _gained(self, value: Value, index: Index, result: Any) -> bool:
        """Whether a formula is better than loading the value: no loads at all, or smaller ones, or a mask found."""
        loads = result.atoms(Load)
        if result.count_ops(visual=False) > (LONGEST_MASK if value.dtype == torch.bool else LONGEST_TERM):
            return False
        if not loads or value.dtype == torch.bool or is_mask(result):
            return True
        if value.op in _VIEWS | _MOVES and not value.dtype.is_floating_point:
            return True
        if value.op in ("add", "sub") and any(is_mask(term) for term in sympy.Add.make_args(result)):
            return True
        if value.op in ("mul", "div") and isinstance(result.as_coeff_Mul()[1], Load):
            return True  # costs nothing, and baddbmm's beta leaves no tensor to load
        # Fewer bytes: every load spans fewer of the axes than the value itself does.
        symbols = set().union(*(x.free_symbols for x in index)) if index else set()
        return all(load.free_symbols < symbols for load in loads) and len(loads) <= 4

    def arg(self, x: Any, index: Index, shape: tuple[Any, ...]) -> Any:
        """The element of an operand of a broadcasting operation; numbers are themselves."""
        if not isinstance(x, Value):
            return literal(x)
        return self.at(x, broadcast(index, shape, x.shape))

    def numeric(self, x: Any, index: Index, shape: tuple[Any, ...]) -> sympy.Expr:
        return as_number(self.arg(x, index, shape))


def _mentions(expr: Any, mark: int) -> bool:
    return any(load.operand >= mark for load in expr.atoms(Load))


def is_mask(expr: Any) -> bool:
    """A choice between constants."""
    return isinstance(expr, Where) and all(x.is_number for x in expr.args[1:])


def literal(x: Any) -> Any:
    """A number of the program as sympy sees it; exact where it is a small integer."""
    if isinstance(x, bool):
        return sympy.true if x else sympy.false
    if isinstance(x, float):
        if math.isinf(x):
            return sympy.oo if x > 0 else -sympy.oo
        if math.isnan(x):
            raise Miss("a NaN constant in the score")
        return sympy.Integer(int(x)) if x.is_integer() and abs(x) < 2**24 else sympy.Float(x, 17)
    return sympy.sympify(x)


def as_number(x: Any) -> sympy.Expr:
    """A boolean as 0 or 1."""
    if x == sympy.true:
        return sympy.S.One
    if x == sympy.false:
        return sympy.S.Zero
    if isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol):
        return where(x, sympy.S.One, sympy.S.Zero)
    return x


def rounded(x: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """A number as a tensor of that dtype holds it: finfo(float32).min in bf16 is -inf, and -1 in uint8 is 255."""
    if x.is_Integer and not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool):
        info = torch.iinfo(dtype)
        return (x - info.min) % (info.max - info.min + 1) + info.min
    if not x.is_number or not dtype.is_floating_point or x in (sympy.oo, -sympy.oo):
        return x
    return literal(torch.tensor(float(x), dtype=torch.float64).to(dtype).item())


def as_boolean(x: Any) -> Any:
    """A number as "is not zero"."""
    if isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol):
        return x
    return fold(lambda y: sympy.Ne(y, 0), x)


def where(condition: Any, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """`Where`, with the branches simplified by what the condition says."""
    if isinstance(condition, sympy.Not):
        condition, a, b = condition.args[0], b, a
    if isinstance(a, Where) and a.args[0] == condition:
        a = a.args[1]
    if isinstance(b, Where) and b.args[0] == condition:
        b = b.args[2]
    return Where(condition, a, b)


def fold(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args), taken into a choice between constants: f(where(c, 1, 0)) is where(c, f(1), f(0))."""
    choices = [x for x in args if isinstance(x, Where)]
    if choices and all(is_mask(x) or x.is_number for x in args) and len({x.args[0] for x in choices}) == 1:
        condition = choices[0].args[0]
        yes = f(*(x.args[1] if isinstance(x, Where) else x for x in args))
        no = f(*(x.args[2] if isinstance(x, Where) else x for x in args))
        if isinstance(yes, sympy.logic.boolalg.Boolean):
            if yes == no:
                return yes
            return condition if yes == sympy.true else sympy.Not(condition)
        if sympy.nan in (yes, no):
            raise Miss("a mask is made by arithmetic that gives NaN")
        return where(condition, yes, no)
    return f(*args)


def broadcast(index: Index, shape: tuple[Any, ...], to: tuple[Any, ...]) -> Index:
    """The index into an operand of shape `to` of a result of shape `shape`."""
    tail = index[len(index) - len(to) :]
    sizes = shape[len(shape) - len(to) :]
    return tuple(sympy.S.Zero if n == 1 and m != 1 else x for x, n, m in zip(tail, to, sizes, strict=True))


# -- rules: (elements, value, index) -> formula, or None to load the value ---------------------------------------


def _add(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    if e.depends_on_dot(v) and any(is_mask(t) or t.atoms(Load) for x in (a, b) for t in sympy.Add.make_args(x)):
        e.masked_in.add(v.dtype)
    sign = -1 if v.op == "sub" else 1
    alpha = literal(v.args.get("alpha", 1))
    if v.dtype == torch.bool:  # true and true are true, not 2
        return sympy.Or(as_boolean(a), as_boolean(b)) if alpha == 1 else None
    return fold(lambda x, y: x + sign * alpha * y, a, b)


def _mul(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    if v.dtype == torch.bool:
        return sympy.And(as_boolean(a), as_boolean(b))
    return fold(lambda x, y: x * y, a, b)


def _div(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    rounding = v.args.get("rounding_mode")
    if rounding is None and v.op == "div":
        return fold(lambda x, y: x / y if y != 0 else _no("division by zero", v), a, b)
    if not _divides(e, v, a, b):
        return None
    if rounding == "trunc" and not nonnegative(a, e.ranges):
        return None
    return floordiv(a, b, e.ranges)


def _narrows(v: Value) -> bool:
    """Whether an operation gives whole numbers, before it does what it does, a floating dtype of few digits."""
    dtypes = {x.dtype for x in v.inputs() if x.dtype != torch.bool}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    return bool(floating) and floating != dtypes and all(dtype.itemsize <= 2 for dtype in floating)


def _holds(dtype: torch.dtype, *numbers: sympy.Expr) -> bool:
    """Whether a dtype of whole numbers has these: what uint8 has of 256, which a comparison with it takes, is 0."""
    return dtype.is_floating_point or all(rounded(x, dtype) == x for x in numbers if x.is_Integer)


def _operating(v: Value) -> torch.dtype:
    """The dtype in which an operation takes its two operands."""
    a, b = (
        torch.empty((1,) * min(x.ndim, 1), dtype=x.dtype, device="meta") if isinstance(x, Value)
        else x if isinstance(x, (int, float)) else 1
        for x in (v["self"], v["other"])
    )  # fmt: skip
    dtype: torch.dtype = torch.result_type(a, b)
    return dtype


def _divides(e: Elements, v: Value, a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a whole number is divided by one above 0, both of them what they are read as."""
    whole = a.is_integer and b.is_integer and b.is_positive
    return bool(whole) and not any(x in e.rounded for x in v.inputs()) and _holds(_operating(v), a, b)


def _no(reason: str, *culprits: object) -> Any:
    raise Miss(reason, *culprits)


def _mod(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    if not _divides(e, v, a, b):
        return None
    if v.op == "fmod" and not nonnegative(a, e.ranges):
        return None
    return mod(a, b, e.ranges)


def _comparison(e: Elements, v: Value, index: Index) -> Any:
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    if S in a.free_symbols or S in b.free_symbols:
        raise Miss("scores are compared", v)
    if (
        not (_exact(a) and _exact(b))
        or _narrows(v)
        or not _holds(_operating(v), a, b)
        or e.told_apart(v["self"], b)
        or e.told_apart(v["other"], a)
    ):
        return None
    loads = a.atoms(Load) | b.atoms(Load)
    if any(e.loads[load.operand].dtype.is_floating_point for load in loads):
        if v.op not in ("eq", "ne"):
            return None  # NaN is neither above nor below: `not (x < y)` is not `x >= y`, as sympy would have it
        if a == b or a.is_infinite or b.is_infinite:
            return None  # NaN is not equal to itself, and a tensor may hold inf, which no real number is for sympy
    return fold(_COMPARISONS[v.op], a, b)


def _exact(x: sympy.Expr) -> bool:
    """Whether a formula, evaluated in fp32, gives the very number that the program has."""
    return bool(x.is_integer) or x.is_number or isinstance(x, Load) or is_mask(x)


def _logical(e: Elements, v: Value, index: Index) -> Any:
    parts = [e.arg(v[k], index, v.shape) for k in ("self", "other")]
    if v.dtype != torch.bool or any(e.told_apart(x) for x in v.inputs()):
        return None
    a, b = (as_boolean(x) for x in parts)
    return {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor}[v.op](a, b)


def _not(e: Elements, v: Value, index: Index) -> Any:
    if v.dtype != torch.bool:
        return None
    x = as_boolean(e.at(v["self"], index))
    return None if e.told_apart(v["self"]) else sympy.Not(x)


def _where(e: Elements, v: Value, index: Index) -> Any:
    condition = e.arg(v["condition"], index, v.shape)
    if condition == sympy.true or condition == sympy.false:
        chosen = e.arg(v["self"] if condition == sympy.true else v["other"], index, v.shape)
        return chosen if v.dtype == torch.bool else as_number(chosen)
    a, b = e.arg(v["self"], index, v.shape), e.arg(v["other"], index, v.shape)
    if e.depends_on_dot(v):
        e.masked_in.add(v.dtype)
    if v.dtype == torch.bool:
        a, b = as_boolean(a), as_boolean(b)
        return sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b))
    return where(as_boolean(condition), *(rounded(as_number(x), v.dtype) for x in (a, b)))


def _cast(e: Elements, v: Value, index: Index) -> Any:
    x = e.at(v["self"], index)
    if v.dtype == torch.bool:
        return None if e.told_apart(v["self"]) else as_boolean(x)
    x = as_number(x)
    if v.dtype.is_floating_point:
        if is_mask(x) or x.is_number:
            return fold(lambda y: rounded(y, v.dtype), x)
        if not e.depends_on_dot(v) or v.dtype.itemsize >= v["self"].dtype.itemsize:
            return x
        wider = {e.loads[n.operand] for n in _apart_from_positions(x)}
        if any(t.dtype.itemsize > v.dtype.itemsize and may_absorb(t) for t in wider):
            raise Miss("what is added to the scores may be infinite in the dtype that they are then cast to", v)
        return _overflown(x, v.dtype)
    return x if not v["self"].dtype.is_floating_point or (x.is_integer and v["self"] not in e.rounded) else None


def _apart_from_positions(x: sympy.Basic) -> Iterator[Load]:
    """The loads that a formula computes with other than as factors of a key's position, or of its distance: a number
    times those is another one for each key of a row, and no row has nothing else (ALiBi)."""
    if isinstance(x, sympy.Mul) and any(_is_place(factor) for factor in x.args):
        return
    if isinstance(x, Load):
        yield x
    elif not isinstance(x, sympy.logic.boolalg.Boolean):
        for arg in x.args[1:] if isinstance(x, Where) else x.args:
            yield from _apart_from_positions(arg)


def _is_place(x: sympy.Basic) -> bool:
    """Whether a number is one for each key, or for two that are equally far away."""
    inner = x.args[0] if isinstance(x, sympy.Abs) else x
    return (
        isinstance(inner, sympy.Expr)
        and not inner.atoms(Load)
        and inner.diff(J).is_nonzero
        and not inner.diff(J).has(J)
    )


def _overflown(x: sympy.Expr, dtype: torch.dtype, factor: sympy.Expr = sympy.S.One) -> sympy.Expr:
    """A score in a smaller dtype, where what it was masked by may be infinite: finfo(float32).min in fp16 is."""

    def branch(y: sympy.Expr) -> sympy.Expr:
        if not y.is_number:
            return _overflown(y, dtype, factor)
        return y * sympy.oo if y != 0 and rounded(y * factor, dtype).is_infinite else y

    if isinstance(x, Where):
        return where(x.args[0], branch(x.args[1]), branch(x.args[2]))
    if isinstance(x, sympy.Add):
        return x.func(*(_overflown(y, dtype, factor) for y in x.args))
    c, rest = x.as_coeff_Mul()
    return c * _overflown(rest, dtype, factor * c) if c != 1 else x


def _reshape(e: Elements, v: Value, index: Index) -> Any:
    return e.at(v["self"], reshaped(v, index, e.ranges))


def reshaped(v: Value, index: Index, ranges: Ranges) -> Index:
    """The index into the base of a reshape."""
    source = v["self"].shape
    kept = [(x, n) for x, n in zip(index, v.shape, strict=True) if n != 1]
    if [n for _, n in kept] == [n for n in source if n != 1]:
        rest = iter(x for x, _ in kept)
        return tuple(sympy.S.Zero if n == 1 else next(rest) for n in source)
    # Leading and trailing dimensions that both shapes share keep their index: only what was reshaped is divided.
    front = 0
    while front < min(len(source), v.ndim) and source[front] == v.shape[front]:
        front += 1
    back = 0
    while back < min(len(source), v.ndim) - front and source[-1 - back] == v.shape[-1 - back]:
        back += 1
    outer, inner = slice(front, v.ndim - back), slice(front, len(source) - back)
    sizes = tuple(integer(n) for n in v.shape[outer])
    offset = linear(index[outer], sizes)
    middle = unravel(offset, tuple(integer(n) for n in source[inner]), ranges)
    return (*index[:front], *middle, *index[v.ndim - back :])


def _permute(e: Elements, v: Value, index: Index) -> Any:
    return e.at(v["self"], permuted(v, index))


def permuted(v: Value, index: Index) -> Index:
    source: list[Any] = [None] * len(index)
    for k, d in enumerate(v["dims"]):
        source[d] = index[k]
    return tuple(source)


def _expand(e: Elements, v: Value, index: Index) -> Any:
    return e.at(v["self"], broadcast(index, v.shape, v["self"].shape))


def _slice(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"]
    return e.at(v["self"], (*index[:d], integer(v["start"]) + integer(v["step"]) * index[d], *index[d + 1 :]))


def _select(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"]
    return e.at(v["self"], (*index[:d], integer(v["index"]), *index[d:]))


def _repeat_interleave(e: Elements, v: Value, index: Index) -> Any:
    source = interleaved(v, index, e.ranges)
    return None if source is None else e.at(v["self"], source)


def interleaved(v: Value, index: Index, ranges: Ranges) -> Index | None:
    if v.args.get("dim") is None or isinstance(v.args.get("repeats"), Value):
        return None
    d = v["dim"] % v.ndim
    return (*index[:d], floordiv(index[d], integer(v["repeats"]), ranges), *index[d + 1 :])


def _repeat(e: Elements, v: Value, index: Index) -> Any:
    source = v["self"].shape
    tail = index[len(index) - len(source) :]
    return e.at(v["self"], tuple(mod(x, integer(n), e.ranges) for x, n in zip(tail, source, strict=True)))


def _flip(e: Elements, v: Value, index: Index) -> Any:
    dims = {d % v.ndim for d in v["dims"]}
    return e.at(v["self"], tuple(v.shape[k] - 1 - x if k in dims else x for k, x in enumerate(index)))


def _arange(e: Elements, v: Value, index: Index) -> Any:
    start, step = literal(v.args.get("start") or 0), literal(v.args.get("step", 1))
    if not (start.is_integer and step.is_integer):
        return None
    return start + step * index[0]


def _detach(e: Elements, v: Value, index: Index) -> Any:
    """Of what depends on the scores, only a shift of the row may be detached: softmax gives it no gradient anyway."""
    if not e.depends_on_dot(v):
        return None
    x = e.at(v["self"], index)
    return x if x.free_symbols == {ROW} else None


def _full(e: Elements, v: Value, index: Index) -> Any:
    x = literal(v["fill"])
    if v.dtype == torch.bool:
        return as_boolean(x)
    return rounded(as_number(x), v.dtype)


def _choose(v: Value, condition: Any, a: Callable[[], Any], b: Callable[[], Any]) -> Any:
    """One of two elements; only the reachable ones are read."""
    if condition == sympy.true:
        return a()
    if condition == sympy.false:
        return b()
    x, y = a(), b()
    if v.dtype == torch.bool:
        return sympy.Or(sympy.And(condition, x), sympy.And(sympy.Not(condition), y))
    return where(condition, as_number(x), as_number(y))


def _below(e: Elements, x: sympy.Expr, n: sympy.Expr) -> Any:
    """x < n, decided by the ranges where they can."""
    if nonnegative(n - 1 - x, e.ranges):
        return sympy.true
    if nonnegative(x - n, e.ranges):
        return sympy.false
    return sympy.Lt(x, n)


def _cat(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"] % v.ndim
    tensors = [t for t in v["tensors"] if t.shape != (0,) and t.shape[d] != 0]
    if not tensors:
        return None
    start: sympy.Expr = sympy.S.Zero

    def piece(k: int, start: sympy.Expr) -> Any:
        local = (*index[:d], index[d] - start, *index[d + 1 :])
        if k == len(tensors) - 1:
            return e.at(tensors[k], local)
        end = start + integer(tensors[k].shape[d])
        return _choose(v, _below(e, index[d], end), lambda: e.at(tensors[k], local), lambda: piece(k + 1, end))

    return piece(0, start)


def _stack(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"] % v.ndim
    if not index[d].is_Integer:
        return None
    return e.at(v["tensors"][int(index[d])], (*index[:d], *index[d + 1 :]))


def _triangle(e: Elements, v: Value, index: Index) -> Any:
    row, column = index[-2], index[-1]
    distance = row - column + literal(v["diagonal"])
    inside = sympy.Ge(distance, 0) if v.op == "tril" else sympy.Le(distance, 0)
    zero = sympy.false if v.dtype == torch.bool else sympy.S.Zero
    return _choose(v, inside, lambda: e.at(v["self"], index), lambda: zero)


def _pad(e: Elements, v: Value, index: Index) -> Any:
    if v.args.get("mode", "constant") != "constant":
        return None
    source = list(index)
    pad = v["pad"]
    inside: Any = sympy.true
    for k in range(len(pad) // 2):
        d = v.ndim - 1 - k
        source[d] = index[d] - integer(pad[2 * k])
        n = integer(v["self"].shape[d])
        low = sympy.true if nonnegative(source[d], e.ranges) else sympy.Ge(source[d], 0)
        inside = sympy.And(inside, low, _below(e, source[d], n))
    outside = literal(v["value"] or 0)
    outside = as_boolean(outside) if v.dtype == torch.bool else as_number(outside)
    if inside != sympy.true:
        element = e.at(v["self"], tuple(source))
        if isinstance(element, sympy.Basic) and element.atoms(Load):
            return None  # an element outside of the tensor must not be loaded
    return _choose(v, inside, lambda: e.at(v["self"], tuple(source)), lambda: outside)


def _diff(e: Elements, v: Value, index: Index) -> Any:
    if v["n"] != 1 or v["append"] is not None or v.dtype.is_floating_point:
        return None
    x, before, d = v["self"], v["prepend"], v["dim"] % v.ndim

    def element(at: sympy.Expr) -> Any:
        """of cat([prepend, x])"""
        n = integer(before.shape[d]) if before is not None else sympy.S.Zero
        inside = (*index[:d], sympy.expand(at - n), *index[d + 1 :])
        if before is None:
            return e.at(x, inside)
        first = (*index[:d], at, *index[d + 1 :])
        return _choose(x, _below(e, at, n), lambda: e.at(before, first), lambda: e.at(x, inside))

    after, now = element(index[d] + 1), element(index[d])
    if v.dtype == torch.bool:
        return sympy.Xor(after, now)
    return as_number(after) - as_number(now)


def _cumsum(e: Elements, v: Value, index: Index) -> Any:
    if e.depends_on_dot(v):
        return None
    x, d = v["self"], v["dim"] % v.ndim
    walk = sympy.Symbol(f"c{len(e.ranges)}", integer=True, nonnegative=True)
    e.ranges[walk] = integer(x.shape[d])
    element = settle(as_number(e.at(x, (*index[:d], walk, *index[d + 1 :]))), e.ranges)
    if walk in element.free_symbols or element.atoms(Load):
        return None
    return element * (index[d] + 1)


def _index(e: Elements, v: Value, index: Index) -> Any:
    """Advanced indexing by integer tensors in the leading dimensions, broadcast together."""
    x, tensors = v["self"], list(v["indices"])
    tensors += [None] * (x.ndim - len(tensors))
    used = [k for k, t in enumerate(tensors) if t is not None]
    if any(tensors[k].dtype == torch.bool for k in used) or used != list(range(used[0], used[-1] + 1)):
        return None
    width = max(tensors[k].ndim for k in used)
    front = used[0]
    shape = v.shape[front : front + width]
    at = index[front : front + width]
    found = [_wrapped(e.arg(tensors[k], at, shape), x.shape[k], e) for k in used]
    if any(f is None for f in found):
        return None
    return e.at(x, (*index[:front], *found, *index[front + width :]))


def _wrapped(position: Any, size: Any, e: Elements) -> Any:
    """A gathered position, negative ones counted from the end; None if its sign is not known."""
    if isinstance(position, sympy.Expr) and nonnegative(position, e.ranges):
        return position
    if isinstance(position, sympy.Expr) and nonnegative(-position - 1, e.ranges):
        return position + size
    return None


def _index_select(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"] % v.ndim
    position = _wrapped(e.at(v["index"], (index[d],)), v["self"].shape[d], e) if v["index"].ndim == 1 else None
    return None if position is None else e.at(v["self"], (*index[:d], position, *index[d + 1 :]))


def _extremum(e: Elements, v: Value, index: Index) -> Any:
    if "other" not in v.args:
        return _row_statistic(e, v, index)
    a, b = e.numeric(v["self"], index, v.shape), e.numeric(v["other"], index, v.shape)
    return (sympy.Max if v.op in ("maximum", "max") else sympy.Min)(a, b) if _holds(v.dtype, a, b) else None


def _row_statistic(e: Elements, v: Value, index: Index) -> Any:
    """A maximum over the keys of something made of scores: it shifts the row, and softmax does not see shifts."""
    if not e.depends_on_dot(v) or v.args.get("item", 0) != 0:
        return None
    dims = v.args.get("dim", ())
    dims = dims if isinstance(dims, tuple) else (dims,)
    x = v["self"]
    if len(dims) != 1 or v.op not in ("amax", "max"):
        return None
    d = dims[0] % x.ndim
    kept = index if v.args.get("keepdim") else (*index[:d], sympy.S.Zero, *index[d:])
    if any(J in k.free_symbols for k in kept) or x.shape[d] != e.key_axis_size:
        return None
    e.at(x, (*kept[:d], J, *kept[d + 1 :]))  # it must be made of these very scores
    return ROW


def _clamp(e: Elements, v: Value, index: Index) -> Any:
    x = e.numeric(v["self"], index, v.shape)
    for bound, f in (("min", sympy.Max), ("max", sympy.Min)):
        if v.args.get(bound) is not None:
            limit = e.numeric(v[bound], index, v.shape)
            if not _holds(v.dtype, limit):
                return None
            x = f(x, limit)
    return x


def _unary(f: Callable[[sympy.Expr], Any]) -> Callable[[Elements, Value, Index], Any]:
    def rule(e: Elements, v: Value, index: Index) -> Any:
        return fold(f, e.numeric(v["self"], index, v.shape))

    return rule


def _smooth(f: Callable[[sympy.Expr], Any]) -> Callable[[Elements, Value, Index], Any]:
    """A function that is worth evaluating in a kernel only where the scores themselves go through it."""

    def rule(e: Elements, v: Value, index: Index) -> Any:
        if not e.depends_on_dot(v):
            return None
        return f(e.numeric(v["self"], index, v.shape))

    return rule


def _log(e: Elements, v: Value, index: Index) -> Any:
    """Of a mask of 0 and 1: -inf and 0."""
    x = e.numeric(v["self"], index, v.shape)
    if not is_mask(x) or any(a < 0 for a in x.args[1:]):
        return None
    return fold(lambda a: literal(math.log(a) if a else -math.inf), x)


def _pow(e: Elements, v: Value, index: Index) -> Any:
    exponent = v["exponent"]
    if isinstance(exponent, Value) or not e.depends_on_dot(v) or exponent not in (1, 2, 3):
        return None
    return e.numeric(v["self"], index, v.shape) ** int(exponent)


def settle(expr: Any, ranges: Ranges) -> Any:
    """Simplify choices and comparisons by what the ranges prove; a choice is split where its branches may agree."""
    from xfcompile.masks import prove

    choices = sorted(expr.atoms(Where), key=sympy.default_sort_key) if isinstance(expr, sympy.Basic) else []
    inner = [w for w in choices if not any(a.has(Where) for a in w.args)]
    if not inner:
        return prove(expr, ranges)
    condition = inner[0].args[0]
    yes, no = (settle(expr.xreplace({w: w.args[k] for w in inner if w.args[0] == condition}), ranges) for k in (1, 2))
    pinned = _only_value(condition, ranges)
    if pinned is not None:
        yes = settle(yes.xreplace(pinned), ranges) if isinstance(yes, sympy.Basic) else yes
    return yes if yes == no else where(condition, as_number(yes), as_number(no))


def _only_value(condition: Any, ranges: Ranges) -> dict[sympy.Symbol, sympy.Expr] | None:
    """{x: 0} if the condition is x < 1."""
    if isinstance(condition, sympy.StrictLessThan) and condition.args[0] in ranges and condition.args[1] == 1:
        return {condition.args[0]: sympy.S.Zero}
    return None


_MOVES = frozenset("cat stack index index_select constant_pad_nd".split())
_RULES: dict[str, Callable[[Elements, Value, Index], Any]] = {
    "add": _add, "sub": _add, "mul": _mul, "div": _div, "floor_divide": _div, "mod": _mod, "fmod": _mod,
    "neg": _unary(lambda x: -x), "abs": _unary(sympy.Abs), "square": _smooth(lambda x: x**2), "pow": _pow,
    "where": _where, "to": _cast, "and": _logical, "or": _logical, "xor": _logical, "not": _not,
    **dict.fromkeys(_COMPARISONS, _comparison),
    "minimum": _extremum, "maximum": _extremum, "min": _extremum, "max": _extremum, "amax": _row_statistic,
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp,
    "tanh": _smooth(sympy.tanh), "exp": _smooth(sympy.exp), "sigmoid": _smooth(lambda x: 1 / (1 + sympy.exp(-x))),
    "log": _log,
    "reshape": _reshape, "permute": _permute, "expand": _expand, "slice": _slice, "select": _select,
    "repeat_interleave": _repeat_interleave, "repeat": _repeat, "flip": _flip, "detach": _detach,
    "arange": _arange, "full": _full, "cat": _cat, "stack": _stack, "tril": _triangle, "triu": _triangle,
    "constant_pad_nd": _pad, "pad": _pad, "diff": _diff, "cumsum": _cumsum,
    "index": _index, "index_select": _index_select,
}  # fmt: skip
