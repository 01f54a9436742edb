"""A body that stands in a graph once and is called several times (`nested_compile_region`) has no single meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import check, tensors
from torch import Tensor

SHAPE = (2, 3, 4, 8)


@torch.compiler.nested_compile_region
def layer(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).masked_fill(masked, float("-inf")).softmax(-1) @ v


@torch.compiler.nested_compile_region
def layer_of_a_layer(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return layer(q, k, v * 2, masked) + 1


def positions() -> tuple[Tensor, Tensor]:
    i = torch.arange(SHAPE[-2])
    return i[:, None], i


def two_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    return layer(q, k, v, i < j) + 2 * layer(q, k, v, i > j)


def a_body_in_a_body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    return layer_of_a_layer(q, k, v, i < j) + 2 * layer_of_a_layer(q, k, v, i > j)


def with_a_body_in_it(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    return layer_of_a_layer(q, k, v, i < j) + 2 * layer(q, k, v, i > j)


@pytest.mark.parametrize("program", [two_masks, a_body_in_a_body, with_a_body_in_it], ids=lambda f: f.__name__)
def test_what_one_call_passes_is_not_taken_for_what_all_do(program: Callable[..., Any]) -> None:
    inputs = tensors(SHAPE, SHAPE, SHAPE)
    try:
        torch.compile(program, backend="aot_eager")(*inputs)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # torch 2.11, of a body with one in it beside another
        pytest.skip(f"torch does not compile it: {error}")
    outcome = check(program, *inputs, family="attention")
    assert "causal" not in [site.mask for site in outcome.matched]
    assert {site.route for site in outcome.matched} == {"sdpa"}


def test_a_body_that_is_called_once_knows_what_it_is_given() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = positions()
        return layer(q, k, v, i < j)

    outcome = check(program, *tensors(SHAPE, SHAPE, SHAPE), family="attention")
    assert [(site.route, site.mask) for site in outcome.matched] == [("sdpa", "causal")]


@torch.compiler.nested_compile_region
def a_whole_layer(x: Tensor, w: Tensor, b: Tensor, out: Tensor, c: Tensor) -> Tensor:
    made = F.multi_head_attention_forward(
        x, x, x, 8, 2, w, b, None, None, False, 0.0, out, c, training=False, need_weights=False
    )
    return made[0]


def test_a_call_that_holds_an_attention_is_spelled_out_once() -> None:
    def program(x: Tensor, w: Tensor, b: Tensor, out: Tensor, c: Tensor) -> Tensor:
        return a_whole_layer(x * 2, w, b, out, c) + a_whole_layer(x, w, b, out, c)

    outcome = check(program, *tensors((5, 2, 8), (24, 8), (24,), (8, 8), (8,)), family="attention")
    assert [site.route for site in outcome.matched] == ["sdpa"]
