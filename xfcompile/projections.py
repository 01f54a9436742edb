"""Reads one element of a value as a formula of projections: products of an input with weights, and their biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from xfcompile import activation
from xfcompile.contraction import Contraction, contraction
from xfcompile.elementwise.constants import as_number, literal, rounded
from xfcompile.elementwise.positions import Index, broadcast
from xfcompile.indexing import Ranges, integer
from xfcompile.operands import Walk
from xfcompile.site import Bias, Miss
from xfcompile.values import Value

PROJECTIONS = frozenset({"matmul", "einsum", "linear"})
"""The operations that are one."""


def projection(value: Value) -> Contraction | None:
    """The product that a value is, a linear's without its bias; None if it is none."""
    if value.op != "linear":
        return contraction(value)
    x, weight = value["input"], value["weight"]
    if weight.ndim != 2:
        return None
    rows = "".join(chr(ord("A") + k) for k in range(x.ndim - 1))
    return Contraction(value, x, weight, f"{rows}d", "yd", f"{rows}y")


@dataclass(frozen=True)
class Element:
    """One element of a product: `at` is its index, for each label of the product; with a bias added, or none yet."""

    product: Contraction
    at: tuple[tuple[str, sympy.Expr], ...]
    bias: Bias | None = None

    def index(self, label: str) -> sympy.Expr:
        return dict(self.at)[label]


