"""Whether a term of a score may be so large that nothing is left of what it is added to, or not be a number at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch

from xfcompile.contraction import CONTRACTIONS
from xfcompile.score import Load, S, Where
from xfcompile.values import Value

ABSORBING = 1e18
"""A number of at least this size leaves nothing of a score that is added to it: its ulp is 128 in fp64."""

COARSE = 8.0
"""A number whose neighbours in its dtype are this far apart leaves little of a score that is added to it."""

WIDEST = 2.0**20
"""No score is as large as half of this."""


def spacing(x: float, dtype: torch.dtype) -> float:
    """How far a number's neighbours in a dtype are apart."""
    return 2.0 ** math.floor(math.log2(abs(x))) * torch.finfo(dtype).eps if x else 0.0


def absorbing(x: float, dtype: torch.dtype) -> bool:
    """Whether nothing is left of any score that is added to a finite number in that dtype."""
    return abs(x) >= ABSORBING or spacing(x, dtype) >= WIDEST


def coarse(x: float, dtype: torch.dtype) -> bool:
    """Whether little is left of the scores that are added to a finite number in that dtype: -1e9 in fp32."""
    return spacing(x, dtype) >= COARSE


_BOUNDED = CONTRACTIONS | frozenset(
    "tanh sigmoid softmax erf sin cos layer_norm native_layer_norm rms_norm group_norm native_group_norm batch_norm "
    "linear conv1d conv2d convolution gelu silu relu".split()
)
"""What is of the size of a model's activations, or smaller. A product of matrices near 1e18 would not survive the
next one."""

_UNBOUNDED = frozenset("log log2 log10 log1p log_softmax logit reciprocal rsqrt pow exp exp2 expm1 empty".split())

_POSITIONS = frozenset("slice slice_of narrow select select_of".split())
"""Operations whose numbers say where, not what."""

_CHOOSING = frozenset("where add sub maximum minimum clamp clamp_min clamp_max".split())
"""Operations whose numbers are elements of their results, or nearly so."""


def absorbs(expr: sympy.Basic | None, loads: Sequence[Value], *, finite: bool = False, strict: bool = False) -> bool:
    """Whether a formula contains a number, or loads from a tensor that may, of more than `ABSORBING` in size.

    loads: the values that `Load(n, ...)` speaks of. finite: infinite numbers and NaN don't count. strict: as in
    `may_absorb`.
    """
    if expr is None:
        return False
    found = set(_numerals(expr))
    if any(abs(x) >= ABSORBING and (x.is_finite or not finite) for x in found if not isinstance(x, Load)):
        return True
    values = (loads[x.operand] for x in found if isinstance(x, Load))
    return any(may_absorb(v, strict=strict) for v in values if not (finite and v.dtype == torch.float16))


def _numerals(expr: sympy.Basic) -> Iterator[sympy.Expr]:
    """The numbers and the loads that a formula computes with, and not those that it only compares."""
    if isinstance(expr, Load) or expr.is_Number:
        yield expr
    elif not isinstance(expr, sympy.logic.boolalg.Boolean) or isinstance(expr, sympy.Symbol):
        for arg in expr.args[1:] if isinstance(expr, Where) else expr.args:
            yield from _numerals(arg)


def bends(score: sympy.Basic, dtype: torch.dtype, loads: Sequence[Value]) -> bool:
    """Whether something else than a sum is made of scores where they may be beside numbers that leave little of them:
    max(s + mask, finfo.min). What is left goes by how each step is rounded, and so do the gradients.

    Functions that are bounded, or bounded from below, forget such numbers: tanh, exp, and max(s + mask, -50).
    """
    if isinstance(score, (Load, sympy.logic.boolalg.Boolean)) or S not in score.free_symbols:
        return False
    sums = isinstance(score, (sympy.Add, sympy.Mul, Where, sympy.tanh, sympy.exp))
    if not sums and _beside_coarse(score, dtype, loads, low=False):
        return True
    return any(bends(x, dtype, loads) for x in score.args)


def overflows(score: sympy.Basic, dtype: torch.dtype) -> bool:
    """Whether a large number that a mask puts in place of scores, or adds, is multiplied by data: in that dtype it may
    be infinite then, and in the fp32 of our kernels not."""
    most = torch.finfo(dtype).max / 100

    def is_large(x: sympy.Expr) -> bool:
        return isinstance(x, Where) and any(
            n.is_number and n.is_finite and abs(n) >= most for n in _numerals(x) if not isinstance(n, Load)
        )

    def is_small(x: sympy.Expr) -> bool:
        if isinstance(x, Where):
            return is_small(x.args[1]) and is_small(x.args[2])
        return bool(x.is_number and abs(x) <= 1)

    products = (x.args for x in score.atoms(sympy.Mul))
    return any(
        is_large(x) and not all(is_small(y) or y.is_number for y in xs if y is not x) for xs in products for x in xs
    )


