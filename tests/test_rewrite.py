"""The bare pass on graphs from elsewhere than Dynamo: exported programs and symbolic traces, with modules in them."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

import xfcompile


class Attention(nn.Module):
    """Causal self-attention, written out, with its layers as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.softmax = nn.Softmax(-1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        future = torch.ones(10, 10, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(future, float("-inf"))
        return (self.dropout(self.softmax(scores)) @ v).transpose(1, 2).flatten(2)


def exported(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    return torch.export.export(model, (x,)).module()  # type: ignore[return-value]


def traced(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(model)


def propagated(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    graph_module = torch.fx.symbolic_trace(model)
    ShapeProp(graph_module).propagate(x)
    return graph_module


# A symbolic trace holds the mask as a tensor, which its owner may change: that it is causal is not proved.
@pytest.mark.parametrize("graph_of, mask", [(exported, "causal"), (traced, "dense mask"), (propagated, "dense mask")])
def test_an_attention_is_found_whoever_traced_the_graph(graph_of: Any, mask: str) -> None:
    model, x = Attention().eval(), torch.randn(2, 10, 32)
    expected = model(x)
    with torch.no_grad():
        gm = graph_of(model, x)
        report = xfcompile.rewrite(gm, [x])
        out = gm(x)
    assert [(s.matched, s.route, s.mask) for s in report.sites] == [(True, "sdpa", mask)]
    assert "scaled_dot_product_attention" in gm.code
    torch.testing.assert_close(out, expected)


def test_a_node_without_examples_is_given_none() -> None:
    """Not even one that takes no tensor: the mask of whole rows is spread over the keys."""

    class Masked(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
            return (q @ k.transpose(-1, -2)).masked_fill(masked, -1e30).softmax(-1) @ v

    given = [*(torch.randn(2, 3, 5, 8) for _ in range(3)), torch.tensor([0, 1, 0, 1, 1]).bool()[:, None]]
    gm = traced(Masked(), given[0])
    with torch.no_grad():
        report = xfcompile.rewrite(gm, given)
        out = gm(*given)
    assert [(s.matched, s.route) for s in report.sites] == [(True, "sdpa")]
    assert "torch.zeros(" in gm.code
    torch.testing.assert_close(out, Masked()(*given))


def test_a_call_without_a_result_holds_nothing() -> None:
    """`_foreach_mul_` on a tuple whose tensors no node holds yet."""
    graph = torch.fx.Graph()
    parts = graph.call_method("chunk", (graph.placeholder("x"), 3, -1))
    graph.call_function(torch._foreach_mul_, (parts, 2.0))
    q, k, v = (graph.call_function(operator.getitem, (parts, n)) for n in range(3))
    scores = graph.call_function(torch.matmul, (q, graph.call_method("transpose", (k, -1, -2))))
    graph.output(graph.call_function(torch.matmul, (graph.call_method("softmax", (scores, -1)), v)))
    gm, x = torch.fx.GraphModule(nn.Module(), graph), torch.randn(2, 3, 5, 24)
    with torch.no_grad():
        expected = gm(x.clone())
        report = xfcompile.rewrite(gm, [x])
        out = gm(x.clone())
    assert [(s.matched, s.route) for s in report.sites] == [(True, "sdpa")]
    torch.testing.assert_close(out, expected)


def test_an_exported_program_runs_after_its_own_graph_was_rewritten() -> None:
    model, x = Attention().eval(), torch.randn(2, 10, 32)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        report = xfcompile.rewrite(program.graph_module, [])
    assert [s.matched for s in report.sites] == [True]
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_one_element_parameter_is_no_constant() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2)
            return self.scale(scores.unsqueeze(-1)).squeeze(-1).softmax(-1) @ v

    model = Scaled().eval()
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    gm = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        report = xfcompile.rewrite(gm, [q, k, v])
        before = gm(q, k, v)
        torch.testing.assert_close(before, model(q, k, v))
        model.scale.weight.mul_(3)
        torch.testing.assert_close(gm(q, k, v), model(q, k, v))
    assert [s.matched for s in report.sites] == [False]
