"""Regions of a program: modes of torch that hold from one node of a graph to another, and what is done inside."""

# ruff: noqa: E501 (one line a program, so that the table can be read as one)

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
    assert not outcome.matched, outcome.sites


# -- gradients on and off ------------------------------------------------------------------------------------------


def off(made: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return made(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


# What one tensor is made into is made twice, with a gradient and without: x, w, v, b, r -> a tensor.
TWICE: dict[str, Fn] = {
    "a weight": lambda x, w, v, b, r: off(torch.exp, w).sum() + F.gelu(F.linear(x, w.exp(), b)),
    "an input": lambda x, w, v, b, r: off(torch.exp, x).sum() + F.gelu(F.linear(x.exp(), w, b)),
    "a residual": lambda x, w, v, b, r: off(torch.exp, r).sum() + F.gelu(F.linear(x, w)) + r.exp(),
    "a scale": lambda x, w, v, b, r: off(torch.exp, b).sum() + F.gelu(F.linear(x, w)) * b.exp() + r,
    "a scale that has none": lambda x, w, v, b, r: b.exp().sum() + F.gelu(F.linear(x, w)) * off(torch.exp, b) + r,
    "a residual that has none": lambda x, w, v, b, r: r.exp().sum() + F.gelu(F.linear(x, w)) + off(torch.exp, r),
    "a view that has none": lambda x, w, v, b, r: F.gelu(x @ off(Tensor.t, w) + b) + off(lambda r: r.view(2, 5, 16), r),
    "a gate's input": lambda x, w, v, b, r: off(torch.exp, x).sum() + F.silu(F.linear(x.exp(), w)) * F.linear(x.exp(), v),
    "a gate's weight": lambda x, w, v, b, r: off(torch.sin, w).sum() + F.silu(F.linear(x, w.sin())) * F.linear(x, v),
    "a gate's weight that has none": lambda x, w, v, b, r: w.sin().sum() + F.silu(F.linear(x, off(torch.sin, w))) * F.linear(x, v),
    "a gate's view that has none": lambda x, w, v, b, r: F.silu(x @ off(Tensor.t, w)) * (x @ v.t()),
    "queries": lambda x, w, v, b, r: off(torch.sin, r).sum() + attention(r.sin(), r, r),
    "values": lambda x, w, v, b, r: off(torch.sin, r).sum() + attention(r, r, r.sin()),
    "keys that have none": lambda x, w, v, b, r: r.sin().sum() + attention(r, off(torch.sin, r), r),
    "written to outside": lambda x, w, v, b, r: (lambda y: F.gelu(F.linear(x, w, b)) + y.mul_(r) + y)(off(torch.exp, r)),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("routes", ROUTES, ids=["triton", "other"])
def test_an_operand_has_a_gradient_where_the_program_gives_it_one(name: str, routes: dict[str, str]) -> None:
    """The two hold the same numbers."""
    outcome = check(TWICE[name], *tensors(*SHAPES, grad=True), grad=True, routes=routes, family=ALL)
    assert [site.family for site in outcome.matched], outcome.sites


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


@pytest.mark.parametrize("route", ["triton", "sdpa", "inductor"])
def test_a_mask_of_tensors_that_only_a_transform_has_is_made_as_it_was(route: str) -> None:
    """T5Gemma2's merged masks: what stands for a sequence in `torch.vmap` is no tensor outside of it."""

    def masked(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        def keep(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            numbers = documents[b].cumsum(0)
            return (numbers[i] == numbers[j]) & (j <= i)

        b, i = torch.arange(documents.shape[0]), torch.arange(documents.shape[1])
        mask = torch.vmap(torch.vmap(torch.vmap(keep, (None, None, 0)), (None, 0, None)), (0, None, None))(b, i, i)
        scores = (q @ k.mT * 0.25).masked_fill(~mask[:, None], torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v

    documents = torch.randint(0, 2, (2, 24), generator=torch.Generator().manual_seed(1))
    inputs, outcome = [*tensors(*3 * [(2, 2, 24, 16)]), documents], Outcome()
    made = torch.compile(masked, backend=rewriting(outcome, {"attention": route}, family=ALL))(*inputs)
    torch.testing.assert_close(made, masked(*inputs), rtol=1e-4, atol=1e-5)
    assert [site.route for site in outcome.sites] in (["inductor"], [None])
