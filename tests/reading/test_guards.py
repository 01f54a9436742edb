"""Near misses of single guards (`tests/mutation`): programs that a guard less might match, and that equal eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from equivalence import ALL, Outcome, check, rewriting, tensors

from xfcompile.activation import X, with_distributions

Q, K, V = (2, 3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8)
LONG = ((1, 1, 70, 8),) * 3
"""Several tiles in both directions."""


def attended(mask: Callable[..., Any]) -> Callable[..., Any]:
    """An attention of the keys that a mask of positions keeps, which are made where they can be read."""

    def program(q: Any, k: Any, v: Any, *m: Any) -> Any:
        i = torch.arange(q.shape[-2])
        return (q @ k.mT).masked_fill(~mask(i[:, None], i, *m), float("-inf")).softmax(-1) @ v

    return program


def scored(score: Callable[..., Any]) -> Callable[..., Any]:
    """An attention with something done to its scores."""

    def program(q: Any, k: Any, v: Any, *m: Any) -> Any:
        i = torch.arange(q.shape[-2])
        return score(q @ k.mT, i[:, None], i, *m).softmax(-1) @ v

    return program


def two_fills(q: Any, k: Any, v: Any, m: Any, n: Any) -> Any:
    """Rows that see no key get a mean of some keys, of all, or NaN."""
    scores = (q @ k.mT).masked_fill(m > 0.5, float("-inf")).masked_fill(n > 0.5, -1e30)
    return scores.softmax(-1) @ v


def keys_of_each_query(q: Any, k: Any, v: Any) -> Any:
    return torch.einsum("bhid,bhijd->bhij", q, k).softmax(-1) @ v


def experts_before_one_linear(x: Any, w: Any, u: Any, d: Any) -> Any:
    return F.linear(F.silu(x @ w.mT) * (x @ u.mT), d)


def a_product_that_goes_on_in_fp64(x: Any, w: Any, u: Any, d: Any) -> Any:
    return F.linear((F.silu(F.linear(x, w)) * F.linear(x, u)).double(), d.double())


def a_bias_with_gaps(x: Any, w: Any, u: Any, b: Any) -> Any:
    return F.silu(F.linear(x, w) + b[::3]) * F.linear(x, u)


def one_row_of_biases(x: Any, w: Any, u: Any, b: Any) -> Any:
    return F.silu(F.linear(x, w) + b[1]) * F.linear(x, u)


def a_gate_to_a_power(x: Any, w: Any, u: Any, b: Any) -> Any:
    return F.silu(F.linear(x, w)) * F.linear(x, u).abs() ** b


def a_weight_of_one_dimension(x: Any, w: Any) -> Any:
    return F.gelu(F.linear(x, w))


def a_product_without_an_axis(x: Any, w: Any) -> Any:
    return F.gelu(x @ w)


def moved_twice(x: Any, w: Any, b: Any) -> Any:
    return torch.tanh(F.linear(x, w, b).transpose(0, 1).transpose(0, 1).transpose(0, 1))


def features_in_the_rows_scaled(x: Any, w: Any, c: Any) -> Any:
    return F.gelu(F.linear(x, w).mT * c)


def features_split_and_scaled(x: Any, w: Any, c: Any) -> Any:
    return F.gelu(F.linear(x, w).reshape(4, 5, 2, 4) * c)


def seen_in_two_orders_and_dtypes(x: Any, w: Any) -> Any:
    h = F.linear(x.half(), w.half())
    return F.gelu(h.float().transpose(0, 1)) + h


def dropped_out_altogether(q: Any, k: Any, v: Any) -> Any:
    return F.dropout((q @ k.mT).softmax(-1), 1.0) @ v


def probability(x: Any) -> Any:
    """With a normal distribution that is spelt out, and one that is not."""
    return 0.5 * x * (2 + torch.erf(x / 2**0.5))


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


def halves(q: Any, k: Any, v: Any) -> Any:
    return ((q @ k.mT).exp() / 2.0) @ v


def queries_of_each_key(q: Any, k: Any, v: Any) -> Any:
    return torch.einsum("bhijd,bhjd->bhij", q, k).softmax(-1) @ v


def one_and_erf_and_more(x: Any, w: Any) -> Any:
    h = F.linear(x, w)
    return torch.erf(h) + torch.tanh(h) + 1


def a_bias_of_two_axes(y: Any, b: Any) -> Any:
    return F.gelu(y.sin() + b)


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "a number is no sum": (halves, (Q, K, V)),
    "queries of each key": (queries_of_each_key, ((2, 3, 4, 4, 8), K, V)),
    "a mean is no sum": (mean_for_a_sum, (Q, K, V)),
    "divided by a negative number": (attended(lambda i, j: (j - i) // -2 >= 0), (Q, K, V)),
    "divided by a fraction": (attended(lambda i, j: j.float() // 1.5 <= i), (Q, K, V)),
    "the rest of a negative divisor": (attended(lambda i, j: ((j - i) % -3 == -1) | (i == j)), (Q, K, V)),
    "the rest of a fraction": (attended(lambda i, j: (j % 1.5 == 0) | (i == j)), (Q, K, V)),
    "sums of indices": (attended(lambda i, j: (j + 1).cumsum(0) <= 3 * i + 1), (Q, K, V)),
    "steps of a fraction": (attended(lambda i, j: torch.arange(0, 2, 0.5) <= i), (Q, K, V)),
    "every second key before a query": (attended(lambda i, j: 2 * j <= i), LONG),
    "keys from half of a query on": (attended(lambda i, j: 2 * j >= i), LONG),
    "keys near twice a query": (attended(lambda i, j: ((2 * j - i).abs() < 5) | (i == j)), LONG),
    "keys near half of a query": (attended(lambda i, j: (2 * j - i).abs() < 5), LONG),
    "keys that mirror queries": (attended(lambda i, j: (i + j - 69).abs() < 5), LONG),
    "a number that may win": (scored(lambda s, i, j: s.masked_fill(i < j, 3.0)), (Q, K, V)),
    "a mask times infinity": (scored(lambda s, i, j: s + (j > i).float() * float("-inf")), (Q, K, V)),
    "a bias that is padded": (scored(lambda s, i, j, b: s + F.pad(b, (1, 0))), (Q, K, V, (4, 3))),
    "a detached maximum of something else": (
        scored(lambda s, i, j, b: s + b - b.amax(-2, keepdim=True).detach()),
        (Q, K, V, (4, 4)),
    ),
    "a maximum over queries": (scored(lambda s, i, j: s - s.amax(-2, keepdim=True)), (Q, K, V)),
    "no multiple of the scores": (scored(lambda s, i, j: s + 0.3 * s.abs()), (Q, K, V)),
    "an added mask of rows without keys": (
        scored(lambda s, i, j, m: s + torch.where(m > 0.9, 0.0, -1e9)),
        (Q, K, V, (4, 4)),
    ),
    "the least number, added to rows without keys": (
        scored(lambda s, i, j, m: s + torch.where(m > 0.9, 0.0, torch.finfo(torch.float32).min)),
        (Q, K, V, (4, 4)),
    ),
    "two added masks of rows without keys": (
        scored(lambda s, i, j, m: s + torch.where(m > 0.9, 0.0, -1e9) + torch.where(i >= j, 0.0, -1e9)),
        (Q, K, V, (4, 4)),
    ),
    "a mask and a bias that may hide it": (
        scored(lambda s, i, j, m, b: (s + 1e9 * b.detach()).masked_fill(m < 0.9, -1e9)),
        (Q, K, V, (4, 4), (4, 4)),
    ),
    "queries times nothing": (lambda q, k, v: ((q * 0.0) @ k.mT).softmax(-1) @ v, (Q, K, V)),
    "weights that are dropped out altogether": (dropped_out_altogether, (Q, K, V)),
    "masks whose fills do not agree": (two_fills, (Q, K, V, (4, 4), (4, 4))),
    "keys of each query": (keys_of_each_query, (Q, (2, 3, 4, 4, 8), V)),
    "experts before one linear": (experts_before_one_linear, ((3, 5, 8), (3, 16, 8), (3, 16, 8), (8, 16))),
    "a product that goes on in fp64": (a_product_that_goes_on_in_fp64, ((5, 8), (16, 8), (16, 8), (8, 16))),
    "a bias with gaps": (a_bias_with_gaps, ((5, 8), (8, 8), (8, 8), (24,))),
    "one row of biases": (one_row_of_biases, ((5, 8), (8, 8), (8, 8), (3, 8))),
    "a gate to a power": (a_gate_to_a_power, ((5, 8), (8, 8), (8, 8), (8,))),
    "a weight of one dimension": (a_weight_of_one_dimension, ((4, 5, 8), (8,))),
    "a product without rows": (a_product_without_an_axis, ((8,), (8, 5))),
    "a product of one feature": (a_product_without_an_axis, ((5, 8), (8, 1))),
    "features in the rows, scaled": (features_in_the_rows_scaled, ((4, 5, 3), (8, 3), (1,))),
    "features that are split and scaled": (features_split_and_scaled, ((4, 5, 3), (8, 3), (1,))),
    "a projection in two orders and two dtypes": (seen_in_two_orders_and_dtypes, ((4, 4, 4), (4, 4))),
    "rows that are moved twice": (moved_twice, ((4, 5, 4), (4, 4), (4,))),
    "a column and a bias": (a_bias_of_two_axes, ((5, 1), (8,))),
    "nearly a normal distribution": (lambda x, w, b: probability(F.linear(x, w, b)), ((5, 8), (8, 8), (8,))),
    "a bias from behind": (bias_from_behind, ((5, 8), (8, 8), (8, 8), (8,))),
    "a bias, repeated, from behind": (bias_every_second, ((5, 8), (8, 8), (8, 8), (8,))),
    "rows in another order after an activation": (rows_in_another_order, ((4, 4, 4), (4, 4), (4,))),
    "features in the rows": (features_in_the_rows, ((4, 4, 4), (4, 4), (4,))),
    "more features in the rows": (features_in_the_rows, ((4, 5, 3), (8, 3), (5,))),
    "a projection in two orders": (seen_in_two_orders, ((4, 4, 4), (4, 4), (4,))),
    "a projection in two orders of rows": (seen_in_two_orders_of_rows, ((4, 4, 4), (4, 4), (4,))),
    "features that are split": (features_split, ((4, 4, 4), (4, 4), (4,), (2,))),
    "one, erf and something else": (one_and_erf_and_more, ((5, 8), (8, 8))),
    "a bias of two axes": (a_bias_of_two_axes, ((4, 4), (4, 4))),
    "a bias of more axes than what it is added to": (a_bias_of_two_axes, ((8,), (1, 8))),
    "a bias that is broadcast over rows": (a_bias_of_two_axes, ((1, 8), (5, 8))),
}


@pytest.fixture(params=[None, "triton"])
def routes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str] | None:
    """Those of a CPU, and our kernels; "epilogue": the one that multiplies too."""
    if request.param is None:
        return None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": request.param}


def attends(shapes: tuple[tuple[int, ...], ...]) -> bool:
    return len(shapes[0]) >= 4


RUNS = [
    (name, route)
    for name, (_, shapes) in PROGRAMS.items()
    for route in ((None, "triton") if attends(shapes) else ("triton", "epilogue"))
]


@pytest.mark.parametrize("name, routes", RUNS, indirect=["routes"])
def test_is_equal_to_eager(name: str, routes: dict[str, str] | None) -> None:
    program, shapes = PROGRAMS[name]
    check(program, *tensors(*shapes, grad=True), grad=True, routes=routes, family=ALL)


@pytest.mark.parametrize(
    "formula", [sympy.Max(1, sympy.erf(X)), sympy.Lt(1, sympy.erf(X)), 1 + sympy.erf(X) + sympy.tanh(X)], ids=str
)
def test_only_a_sum_of_one_and_erf_is_twice_a_normal_distribution(formula: sympy.Expr) -> None:
    assert formula.args[0] == 1 and isinstance(formula.args[1], sympy.erf), "no near miss"
    assert with_distributions(formula) == formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_added_tensor_is_coarse_in_fp16_alone(dtype: torch.dtype) -> None:
    """In others a mask is taken to hold the least number, or -inf, beside which nothing is left."""

    def program(q: Any, k: Any, v: Any, m: Any) -> Any:
        return (q @ k.mT + m).softmax(-1) @ v

    outcome = check(program, *tensors(Q, K, V, (4, 4), dtype=dtype), family=ALL)
    assert [s.route for s in outcome.matched] == ["sdpa"]


def test_our_kernel_has_no_gradient_of_rows_that_may_see_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is data may be so low that masked keys are as high."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def program(q: Any, k: Any, v: Any, m: Any) -> Any:
        masked = torch.ones(4, 4, dtype=torch.bool).triu(1)
        return (q @ k.mT + m).masked_fill(masked, torch.finfo(torch.float32).min).softmax(-1) @ v

    far = torch.zeros(4, 4).index_fill(0, torch.tensor([2]), torch.finfo(torch.float32).min)
    inputs = [*tensors(Q, K, V, grad=True), far]
    outcome = check(program, *inputs, grad=True, routes={"attention": "triton"}, family="attention")
    assert [s.route for s in outcome.matched] == ["inductor"]
    assert "whose gradients no fused kernel has" in str(outcome.matched[0].reason)


@pytest.mark.parametrize("route, taken", [("triton", "triton"), ("epilogue", "inductor")])
def test_a_product_that_is_needed_is_not_multiplied_twice(
    route: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def program(x: Any, w: Any) -> Any:
        h = F.linear(x, w)
        return F.gelu(h), h

    outcome = check(program, *tensors((5, 8), (8, 8)), routes={"bias-act-dropout": route}, family=ALL)
    assert [s.route for s in outcome.matched] == [taken]


def test_what_is_not_below_a_number_may_be_nan(routes: dict[str, str] | None) -> None:
    q, k, v, m = tensors(Q, K, V, (4, 4))
    m = m.masked_fill(torch.eye(4, dtype=torch.bool), 1.0).index_fill(1, torch.tensor([2]), float("nan"))
    check(attended(lambda i, j, m: ~(m < 0.5)), q, k, v, m, routes=routes, family=ALL)


def test_queries_times_infinity_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """By our kernel. SDPA's own on CPUs has 0 for a row of NaN, whoever calls it (torch 2.13)."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def program(q: Any, k: Any, v: Any) -> Any:
        return ((q * float("inf")) @ k.mT).softmax(-1) @ v

    check(program, *tensors(Q, K, V, grad=True), grad=True, routes={"attention": "triton"}, family="attention")


