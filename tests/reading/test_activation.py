"""The vocabulary of activations: what it has no word for is refused, and left alone where a program says it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from equivalence import ALL, check, tensors
from torch import Tensor

from xfcompile import activation
from xfcompile.activation import GATE, UP, X
from xfcompile.site import Miss

NO_WORDS: dict[str, Callable[[], sympy.Expr]] = {
    "gelu by another approximation": lambda: activation.gelu(X, "sigmoid"),
    "an upside-down clamp": lambda: activation.clamp(X, 1, -1),
    "an upside-down hardtanh": lambda: activation.hardtanh(X, 1, -1),
    "celu of nothing": lambda: activation.celu(X, 0),
    "softplus of nothing": lambda: activation.softplus(X, 0, 20),
    "softplus that soon is its argument": lambda: activation.softplus(X, 1, 15),
    "divided by nothing": lambda: activation.quotient(X, sympy.S.Zero),
    "divided by infinity": lambda: activation.quotient(X, sympy.oo),
    "divided by a function": lambda: activation.quotient(X, X + 2),
    "a power that is no product": lambda: activation.power(X, 0.5),
}


@pytest.mark.parametrize("name", NO_WORDS)
def test_what_has_no_word_is_refused(name: str) -> None:
    with pytest.raises(Miss):
        NO_WORDS[name]()


ACTIVATED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "softplus": (lambda h: F.softplus(h), True),
    "softplus that soon is its argument": (lambda h: F.softplus(h, threshold=0.5), False),
    "softplus of nothing": (lambda h: F.softplus(h, beta=0.0), False),
    "hardtanh": (lambda h: torch.ops.aten.hardtanh(h, -1.0, 1.0), True),
    "an upside-down hardtanh": (lambda h: torch.ops.aten.hardtanh(h, 1.0, -1.0), False),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_an_activation_is_matched_where_it_has_a_word_and_equal_to_eager(name: str) -> None:
    act, known = ACTIVATED[name]
    inputs = tensors((4, 8), (16, 8), (16,), grad=True)
    routes = {"bias-act-dropout": "triton"}

    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return act(F.linear(x, w, b))

    try:
        torch.compile(program, backend="eager")(*inputs)
    except torch._dynamo.exc.TorchRuntimeError as error:  # torch 2.11, of bounds the other way round
        pytest.skip(f"torch does not trace it: {error}")
    outcome = check(program, *inputs, grad=True, routes=routes, family=ALL)
    assert bool(outcome.matched) == known, outcome.sites


@pytest.mark.parametrize(
    "formula",
    [
        activation.silu(GATE) * (UP + 1),
        activation.silu(GATE) * (UP + GATE),
        GATE * sympy.tanh(GATE * UP),
        2 * GATE,
    ],
    ids=str,
)
def test_a_product_is_taken_apart_where_up_stands_without_the_gate(formula: sympy.Expr) -> None:
    apart = activation.separate(formula)
    assert (apart is not None) == (not any(GATE in f.free_symbols for f in formula.args if UP in f.free_symbols))
    if apart is not None:
        assert sympy.expand(apart[0] * apart[1] - formula) == 0
        assert UP not in apart[0].free_symbols and GATE not in apart[1].free_symbols
