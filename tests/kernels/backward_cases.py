"""How gradients of attention are compared with fp64 and with eager's own, in the interpreter and on GPUs alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import sympy
import torch
from attention_cases import (
    CASES,
    FLOAT,
    SCALE,
    Case,
    Inputs,
    Sizes,
    X,
    call,
    error,
    left_padding,
    minus_infinity,
    normal,
)
from torch import Tensor

from xfcompile.kernels.attention import launch_backward, prepare, reference
from xfcompile.kernels.attention.backward_layout import Needs
from xfcompile.kernels.attention.gradient import gradients, why_not
from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Operand, ScoreSpec

DIFFERENTIABLE = [case for case in CASES if why_not(case.spec) is None]

_CAP = 2 * sympy.tanh(SCALE / 2)
_PADDING = (Operand(FLOAT, 2),)
CAPPED = [
    Case("capped beside padding", ScoreSpec(_CAP + Load(0, B, J), operands=_PADDING), minus_infinity),
    Case("capped beside far keys", ScoreSpec(_CAP + Load(0, B, J), operands=_PADDING, far=True), left_padding),
    Case("capped at run time", ScoreSpec(X * sympy.tanh(SCALE / X), scalars=(X,)), floats=(1.5,)),
    Case("capped after rounding", ScoreSpec(_CAP, coarse=True)),
]
"""Scores each of which has a slope of its own, beside those of `CASES`."""


WINDOWS = Sizes(batch=5, heads=2, kv_heads=2, lq=33, lk=33, dq=8, dv=8)
BIAS = Case(
    "biases of windows",
    ScoreSpec(SCALE + Load(0, 0, H, I, J), operands=(Operand(FLOAT, 4),)),
    lambda z: [normal(1, z.heads, z.lq, z.lk)],
    sizes=WINDOWS,
)
BOTH = Case(
    "biases and masks of windows",
    ScoreSpec(SCALE + Load(0, 0, H, I, J) + Load(1, B, 0, I, J), operands=(Operand(FLOAT, 4), Operand(FLOAT, 4))),
    lambda z: [normal(1, z.heads, z.lq, z.lk), -100.0 * (normal(z.batch, 1, z.lq, z.lk) > 1)],
    sizes=WINDOWS,
)
"""Many batches and few keys: what all batches add, and masks of each."""


def distances(
    axes: Sequence[sympy.Expr],
    z: Sizes,
    spec: ScoreSpec | None = None,
    extra: int = 0,
    dtype: torch.dtype = FLOAT,
) -> Case:
    """With a bias [.., Lq + Lk - 1 + extra], which has an element for each of these axes and each distance."""
    spec = spec or ScoreSpec(SCALE)
    score = spec.score + Load(0, *axes, J - I + z.lq - 1)
    sizes = [{B: z.batch, H: z.heads}.get(a, 1) for a in axes]
    whole = dataclasses.replace(spec, score=score, operands=(Operand(dtype, len(axes) + 1),))
    return Case("distances", whole, lambda z: [normal(*sizes, z.lq + z.lk - 1 + extra).to(dtype)], sizes=z)


def floating(x: Inputs) -> list[int]:
    return [n for n, y in enumerate(x.operands) if y.is_floating_point()]


def exact(case: Case, x: Inputs, dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gradients by autograd through the definition, in `dtype`: of q, k, v and the floating operands."""
    leaves = [y.detach().to(dtype).requires_grad_() for y in (x.q, x.k, x.v)]
    operands = [y.to(dtype).requires_grad_() if y.is_floating_point() else y for y in x.operands]
    # Of a row that is NaN nothing comes back.
    spec = dataclasses.replace(case.spec, dead="zero") if case.spec.dead == "nan" else case.spec
    out, _ = reference.attention(spec, *leaves, operands, x.ints, x.floats, dtype)
    wanted = [*leaves, *(operands[n] for n in floating(x))]
    found = torch.autograd.grad(out, wanted, dout.to(dtype), allow_unused=True)
    return [torch.zeros_like(y) if g is None else g for g, y in zip(found, wanted, strict=True)]


