"""Biases of positions by SDPA: no larger there than in the program, and no more rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import xfcompile

KEYS = 1500

Bias = Callable[[Tensor, Tensor], Tensor]
BIASES: dict[str, Bias] = {
    "times a slope": lambda i, j: (j - i) * 0.37,
    "over a number": lambda i, j: (j - i) / 3,
    "moved": lambda i, j: (j - i - 7) * 0.5,
    "of floats": lambda i, j: (j.float() - i.float()) * 0.37,
    "both ways": lambda i, j: -(j - i).abs() * 0.37,
    "a product": lambda i, j: (i - j) * (j - i + 3) * 0.01,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [KEYS, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_distances_keep_their_digits(name: str, dtype: torch.dtype, queries: int, causal: bool) -> None:
    """Without the queries' part, which softmax does not see, they would be as large as the number of keys."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
        j = torch.arange(k.shape[2])
        scores = q @ k.mT / 4 + BIASES[name](i, j).to(q.dtype)
        if causal:
            scores = scores.masked_fill(j > i, -torch.inf)
        return scores.softmax(-1) @ v

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator).to(dtype) for n in (queries, KEYS, KEYS))
    with torch.no_grad(), xfcompile.collect() as report:
        found = torch.compile(attention, backend="xformers", dynamic=False)(q, k, v)
    assert [site.route for site in report.sites] == ["sdpa"]
    right = attention(q.double(), k.double(), v.double())
    error, theirs = ((x.double() - right).abs().max().item() for x in (found, attention(q, k, v)))
    assert error <= 2 * theirs + 2 * torch.finfo(dtype).eps


FP32: dict[str, Bias] = {
    "distances": lambda i, j: -(j - i).abs() * 0.37,
    "keys alone": lambda i, j: j * 0.37 + i * 0,
    "waves": lambda i, j: torch.sin((j - i) * 0.1) * 30,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FP32)
def test_what_is_added_in_fp32_is_not_rounded_first(name: str, dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = FP32[name](torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]))
        wide = torch.promote_types(q.dtype, torch.float32)
        return ((q @ k.mT / 4).to(wide) + bias).softmax(-1).to(q.dtype) @ v

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, KEYS, 16, generator=generator).to(dtype) for _ in range(3))
    with torch.no_grad(), xfcompile.collect() as report:
        found = torch.compile(attention, backend="xformers", dynamic=False)(q, k, v)
    assert [site.route for site in report.sites] == ["sdpa"]
    right = attention(q.double(), k.double(), v.double())
    error, theirs = ((x.double() - right).abs().max().item() for x in (found, attention(q, k, v)))
    assert error <= 1.5 * theirs
