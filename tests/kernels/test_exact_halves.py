"""Activations of 16 bits, at every number that there is, beside fp64 and eager's own kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor

from xfcompile import activation
from xfcompile.activation import X
from xfcompile.kernels.bias_act_dropout import bias_act_dropout, calls, text_of, tiles

HALVES = [torch.float16, torch.bfloat16]
TAIL = -3.0
"""Below it little is left of eager's gelu."""

SQRT_HALF, DENSITY, INNER = 0.5**0.5, (2 * torch.pi) ** -0.5, (2 / torch.pi) ** 0.5


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-SQRT_HALF * x)


def gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-SQRT_HALF * x) + x * DENSITY * torch.exp(-x * x / 2)


def tanh_gelu(x: Tensor) -> Tensor:
    """Without what 1 + tanh(z) loses."""
    return x * torch.sigmoid(2 * INNER * (x + 0.044715 * x**3))


def tanh_gelu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(2 * INNER * (x + 0.044715 * x**3))
    t = torch.sigmoid(-2 * INNER * (x + 0.044715 * x**3))
    return s + x * s * t * 2 * INNER * (1 + 3 * 0.044715 * x * x)


FUNCTIONS: dict[str, tuple[sympy.Expr, str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (activation.gelu(X, "none"), "none", gelu, gelu_slope),
    "gelu by tanh": (activation.gelu(X, "tanh"), "tanh", tanh_gelu, tanh_gelu_slope),
}
"""A formula, eager's name for it, and both it and its derivative in fp64."""


def numbers(dtype: torch.dtype) -> Tensor:
    """All whose squares are finite in fp32, and no number that the interpreter takes for 0."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return x[(x.float().abs() < 2.0**40) & ((x.float().abs() > 2.0**-120) | (x == 0))]


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> None:
    monkeypatch.setattr(tiles, "pointwise", lambda n, kernel: tiles.Tile(64, 1024, 4))
    monkeypatch.setattr(calls, "known", {})


def ours(formula: sympy.Expr, x: Tensor) -> tuple[Tensor, Tensor]:
    """The function and its derivative before they are rounded."""
    text, padded = text_of(formula), torch.nn.functional.pad(x, (0, -len(x) % 1024)).reshape(-1, 1024)
    out = bias_act_dropout(padded, None, [], [], None, 0, text, 0.0, torch.float32, False)
    given = (torch.ones_like(padded), padded, None, [], None, 0, text, 0.0, 0, [True, False], ["float32", "float32"])
    slope = torch.ops.xfcompile.bias_act_dropout_backward(*given)[0]
    return out.flatten()[: len(x)], slope.flatten()[: len(x)]


def eagers(approximate: str, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float().requires_grad_()
    out = torch.nn.functional.gelu(x, approximate=approximate)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def misrounded(x: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) != exact.to(dtype)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_more_numbers_are_rounded_the_wrong_way_than_eagers(name: str, dtype: torch.dtype) -> None:
    formula, approximate, *exact = FUNCTIONS[name]
    x = numbers(dtype)
    wanted = [f(x.double()) for f in exact]
    found, theirs = ours(formula, x), eagers(approximate, x)
    for mine, other, correct in zip(found, theirs, wanted, strict=True):
        wrong, others_wrong = misrounded(mine, correct, dtype), misrounded(other, correct, dtype)
        assert wrong.sum() <= others_wrong.sum()
        assert wrong[x < TAIL].sum() <= others_wrong[x < TAIL].sum()
    # Before they are rounded, in fp32's own digits.
    value, slope = ((a - b).abs() for a, b in zip(found, wanted, strict=True))
    assert (value <= 2.0**-22 * x.double().abs()).all()
    assert slope.max() <= 2.0**-18
    tail = (x < TAIL) & (x > -5.5)
    assert (value[tail] <= 2.0**-13 * wanted[0][tail].abs()).all()
    assert (slope[tail] <= 2.0**-13 * wanted[1][tail].abs()).all()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_infinity_and_nan_become_what_they_are_in_fp64(name: str, dtype: torch.dtype) -> None:
    formula, _, *exact = FUNCTIONS[name]
    far = torch.tensor([-torch.inf, torch.inf, torch.nan, torch.finfo(dtype).min, torch.finfo(dtype).max], dtype=dtype)
    value, slope = ours(formula, far)
    torch.testing.assert_close(value.double(), exact[0](far.double()), equal_nan=True)
    torch.testing.assert_close(slope.double()[:3], exact[1](far.double())[:3], equal_nan=True)
