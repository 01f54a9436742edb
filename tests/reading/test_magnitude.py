"""Which terms of a score may be so large that nothing is left of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from xfcompile.magnitude import is_coarse, may_absorb
from xfcompile.read import Reading
from xfcompile.values import Value


class Term(nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.randn(4, 4))

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.fn(x, n, self.weight, self.table)


def positions(x: Tensor) -> Tensor:
    return torch.full_like(x, 1.0).cumsum(-1)


# What is asked: may it absorb scores; and strictly?
TERMS: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    "an input": (lambda x, n, w, t: x + 0.5, True, True),
    "a buffer": (lambda x, n, w, t: t * 2.0, True, True),
    "a parameter": (lambda x, n, w, t: w * 2.0, False, False),
    "a parameter at positions": (lambda x, n, w, t: F.embedding(n, w), False, False),
    "a parameter and an input": (lambda x, n, w, t: w + x, True, True),
    "a parameter and a mask": (lambda x, n, w, t: w + torch.where(n > 0, 0.0, -3e38), True, True),
    "a parameter and a mask of -inf": (lambda x, n, w, t: w + torch.where(n > 0, 0.0, -torch.inf), True, True),
    "a small number where masked": (lambda x, n, w, t: w + torch.where(n > 0, 0.0, -100.0), False, False),
    "a product of matrices": (lambda x, n, w, t: x @ t, False, False),
    "a sum of products": (lambda x, n, w, t: x @ t + w @ x, False, False),
    "a bounded function": (lambda x, n, w, t: 16 * torch.sigmoid(x), False, False),
    "integers": (lambda x, n, w, t: n * 0.5, False, False),
    "a logarithm": (lambda x, n, w, t: torch.log(w), True, True),
    "a quotient": (lambda x, n, w, t: w / w, True, True),
    "a quotient by a number": (lambda x, n, w, t: w / 3.0, False, False),
    "slopes of positions": (lambda x, n, w, t: 1.0 / torch.pow(2.0, positions(x)), False, True),
    "the logarithm of positions": (lambda x, n, w, t: torch.log(positions(x)), False, True),
    "slopes of data": (lambda x, n, w, t: 1.0 / torch.pow(2.0, x), True, True),
}


def read(fn: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Value:
    gm = fx.symbolic_trace(Term(fn).to(dtype))
    inputs = [torch.randn(4, 4, dtype=dtype), torch.ones(4, 4, dtype=torch.long)]
    ShapeProp(gm).propagate(*inputs)
    reading = Reading(gm, inputs)
    (output,) = gm.graph.find_nodes(op="output")
    value = reading.value(output.args[0])
    assert value is not None
    return value


@pytest.mark.parametrize("name", TERMS)
def test_what_a_term_may_be(name: str) -> None:
    fn, expected, strictly = TERMS[name]
    value = read(fn)
    assert (may_absorb(value), may_absorb(value, strict=True)) == (expected, strictly)


@pytest.mark.parametrize("name", ["an input", "a parameter"])
def test_a_tensor_is_coarse_that_may_hold_the_least_number_of_fp16(name: str) -> None:
    fn, may, _ = TERMS[name]
    assert is_coarse(read(fn, torch.float16), torch.float16) == may