class Reader:
    """Formulas of elements. Each `Element` on the way is a symbol of its own in them.

    feature: the axis along which a bias varies.
    """

    def __init__(self, ranges: Ranges, feature: sympy.Symbol) -> None:
        self.walk = Walk(ranges)
        self.feature = feature
        self.elements: dict[sympy.Symbol, Element] = {}
        self.tensors: dict[sympy.Symbol, tuple[Value, Index]] = {}
        self.casts: dict[sympy.Symbol, torch.dtype] = {}
        """The dtypes that tensors are rounded to before anything is made of them."""
        self.passed: dict[Value, None] = {}
        """The values between the products and what was asked for, the products themselves included."""

    def at(self, value: Value, index: Index) -> sympy.Expr:
        """The element at `index`, where no dimension of size 1 has another index than 0."""
        if value.op in PROJECTIONS:
            self.passed[value] = None
            return self._product(value, index)
        if value.op == "full":
            return rounded(as_number(literal(value["fill"])), value.dtype)
        step = self.walk.back(value, index)
        if step is not None:
            mark = len(self.elements)
            found = self.at(*step)
            if len(self.elements) > mark or not found.is_number:
                self.passed[value] = None
            return found
        if value.op == "to" and value.dtype.is_floating_point and value["self"].dtype.is_floating_point:
            self.passed[value] = None
            found = self.at(value["self"], index)
            if found in self.tensors and not _holds(value.dtype, self._dtype(found)):
                self.casts[found] = value.dtype
            return found
        rule = _RULES.get(value.op)
        if rule is None or not value.dtype.is_floating_point:
            return self._tensor(value, index)
        self.passed[value] = None
        return rule(self, value, index)

    def argument(self, x: Any, value: Value, index: Index) -> sympy.Expr:
        """The element of an operand that broadcasts to `value`; numbers are themselves."""
        if isinstance(x, Value):
            return self.at(x, broadcast(index, value.shape, x.shape))
        if isinstance(x, bool):
            raise Miss("a gate is computed with a truth value", value)
        return known(literal(x))

    def _product(self, value: Value, index: Index) -> sympy.Expr:
        product = projection(value)
        if product is None:
            return self._tensor(value, index)
        at = tuple(zip(product.out_labels, index, strict=True))
        bias = None
        if value.op == "linear" and value["bias"] is not None:
            bias = self._bias(value["bias"], (index[-1],))
        return self._symbol(Element(product, at, bias))

    def _symbol(self, element: Element) -> sympy.Symbol:
        for symbol, known_element in self.elements.items():
            if known_element == element:
                return symbol
        symbol = sympy.Symbol(f"p{len(self.elements)}", real=True)
        self.elements[symbol] = element
        return symbol

    def _tensor(self, value: Value, index: Index) -> sympy.Symbol:
        symbol = sympy.Symbol(f"t{len(self.tensors)}", real=True)
        self.tensors[symbol] = (value, index)
        return symbol

    def _dtype(self, tensor: sympy.Symbol) -> torch.dtype:
        return self.casts.get(tensor, self.tensors[tensor][0].dtype)

    def _bias(self, value: Value, index: Index) -> Bias:
        """A tensor that is the same for all rows."""
        axes = [(d, x) for d, x in enumerate(index) if x.free_symbols]
        if not axes or axes[-1][1].free_symbols != {self.feature} or len(axes) > 2:
            raise Miss("a tensor is added to a projection that is no bias of its features", value)
        if len(axes) == 2 and not axes[0][1].is_Symbol:
            raise Miss("a bias is laid out in another order than the experts", value)
        if any(x != 0 for x in index if not x.free_symbols):
            raise Miss("a bias is one row of a larger tensor", value)
        expert = (axes[0][0], axes[0][1]) if len(axes) == 2 else None
        return Bias(value, axes[-1][0], axes[-1][1], expert)

    def biased(self, a: sympy.Expr, b: sympy.Expr) -> sympy.Symbol | None:
        """The element of a projection with its bias, where one of the two is its product, and the other a tensor."""
        for product, tensor in ((a, b), (b, a)):
            if product in self.elements and tensor in self.tensors and self.elements[product].bias is None:
                found, dtype = self._dtype(tensor), self.elements[product].product.value.dtype
                if not _holds(dtype, found):
                    raise Miss(
                        f"a bias of {found} has more digits than a projection of {dtype}", *self.tensors[tensor][:1]
                    )
                bias = self._bias(*self.tensors[tensor])
                return self._symbol(replace(self.elements[product], bias=bias))
        return None


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype has all numbers of another one."""
    return torch.promote_types(dtype, other) == dtype


def known(x: Any) -> sympy.Expr:
    """A number of the program, if it is one when the program is compiled."""
    if not x.is_number or not x.is_finite:
        raise Miss(f"a gate is computed with {x}, which is no finite number that is known at compile time")
    fraction = float(x) * 2**FRACTION
    return sympy.Rational(int(fraction), 2**FRACTION) if x.is_Float and fraction.is_integer() else x


# -- rules: (reader, value, index) -> formula ----------------------------------------------------------------------


def _add(r: Reader, v: Value, index: Index) -> sympy.Expr:
    a, b = (r.argument(v[k], v, index) for k in ("self", "other"))
    alpha = known(literal(v.args.get("alpha", 1)))
    if v.op == "sub":
        return a - alpha * b
    biased = r.biased(a, b) if alpha == 1 else None
    return a + alpha * b if biased is None else biased


def _mul(r: Reader, v: Value, index: Index) -> sympy.Expr:
    return r.argument(v["self"], v, index) * r.argument(v["other"], v, index)


def _div(r: Reader, v: Value, index: Index) -> sympy.Expr:
    if v.args.get("rounding_mode") is not None:
        raise Miss("a gate is divided into whole numbers", v)
    return activation.quotient(r.argument(v["self"], v, index), r.argument(v["other"], v, index))


def _reciprocal(r: Reader, v: Value, index: Index) -> sympy.Expr:
    return activation.quotient(sympy.S.One, r.argument(v["self"], v, index))


def _pow(r: Reader, v: Value, index: Index) -> sympy.Expr:
    if isinstance(v["exponent"], Value):
        raise Miss("a gate to a power that is a tensor", v)
    return activation.power(r.argument(v["self"], v, index), v["exponent"])


def _clamp(r: Reader, v: Value, index: Index) -> sympy.Expr:
    low, high = (v.args.get(k) for k in ("min", "max"))
    bounds = [x if x is None else r.argument(x, v, index) for x in (low, high)]
    if any(x is not None and not x.is_number for x in bounds):
        raise Miss("a gate is clamped by a tensor", v)
    return activation.clamp(r.argument(v["self"], v, index), *bounds)


def _glu(r: Reader, v: Value, index: Index) -> sympy.Expr:
    x, d = v["self"], v["dim"] % v.ndim
    half = integer(v.shape[d])
    first, second = (r.at(x, (*index[:d], index[d] + k * half, *index[d + 1 :])) for k in (0, 1))
    return first * activation.Sigmoid(second)


def _function(r: Reader, v: Value, index: Index) -> sympy.Expr:
    return activation.FUNCTIONS[v.op](r.argument(v["self"], v, index), v.args)


_RULES: dict[str, Callable[[Reader, Value, Index], sympy.Expr]] = {
    "add": _add, "sub": _add, "mul": _mul, "div": _div, "reciprocal": _reciprocal, "pow": _pow,
    "clamp": _clamp, "clip": _clamp, "clamp_min": _clamp, "clamp_max": _clamp, "glu": _glu,
    **dict.fromkeys(activation.FUNCTIONS, _function),
}  # fmt: skip

FRACTION = 8
"""Binary digits after the point of a number that is taken for a fraction: 0.5 is the half that `/ 2` makes."""

POINTWISE = frozenset(_RULES) - {"glu"}
