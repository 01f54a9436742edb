"""A softmax as programs have it: a call, or exp(x) / sum(exp(x)), which is 0 / 0 where all powers vanish."""

from __future__ import annotations

import math

import sympy
import torch

from xfcompile.score import Where
from xfcompile.site import Miss
from xfcompile.values import Value

VANISHING = 1000
"""exp(-1000 + s) is 0 in fp64 for all s below 254: a number that may be added to scores."""


def written_out(value: Value) -> tuple[Value, int] | None:
    """exp(x) / sum(exp(x)) over one axis: (x, axis)."""
    if value.op == "exp" and value["self"].op == "log_softmax":
        inner = value["self"]
        return inner["self"], inner["dim"] % inner.ndim
    if value.op != "div" or value.args.get("rounding_mode") is not None:
        return None
    top, bottom = value["self"], value["other"]
    if not isinstance(top, Value) or not isinstance(bottom, Value) or top.op != "exp":
        return None
    unsqueezed = bottom.op == "reshape"
    total = bottom["self"] if unsqueezed else bottom
    if total.op != "sum" or total["self"] is not top or not total.dtype.is_floating_point:
        return None
    dims = total.args.get("dim")
    if not isinstance(dims, tuple) or len(dims) != 1:
        return None
    axis = dims[0] % top.ndim
    kept = tuple(1 if k == axis else n for k, n in enumerate(top.shape))
    return (top["self"], axis) if bottom.shape == kept else None


def softmax_of(anchor: Value) -> tuple[Value, int]:
    """What a softmax is of, and over which axis."""
    written = written_out(anchor)
    return written if written is not None else (anchor["self"], anchor["dim"])


def vanishing(score: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """A score of which exp is taken as it is, in a dtype: numbers that stand where keys are masked leave 0 of it, as
    -inf does. `Miss` where that goes by the scores that they are added to."""
    about = torch.finfo(dtype)
    least = math.log(about.smallest_normal) + math.log(about.eps / 2)  # of half of the least that is not 0

    def far(x: sympy.Expr) -> sympy.Expr:
        return -sympy.oo if x.is_number and x <= -VANISHING else x

    def filled(x: sympy.Expr) -> sympy.Expr:
        if isinstance(x, Where):
            return Where(x.args[0], filled(x.args[1]), filled(x.args[2]))
        return -sympy.oo if x.is_number and x <= least else x

    score = filled(
        score.replace(lambda x: isinstance(x, Where), lambda w: Where(w.args[0], far(w.args[1]), far(w.args[2])))
    )
    if any(x.is_number and -sympy.oo < x <= least for w in score.atoms(Where) for x in w.args[1:]):
        raise Miss("exp(x) / sum(exp(x)) of an x that may be too low as a whole is 0 / 0")
    return score
