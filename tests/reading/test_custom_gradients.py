"""What a `torch.autograd.Function` computes is read where it is one result and nothing else; elsewhere it is opaque."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from xfcompile.read import Reading

Forward = Callable[..., Any]
OUTSIDE = torch.ones(4, 4)


def saving(forward: Callable[..., Tensor], saved: Callable[..., Any]) -> Forward:
    def both(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(saved(*args))
        return forward(*args)

    return both


def keeping(ctx: Any, x: Tensor, n: int) -> Tensor:
    ctx.n = n
    return x * n


def written(ctx: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1).add_(1)
    return y


def sine(ctx: Any, x: Tensor) -> Tensor:
    return x.sin()


def same(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def saved_times(ctx: Any, grad: Tensor) -> Tensor:
    (saved,) = ctx.saved_tensors
    return grad * saved


def alone(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    return (x,)


def both(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    return x, y


Function = tuple[Forward, Forward, Callable[[Tensor, Tensor], tuple[Any, ...]]]
"""A forward, a backward, and what is passed."""

READ: dict[str, Function] = {
    "one result": (saving(torch.sin, torch.cos), saved_times, alone),
    "one result in a tuple": (lambda ctx, x: (x.sin(),), same, alone),
    "two tensors": (lambda ctx, x, y: x * y, lambda ctx, grad: (grad, grad.cos()), both),
    "a constant factor": (keeping, lambda ctx, grad: (grad * ctx.n, None), lambda x, y: (x, 2.5)),
}
OPAQUE: dict[str, Function] = {
    "two results": (lambda ctx, x: (x.sin(), x.cos()), lambda ctx, a, b: a + b, alone),
    "a size": (keeping, lambda ctx, grad: (grad * ctx.n, None), lambda x, y: (x, x.shape[0])),
    "a size kept for the backward": (
        saving(torch.sin, torch.cos), lambda ctx, grad: grad * ctx.saved_tensors[0].shape[0], alone,
    ),
    "a mask without a gradient": (
        saving(torch.mul, lambda x, m: m), lambda ctx, grad: (saved_times(ctx, grad), None), lambda x, y: (x, y > 0),
    ),
    "no gradient": (sine, lambda ctx, grad: None, alone),
    "a number for a gradient": (sine, lambda ctx, grad: 2.0, alone),
    "a write": (written, same, alone),
    "a write to the gradient": (sine, lambda ctx, grad: grad.mul_(2), alone),
    "dropout": (lambda ctx, x: F.dropout(x, 0.5, True), same, alone),
    "dropout of the gradient": (sine, lambda ctx, grad: F.dropout(grad, 0.5, True), alone),
    "autocast": (lambda ctx, x: cast(x), same, alone),
    "an input that is given back": (lambda ctx, x, y: x, lambda ctx, grad: (grad, None), both),
    "a tensor from outside in the forward": (lambda ctx, x: x * OUTSIDE, same, alone),
    "a tensor from outside in the backward": (sine, lambda ctx, grad: grad * OUTSIDE, alone),
}  # fmt: skip


def cast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x


def captured(given: Function, dynamic: bool) -> fx.GraphModule:
    forward, backward, passed = given
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type("Given", (torch.autograd.Function,), methods)
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm

    def program(x: Tensor, y: Tensor) -> Tensor:
        made = function.apply(*passed(x, y))
        return (made[0] if isinstance(made, tuple) else made) * 1

    torch._dynamo.reset()
    torch.compile(program, backend=backend, fullgraph=True, dynamic=dynamic)(
        *(torch.randn(4, 4, requires_grad=True) for _ in range(2))
    )
    return found[0]


@pytest.mark.parametrize("name", READ)
def test_one_result_is_read(name: str) -> None:
    assert "custom_gradient" in {value.op for value in Reading(captured(READ[name], False)).steps}


@pytest.mark.parametrize("name", OPAQUE)
def test_anything_else_is_opaque(name: str) -> None:
    reading = Reading(captured(OPAQUE[name], "size" in name))
    assert reading.steps
    assert "custom_gradient" not in {value.op for value in reading.steps}


def test_other_versions_of_torch_give_a_backward_a_context() -> None:
    gm = captured(READ["one result"], False)
    graph = gm.bwd_body_0.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("ctx")
    assert "custom_gradient" not in {value.op for value in Reading(gm).steps}


def test_other_versions_of_torch_return_no_two_tuples() -> None:
    gm = captured(READ["one result in a tuple"], False)
    (output,) = gm.fwd_body_0.graph.find_nodes(op="output")
    ((result,), saved) = output.args[0]
    output.args = ((result, saved),)
    assert "custom_gradient" not in {value.op for value in Reading(gm).steps}


def test_other_versions_of_torch_have_no_gradients_of_what_is_captured() -> None:
    gm = captured(READ["two tensors"], False)
    (output,) = gm.bwd_body_0.graph.find_nodes(op="output")
    output.args = (output.args[0][:1],)
    assert "custom_gradient" not in {value.op for value in Reading(gm).steps}