def _beside_coarse(expr: sympy.Basic, dtype: torch.dtype, loads: Sequence[Value], low: bool) -> bool:
    """low: whether -inf is such a number too."""
    if isinstance(expr, Load):
        return low and may_absorb(loads[expr.operand])
    if expr.is_Number:
        return coarse(float(expr), dtype) if expr.is_finite else low
    if isinstance(expr, (sympy.tanh, sympy.exp, sympy.logic.boolalg.Boolean)):
        return False
    highest = isinstance(expr, sympy.Max)
    found = [_beside_coarse(x, dtype, loads, low or highest) for x in expr.args]
    return bool(found) and (all(found) if highest else any(found))


def is_coarse(value: Value, dtype: torch.dtype) -> bool:
    """Whether a tensor that is added in a dtype may hold a number of which too little is left to absorb scores and too
    much to forget them: in fp16 its least one. A mask that is data in another dtype is taken to hold the least number
    of that, or -inf; of one that the program makes we see its numbers."""
    if value.dtype == dtype == torch.float16 and may_absorb(value):
        return True
    return any(_leaves_some(x, dtype) for x in _chosen(value))


def adds_coarse(expr: sympy.Expr, dtype: torch.dtype) -> bool:
    """Whether such a number stands in a formula."""
    return any(_leaves_some(float(x), dtype) for x in expr.atoms(sympy.Number))


def _leaves_some(x: float, dtype: torch.dtype) -> bool:
    """Of scores that are added to it, in that dtype or, where that leaves nothing, in the fp32 of our kernels."""
    return abs(x) < ABSORBING and coarse(x, dtype)


def _chosen(value: Value) -> Iterator[float]:
    """The numbers that a tensor may have for elements, as far as the program chooses or adds them."""
    seen, todo = {value}, [value]
    while todo:
        top = todo.pop()
        if not top.dtype.is_floating_point or top.op in _BOUNDED | _POSITIONS:
            continue
        if top.op in _CHOOSING:
            yield from _numbers(tuple(top.args.values()))
        todo.extend(v for v in top.inputs() if v not in seen)
        seen.update(top.inputs())


def may_absorb(value: Value, *, strict: bool = False) -> bool:
    """Whether an element of a tensor may be of more than `ABSORBING` in size, or infinite, or NaN.

    Parameters and what needs a gradient are taken to be smaller: no model trains with such weights. So is what is made
    of small numbers and positions alone (ALiBi's slopes), but where `strict` it may divide by 0. Any other tensor that
    enters the program may hold anything.
    """
    known: dict[Value, bool] = {}
    todo = [value]
    while todo:
        top = todo[-1]
        verdict = known.get(top, _alone(top))
        if verdict and not strict and top.op in _UNBOUNDED | {"div"} and not _enters(top):
            verdict = None
        if verdict is None:
            pending = [v for v in top.inputs() if v not in known]
            if pending:
                todo.extend(pending)
                continue
            verdict = any(known[v] for v in top.inputs())
        known[todo.pop()] = verdict
    return known[value]


def _alone(value: Value) -> bool | None:
    """The verdict where it does not depend on the inputs; None where it does."""
    if not value.dtype.is_floating_point or value.op in _BOUNDED:
        return False
    if value.op == "leaf":
        return value["why"] != "learned"
    if value.op in _UNBOUNDED or (value.op == "div" and isinstance(value["other"], Value)):
        return True
    if value.op not in _POSITIONS and any(abs(x) >= ABSORBING or x != x for x in _numbers(tuple(value.args.values()))):
        return True
    return None


def _enters(value: Value) -> bool:
    """Whether a tensor that enters the program is part of a value."""
    seen: set[Value] = set()
    todo = [value]
    while todo:
        top = todo.pop()
        if top.op in ("leaf", "empty"):
            return True
        todo.extend(v for v in top.inputs() if v not in seen)
        seen.update(top.inputs())
    return False


def _numbers(x: Any) -> Iterator[float]:
    if isinstance(x, tuple):
        for y in x:
            yield from _numbers(y)
    elif isinstance(x, (int, float)) and not isinstance(x, bool):
        yield x
