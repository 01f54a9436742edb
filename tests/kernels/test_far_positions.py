"""Biases of distances where positions are far from 0: as exact as the program, which subtracts whole numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor, fx

import xfcompile
from xfcompile.score import I, J
from xfcompile.sums import summands

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

QUERIES, KEYS = 4, 3001

BIASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "times a slope": lambda i, j: (j - i) * 0.37,
    "of floats": lambda i, j: (j.float() - i.float()) * 0.37,
    "a third": lambda i, j: (j - i) / 3,
    "twice": lambda i, j: (2 * j - 2 * i) * 0.37,
    "a product": lambda i, j: (i - j) * (j - i + 3) * 0.01,
}


@pytest.mark.parametrize("name", BIASES)
def test_distances_are_subtracted_before_they_are_scaled(name: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(QUERIES)[:, None] + (KEYS - QUERIES)
        return (q @ k.mT / 4 + BIASES[name](i, torch.arange(KEYS))).softmax(-1) @ v

    inputs = [torch.randn(1, 2, n, 16) for n in (QUERIES, KEYS, KEYS)]
    report = xfcompile.Report()

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Tensor]:
        report.extend(xfcompile.rewrite(gm, example_inputs, {"strict": True, "routes": {"attention": "triton"}}))
        return gm

    torch.set_default_dtype(torch.float64)
    try:
        exact = attention(*(x.double() for x in inputs))
    finally:
        torch.set_default_dtype(torch.float32)
    ours = torch.compile(attention, backend=backend)(*inputs)
    assert [site.route for site in report.sites] == ["triton"]
    error, allowed = ((x - exact).abs().max() for x in (ours, attention(*inputs)))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_terms_that_are_no_multiples_of_one_number_stay_as_they_are() -> None:
    for total in (0.37 * I - 0.21 * J, 2 * I - 2 * J, 0.5 * I + 1.3, I + sympy.Symbol("x", real=True)):
        assert summands(total) == list(total.args)
    assert len(summands(0.37 * (J - I) - sympy.Float(0.37 * 59997) + 1.3 * sympy.Symbol("x", real=True))) == 2
