"""Exponentials of which some are a polynomial's: the text's own instructions, run by torch."""

from __future__ import annotations

import math
import re

import ptx_in_torch
import pytest
import torch
from torch import Tensor

from xfcompile.kernels.attention import exponential


def exp2(x: Tensor, eighths: int, bounded: bool = False) -> Tensor:
    """x: [n, 8], as a thread has them."""
    (text,) = re.findall(r'\("""\n(.*?)""",', exponential.text(eighths, bounded), re.DOTALL)
    return torch.stack(ptx_in_torch.run(text, x.unbind(-1), exponential.PACK), -1)


def each(x: Tensor) -> Tensor:
    """All of them in each of eight places."""
    return x[:, None].expand(-1, exponential.PACK)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("eighths", [1, 2, 3, 4, 8])
def test_powers_of_two(eighths: int, bounded: bool) -> None:
    x = torch.cat([torch.linspace(-126, 127, 100_001), -torch.logspace(-45, 2, 5000), torch.arange(-126.0, 128.0)])
    exact = torch.exp2(x.double())
    error = ((exp2(each(x), eighths, bounded).double() - exact[:, None]) / exact[:, None]).abs().amax(0)
    assert (error > 1e-6).sum() == eighths, "that many of eight are a polynomial's"
    assert error.max() < 3.5e-6


@pytest.mark.parametrize("eighths", [1, 2, 3, 4, 8])
def test_what_is_no_number_or_too_small(eighths: int) -> None:
    x = torch.tensor([-math.inf, -1e38, -200.0, -127.5, -127.0, 0.0, -0.0, math.nan])
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, math.nan])
    assert torch.equal(exp2(each(x), eighths).nan_to_num(7.0), each(wanted).nan_to_num(7.0))


@pytest.mark.parametrize("eighths", [1, 2, 3, 4, 8])
def test_what_stands_for_no_score_where_they_are_bounded(eighths: int) -> None:
    """Wherever a rounding leaves it."""
    least = torch.full([201], exponential.LEAST).view(torch.int32) + torch.arange(-100, 101, dtype=torch.int32)
    x = torch.cat([least.view(torch.float32), torch.tensor([math.nan])])
    wanted = torch.cat([torch.zeros(201), torch.tensor([math.nan])])
    assert torch.equal(exp2(each(x), eighths, bounded=True).nan_to_num(7.0), each(wanted).nan_to_num(7.0))


def test_it_never_falls() -> None:
    """A higher score has no smaller weight, but for the rounding of the last digit."""
    x = torch.linspace(-4, 1, 1_000_001)
    y = exp2(each(x), 8)[:, 0]
    assert (y[1:] - y[:-1] >= -2e-7 * y[1:]).all()
