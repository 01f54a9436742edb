"""What rounding may do to a result: as much as it does to fused kernels, and no more."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xfcompile
from xfcompile.rounding import Rounded, nearby


def weights_by_softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def weights_written_out(scores: Tensor) -> Tensor:
    x = torch.exp(scores - scores.amax(-1, keepdim=True))
    return x / x.sum(-1, keepdim=True)


@pytest.mark.parametrize("weights", [weights_by_softmax, weights_written_out])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_rows_with_one_key_raise_no_alarm(weights: object, scale: float, recwarn: pytest.WarningsRecorder) -> None:
    """Their gradients are next to nothing (1e-12), and a fused backward's are what rounding leaves (1e-5)."""

    def program(x: Tensor, k: Tensor) -> Tensor:
        return weights(x @ k.mT * scale) @ x  # type: ignore[operator]

    for seed in range(12):
        torch.manual_seed(seed)
        x = torch.randn(3, 17, 64)
        (check,) = xfcompile.verify(program, x, (x * 0.99).requires_grad_()).checks
        assert check.ok and check.route == "sdpa", check
    assert not [w for w in recwarn if "not what the program computes" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_gradients_are_moved_by_little(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    results = []
    q, k, v, dout = (torch.randn(1, 2, 33, 64, dtype=torch.float64) for _ in range(4))
    for mode in (torch.enable_grad(), Rounded(dtype)):
        x = [y.clone().requires_grad_() for y in (q, k, v)]
        with mode:
            results.append(torch.autograd.grad(F.scaled_dot_product_attention(*x), x, dout))
    moves = [(a - b).abs().amax() / a.abs().amax() / torch.finfo(dtype).eps for a, b in zip(*results, strict=True)]
    assert 0 < moves[0] < 8 and 0 < moves[1] < 8 and moves[2] == 0


def test_buckets_and_masks_of_positions_are_not_moved() -> None:
    n = torch.arange(1, 65).double()
    with Rounded(torch.bfloat16):
        bucket = (torch.log(n / 8) / math.log(16) * 8).to(torch.long)
        keep = n[:, None] * 0.5 >= n * 0.5
    assert torch.equal(bucket, (torch.log(n / 8) / math.log(16) * 8).to(torch.long))
    assert torch.equal(keep, torch.ones(64, 64).tril().bool())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_operands_are_moved_by_one_rounding_of_their_own(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    eps = torch.finfo(dtype).eps
    relative = (nearby(x) - x.double()).abs() / x.double().abs() / eps
    assert relative.amin() >= 0.5 and relative.amax() <= 2  # fp64 rounds the product once more
    assert nearby(3) == 3 and nearby(torch.tensor([1, 2])).tolist() == [1, 2]
