"""Sites of bias-act-dropout as tests read them, and what their programs have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from equivalence import tensors
from torch import Tensor

from xfcompile.patterns import bias_act_dropout as pattern
from xfcompile.read import Reading
from xfcompile.site import BiasActDropoutSite, Miss

FAMILY = "bias-act-dropout"
Fn = Callable[..., Tensor]
# x [.., K], weight [N, K], bias [N], residual [.., N], scale [N]
SHAPES = ((2, 5, 8), (16, 8), (16,), (2, 5, 16), (16,))


def found(fn: Callable[..., Any], *inputs: Any) -> list[BiasActDropoutSite | str]:
    """The sites of a program, and the reasons of near misses."""
    result: list[BiasActDropoutSite | str] = []

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
        reading = Reading(gm, examples)
        users: dict[Any, list[Any]] = {}
        for value in reading.steps:
            for source in dict.fromkeys(value.inputs()):
                users.setdefault(source, []).append(value)
        for anchor in pattern.anchors(list(reading.steps)):
            try:
                result.extend(pattern.match(anchor, users))
            except Miss as miss:
                result.append(miss.reason)
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend)(*inputs)
    return result


def given(grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return tensors(*SHAPES, grad=grad, dtype=dtype)


def as_text(site: BiasActDropoutSite) -> str:
    return str(site.formula.xreplace({f: round(f, 6) for f in site.formula.atoms() if f.is_Float}))


def bloom(h: Tensor) -> Tensor:
    return h * 0.5 * (1.0 + torch.tanh(0.79788456 * h * (1 + 0.044715 * h * h)))


class Bloom(torch.autograd.Function):
    """As transformers has it: forward and backward by hand."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return bloom(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * h * (1 + 0.044715 * h * h))
        return (0.5 * h * ((1 - t * t) * (0.79788456 + 0.1070322243 * h * h)) + 0.5 * (1 + t)) * grad
