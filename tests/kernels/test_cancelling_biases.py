"""Biases whose terms are far larger than they are: no score is rounded by what the program has added before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import xfcompile

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

LEAST = torch.finfo(torch.float32).min
SIZES = (2, 3, 20, 20)


def _keys(x: Tensor) -> Tensor:
    return x[:, None, None, :]


def _queries(x: Tensor) -> Tensor:
    return x[:, None, :, None]


BIASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mask of floats that is repeated": lambda m, t: (1.0 - _keys(m).repeat(1, 3, 1, 1)) * LEAST,
    "a mask of floats that is expanded": lambda m, t: (1.0 - _keys(m).expand(SIZES)) * -10000.0,
    "a mask of whole numbers": lambda m, t: (1.0 - _keys(m.long()).expand(SIZES).to(t.dtype)) * LEAST,
    "written out": lambda m, t: _keys(m).expand(SIZES) * 10000.0 - 10000.0,
    "times that went by": lambda m, t: (_queries(t) - _keys(t)) * -0.01,
    "times in halves": lambda m, t: (_queries(t) - _keys(t)) / -3.0,
    "plain differences": lambda m, t: _queries(t) - _keys(t),
}


@pytest.mark.parametrize("route", ["triton", "sdpa"])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_as_exact_as_in_eager(name: str, route: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor, t: Tensor) -> Tensor:
        return (q @ k.mT / 4 + BIASES[name](m, t)).softmax(-1) @ v

    q, k, v = (2 * torch.randn(2, 3, 20, 16) for _ in range(3))
    mask = torch.ones(2, 20)
    mask[1, -7:] = 0
    inputs = q, k, v, mask, 1e6 + 0.37 * torch.arange(40.0).view(2, 20)
    report = xfcompile.Report()

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Tensor]:
        report.extend(xfcompile.rewrite(gm, example_inputs, {"strict": True, "routes": {"attention": route}}))
        return gm

    exact = attention(*(x.double() for x in inputs))
    ours = torch.compile(attention, backend=backend)(*inputs)
    assert [site.route for site in report.sites] == [route]
    error, allowed = ((x - exact).abs().max() for x in (ours, attention(*inputs)))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_a_sum_of_a_row_and_a_column_is_two_vectors_still() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (q @ k.mT + (_queries(row) + _keys(column))).softmax(-1) @ v

    gm = torch.fx.symbolic_trace(attention)
    q, k, v = (torch.randn(2, 3, 20, 16) for _ in range(3))
    (site,) = xfcompile.rewrite(gm, [q, k, v, torch.randn(2, 20), torch.randn(2, 20)]).sites
    assert site.expression == "s + t0[b, 0, i, 0] + t1[b, 0, 0, j]"