def test_operands_are_read_after_they_are_rounded(routes: dict[str, str] | None) -> None:
    def program(q: Any, k: Any, v: Any) -> Any:
        return (q.float() @ k.float().mT).softmax(-1) @ v.float()

    outcome = check(program, *[x.double() for x in tensors(Q, K, V)], routes=routes, family=ALL)
    assert [s.route for s in outcome.matched] == ["sdpa" if routes is None else "triton"]


def test_an_input_that_is_activated_in_place_is_changed(routes: dict[str, str] | None) -> None:
    def program(y: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.silu(y.add_(b), inplace=True) * 1.0

    eager, compiled = (tensors((4, 8), (8,)) for _ in range(2))
    torch._dynamo.reset()
    fn = torch.compile(program, backend=rewriting(Outcome(), routes, True, ALL))
    torch.testing.assert_close(fn(*compiled), program(*eager))
    torch.testing.assert_close(compiled[0], eager[0])


@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_a_product_that_is_scaled_by_a_tensor_is_one_still(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site ends before: what follows is no function of the product alone."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def program(x: Any, w: Any, u: Any, y: Any) -> Any:
        return F.silu(F.linear(x, w)) * F.linear(x, u) * y

    routes = {"gated_mlp": "triton", "bias-act-dropout": route}
    outcome = check(program, *tensors((5, 8), (8, 8), (8, 8), (5, 8), grad=True), grad=True, routes=routes, family=ALL)
    assert [s.route for s in outcome.matched if s.family == "gated_mlp"] == ["triton"]


RESULTS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda out: out,
    "seen otherwise": lambda out: out.transpose(1, 2),
    "seen as one row": lambda out: out.view(2, -1),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_lies_in_memory_as_it_did(name: str, routes: dict[str, str] | None) -> None:
    def program(q: Any, k: Any, v: Any) -> Any:
        return RESULTS[name]((q @ k.mT).softmax(-1) @ v)

    outcome = Outcome()
    x = tensors(Q, K, V)
    fn = torch.compile(program, backend=rewriting(outcome, routes, True, "attention", aot=False))
    found, expected = fn(*x), program(*x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.stride() == expected.stride()
    assert [s.route for s in outcome.matched] == ["sdpa" if routes is None else "triton"]


def test_rows_are_not_searched_for_keys_where_all_have_some() -> None:
    """A window's own position is always seen."""
    outcome = check(attended(lambda i, j: (j <= i) & (i - j < 3)), *tensors(Q, K, V), family="attention")
    assert [s.route for s in outcome.matched] == ["sdpa"]
    assert "logical_not" not in outcome.graphs[0].code


def test_what_lies_outside_of_a_padded_mask_is_not_loaded(routes: dict[str, str] | None) -> None:
    """Though a kernel would not use it."""

    def program(q: Any, k: Any, v: Any, m: Any) -> Any:
        return (q @ k.mT).masked_fill(F.pad(m, (1, 0), value=False), float("-inf")).softmax(-1) @ v

    outcome = check(
        program, *tensors(Q, K, V), torch.eye(4, dtype=torch.bool)[:, 1:], routes=routes, family="attention"
    )
    (site,) = outcome.matched
    assert site.about is not None
    assert "j - 1" not in str(site.about.meaning), site.about.meaning
