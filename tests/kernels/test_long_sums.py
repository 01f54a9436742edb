"""Long sums in fp32 are added up in parts: one chain of additions errs more than eager's products do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xfcompile.activation import GATE, UP, X
from xfcompile.kernels.bias_act_dropout import linear_act_dropout, text_of
from xfcompile.kernels.gated_mlp import gated_mlp, prepare

INNER = 4096


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(shape[0]))


def errors(made: Tensor, x: Tensor, w: Tensor) -> tuple[float, float]:
    """The error in the root mean square, and that of a chain of additions of 32 products each."""
    truth = x.double() @ w.double().t()
    chain = torch.zeros(truth.shape)
    for a, b in zip(x.split(32, 1), w.split(32, 1), strict=True):
        chain += a @ b.t()
    return tuple(float((t.double() - truth).square().mean().sqrt()) for t in (made, chain))  # type: ignore[return-value]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("rows", [4, 20])
def test_gated_mlps(rows: int) -> None:
    x, w, v = positive(rows, INNER), positive(8, INNER), torch.ones(8, INNER) / INNER
    _, saved = gated_mlp(x, w, v, None, None, prepare(GATE * UP), "separate", "dual", True, torch.float32)
    mine, chain = errors(saved[:, :8], x, w)
    assert mine < chain * 2 / 3


@pytest.mark.usefixtures("interpreter")
def test_linears_with_their_activation() -> None:
    x, w = positive(20, INNER), positive(8, INNER)
    _, pre = linear_act_dropout(x, w, None, [], [], None, 0, text_of(X * X), 0.0, torch.float32, True)
    mine, chain = errors(pre, x, w)
    assert mine < chain * 2 / 3