def kernels(case: Case, x: Inputs, dout: Tensor) -> list[Tensor]:
    key = prepare(case.spec)
    out, lse = call(case.spec, x)
    needs = Needs(True, True, True, tuple(floating(x)))
    dq, dk, dv, rest = launch_backward.run(dout, x.q, x.k, x.v, out, lse, x.operands, x.ints, x.floats, key, needs)
    return [dq, dk, dv, *(rest[n] for n in floating(x))]


def sizes_of_terms(case: Case, x: Inputs, dout: Tensor) -> dict[str, float]:
    """The sum of the sizes of what an operand's gradient is the sum of, and dv's, which is a sum of weights, not below
    0, times dout: what their roundings are measured in."""
    found = gradients(case.spec, floating(x))
    arguments = (x.q, x.k, x.v, x.operands, x.ints, x.floats, torch.float64)
    dv = reference.backward(case.spec, found, dout.abs(), *arguments)[2]
    *_, loads = reference.backward(case.spec, found, dout, *arguments, absolute=True)
    sizes = {"dv": dv.nan_to_num(0.0).abs().max().item() / 4}
    for load, value in zip(found.loads, loads, strict=True):
        name = f"t{load.load.operand}"
        sizes[name] = sizes.get(name, 0.0) + value.max().item()
    return sizes


def eager_errors(case: Case, x: Inputs, dout: Tensor, right: list[Tensor]) -> list[float]:
    """The largest error of each gradient by eager's autograd in the inputs' own dtype, over some orders of the features
    that are added up: one order alone is lucky or not."""
    worst = [0.0] * len(right)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3 if x.q.dtype == torch.float32 else 1):
        order = torch.randperm(x.q.shape[-1], generator=generator).to(x.q.device)
        back = order.argsort()
        moved = dataclasses.replace(x, q=x.q[..., order], k=x.k[..., order])
        found = exact(case, moved, dout, x.q.dtype)
        found[:2] = [y[..., back] for y in found[:2]]
        worst = [max(e, (a.double() - b).abs().max().item()) for e, a, b in zip(worst, found, right, strict=True)]
    return worst


def check(case: Case, x: Inputs, slack: float = 1.0, least: float = 0.0) -> None:
    """Each gradient's error against fp64 is at most twice that of eager's autograd in the inputs' own dtype, and four
    ulps of the largest number: two right orders of summation differ by as much. least: what that number is taken to be
    at least: where a row sees one key its gradients are differences of numbers that are the same."""
    dout = torch.randn(x.q.shape[:3] + x.v.shape[3:], generator=torch.Generator().manual_seed(1)).to(x.q)
    ours = kernels(case, x, dout)
    right = exact(case, x, dout, torch.float64)
    eager = eager_errors(case, x, dout, right)
    terms = sizes_of_terms(case, x, dout)
    names = ["dq", "dk", "dv", *(f"t{n}" for n in floating(x))]
    for name, a, b, theirs in zip(names, ours, right, eager, strict=True):
        assert a.shape == b.shape
        assert (
            a.dtype == (x.operands[int(name[1:])].dtype if name[0] == "t" and name in terms else x.q.dtype)
            or name[0] == "t"
        )
        # An operand's gradient is a sum of very many numbers, of which partial sums are rounded.
        magnitude = max(b.abs().max().item(), 4 * terms.get(name, 0.0), least)
        eps = max(torch.finfo(a.dtype).eps, torch.finfo(x.q.dtype).eps)
        # NaN where eager's own gradient overflows
        allowed = (2 * theirs if math.isfinite(theirs) else 0.0) + slack * 4 * eps * magnitude
        assert error(a, b) <= allowed, f"{case.name} {name}: {error(a, b):.3g} > {allowed:.3g} of {magnitude:.3g}"
