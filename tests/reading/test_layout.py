"""Whether something sees how a result lies in memory: then it lies as it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import check, tensors
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

import xfcompile
from xfcompile.layout_seen import layout_matters

SHAPE = (2, 3, 4, 8)


def as_rows(out: Tensor) -> Tensor:
    return out.view(6, 32) * 2


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


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


CARRIED: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "scaled": (lambda out: out * 2, True),
    "added to itself": (lambda out: out + out.exp(), True),
    "added to other numbers": (lambda out: torch.zeros(SHAPE) + out, False),
    "like it": (torch.zeros_like, True),
    "scaled, as rows": (lambda out: as_rows(out * 2) + 1, True),
    "scaled, in parts": (lambda out: (out * 2).chunk(2, 1), True),
    "scaled, summed": (lambda out: (out * 2).sum(-1), False),
    "scaled, in a body": (lambda out: checkpoint(torch.exp, out * 2, use_reentrant=False), True),
    "scaled, normed": (lambda out: F.layer_norm(out * 2, (8,)), False),
    "scaled, concatenated": (lambda out: torch.cat([out * 2, out.exp()], -1), False),
    "scaled, as a batch of rows": (lambda out: (out * 2).transpose(1, 2).reshape(2, 4, 24), False),
    "as a batch of rows, projected": (lambda out: F.linear(out.transpose(1, 2).flatten(2), torch.ones(5, 24)), False),
}
"""What is made of an attention's result [b, h, i, d], and whether it lies otherwise where that lies [b, i, h, d]."""


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_computed_of_a_result_lies_as_it_did(name: str, dynamic: bool, interpreter: None) -> None:
    use, carried = CARRIED[name]

    def program(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return use((q @ k.mT).tanh().softmax(-1) @ v)

    inputs = tensors(SHAPE, SHAPE, SHAPE)
    outcome = check(program, *inputs, routes={"attention": "triton"}, family="attention", dynamic=dynamic)
    assert [site.route for site in outcome.matched] == ["triton"]
    (call,) = (n for gm in outcome.graphs for n in gm.graph.nodes if "attention.default" in str(n.target))
    assert call.kwargs.get("heads_first", False) == carried


def test_a_result_is_viewed_where_another_graph_begins(interpreter: None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT).tanh().softmax(-1) @ v * q.sigmoid()
        torch._dynamo.graph_break()
        return as_rows(out)

    outcome = check(program, *tensors(SHAPE, SHAPE, SHAPE), routes={"attention": "triton"}, family="attention")
    assert [site.route for site in outcome.matched] == ["triton"]


@pytest.mark.parametrize("returned", [True, False])
def test_a_result_with_gaps_in_memory_is_left_alone(returned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is seen: what was written into every other column lies there."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def fn(x: Tensor, w: Tensor) -> Tensor:
        p = x @ w.mT
        up, gate = p[..., ::2], p[..., 1::2]
        h = gate.mul_(up)
        return h if returned else h.sum()

    x, w = torch.randn(5, 3, 4), torch.randn(24, 4)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="xformers", options={"routes": {"gated_mlp": "triton"}, "strict": True})
    with xfcompile.collect() as report:
        out = compiled(x, w)
    wanted = fn(x, w)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert out.stride() == wanted.stride()
    routes = [(site.route, "gaps" in str(site.reason)) for site in report.sites if site.family == "gated_mlp"]
    assert routes == [("inductor", True) if returned else ("triton", False)]
