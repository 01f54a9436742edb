"""Whether something sees how a result lies in memory: then it lies as it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from equivalence import check, tensors
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from xfcompile.layout import layout_matters

SHAPE = (2, 3, 4, 8)


def as_rows(out: Tensor) -> Tensor:
    return out.view(6, 32) * 2


SEEN: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "in a sum": (lambda out: (out * 2).sum(), False),
    "as rows": (as_rows, True),
    "as rows, in a body": (lambda out: checkpoint(as_rows, out, use_reentrant=False), True),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("grad", [False, True])
def test_a_result_is_contiguous_where_that_is_seen(name: str, grad: bool) -> None:
    use, seen = SEEN[name]
    outcome = check(
        lambda q, k, v: use((q @ k.mT).softmax(-1) @ v),
        *tensors(SHAPE, SHAPE, SHAPE, grad=grad),
        family="attention",
        grad=grad,
    )
    assert [site.route for site in outcome.matched] == ["sdpa"]
    (graph,) = (gm.graph for gm in outcome.graphs)
    assert any(node.target == "contiguous" for node in graph.nodes) == seen


def test_each_view_is_looked_at_once() -> None:
    """There are 2 ** 64 ways from the first to the last."""
    graph = fx.Graph()
    x = y = graph.placeholder("x")
    for _ in range(64):
        y = graph.call_method("add_", (graph.call_method("transpose", (y, 0, 1)), y))
    last = graph.call_method("sum", (y,))
    assert not layout_matters(x)
    graph.output(y)
    assert last.users == {} and layout_matters(x)
