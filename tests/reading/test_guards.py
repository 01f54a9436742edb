"""Near misses of single guards (`tests/mutation`): programs that a guard less might match, and that equal eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import ALL, Outcome, check, rewriting, tensors

Q, K, V = (2, 3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8)
I, J = torch.arange(4)[:, None], torch.arange(4)


def attended(mask: Callable[..., Any]) -> Callable[..., Any]:
    """An attention of the keys that a mask keeps."""

    def program(q: Any, k: Any, v: Any, *m: Any) -> Any:
        return (q @ k.mT).masked_fill(~mask(*m), float("-inf")).softmax(-1) @ v

    return program


def mean_for_a_sum(q: Any, k: Any, v: Any) -> Any:
    e = (q @ k.mT).exp()
    return (e / e.mean(-1, keepdim=True)) @ v


def bias_from_behind(x: Any, w: Any, u: Any, b: Any) -> Any:
    return F.silu(F.linear(x, w) + b.flip(0)) * F.linear(x, u)


def bias_every_second(x: Any, w: Any, u: Any, b: Any) -> Any:
    return F.silu(F.linear(x, w) + b[..., None].expand(8, 2).reshape(16)[::2].flip(0)) * F.linear(x, u)


def rows_in_another_order(x: Any, w: Any, b: Any) -> Any:
    return torch.tanh(F.gelu(F.linear(x, w, b)).transpose(0, 1))


def features_in_the_rows(x: Any, w: Any, b: Any) -> Any:
    return F.gelu(F.linear(x, w).mT + b)


def seen_in_two_orders(x: Any, w: Any, b: Any) -> Any:
    h = F.linear(x, w, b)
    return F.gelu(h.transpose(0, 1)) + h


def seen_in_two_orders_of_rows(x: Any, w: Any, b: Any) -> Any:
    h = F.linear(x, w)
    return torch.tanh(h.transpose(0, 1) + b) * F.gelu(h)


def features_split(x: Any, w: Any, b: Any, r: Any) -> Any:
    return F.gelu(F.linear(x, w, b)).reshape(4, 4, 2, 2) * r


def a_bias_of_two_axes(y: Any, b: Any) -> Any:
    return F.gelu(y.sin() + b)


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "a mean is no sum": (mean_for_a_sum, (Q, K, V)),
    "divided by a negative number": (attended(lambda: (J - I) // -2 >= 0), (Q, K, V)),
    "divided by a fraction": (attended(lambda: J.float() // 1.5 <= I), (Q, K, V)),
    "the rest of a negative divisor": (attended(lambda: ((J - I) % -3 == -1) | (I == J)), (Q, K, V)),
    "the rest of a fraction": (attended(lambda: (J % 1.5 == 0) | (I == J)), (Q, K, V)),
    "sums of indices": (attended(lambda: (J + 1).cumsum(0) <= 3 * I + 1), (Q, K, V)),
    "steps of a fraction": (attended(lambda: torch.arange(0, 2, 0.5) <= I), (Q, K, V)),
    "a bias from behind": (bias_from_behind, ((5, 8), (8, 8), (8, 8), (8,))),
    "a bias, repeated, from behind": (bias_every_second, ((5, 8), (8, 8), (8, 8), (8,))),
    "rows in another order after an activation": (rows_in_another_order, ((4, 4, 4), (4, 4), (4,))),
    "features in the rows": (features_in_the_rows, ((4, 4, 4), (4, 4), (4,))),
    "a projection in two orders": (seen_in_two_orders, ((4, 4, 4), (4, 4), (4,))),
    "a projection in two orders of rows": (seen_in_two_orders_of_rows, ((4, 4, 4), (4, 4), (4,))),
    "features that are split": (features_split, ((4, 4, 4), (4, 4), (4,), (2,))),
    "a bias of two axes": (a_bias_of_two_axes, ((4, 4), (4, 4))),
    "a bias of more axes than what it is added to": (a_bias_of_two_axes, ((8,), (1, 8))),
    "a bias that is broadcast over rows": (a_bias_of_two_axes, ((1, 8), (5, 8))),
}


@pytest.fixture(params=[None, "triton"])
def routes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str] | None:
    """Those of a CPU, and our kernels."""
    if request.param is None:
        return None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return dict.fromkeys(("attention", "gated_mlp", "bias-act-dropout"), request.param)


@pytest.mark.parametrize("name", PROGRAMS)
def test_is_equal_to_eager(name: str, routes: dict[str, str] | None) -> None:
    program, shapes = PROGRAMS[name]
    check(program, *tensors(*shapes, grad=True), grad=True, routes=routes, family=ALL)


def test_what_is_not_below_a_number_may_be_nan(routes: dict[str, str] | None) -> None:
    q, k, v, m = tensors(Q, K, V, (4, 4))
    m = m.masked_fill(torch.eye(4, dtype=torch.bool), 1.0).index_fill(1, torch.tensor([2]), float("nan"))
    check(attended(lambda m: ~(m < 0.5)), q, k, v, m, routes=routes, family=ALL)


def test_an_input_that_is_activated_in_place_is_changed(routes: dict[str, str] | None) -> None:
    def program(y: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.silu(y.add_(b), inplace=True) * 1.0

    eager, compiled = (tensors((4, 8), (8,)) for _ in range(2))
    torch._dynamo.reset()
    fn = torch.compile(program, backend=rewriting(Outcome(), routes, True, ALL))
    torch.testing.assert_close(fn(*compiled), program(*eager))
    torch.testing.assert_close(compiled[0], eager[0])
