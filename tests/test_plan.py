"""Which route a site takes on a GPU, decided from the site alone: no GPU is needed to ask."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch

plan = importlib.import_module("xfcompile.plan")

BIASED = plan.Told(sympy.S.One, sympy.Symbol("bias"), False, sympy.true)


def objection(keys: Any, *, bias_grad: bool = True, call: object = None) -> str | None:
    site = SimpleNamespace(
        call=call, dead="nan", alive=True, root=SimpleNamespace(dtype=torch.bfloat16), head_dim=64, value_dim=64,
        dropout=0.0, keys=keys, rounding=None,
    )  # fmt: skip
    return plan._why_no_sdpa(site, BIASED, "cuda", bias_grad)  # type: ignore[no-any-return]


@pytest.mark.parametrize("keys", [1024, sympy.Integer(257), sympy.Symbol("s0", integer=True)])
def test_sdpa_leaves_long_biases_that_need_a_gradient_to_inductor(keys: Any) -> None:
    assert "slower" in (objection(keys) or "")
    assert objection(keys, bias_grad=False) is None
    assert objection(keys, call=object()) is None  # the program's own call of SDPA stays one


def test_sdpa_takes_short_biases_that_need_a_gradient() -> None:
    assert objection(144) is None
    assert objection(256) is None
