"""What random programs found, each as small as it could be made: wrong numbers and crashes that are no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equivalence import ALL, Outcome, check, rewriting, tensors
from torch import Tensor

BIAS = "bias-act-dropout"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def routes(outcome: Outcome, family: str) -> list[str | None]:
    return [site.route for site in outcome.sites if site.family == family]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_a_bias_that_is_added_after_the_projections_input_was_changed_is_not_lost(route: str, grad: bool) -> None:
    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x = x.permute(0, 3, 2, 1) * 1.0  # the projection reads a copy, so that its gradient is not lost
        h = b + F.linear(x, w)
        x.relu_()
        return F.gelu(h)

    outcome = check(
        program, *tensors((1, 8, 2, 2), (8, 8), (8,), grad=grad), grad=grad, routes={BIAS: route}, family=ALL
    )
    assert len(routes(outcome, BIAS)) == 1


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("route", ["triton", "epilogue"])
@pytest.mark.parametrize(
    "after",
    [
        lambda h: F.relu(h).sqrt(),
        lambda h: F.gelu(F.relu6(h)).reciprocal(),
        lambda h: (F.relu(h) * torch.arange(1.0, 7.0)).sqrt(),
        lambda h: (2 * F.relu(h).square()).sqrt(),
        lambda h: h.clamp(min=0).sqrt(),
    ],
    ids=["relu", "relu6 and gelu", "relu and a scale", "squared relu", "clamp"],
)
def test_a_gradient_of_inf_is_0_where_a_kink_is_flat(route: str, after: Callable[[Tensor], Tensor]) -> None:
    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return after(F.linear(x, w, b))

    outcome = check(program, *tensors((5, 8), (6, 8), (6,), grad=True), grad=True, routes={BIAS: route}, family=ALL)
    assert routes(outcome, BIAS) == [route]


@pytest.mark.usefixtures("interpreted")
def test_a_mask_of_keys_under_a_number_of_its_own_row_has_a_gradient() -> None:
    """The kernel for the gradient of what is added to the scores loads both, for several heads one after another."""

    def program(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, added: Tensor) -> Tensor:
        s = q @ k.mT * scale + added
        s = s.where(torch.eye(4, dtype=torch.bool), torch.tensor(-100.0))
        return s.softmax(-1) @ v

    shapes = ((3, 4, 4), (3, 4, 4), (3, 4, 4), (1, 1, 1), (1, 4, 4))
    outcome = check(program, *tensors(*shapes, grad=True), grad=True, routes={"attention": "triton"}, family=ALL)
    assert routes(outcome, "attention") == ["triton"]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", [(2, 2, 1, 1), ()], ids=str)
@pytest.mark.parametrize(
    "keep",
    [lambda m, near: (m != 0) & near, lambda m, near: (m == 1) | ~near, lambda m, near: ~(m.bool() ^ near)],
    ids=["and", "or", "xor"],
)
def test_a_real_number_of_each_head_is_a_condition(
    keep: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        i, j = torch.arange(5)[:, None], torch.arange(7)
        return (q @ k.mT).masked_fill(~keep(m, j <= i + 1), -1e9).softmax(-1) @ v

    q, k, v, m = tensors((2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4), shape)
    outcome = check(program, q, k, v, m.clamp(min=0).ceil(), routes={"attention": "triton"})
    assert routes(outcome, "attention") == ["triton"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_a_mask_is_infinite_in_a_dtype_that_does_not_hold_its_number(dtype: torch.dtype, added: bool) -> None:
    """A row without keys is NaN then: finfo(float32).min, which would leave the mean of its values, is gone."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(6)
        keep = (i[:, None] >= i) & (i[:, None] != 3)
        low = torch.finfo(torch.float32).min
        s = q @ k.mT
        s = s + torch.where(keep, 0.0, low) if added else s.masked_fill(~keep, low)
        return (s * 0.5).to(dtype).float().softmax(-1) @ v

    outcome = check(program, *tensors(*[(1, 2, 6, 8)] * 3))
    assert len(outcome.sites) == 1


def test_a_mask_of_data_that_may_be_infinite_in_another_dtype_is_none_that_is_known() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + mask).half().float().softmax(-1) @ v

    mask = torch.zeros(6, 6)
    mask[3] = torch.finfo(torch.float32).min
    outcome = check(program, *tensors(*[(1, 2, 6, 8)] * 3), mask)
    assert "infinite in the dtype" in outcome.reasons


