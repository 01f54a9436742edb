"""One node traced alone: what its trace must consist of to be read, and what is read of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.out_dtype import out_dtype
from torch.utils import _pytree as pytree

from xfcompile.trace import Program, static_mode, trace


def traced(fn: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Program | None:
    with static_mode():
        flat, spec = pytree.tree_flatten(((torch.empty(4, 4, dtype=dtype), torch.empty(4, 4, dtype=dtype)), {}))
    return trace(fn, flat, spec)


def without_gradient(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return x @ y


def under_autocast(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ y


def of_bodies(x: Tensor, y: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda z: z + 1, lambda z: z - 1, (y,))


@pytest.mark.parametrize("fn", [without_gradient, under_autocast, of_bodies], ids=lambda f: f.__name__)
def test_what_sets_modes_or_calls_bodies_is_not_read(fn: Callable[..., Any]) -> None:
    assert traced(lambda x, y: x @ y) is not None
    assert traced(fn) is None


def test_higher_order_operations_are_not_read() -> None:
    assert traced(lambda x, y: out_dtype(torch.ops.aten.mm.default, torch.int32, x, y), torch.int8) is None


def test_a_tensor_of_one_element_is_a_constant_unless_it_is_fake() -> None:
    with static_mode():
        fake = torch.ones(1)
    real = torch.full((1,), 3.0)
    program = traced(lambda x, y: x * real)
    assert program is not None and program.calls[0].args["other"].value == 3.0
    assert traced(lambda x, y: x * fake) is None


def test_a_call_without_a_result_is_one_still() -> None:
    program = traced(lambda x, y: torch._assert_async((x > 0).all()))
    assert program is not None
    assert [call.outputs for call in program.calls[-1:]] == [(None,)]


def test_lists_among_results_are_not_read() -> None:
    with torch.library._scoped_library("xfcompile_tests", "FRAGMENT") as library:
        library.define("parts(Tensor x) -> (Tensor, Tensor[])")
        library.impl("parts", lambda x: (x + 1, [x + 2, x + 3]), "CompositeExplicitAutograd")
        assert traced(lambda x, y: torch.ops.xfcompile_tests.parts(x)[1][0]) is None
