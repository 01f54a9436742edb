"""Sizes and numbers that are known at run time only: one compilation serves them all, by either route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import Outcome, rewriting, tensors
from torch import Tensor
from torch._dynamo.utils import counters

import xfcompile

HEADS, D = 3, 8
Sizes = tuple[int, int, int]
"""Batch, queries, keys; multiples of the kernel's tiles and not. No batch is as large as another size at the first."""
SQUARE: list[Sizes] = [(2, 33, 33), (4, 64, 64), (5, 40, 40), (4, 96, 96)]
OBLONG: list[Sizes] = [(2, 33, 70), (4, 64, 96), (5, 40, 41), (4, 96, 128)]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])


def masked(keep: Callable[..., Tensor], fill: float = -torch.inf) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        i, j = positions(q, k)
        return (q @ k.mT * 0.3).masked_fill(~keep(i, j, q.shape[2], k.shape[2], *data), fill).softmax(-1) @ v

    return program


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q, k)
    return (5 * torch.tanh(q @ k.mT / 5)).masked_fill(j > i, torch.finfo(q.dtype).min).softmax(-1) @ v


def left_padded(batch: int, queries: int, keys: int) -> Tensor:
    return torch.arange(keys) >= 3 * torch.arange(batch)[:, None]


PROGRAMS: dict[str, tuple[Callable[..., Tensor], list[Sizes], Callable[..., Tensor] | None]] = {
    "causal": (masked(lambda i, j, n, m: j <= i), SQUARE, None),
    "bottom-right": (masked(lambda i, j, n, m: j <= i + m - n), OBLONG, None),
    "window": (masked(lambda i, j, n, m: (j <= i) & (j > i - 16)), SQUARE, None),
    "chunks": (masked(lambda i, j, n, m: i // 16 == j // 16, -1e9), SQUARE, None),
    "padding": (masked(lambda i, j, n, m, kept: kept[:, None, None, :]), OBLONG, left_padded),
    "causal and padding": (
        masked(lambda i, j, n, m, kept: (j <= i) & kept[:, None, None, :]), SQUARE, left_padded,
    ),
    "documents": (
        masked(lambda i, j, n, m, d: d[:, None, :, None] == d[:, None, None, :]),
        SQUARE,
        lambda batch, n, m: (torch.arange(m) // 7).expand(batch, -1).clone(),
    ),
    "bias": (
        lambda q, k, v, bias: (q @ k.mT * 0.3 + bias).softmax(-1) @ v,
        OBLONG,
        lambda batch, n, m: torch.randn(batch, 1, n, m),
    ),
    "soft-cap": (lambda q, k, v: (5 * torch.tanh(q @ k.mT / 5)).softmax(-1) @ v, OBLONG, None),
    "soft-cap, causal": (capped, SQUARE, None),
}  # fmt: skip


def inputs(name: str, sizes: Sizes, heads: int = HEADS, d: int = D) -> list[Tensor]:
    batch, n, m = sizes
    data = PROGRAMS[name][2]
    q, k, v = tensors(*((batch, heads, length, d) for length in (n, m, m)), seed=n)
    return [q, k, v] if data is None else [q, k, v, data(batch, n, m)]


def assert_equal(compiled: Callable[..., Tensor], program: Callable[..., Tensor], x: list[Any]) -> None:
    with torch.no_grad():
        ours, eager = compiled(*x), program(*x)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5, equal_nan=True)


def served(name: str, route: str, how: str) -> Outcome:
    """The program over all its sizes."""
    program, sizes, _ = PROGRAMS[name]
    outcome = Outcome()
    compiled = torch.compile(
        program, backend=rewriting(outcome, {"attention": route}), dynamic=True if how == "dynamic" else None
    )
    for each in sizes:
        x = inputs(name, each)
        if how == "marked":
            for k, tensor in enumerate(x):
                for dim in (0, 2) if k < 3 else (d for d, n in enumerate(tensor.shape) if n != 1):
                    torch._dynamo.mark_dynamic(tensor, dim)
        assert_equal(compiled, program, x)
    return outcome


@pytest.mark.parametrize("route", ["sdpa", "triton"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_compilation_serves_all_batches_and_lengths(name: str, route: str) -> None:
    outcome = served(name, route, "dynamic")
    assert len(outcome.graphs) == 1
    expected = "inductor" if route == "sdpa" and "soft-cap" in name else route
    assert [(s.matched, s.route) for s in outcome.sites] == [(True, expected)], outcome.sites


@pytest.mark.parametrize("name", ["bottom-right", "causal and padding", "bias"])
def test_one_compilation_serves_dimensions_that_are_marked(name: str) -> None:
    outcome = served(name, "triton", "marked")
    assert len(outcome.graphs) == 1
    assert [s.route for s in outcome.sites] == ["triton"]


@pytest.mark.parametrize("name", ["window", "padding"])
def test_a_second_compilation_serves_all_further_lengths(name: str) -> None:
    outcome = served(name, "triton", "automatic")
    assert len(outcome.graphs) == 2
    assert [s.route for s in outcome.sites] == ["triton", "triton"]


@pytest.mark.parametrize("route", ["sdpa", "triton"])
def test_as_many_sequences_as_heads_have_one_symbol_for_both(route: str) -> None:
    outcome = Outcome()
    program = PROGRAMS["causal"][0]
    compiled = torch.compile(program, backend=rewriting(outcome, {"attention": route}), dynamic=True)
    for n in (3, 4):
        assert_equal(compiled, program, inputs("causal", (n, 40 + n, 40 + n), heads=n))
    assert len(outcome.graphs) == 1
    assert [s.route for s in outcome.sites] == [route], outcome.reasons


def test_a_kernel_is_made_for_one_head_dimension() -> None:
    """Which torch takes for a symbol, as all sizes: it is held to its number, and lengths stay symbols."""
    outcome = Outcome()
    program, sizes, _ = PROGRAMS["bottom-right"]
    compiled = torch.compile(program, backend=rewriting(outcome, {"attention": "triton"}), dynamic=True)
    for d in (8, 16):
        for each in sizes[:3]:
            assert_equal(compiled, program, inputs("bottom-right", each, d=d))
    assert len(outcome.graphs) == 2
    assert [s.route for s in outcome.sites] == ["triton", "triton"]


class Module(torch.nn.Module):
    scale, cap = 0.3, 5.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.cap * torch.tanh(q @ k.mT * self.scale / self.cap)).softmax(-1) @ v


NUMBERS: dict[str, Callable[..., Tensor]] = {
    "arguments": lambda q, k, v, scale, cap: (cap * torch.tanh(q @ k.mT * scale / cap)).softmax(-1) @ v,
    "attributes": Module(),
}


@pytest.mark.parametrize("name", ["arguments", pytest.param("attributes", marks=pytest.mark.slow)])
def test_one_compilation_serves_all_scales_and_caps(name: str) -> None:
    """Through Inductor, which makes tensors of numbers, and compiles for each number that it cannot make one of."""
    program = NUMBERS[name]
    counters.clear()
    with xfcompile.collect() as report:
        compiled = torch.compile(
            program,
            backend=xfcompile.xformers,
            dynamic=True,
            options={"strict": True, "routes": {"attention": "triton"}},
        )
        numbers = [(0.3, 5.0), (0.25, 4.0), (0.7, 9.5), (0.2, 3.5)]
        for sizes, (scale, cap) in zip(OBLONG, numbers, strict=True):
            x: list[Any] = [*inputs("soft-cap", sizes)]
            if isinstance(program, Module):
                program.scale, program.cap = scale, cap
            else:
                x += [scale, cap]
            assert_equal(compiled, program, x)
    assert counters["stats"]["unique_graphs"] == 1
    assert {(site.matched, site.route) for site in report.sites} == {(True, "triton")}
