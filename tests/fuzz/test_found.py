"""What random programs found, each as small as it could be made: wrong numbers and crashes that are no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equivalence import ALL, Outcome, check, tensors
from torch import Tensor

BIAS = "bias-act-dropout"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def routes(outcome: Outcome, family: str) -> list[str | None]:
    return [site.route for site in outcome.sites if site.family == family]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_a_bias_that_is_added_after_the_projections_input_was_changed_is_not_lost(route: str, grad: bool) -> None:
    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x = x.permute(0, 3, 2, 1) * 1.0  # the projection reads a copy, so that its gradient is not lost
        h = b + F.linear(x, w)
        x.relu_()
        return F.gelu(h)

    outcome = check(program, *tensors((1, 8, 2, 2), (8, 8), (8,), grad=grad), grad=grad, routes={BIAS: route}, family=ALL)
    assert len(routes(outcome, BIAS)) == 1
