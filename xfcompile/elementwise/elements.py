"""Goes through values from one element to those that it is made of, and loads what is not worth a formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from xfcompile.elementwise.choices import is_choice, one_choice
from xfcompile.elementwise.constants import as_number, is_mask, literal, rounded
from xfcompile.elementwise.digits import narrows
from xfcompile.elementwise.positions import Index, broadcast
from xfcompile.indexing import Ranges, extreme
from xfcompile.order import Order
from xfcompile.score import I, J, Load, S
from xfcompile.site import Miss
from xfcompile.values import Value, depends

Rule = Callable[["Elements", Value, Index], Any]
"""(elements, value, index) -> formula, or None to load the value."""

LONGEST_TERM = 24
LONGEST_MASK = 64
"""Operations in a formula past which loading the tensor is taken to be cheaper than evaluating it again."""

SMALL = 64
"""Every floating dtype of 16 bits tells whole numbers up to here from all others."""

_VIEWS = frozenset("reshape permute expand slice select repeat_interleave repeat flip roll".split())
_MOVES = frozenset("cat stack index index_select constant_pad_nd".split())


class Elements:
    """Formulas of elements, by the `rules` of operations. `dot` is the value whose element at `dot_index` is the symbol
    `S`.

    Whatever depends on the dot must be read to the end (`Miss` if it cannot); anything else that is not index algebra
    becomes a `Load` of the value itself.
    """

    def __init__(
        self, rules: Mapping[str, Rule], ranges: Ranges, dot: Value | None = None, key_axis_size: Any = None
    ) -> None:
        self.rules = rules
        self.ranges = dict(ranges)
        self.dot = dot
        self.dot_index: Index | None = None
        self.loads: list[Value] = []
        self.key_axis_size = key_axis_size
        self.masked_in: set[torch.dtype] = set()
        """The dtypes that the scores have where a mask or a bias is put on them."""
        self.orders: set[Order] = set()
        """In which order masks and biases are added."""
        self.maxima: list[sympy.Expr] = []
        """The scores of whose rows maxima are taken."""
        self.rounded: dict[Value, bool] = {}
        """The values that may not be what their formulas say, because their dtype has few digits; and whether they are
        where it is a small number."""
        self.wrapped: set[Value] = set()
        """The whole numbers that may have left the range of their dtype: they may be as large as it has any."""
        self._memo: dict[tuple[Value, Index], Any] = {}
        self._last: dict[Any, int] = {}
        """Of formulas in the memo the last of `loads` that they read, -1 for none: where it was asked for."""
        self._on_dot: dict[Value, bool] = {}

    def at(self, value: Value, index: Index) -> Any:
        """The element at `index`: a sympy expression, or a sympy boolean where the dtype is bool."""
        key = (value, index)
        if key not in self._memo:
            self._memo[key] = self._read(value, index)
        return self._memo[key]

    def _last_load(self, expr: Any) -> int:
        found = self._last.get(expr)
        if found is None:
            found = self._last[expr] = max((load.operand for load in expr.atoms(Load)), default=-1)
        return found

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
        rule = self.rules.get(value.op)
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
        if is_choice(result):
            result = one_choice(result, value.dtype)
        elif value.dtype.is_floating_point and isinstance(result, sympy.Expr) and result.is_number:
            result = rounded(result, value.dtype)
        if result is not None and self._wraps(value, result):
            self.wrapped.add(value)
            result = None
        if result is None or not self._gained(value, index, result):
            if not any((v in self.loads[:mark]) for v in self.loads[mark:]):
                del self.loads[mark:]
                self._memo = {k: v for k, v in self._memo.items() if self._last_load(v) < mark}
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
        mixed = value.op != "to" and narrows(value)
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
        if value.dtype.is_floating_point and _cancels(value, result):
            return False
        if value.op in _VIEWS | _MOVES and not value.dtype.is_floating_point:
            return True
        if value.op in ("add", "sub") and any(is_mask(term) for term in sympy.Add.make_args(result)):
            return True
        if value.op in ("mul", "div") and isinstance(result.as_coeff_Mul()[1], Load):
            return True  # costs nothing, and baddbmm's beta leaves no tensor to load
        if value.op in _VIEWS and isinstance(result, Load) and self._repeats(value, result):
            return True
        # Fewer bytes: every load spans fewer of the axes than the value itself does.
        symbols = set().union(*(x.free_symbols for x in index)) if index else set()
        return all(load.free_symbols < symbols for load in loads) and len(loads) <= 4

    def _repeats(self, value: Value, load: Load) -> bool:
        """Whether a view holds each element of what is loaded several times (the masks of windows, for each image), at
        places that are the same for all queries and keys of a batch and head."""
        if any(x.has(I, J) and x not in (I, J) for x in load.indices):
            return False
        times = sympy.Mul(*value.shape) / sympy.Mul(*self.loads[load.operand].shape)
        return bool(times.is_integer) and times not in (0, 1)

    def arg(self, x: Any, index: Index, shape: tuple[Any, ...]) -> Any:
        """The element of an operand of a broadcasting operation; numbers are themselves."""
        if not isinstance(x, Value):
            return literal(x)
        return self.at(x, broadcast(index, shape, x.shape))

    def numeric(self, x: Any, index: Index, shape: tuple[Any, ...]) -> sympy.Expr:
        return as_number(self.arg(x, index, shape))


def _cancels(value: Value, result: sympy.Expr) -> bool:
    """Whether the terms of a formula may be far larger than their sum: beside a score, or distributed over by a factor,
    they are rounded as they would not be in (1 - m) * -10000."""
    terms = sympy.Add.make_args(result)
    loaded = [term for term in terms if term.atoms(Load) and not is_mask(term)]
    if len(terms) == 1 or not loaded:
        return False
    opposite = len({bool(term.as_coeff_Mul()[0] < 0) for term in loaded}) > 1
    return opposite or value.op in ("mul", "div") or any(term.is_number and abs(term) > SMALL for term in terms)
