"""Dropout on the weights, which SDPA does itself on GPUs. On CPUs it does so only unfused: there these tests switch the
objection off to see what is written into the graph."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from equivalence import Outcome, rewriting, tensors
from torch import Tensor

plan = importlib.import_module("xfcompile.plan")


@pytest.fixture
def sdpa_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_why_no_sdpa", lambda *args: None)


def compiled(fn: object, *inputs: Tensor) -> tuple[Outcome, Tensor]:
    outcome = Outcome()
    out = torch.compile(fn, backend=rewriting(outcome))(*inputs)  # type: ignore[call-overload]
    return outcome, out


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * 0.3).softmax(-1), 0.25, True) @ v


@pytest.mark.usefixtures("sdpa_drops")
def test_sdpa_drops_in_place_of_the_program() -> None:
    q, k, v = tensors((1, 1, 2000, 4), (1, 1, 8, 4), (1, 1, 8, 4), grad=True)
    outcome, out = compiled(dropped, q, k, torch.ones_like(v))
    code = outcome.graphs[0].code
    assert [s.route for s in outcome.matched] == ["sdpa"]
    assert "dropout_p = 0.25" in code
    assert "functional.dropout" not in code
    assert "softmax" not in code
    # A row of weights adds up to 1, of which a quarter of the terms are 0 and the others 4/3 as large.
    assert abs(out.mean().item() - 1) < 0.02
    variance = ((q @ k.mT * 0.3).softmax(-1).square().sum(-1) / 3).mean().item()
    assert abs(out[..., 0].var().item() / variance - 1) < 0.2
    out.sum().backward()
    assert q.grad is not None


@pytest.mark.usefixtures("sdpa_drops")
def test_weights_that_something_else_needs_are_left_alone() -> None:
    def shown(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w = F.dropout((q @ k.mT).softmax(-1), 0.25, True)
        return w @ v, w

    outcome, _ = compiled(shown, *tensors((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)))
    assert [(s.route, s.reason) for s in outcome.matched] == [
        ("inductor", "the attention weights are used elsewhere too")
    ]


@pytest.mark.usefixtures("sdpa_drops")
def test_a_dropout_beside_is_still_drawn() -> None:
    def beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        F.dropout(q, 0.5, True)
        return dropped(q, k, v)

    outcome, _ = compiled(beside, *tensors((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)))
    assert [s.route for s in outcome.matched] == ["sdpa"]
    assert outcome.graphs[0].code.count("nn.functional.dropout") == 1


def test_dropping_everything_is_left_alone() -> None:
    def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT).softmax(-1), 1.0, True) @ v

    outcome, out = compiled(nothing, *tensors((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)))
    assert [s.route for s in outcome.matched] == ["inductor"]
    assert (out == 0).all()
