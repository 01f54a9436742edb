"""Calls that hold a whole attention: spelled out where that can be done, and left as they are where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import check, tensors
from torch import Tensor, fx, nn

import xfcompile

Q, K = (2, 3, 5, 8), (2, 3, 6, 8)
INSIDE = "inside of a call that cannot be spelled out"


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


# -- calls of functions that Dynamo does not look into -------------------------------------------------------------


@torch._dynamo.allow_in_graph
def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(weights(q, k) @ v)


@torch._dynamo.allow_in_graph
def asserted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._assert_async((q < 1e9).all())
    return torch.tanh(weights(q, k) @ v)


@torch._dynamo.allow_in_graph
def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(weights(q * q.shape[-1] ** -0.5, k) @ v)


@torch._dynamo.allow_in_graph
def of_some_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = k.shape[-2] % 5 + 1
    return torch.tanh(weights(q, k[..., :n, :]) @ v[..., :n, :])


CALLS: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    "attended": (attended, True, True),
    "asserted": (asserted, False, True),
    "scaled by what its sizes are": (scaled, False, True),
    "scaled by a size that is a symbol": (scaled, True, False),
    "of as many keys as no node knows": (of_some_keys, True, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_spelled_out_if_nodes_hold_its_sizes(name: str) -> None:
    call, dynamic, spelled = CALLS[name]
    outcome = check(lambda q, k, v: call(q, k, v) + 1, *tensors(Q, K, K), family="attention", dynamic=dynamic)
    assert [site.route for site in outcome.sites] == ["sdpa" if spelled else None]
    assert spelled or INSIDE in outcome.reasons
    (targets,) = ([node.target for node in gm.graph.nodes] for gm in outcome.graphs)
    assert (call in targets) != spelled
    assert (torch.ops.aten._assert_async.default in targets) == (call is asserted)


# -- modules that symbolic tracing does not look into --------------------------------------------------------------


class Attend(nn.Module):
    """Not its result but what is made of it is returned, beside `more`."""

    def __init__(self, *more: Any) -> None:
        super().__init__()
        self.more = more

    def forward(self, qkv: tuple[Tensor, Tensor, Tensor]) -> Any:
        q, k, v = qkv
        result = torch.tanh(weights(q, k) @ v)
        return (result, *self.more) if self.more else result


class Model(nn.Module):
    def __init__(self, inside: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inside, self.call = inside, call

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.call(self.inside, x, y)


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return name == "inside"


def both(inside: nn.Module, x: Tensor, y: Tensor) -> Any:
    found = inside((x, y, y))
    return found[0] + 1, found[1]


def product(inside: nn.Module, x: Tensor, y: Tensor) -> Any:
    found = inside((x, y, y))
    return found[0] * found[1]


def tuple_and_part(inside: nn.Module, x: Tensor, y: Tensor) -> Any:
    whole = inside((x, y, y))
    return whole[0] + 1, whole


MODULES: dict[str, tuple[nn.Module, Callable[..., Any], bool]] = {
    "one result": (Attend(), lambda m, x, y: m((x, y, y)) + 1, True),
    "nothing among its results": (Attend(None), both, True),
    "a number among its results": (Attend(3), product, True),
    "a tuple that is returned as it is": (Attend(None), lambda m, x, y: m((x, y, y)), False),
    "a tuple that is returned and taken apart": (Attend(None), tuple_and_part, False),
    "operands in a tuple of one node": (
        Attend(),
        lambda m, x, y: m((x @ y.mT @ y.repeat(1, 1, 3)).chunk(3, -1)),
        False,
    ),
    "parameters of its own": (nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x, y: m(x, y, y)[0] + 1, False),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_spelled_out_if_nodes_hold_what_it_takes_and_gives(name: str) -> None:
    inside, call, spelled = MODULES[name]
    model = Model(inside, call)
    inputs = tensors((2, 5, 8), (2, 5, 8))
    gm = fx.GraphModule(model, Tracer().trace(model))
    report = xfcompile.rewrite(gm, inputs, {"strict": True})
    torch.testing.assert_close(gm(*inputs), model(*inputs))
    assert all(site.route == "sdpa" if spelled else INSIDE in str(site.reason) for site in report.sites), report.sites
    assert report.sites
    assert any(node.op == "call_module" for node in gm.graph.nodes) != spelled
