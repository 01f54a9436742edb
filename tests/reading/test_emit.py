"""What is written for SDPA: numbers of a formula that a node holds, and nothing where a call says it already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import check, tensors
from torch import Tensor

SHAPES = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8))


@torch._dynamo.allow_in_graph
def by_a_power(scores: Tensor) -> Tensor:
    return scores * scores.shape[-1] ** 0.3


@torch._dynamo.allow_in_graph
def by_a_remainder(scores: Tensor) -> Tensor:
    return scores * (scores.shape[-1] % 4 + 1)


@torch._dynamo.allow_in_graph
def by_thirds(scores: Tensor) -> Tensor:
    return scores * (scores.shape[-1] // 3)


@torch._dynamo.allow_in_graph
def sloped(scores: Tensor) -> Tensor:
    position = torch.arange(scores.shape[-1], dtype=scores.dtype)
    return scores - position * scores.shape[-1] ** 0.3


SCORES: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "times a quotient of their number": (by_thirds, None),
    "times a power of their number": (by_a_power, "no node holds the number"),
    "times a remainder of their number": (by_a_remainder, "no node holds the size"),
    "minus a slope of such a power": (sloped, "has no tensor form here"),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_said_to_sdpa_where_their_numbers_can_be_written(name: str) -> None:
    """Their numbers are symbols. Calls that Dynamo does not look into have no node for what they make of these."""
    scored, reason = SCORES[name]
    outcome = check(
        lambda q, k, v: scored(q @ k.mT).softmax(-1) @ v, *tensors(*SHAPES), family="attention", dynamic=True
    )
    (site,) = outcome.sites
    assert site.route == ("sdpa" if reason is None else "inductor"), site
    assert reason is None or reason in str(site.reason)


CALLED: dict[str, tuple[Callable[[], dict[str, Any]], bool]] = {
    "no mask": (dict, True),
    "causal": (lambda: {"is_causal": True}, True),
    "a causal mask": (lambda: {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()}, False),
    "a mask that hides nothing": (lambda: {"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, False),
    "a window": (lambda: {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)}, True),
}


@pytest.mark.parametrize("name", CALLED)
def test_a_call_of_sdpa_is_written_anew_where_it_need_not_have_a_mask(name: str) -> None:
    arguments, stays = CALLED[name]
    outcome = check(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **arguments()), *tensors(*SHAPES[1:], SHAPES[1])
    )
    (site,) = outcome.sites
    assert site.route == "sdpa"
    assert str(site.reason).startswith("as it was: ") == stays, site