@pytest.mark.parametrize(("step", "matched"), [(1, True), (4, False)])
def test_a_slope_times_a_distance_is_no_mask_that_may_be_infinite(step: int, matched: bool) -> None:
    """Of a row one key at most is as far away as makes finfo(float32).min of it; of steps of distances, several."""

    def program(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        i = torch.arange(6)
        distance = (i - i[:, None]) // step
        return (q @ k.mT + slopes[:, None, None] * distance).to(torch.bfloat16).float().softmax(-1) @ v

    outcome = check(program, *tensors(*[(1, 2, 6, 8)] * 3), torch.tensor([0.5, 0.25]))
    assert [site.matched for site in outcome.sites] == [matched]
    assert ("infinite in the dtype" in outcome.reasons) != matched


def test_what_torch_lays_out_otherwise_by_itself_is_no_failure_of_ours() -> None:
    """Its rrelu in evaluation gives what is dense in eager, and what lies as its input does where it is decomposed."""
    from outcome import fate
    from writer import Program

    source = """
def program(x, w{more}):
    h = F.rrelu(F.gelu((w.mT @ x.mT).mT))
    return {dropped}
"""
    program = Program(
        source.format(more="", dropped="torch.dropout(h, 0.1, True)"),
        shapes=((2, 3, 4), (4, 16)),
        dtype=torch.float32,
        grad=False,
        dynamic=False,
        dropped=0.1,
        kept=source.format(more=", keep", dropped="h * keep"),
    )
    assert fate(program) == ("wrong without us too", [])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("dtype", "fill", "added", "matched"),
    [
        (torch.bfloat16, -100.0, False, True),
        (torch.bfloat16, -80.0, False, True),
        (torch.float16, -50.0, False, True),
        (torch.float16, -5.0, False, True),
        (torch.float32, -104.0, False, True),
        (torch.float64, -800.0, False, True),
        (torch.float32, -100.0, False, True),
        (torch.bfloat16, -100.0, True, False),
        (torch.float16, -50.0, True, False),
        (torch.bfloat16, -2000.0, True, True),
        (torch.float32, -100.0, True, True),
    ],
)
def test_a_softmax_that_is_written_out_is_0_by_0_where_its_dtype_has_no_such_powers(
    dtype: torch.dtype, fill: float, added: bool, matched: bool
) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masked = torch.arange(6)[:, None] < torch.tensor([9, 2, 9, 3])  # the first two rows see nothing
        s = q @ k.mT
        s = s + torch.where(masked, fill, 0.0).to(s.dtype) if added else s.masked_fill(masked, fill)
        e = s.exp()
        return (e / e.sum(-1, keepdim=True)) @ v

    route = "sdpa" if dtype == torch.float64 else "triton"
    outcome = check(program, *tensors((2, 6, 3), (2, 4, 3), (2, 4, 3), dtype=dtype), routes={"attention": route})
    assert [site.matched for site in outcome.sites] == [matched], outcome.reasons


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("fill", ["min", -1e4, -100.0])
@pytest.mark.parametrize("times", [-1.5, 0.5, 8.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_mask_that_is_multiplied_by_data_may_overflow(dtype: torch.dtype, times: float, fill: float | str) -> None:
    number = torch.finfo(dtype).min if isinstance(fill, str) else fill

    def program(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        masked = torch.arange(6)[:, None] < torch.tensor([9, 2, 9, 3])  # the first two rows see nothing
        return ((q @ k.mT).masked_fill(masked, number) * x).softmax(-1) @ v

    given = [*tensors((2, 6, 3), (2, 4, 3), (2, 4, 3), dtype=dtype), torch.tensor([times], dtype=dtype)]
    torch._dynamo.reset()
    outcome = Outcome()
    compiled = torch.compile(program, backend=rewriting(outcome, {"attention": "triton"}), dynamic=False)
    near = min(0.02, 8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(compiled(*given), program(*given), rtol=near, atol=near, equal_nan=True)
    large = number <= -torch.finfo(dtype).max / 100
    assert [site.matched for site in outcome.sites] == [not large], outcome.reasons
