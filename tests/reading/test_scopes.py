"""Regions of a program: modes of torch that hold from one node of a graph to another, and what is done inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import ALL, Outcome, check, rewriting, tensors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# x [.., K], weights [N, K], bias [N], residual [.., N]
SHAPES = ((2, 5, 8), (16, 8), (16, 8), (16,), (2, 5, 16))
ROUTES = [
    {"bias-act-dropout": "triton", "gated_mlp": "triton"},
    {"bias-act-dropout": "epilogue", "gated_mlp": "triton_recompute"},
]
Fn = Callable[..., Any]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def activated(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b))


def gated(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b)) * F.linear(x, v)


def attended(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return torch.softmax(h @ r.mT, -1) @ F.linear(x, v)


def in_a_checkpoint(fn: Fn) -> Fn:
    return lambda *inputs: checkpoint(fn, *inputs, use_reentrant=False)


LAYERS = [activated, gated, attended]


# -- inference -----------------------------------------------------------------------------------------------------
# Graphs run as they are: AOTAutograd traces no views of inputs in such a region (torch 2.13), or nothing (torch 2.11).


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("routes", ROUTES, ids=["triton", "other"])
def test_what_is_made_in_inference_mode_has_no_gradient(layer: Fn, routes: dict[str, str]) -> None:
    def program(*inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            made = layer(*inputs)
        return made.exp() + inputs[-1].square()

    outcome = check(program, *tensors(*SHAPES, grad=True), grad=True, routes=routes, family=ALL, aot=False)
    assert outcome.sites and not outcome.matched, outcome.sites


def projected_before(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    with torch.inference_mode():
        a = F.gelu(h)
    return a + r


def projected_inside(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    with torch.inference_mode():
        h = F.linear(x, w, b)
    return F.gelu(h) + r * r


def added_after(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    with torch.inference_mode():
        h = F.gelu(F.linear(x, w, b))
    return (h + r) * 2


def gate_inside(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    with torch.inference_mode():
        h = F.linear(x, w, b)
    return F.gelu(h) * F.linear(x, v)


def in_a_region_that_infers_nothing(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.inference_mode(False):
            h = F.linear(x, w)
        a = F.gelu(h)
    return a + h * F.linear(x, v)


CROSSING = [projected_before, projected_inside, added_after, gate_inside, in_a_region_that_infers_nothing]


@pytest.mark.parametrize("program", CROSSING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("routes", ROUTES, ids=["triton", "other"])
def test_no_site_reaches_out_of_inference_mode(program: Fn, routes: dict[str, str]) -> None:
    outcome = check(program, *tensors(*SHAPES, grad=True), grad=True, routes=routes, family=ALL, aot=False)
    assert outcome.sites and not outcome.matched
    assert "inference" in outcome.reasons


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [activated, gated])
@pytest.mark.parametrize("routes", ROUTES, ids=["triton", "other"])
def test_a_checkpoint_computes_in_the_modes_around_it(layer: Fn, routes: dict[str, str]) -> None:
    """Products under autocast are those of its dtype; an op of ours would not cast what it is given."""
    products: list[Any] = []

    def program(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return in_a_checkpoint(layer)(*inputs)

    inputs = tensors(*SHAPES, grad=True)
    outcome = check(program, *inputs, grad=True, routes=routes, family=ALL, computed=torch.bfloat16)
    assert len(outcome.matched) == 1 and outcome.matched[0].route in routes.values()
    for node in (n for gm in outcome.programs for n in gm.graph.nodes):
        if any(name in str(node.target) for name in ("mm", "linear_act_dropout", "gated_mlp")):
            products += [n.meta["val"].dtype for n in node.all_input_nodes if n.meta["val"].ndim > 1]
    assert products and set(products) == {torch.bfloat16}


@pytest.mark.parametrize("layer", [activated, gated])
@pytest.mark.parametrize("routes", ROUTES, ids=["triton", "other"])
def test_a_checkpoint_without_gradients_saves_nothing_for_them(layer: Fn, routes: dict[str, str]) -> None:
    def program(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            made = in_a_checkpoint(layer)(*inputs)
        return made + inputs[-1]

    outcome = check(program, *tensors(*SHAPES, grad=True), grad=True, routes=routes, family=ALL)
    assert [site.route in routes.values() for site in outcome.matched] == [True]


@pytest.mark.parametrize("layer", [activated, gated])
@pytest.mark.parametrize("routes", ROUTES, ids=["triton", "other"])
def test_what_runs_without_gradients_saves_nothing_for_them(layer: Fn, routes: dict[str, str]) -> None:
    def program(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            made = layer(*inputs)
        return made, inputs[-1] * 2

    outcome = check(program, *tensors(*SHAPES, grad=True), grad=True, routes=routes, family=ALL)
    assert [site.route in routes.values() for site in outcome.matched] == [True]


def test_a_region_that_is_called_in_two_modes_is_left() -> None:
    """It has one graph. Gradients are not looked at: without us they are not eager's either (torch 2.13)."""
    block = torch.compiler.nested_compile_region(gated)

    def program(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            first = block(*inputs)
        return first + block(*inputs)

    outcome = Outcome()
    torch.compile(program, backend=rewriting(outcome, ROUTES[0], family=ALL))(*tensors(*SHAPES, grad=True))
    assert outcome.sites and not outcome.matched
    assert "called in several modes" in outcome.reasons


# -- transforms ----------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Fn], Fn]] = {
    "grad": lambda fn: lambda x, *more: torch.func.grad(lambda x: fn(x, *more).sum())(x),
    "vjp": lambda fn: lambda x, *more: torch.func.vjp(lambda x: fn(x, *more), x)[1](more[-1]),
    "jvp": lambda fn: lambda x, *more: torch.func.jvp(lambda x: fn(x, *more), (x,), (x.cos(),))[1],
    "vmap": lambda fn: torch.vmap(fn, (0, None, None, None, 0)),
    "jacrev": lambda fn: lambda x, *more: torch.func.jacrev(lambda x: fn(x, *more).sum(-1))(x),
    "grad in vmap": lambda fn: torch.vmap(
        lambda x, *more: torch.func.grad(lambda x: fn(x, *more).sum())(x), (0, None, None, None, 0)
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_transformed_is_left(layer: Fn, name: str) -> None:
    """Operators that only autograd knows cannot be transformed, and an error there leaves functorch's levels behind."""
    program, inputs, outcome = TRANSFORMS[name](layer), tensors(*SHAPES), Outcome()
    expected = program(*inputs)
    made = torch.compile(program, backend=rewriting(outcome, ROUTES[1], family=ALL))(*inputs)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert outcome.sites and not outcome.matched
    assert "torch.func" in outcome.reasons


def test_what_stands_behind_a_transform_is_found() -> None:
    def program(*inputs: Tensor) -> Tensor:
        return gated(torch.func.grad(lambda x: x.sin().sum())(inputs[0]), *inputs[1:])

    outcome, inputs = Outcome(), tensors(*SHAPES)
    made = torch.compile(program, backend=rewriting(outcome, ROUTES[0], family=ALL))(*inputs)
    torch.testing.assert_close(made, program(*inputs), rtol=1e-4, atol=1e-5)
    assert [site.route for site in outcome.sites] == ["triton"]
