"""Evaluates expressions of `xfcompile.score` on tensors: what they mean, in plain PyTorch."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from torch import Tensor

from xfcompile.score import ROUNDED, Load, Where
from xfcompile.sums import summands

Value = Tensor | int | float | bool


class Unsupported(Exception):
    """A score that has no form here, and why."""


class Evaluator:
    """Evaluates an expression over index tensors [B, 1, 1, 1] to [1, 1, 1, Lk]; real numbers in `dtype`."""

    def __init__(
        self,
        scope: Mapping[sympy.Symbol, Value],
        operands: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.scope = scope
        self.operands = operands
        self.dtype = dtype
        self.device = device

    def __call__(self, expr: sympy.Basic) -> Value:
        if isinstance(expr, sympy.Symbol):
            value = self.scope[expr]
            return self._real(value) if isinstance(value, float) else value
        if isinstance(expr, Load):
            return self._load(expr)
        if isinstance(expr, sympy.logic.boolalg.BooleanAtom):
            return bool(expr)
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if expr.is_Number or isinstance(expr, sympy.NumberSymbol):
            return self._real(float(expr))
        if isinstance(expr, sympy.Piecewise):
            return self._piecewise(expr)
        name = type(expr).__name__
        if name in ("floor", "ceiling"):
            return self._floor(expr.args[0]) if name == "floor" else -self._floor(-expr.args[0])
        if name == "Add" and (sigmoid := _complemented(expr)) is not None:
            return torch.sigmoid(self._real(self(-sigmoid.args[0])))
        if name not in FUNCTIONS:
            raise Unsupported(f"{name} has no PyTorch form, in {expr}")
        args = [self(a) for a in (summands(expr) if name == "Add" else expr.args)]
        if name in REAL or (name == "Pow" and not (expr.exp.is_Integer and expr.exp.is_nonnegative)):
            args = [self._real(a) for a in args]
        return FUNCTIONS[name](*args)

    def _real(self, value: Value) -> Tensor:
        """As a tensor of `dtype`: a Python float beside an integer tensor would compute in fp32."""
        return torch.as_tensor(value, dtype=self.dtype, device=self.device)

    def _floor(self, expr: sympy.Expr) -> Value:
        a, b = (self(x) for x in sympy.fraction(sympy.together(expr)))
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in (a, b)):
            return torch.floor(self._real(a) / self._real(b)).long()
        return a // b

    def _load(self, load: Load) -> Tensor:
        operand = self.operands[load.operand]
        index = []
        for size, x in zip(operand.shape, load.indices, strict=True):
            # Out of range only where a condition discards the value.
            index.append(torch.as_tensor(self(x), device=operand.device).clamp(0, max(size - 1, 0)))
        value = operand[tuple(index)] if index else operand
        if value.dtype.is_floating_point:
            return value.to(self.dtype)
        return value.long()

    def _piecewise(self, expr: sympy.Piecewise) -> Value:
        value: Value = math.nan
        for branch, condition in reversed(expr.args):
            value = _where(self(condition), self(branch), value)
        return value


def _complemented(expr: sympy.Basic) -> sympy.Basic | None:
    """y, where an expression is 1 - y for a sigmoid y; near 1 the difference has few digits left of it."""
    y = -expr.args[1] if len(expr.args) == 2 and expr.args[0] == 1 else None
    return y if type(y).__name__ == "Sigmoid" else None


def _fold(function: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    return lambda *args: functools.reduce(function, args)


def _where(condition: Value, a: Value, b: Value) -> Value:
    if not isinstance(condition, Tensor):
        return a if condition else b
    return torch.where(condition, a, b)


def _rounded(x: Value, digits: Value) -> Value:
    x = torch.as_tensor(x)
    return x.to(getattr(torch, ROUNDED[int(digits)])).to(x.dtype)


def _tensors(function: Callable[..., Tensor]) -> Callable[..., Value]:
    return lambda *args: function(*(torch.as_tensor(a) for a in args))


def _not(a: Value) -> Value:
    return ~a if isinstance(a, Tensor) else not a


def _relation(function: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    return lambda a, b: function(a, b)


# Functions of real numbers: whatever they are given is a real number first.
REAL = frozenset(
    [
        "OpaqueUnaryFn_sqrt",
        "tanh",
        "exp",
        "log",
        "erf",
        "Ndtr",
        "Gelu",
        "GeluSlope",
        "Sigmoid",
        "Softplus",
        "Expm1",
        "sin",
        "cos",
        "ToFloat",
        "IntTrueDiv",
        "FloatTrueDiv",
        "FloatPow",
    ]
)

FUNCTIONS: dict[str, Callable[..., Value]] = {
    "Add": _fold(operator.add),
    "Mul": _fold(operator.mul),
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "FloatPow": operator.pow,
    "Min": _fold(_tensors(torch.minimum)),
    "Max": _fold(_tensors(torch.maximum)),
    "Abs": abs,
    "tanh": torch.tanh,
    "OpaqueUnaryFn_sqrt": torch.sqrt,
    "Sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "log": torch.log,
    "erf": torch.erf,
    "Ndtr": torch.special.ndtr,
    "Gelu": lambda x: x * torch.special.ndtr(x),
    "GeluSlope": lambda x: torch.special.ndtr(x) + x * (torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "sign": _tensors(torch.sign),
    "FloorToInt": lambda x: torch.floor(torch.as_tensor(x)).long(),
    "CeilToInt": lambda x: torch.ceil(torch.as_tensor(x)).long(),
    "TruncToInt": lambda x: torch.trunc(torch.as_tensor(x)).long(),
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "ModularIndexing": lambda a, b, m: (a // b) % m,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "ToFloat": lambda x: x,
    "Identity": lambda x: x,
    "Where": _where,
    "Rounded": _rounded,
    "Equality": _relation(operator.eq),
    "Unequality": _relation(operator.ne),
    "StrictLessThan": _relation(operator.lt),
    "LessThan": _relation(operator.le),
    "StrictGreaterThan": _relation(operator.gt),
    "GreaterThan": _relation(operator.ge),
    "And": _fold(operator.and_),
    "Or": _fold(operator.or_),
    "Xor": _fold(operator.xor),
    "Not": _not,
    "ITE": _where,
}
assert Where.__name__ in FUNCTIONS
