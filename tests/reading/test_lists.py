"""Lists of tiles: where a graph has them made, and for how many of its attentions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import check
from torch import Tensor

from xfcompile.kernels import attention
from xfcompile.kernels.attention import lists

ROUTES = {"attention": "triton"}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def layers(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = padding[:, None, None, :]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.scaled_dot_product_attention(x, k, v, attn_mask=mask)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 16, generator=generator) for _ in range(3))
    return [q, k, v, torch.arange(40) < torch.tensor([[40], [31]])]


def lists_made(training: bool) -> int:
    """Of a graph in which each row has two tiles."""
    q, *others = inputs()
    outcome = check(layers, q.requires_grad_(training), *others, grad=training, routes=ROUTES)
    assert [site.route for site in outcome.sites] == ["triton", "triton"]
    return sum("attention_tiles" in str(n.target) for gm in outcome.programs for n in gm.graph.nodes)


def test_few_tiles_have_no_lists() -> None:
    assert lists_made(False) == 0


def test_a_kernel_that_makes_lists_of_few_tiles_too_is_given_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "always_listed", lambda *about: True)
    assert lists_made(False) == 1


def test_a_backward_is_given_no_lists_of_few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which both forwards are given; by keys there are none, and none is kept."""
    assert lists_made(True) == 0
    monkeypatch.setattr(attention, "always_listed", lambda *about: True)
    assert lists_made(True) == 1


# -- masks that say nothing of themselves ----------------------------------------------------------------------------


LONG = 160
"""Five tiles of keys: more than are visited without a list."""


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def stack(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    """Layers whose scores are their own, under one mask in several spellings; and one under another mask."""
    added = torch.where(mask, 0.0, torch.finfo(q.dtype).min)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = scores(x, k).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    x = (5 * torch.tanh(scores(x, k) / 5)).masked_fill(mask.logical_not(), -torch.inf).softmax(-1) @ v
    x = (scores(x, k) - 0.1 * torch.arange(LONG)).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    x = (scores(x, k) + added).softmax(-1) @ v
    return F.scaled_dot_product_attention(x, k, v, attn_mask=other)


def blocks(seed: int) -> Tensor:
    """A dense mask of which tiles are empty, full, and mixed; every query has its own key."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (5, 5), generator=generator).repeat_interleave(32, 0).repeat_interleave(32, 1)
    mixed = torch.rand(LONG, LONG, generator=generator) > 0.5
    return ((kind == 2) | ((kind == 1) & mixed) | torch.eye(LONG, dtype=torch.bool))[None, None]


@pytest.mark.parametrize("training", [False, True])
def test_a_dense_mask_is_looked_at_once_by_all_of_its_layers(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each mask by blocks of queries, and in training by blocks of keys; backwards make no lists anew."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, LONG, 16, generator=generator) for _ in range(3))
    made: list[str] = []
    run = lists.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append("lists")
        return run(*args, **kwargs)

    monkeypatch.setattr(lists, "run", counted)
    outcome = check(stack, q.requires_grad_(training), k, v, blocks(1), blocks(2), grad=training, routes=ROUTES)
    assert [site.route for site in outcome.sites] == ["triton"] * 6
    nodes = [n for gm in outcome.programs for n in gm.graph.nodes if "attention_tiles" in str(n.target)]
    expected = 4 if training else 2
    assert (len(nodes), len(made)) == (expected, expected)
