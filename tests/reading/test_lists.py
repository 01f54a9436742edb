"""Lists of tiles: where a graph has them made, and for how many of its attentions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equivalence import check
from torch import Tensor

from xfcompile.kernels import attention

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
