"""A gated MLP's backward whose product takes the place of the product's gradient."""

from __future__ import annotations

import pytest
import torch
from gated_cases import Case, gradients, inputs, key_of
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from xfcompile.kernels.gated_mlp import gated_mlp_down


@pytest.mark.parametrize("layout", ["separate", "up first", "gate even"])
@pytest.mark.parametrize("memory", ["usual", "transposed"])
def test_in_place_as_anew(layout: str, memory: str, interpreter: None) -> None:
    gradients(Case(layout=layout, memory=memory))  # type: ignore[arg-type]


def test_in_place_as_anew_by_the_definition() -> None:
    gradients(Case(rows=3))


def test_a_second_derivative_with_the_linear_after_it_is_refused() -> None:
    given = inputs(Case(rows=3))
    x, down = given.x.clone().requires_grad_(), torch.randn(6, 45, requires_grad=True)
    about = (key_of("silu"), "separate", "dual", True, torch.float32)
    out = gated_mlp_down(x, *given.weights, None, None, down, None, *about)[0]
    (first, _) = torch.autograd.grad(out.square().sum(), (x, down), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first.sum(), x)


def test_the_product_takes_the_place_of_its_gradient_in_compiled_code() -> None:
    """No copy is made of it, and none of its values is used after."""

    def step(x: Tensor, w: Tensor, v: Tensor, down: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, w, v, down)]
        out = gated_mlp_down(*leaves[:3], None, None, leaves[3], None, *about)[0]
        return [*torch.autograd.grad(out.square().sum(), leaves)]

    given = inputs(Case(rows=20))
    about = (key_of("silu"), "separate", "dual", True, torch.float32)
    down = torch.randn(6, 45) / 7
    x = (given.x, *(w for w in given.weights if w is not None), down)
    found, codes = run_and_get_code(torch.compile(step), *x)
    code = "\n".join(codes)
    assert "gated_mlp_backward_" in code
    assert not any(word in code for word in ("copy_", "clone"))
    for mine, theirs in zip(found, step(*x), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_opcheck_of_the_backward_in_place() -> None:
    arguments = (torch.randn(3, 45), torch.randn(3, 90), key_of("silu"), "separate")
    torch.library.opcheck(torch.ops.xfcompile.gated_mlp_backward_.default, arguments)
