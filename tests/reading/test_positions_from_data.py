"""Masks that compare positions with data: offsets of each batch, positions of tokens; and squares of distances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import check, tensors
from torch import Tensor

LENGTH = 150
SHAPE = (2, 2, LENGTH, 16)
Keep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""i, j and data -> [.., LENGTH, LENGTH]"""

OFFSETS = torch.tensor([3, 70])
TOKENS = torch.cat([torch.arange(90), torch.arange(60)])[None].expand(2, -1).contiguous()


def each(x: Tensor) -> Tensor:
    return x[:, None, None, None]


PROGRAMS: dict[str, tuple[Keep, Tensor, str]] = {
    "an offset of each batch": (lambda i, j, x: j <= each(x) + i - 5, OFFSETS, "positions from data"),
    "one on the other side": (lambda i, j, x: i >= j - each(x), OFFSETS, "positions from data"),
    "a window from an offset": (
        lambda i, j, x: (j <= i + each(x)) & (j > i + each(x) - 20), OFFSETS, "positions from data",
    ),
    "tokens not before": (
        lambda i, j, x: x[:, None, :, None] >= x[:, None, None, :], TOKENS, "positions from data",
    ),
    "tokens of a window": (
        lambda i, j, x: (x[:, None, :, None] - x[:, None, None, :] < 32) & (j <= i), TOKENS,
        "causal & positions from data",
    ),
    "tokens near each other": (
        lambda i, j, x: (x[:, None, :, None] - x[:, None, None, :]).abs() <= 3, TOKENS, "positions from data",
    ),
    "32 bits, which kernels would add in 32": (
        lambda i, j, x: j <= each(x) + i, torch.tensor([2**31 - 1, 3], dtype=torch.int32), "dense mask",
    ),
    "16 bits": (lambda i, j, x: j <= each(x) + i, OFFSETS.short(), "dense mask"),
    "real numbers": (lambda i, j, x: j <= each(x) + i, OFFSETS.float(), "dense mask"),
    "a circle": (
        lambda i, j, x: (i // 10 - j // 10) ** 2 + (i % 10 - j % 10).square() <= 8, OFFSETS,
        "(((i//10)) - ((j//10)))**2 + ((Mod(i, 10)) - (Mod(j, 10)))**2 <= 8",
    ),
    "a square of distances": (lambda i, j, x: (i - j).pow(2) < 400, OFFSETS, "(i - j)**2 < 400"),
    "squares of 32 bits": (lambda i, j, x: (i - j).int() ** 2 < 400, OFFSETS, "dense mask"),
    "either, by its operator": (lambda i, j, x: (j <= i) ^ (j <= i - 20), OFFSETS, "(j <= i) ^ (j <= i - 20)"),
}  # fmt: skip


def program(keep: Keep) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        i = torch.arange(LENGTH)
        score = (q @ k.mT / 4).masked_fill(~keep(i[:, None], i, x), -1e9)
        return score.softmax(-1) @ v

    return attention


@pytest.mark.parametrize("route", ["sdpa", "triton"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_compared_with_data(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if route == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    keep, data, words = PROGRAMS[name]
    grad = route == "sdpa" or name in ("an offset of each batch", "tokens of a window", "a circle")
    inputs = tensors(SHAPE, SHAPE, SHAPE, grad=grad)
    outcome = check(program(keep), *inputs, data, grad=grad, routes={"attention": route})
    assert [(site.route, site.mask) for site in outcome.sites] == [(route, words)]


FIRST, LAST = slice(32, 64), slice(128, LENGTH)
"""Rows of a tile, and keys of another."""


def seen(name: str) -> Tensor:
    """By the first sequence: [LENGTH, LENGTH]."""
    keep, data, _ = PROGRAMS[name]
    i = torch.arange(LENGTH)
    return keep(i[:, None], i, data).expand(2, 1, LENGTH, LENGTH)[0, 0]


APART = [name for name, about in PROGRAMS.items() if about[2] != "dense mask" and not seen(name)[FIRST, LAST].any()]
"""Masks that are read, by which these rows see none of these keys."""


@pytest.mark.parametrize("name", APART)
def test_tiles_of_which_nothing_is_kept_are_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands there: NaN would reach every row that is computed with it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    keep, data, _ = PROGRAMS[name]
    q, k, v = tensors(SHAPE, SHAPE, SHAPE)
    assert seen(name)[FIRST].any(-1).all(), "a row that sees nothing reads all"
    v[:, :, LAST] = torch.nan
    compiled = torch.compile(program(keep), backend="xformers", options={"routes": {"attention": "triton"}})
    assert compiled(q, k, v, data)[0, :, FIRST].isfinite().all()
