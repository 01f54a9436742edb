"""How attention that drops weights out is compared with its definition, in the interpreter and on GPUs alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from attention_cases import Case, Inputs, error
from torch import Tensor

from xfcompile.kernels.attention import prepare, reference

SEED = 0x1234_5678_9ABC


def check(case: Case, x: Inputs, rate: float = 0.25, slack: float = 1.0, least: float = 0.0) -> None:
    """The same weights are dropped out as by the definition, of rows without keys too, forward and backward.

    slack: times what is allowed for roundings. least: what the largest number is taken to be, at least.
    """
    # Of a row that is NaN nothing comes back.
    spec = replace(case.spec, dropout=rate, dead="zero" if case.spec.dead == "nan" else case.spec.dead)
    dtype, seeded = x.q.dtype, torch.tensor([SEED], device=x.q.device)
    shape = (*x.q.shape[:3], x.v.shape[3])
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x.q)

    def step(
        attention: Callable[..., tuple[Tensor, Tensor]], dout: Tensor, wanted: torch.dtype, *more: object
    ) -> list[Tensor]:
        qkv = [y.to(wanted, copy=True).requires_grad_() for y in (x.q, x.k, x.v)]
        out = attention(*qkv, x.operands, x.ints, x.floats, *more, seed=seeded, stream=3)[0]
        found = torch.autograd.grad(out, qkv, dout.to(wanted), allow_unused=True)
        return [out, *(torch.zeros_like(y) if g is None else g for g, y in zip(found, qkv, strict=True))]

    definition = partial(reference.attention, spec)
    right, eager = (step(definition, dout, wanted, wanted) for wanted in (torch.float64, dtype))
    ours = step(torch.ops.xfcompile.attention, dout, dtype, prepare(spec))
    # dv is a sum of weights, which are not below 0, times dout: its roundings are measured in what that has of sizes.
    sizes = [*right[:3], step(definition, dout.abs(), torch.float64, torch.float64)[3]]
    for name, a, b, exact, size in zip(("out", "dq", "dk", "dv"), ours, eager, right, sizes, strict=True):
        near = error(b, exact) if b.isfinite().all() else 0.0  # a mask far away is infinite in 16 bits
        allowed = 2 * near + slack * 4 * torch.finfo(dtype).eps * max(size.abs().max().item(), least)
        assert error(a, exact) <= allowed, f"{case.name} {name}: {error(a, exact):.3g} > {allowed:.3g}"
