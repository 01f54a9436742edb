"""The sum of what programs left in parts."""

from __future__ import annotations

import pytest
import torch

from xfcompile.kernels.parts import MOST, Total

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("parts", "n"), [(2, 1), (3, 16), (64, 40), (MOST, 17), (2 * MOST + 1, 33)])
def test_parts_are_added_up(parts: int, n: int, dtype: torch.dtype) -> None:
    """In fp32, and rounded once: which the interpreter does to bf16 by leaving bits out."""
    total = Total(parts, n, dtype, torch.device("cpu"))
    x = total.blank().copy_(torch.randn(parts, n, generator=torch.Generator().manual_seed(parts)))
    made = total(x)
    assert x.shape == (parts, n) and x.dtype == torch.float32 and made.shape == (n,) and made.dtype == dtype
    exact = x.double().sum(0)
    off = (made.double() - exact).abs()
    rounding = exact.abs() * torch.finfo(dtype).eps / (1 if dtype is torch.bfloat16 else 2)
    chain = x.double().abs().sum(0) * torch.finfo(torch.float32).eps
    assert (off <= rounding + 4 * chain).all()
    assert torch.equal(made, total(x))


def test_one_part_is_the_sum_in_its_dtype() -> None:
    total = Total(1, 5, torch.bfloat16, torch.device("cpu"))
    x = total.blank().copy_(torch.arange(5.0))
    assert x.dtype == torch.bfloat16 and total(x).data_ptr() == x.data_ptr() and total(x).shape == (5,)


def test_nan_and_infinity_stay() -> None:
    total = Total(3, 3, torch.float32, torch.device("cpu"))
    x = total.blank().copy_(torch.tensor([[1.0, torch.inf, torch.inf], [torch.nan, 0.0, -torch.inf], [2.0, 1.0, 0.0]]))
    torch.testing.assert_close(total(x), x.sum(0), equal_nan=True)
