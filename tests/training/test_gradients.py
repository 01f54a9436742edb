"""Gradients of whole programs, by q, k, v and by all that their scores load, against fp64 and eager's own error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from step import check, check_on_average, compiled, doubled, numbers, qkv, step
from torch import Tensor

import xfcompile

LQ, LK = 19, 23


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]


# -- what SDPA can say ----------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q, k)
    return scores(q, k).masked_fill(j > i, -math.inf).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q, k)
    return torch.where((j <= i) & (j > i - 6), scores(q, k), -math.inf).softmax(-1) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (scores(q, k) - scores(q, k).amax(-1, keepdim=True).detach()).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def length_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    weights = torch.einsum("ibhd,jbhd->bhij", q * 0.25, k).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :1, None].expand(-1, -1, q.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    return scores(q, k).softmax(-1) @ v


@pytest.mark.parametrize(
    "program", [plain, causal, window, written_out, length_first, grouped], ids=lambda f: f.__name__
)
def test_a_step_is_as_exact_as_eager(program: object, route: str) -> None:
    check(program, qkv(), route)


# -- learned terms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["".join(a) for n in range(5) for a in itertools.combinations("bhij", n)])
def test_a_bias_of_any_broadcast_shape_gets_its_gradient(axes: str, interpreter: None) -> None:
    full = (2, 2, LQ, LK)
    shape = [n if a in axes else 1 for a, n in zip("bhij", full, strict=True)]

    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (scores(q, k) + bias).softmax(-1) @ v

    # A bias that is the same for all keys has a gradient of 0: what it is the sum of cancels.
    bias = numbers(*shape, seed=9)
    whole = step(program, doubled([*qkv(), bias.detach().expand(full).clone().requires_grad_()]))["gradient 3"]
    terms = (
        whole.abs().sum([n for n, a in enumerate("bhij") if a not in axes], keepdim=True) if axes != "bhij" else whole
    )
    check(program, [*qkv(), bias], "kernel", terms={"gradient 3": float(terms.max())})


@pytest.mark.parametrize("shape", [(LK,), (LQ, 1), (LQ, LK), (2, 1, LK), (2, LQ, LK)], ids=str)
def test_a_bias_may_leave_leading_axes_out(shape: tuple[int, ...], interpreter: None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        i, j = positions(q, k)
        return (bias + scores(q, k)).masked_fill(j > i, -math.inf).softmax(-1) @ v

    check(program, [*qkv(), numbers(*shape, seed=9)], "kernel")


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    i, j = positions(q, k)
    return (scores(q, k) - slopes[:, None, None] * (i - j).abs()).softmax(-1) @ v


def alibi_causal(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    i, j = positions(q, k)
    return (scores(q, k) + slopes.exp()[:, None, None] * (j - i)).masked_fill(j > i, -math.inf).softmax(-1) @ v


def temperature(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (q @ k.mT * scale).softmax(-1) @ v


def temperature_of_heads(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """Cosine attention, as in Swin v2."""
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (s * scale[:, None, None].clamp(max=math.log(100.0)).exp()).softmax(-1) @ v


def divided(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    i, j = positions(q, k)
    return (scores(q, k) / temperature.exp()).masked_fill(j > i, -math.inf).softmax(-1) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """As in GPT-OSS."""
    i, j = positions(q, k)
    s = scores(q, k).masked_fill(j > i, -math.inf)
    s = torch.cat([s, sink[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)], -1)
    return (s - s.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def buckets(relative: Tensor) -> Tensor:
    """As in T5: near distances by themselves, far ones in logarithmic buckets."""
    far = 4 + (torch.log(relative.abs().clamp(min=1).float() / 4) / math.log(16 / 4) * 4).long()
    return (relative > 0).long() * 8 + torch.where(relative.abs() < 4, relative.abs(), far.clamp(max=7))


def t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i, j = positions(q, k)
    return (q @ k.mT + F.embedding(buckets(j - i), table).permute(2, 0, 1)[None]).softmax(-1) @ v


def clipped(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i, j = positions(q, k)
    return (scores(q, k) + table[(j - i).clamp(-7, 7) + 7].permute(2, 0, 1)).softmax(-1) @ v


def soft_cap(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    i, j = positions(q, k)
    s = 3.0 * torch.tanh((scores(q, k) + bias) / 3.0)
    return s.masked_fill(j > i, -math.inf).softmax(-1) @ v


def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A bias that the score multiplies: its gradient holds the score."""
    return (scores(q, k) * torch.sigmoid(gate)[:, :, None] + gate[..., None, :]).softmax(-1) @ v


LEARNED = [
    (alibi, (2,)),
    (alibi_causal, (2,)),
    (temperature, ()),
    (temperature, (1,)),
    (temperature_of_heads, (2,)),
    (divided, (2, 1, 1)),
    (sinks, (2,)),
    (t5, (16, 2)),
    (clipped, (15, 2)),
    (soft_cap, (1, 2, LQ, LK)),
    (soft_cap, (LK,)),
    (gated, (2, 2, LK)),
]


@pytest.mark.parametrize("program, shape", LEARNED, ids=lambda x: x.__name__ if callable(x) else str(x))
def test_what_a_score_learns_gets_its_gradient(program: object, shape: tuple[int, ...], interpreter: None) -> None:
    if math.prod(shape) > 2:
        check(program, [*qkv(), numbers(*shape, seed=9)], "kernel")
    else:  # a number or two, which are the sums of thousands of either sign
        draws = [[*qkv(draw=n), numbers(*shape, seed=20 + n)] for n in range(4)]
        check_on_average(program, draws, "kernel")


SIDE = 4


def windowed_index() -> Tensor:
    """Swin's index of relative positions within a window, [16, 16] into 49."""
    grid = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
    relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + SIDE - 1
    return relative[..., 0] * (2 * SIDE - 1) + relative[..., 1]


def test_a_table_of_relative_positions_gets_its_gradient_through_its_index(interpreter: None) -> None:
    def swin(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
        bias = table[index.view(-1)].view(SIDE**2, SIDE**2, -1).permute(2, 0, 1).contiguous()
        return (scores(q, k) + bias[None]).softmax(-1) @ v

    size = SIDE**2
    inputs = [*qkv(lq=size, lk=size), numbers((2 * SIDE - 1) ** 2, 2, seed=9), windowed_index()]
    check(swin, inputs, "kernel")


@pytest.mark.parametrize(
    "program, shape", [(alibi, (2,)), (sinks, (2,)), (t5, (16, 2))], ids=lambda x: getattr(x, "__name__", str(x))
)
def test_what_sdpa_does_slowly_or_not_at_all_is_left_to_inductor_on_cpus(
    program: object, shape: tuple[int, ...]
) -> None:
    report = check(program, [*qkv(), numbers(*shape, seed=9)], "default", expected="inductor")
    assert "gradient" in str(report.sites[0].reason) or "sinks" in str(report.sites[0].reason)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """New memory is full of NaN too, by torch's own word."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "program, shape",
    [(causal, ()), (alibi, (2,)), (sinks, (2,)), (t5, (16, 2)), (clipped, (15, 2)), (soft_cap, (1, 2, LQ, LK))],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_deterministic_algorithms_give_the_same_numbers_each_time(
    program: Callable[..., Tensor], shape: tuple[int, ...], interpreter: None, deterministic: None
) -> None:
    inputs = [*qkv(), *([numbers(*shape, seed=9)] if shape else [])]
    check(program, inputs, "kernel")
    ours = compiled(program, "kernel", xfcompile.Report())
    first, second = step(ours, inputs), step(ours, inputs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
