"""Masks that are data, with rows so low that nothing is left of their scores: finfo.min, -inf, and others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equivalence import check, tensors
from torch import Tensor

LENGTH = 6
KINDS = ("min", "inf", "1e20", "mixed", "near the minimum", "high", "row of 0")


def far_mask(kind: str, dtype: torch.dtype) -> Tensor:
    """[LENGTH, LENGTH]: its second row is far away as a whole, its third in part."""
    low = torch.finfo(dtype).min
    (mask,) = tensors((LENGTH, LENGTH), dtype=dtype, seed=1)
    mask[2, 1:3] = low
    if kind == "mixed":
        mask[1] = low
        mask[1, ::2] = -torch.inf
    elif kind == "near the minimum":
        mask[1] = low
        mask[1, 2] = low * 0.99
    else:
        mask[1] = {"min": low, "inf": -torch.inf, "1e20": max(-1e20, low), "high": 1e4, "row of 0": 0.0}[kind]
    return mask


PROGRAMS: dict[str, Callable[..., Tensor]] = {
    "added": lambda q, k, v, m: (q @ k.mT * 0.5 + m).softmax(-1) @ v,
    "added by baddbmm": lambda q, k, v, m: (
        torch.baddbmm(m.expand(6, -1, -1), q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1) @ v.flatten(0, 1)
    ),
    "added twice": lambda q, k, v, m: (q @ k.mT + 0.5 * m + 0.25 * m).softmax(-1) @ v,
    "to whole rows": lambda q, k, v, m: (q @ k.mT * 0.5 + m[:, 1:2]).softmax(-1) @ v,
    "to whole rows, and a bias": lambda q, k, v, m: (q @ k.mT * 0.5 + m[:, 1:2] + q[..., :1].mT).softmax(-1) @ v,
    "and a causal mask of -inf": lambda q, k, v, m: (
        (q @ k.mT + m).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1) @ v
    ),
    "and a causal mask of finfo.min": lambda q, k, v, m: (
        (q @ k.mT + m).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), torch.finfo(q.dtype).min).softmax(-1) @ v
    ),
    "after a causal mask of finfo.min": lambda q, k, v, m: (
        (torch.where(torch.ones(LENGTH, LENGTH).tril().bool(), q @ k.mT, torch.finfo(q.dtype).min) + m).softmax(-1) @ v
    ),
    "and a causal mask of -1e9": lambda q, k, v, m: (
        (q @ k.mT + m).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e4).softmax(-1) @ v
    ),
    "capped": lambda q, k, v, m: ((q @ k.mT / 2).tanh() * 2 + m).softmax(-1) @ v,
    "of every key": lambda q, k, v, m: (q @ k.mT * 0.5 + m[1]).softmax(-1) @ v,
    "in a call of SDPA": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
}


def inputs(kind: str, dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
    q, k, v = tensors(*[(2, 3, LENGTH, 4)] * 3, dtype=dtype, grad=grad)
    return [q, k, v, far_mask(kind, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_far_mask(name: str, dtype: torch.dtype) -> None:
    for kind in KINDS:
        if name == "in a call of SDPA" and kind == "inf":
            continue  # torch's own kernels do not agree there
        if dtype == torch.float64 and kind == "high":
            continue  # what eager rounds away, and we do not, there is no wider dtype to see in
        check(PROGRAMS[name], *inputs(kind, dtype))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_far_mask_in_training(name: str) -> None:
    for kind in KINDS:
        if name != "in a call of SDPA":
            outcome = check(PROGRAMS[name], *inputs(kind, torch.float32, grad=True), grad=True)
            assert [s.route for s in outcome.matched] == ["inductor"], "a mask that is data may be far in training"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_far_mask_in_our_kernel(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for kind in KINDS:
        if name == "in a call of SDPA" and kind == "inf":
            continue
        outcome = check(PROGRAMS[name], *inputs(kind, dtype), routes={"attention": "triton"})
        assert [s.route for s in outcome.matched] == ["triton"] or name == "in a call of SDPA"


def test_a_learned_bias_is_not_far() -> None:
    """What is trained, or may be, is no mask: it keeps the fast route."""

    class Biased(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(3, LENGTH, LENGTH))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT + self.table).softmax(-1) @ v

    with torch.no_grad():
        outcome = check(Biased(), *inputs("min", torch.float32)[:3])
    assert [s.route for s in outcome.matched] == ["sdpa"]
    assert "masked_fill" not in outcome.graphs[0].code, "queries are cleared for far rows only"


UNSHIFTED: dict[str, Callable[..., Tensor]] = {
    "masked by -1e9": lambda s, m: s.masked_fill(m > 0, -1e9),
    "masked by finfo.min, and clamped": lambda s, m: s.masked_fill(m > 0, torch.finfo(s.dtype).min).clamp(max=80),
    "-1e4 added": lambda s, m: s + torch.where(m > 0, -1e4, 0.0),
    "a mask that is data": lambda s, m: s + m * 3e38,
    "-1e9 added, less the maximum of what is not masked": lambda s, m: (
        s - s.amax(-1, keepdim=True) + torch.where(m > 0, -1e9, 0.0)
    ),
    "-1e9 subtracted": lambda s, m: s - torch.where(m > 0, 1e9, 0.0),
    "a mask that is data, less the maximum of what is not masked": lambda s, m: (
        s - s.amax(-1, keepdim=True) + m.clamp(min=0) * -1e9
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("route", ["sdpa", "triton"])
@pytest.mark.parametrize("name", UNSHIFTED)
def test_an_unshifted_softmax_has_no_far_rows(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(x) / sum(exp(x)) of a row of finfo.min is 0 / 0, where softmax is the mean."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def unshifted(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        e = UNSHIFTED[name](q @ k.mT, m).exp()
        return (e / e.sum(-1, keepdim=True)) @ v

    mask = -torch.ones(LENGTH, LENGTH)
    mask[1], mask[2, 2:] = 1, 1
    for m in (mask, -mask):
        outcome = check(unshifted, *inputs("min", torch.float32)[:3], m, routes={"attention": route})
        assert outcome.matched or "0 / 0" in outcome.reasons


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_two_masks_of_different_low_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row that both mask, the keys of the higher number are left."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def masked(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT + torch.where(a > 0, 0.0, torch.finfo(q.dtype).min)
        return s.where(b > 0, torch.tensor(-1e30)).softmax(-1) @ v

    a, b = tensors((1, LENGTH), (LENGTH, LENGTH), seed=3)
    b[1] = a[:, 0] = -1
    for route in ("sdpa", "triton"):
        check(masked, *inputs("min", torch.float32)[:3], a, b, routes={"attention": route})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_unshifted_softmax_of_clamped_scores_under_two_masks() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        near = torch.arange(LENGTH)[None, :] // 2 == torch.arange(LENGTH)[:, None] // 2
        s = q @ k.mT + (1.0 - near.to(q.dtype)) * -1e4
        e = s.masked_fill(m == 0, -torch.inf).clamp(max=80).exp()
        return (e / e.sum(-1, keepdim=True)) @ v

    outcome = check(masked, *inputs("high", torch.float32))
    assert outcome.matched


def test_masks_that_leave_nothing() -> None:
    def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        return (q @ k.mT).masked_fill(j <= i, -1e9).masked_fill(j > i, -1e9).softmax(-1) @ v

    outcome = check(nothing, *inputs("min", torch.float32)[:3])
    assert [s.route for s in outcome.matched] == ["inductor"]


ZEROED: dict[str, Callable[..., Tensor]] = {
    "masked by -inf": lambda s, m: s.masked_fill(m < 0, -torch.inf).softmax(-1).nan_to_num(),
    "masked by -inf, 0.0 given": lambda s, m: torch.nan_to_num(s.masked_fill(m < 0, -torch.inf).softmax(-1), 0.0),
    "masked by finfo.min": lambda s, m: s.masked_fill(m < 0, torch.finfo(s.dtype).min).softmax(-1).nan_to_num(nan=0.0),
    "a mask that is data": lambda s, m: (s + m).softmax(-1).nan_to_num(),
    "data, and causal by finfo.min": lambda s, m: (
        (s + m).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), torch.finfo(s.dtype).min)
        .softmax(-1).nan_to_num()
    ),
    "causal, nothing for the first": lambda s, m: (
        s.masked_fill(torch.ones(LENGTH, LENGTH).triu().bool(), -torch.inf)
        .softmax(-1, dtype=torch.float32).nan_to_num().to(s.dtype)
    ),
    "nothing dead": lambda s, m: s.softmax(-1).nan_to_num(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ["sdpa", "triton"])
@pytest.mark.parametrize("name", ZEROED)
def test_nan_of_a_row_without_keys_becomes_0(
    name: str, route: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def zeroed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return ZEROED[name](q @ k.mT * 0.5, m) @ v

    for kind in KINDS:
        outcome = check(zeroed, *inputs(kind, dtype), routes={"attention": route})
        assert [s.matched for s in outcome.sites] == [True], outcome.reasons


def test_another_number_for_nan_is_not_0() -> None:
    def other(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(m < 0, -torch.inf).softmax(-1).nan_to_num(0.5) @ v

    outcome = check(other, *inputs("inf", torch.float32))
    assert "nan_to_num" in outcome.reasons
