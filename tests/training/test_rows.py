"""Rows without keys, weights that something else uses too, and derivatives by gradcheck in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from step import ROUTE, check, compiled, doubled, judge, numbers, qkv, step
from torch import Tensor

import xfcompile
from xfcompile.kernels.attention import prepare
from xfcompile.score import B, H, I, J, Load, S, Where
from xfcompile.site import Band, Operand, ScoreSpec

LEAST = torch.finfo(torch.float32).min
EPS = torch.finfo(torch.float32).eps


def padding() -> Tensor:
    """Which of 23 keys there are: of the first sequence all, of the second none, of the third some."""
    return torch.arange(23) < torch.tensor([[23], [0], [11]])


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


# -- rows without keys ----------------------------------------------------------------------------------------------


def test_rows_that_sdpa_gives_zero(route: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])

    check(program, [*qkv(batch=3), padding()], route)


def test_rows_that_get_the_mean_of_all_values(route: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~keep[:, None, None, :], LEAST).softmax(-1) @ v

    check(program, [*qkv(batch=3), padding()], route)


def test_rows_of_nan_that_are_made_zero(route: str) -> None:
    """Eager sends NaN back through rows that were NaN, whatever becomes of them: to values that they do not see. Ours
    sends back nothing. Without these rows both have the same gradients."""

    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~keep[:, None, None, :], -math.inf).softmax(-1) @ v

    def without(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return program(q, k, v, keep).nan_to_num(0.0)

    inputs = [*qkv(batch=3), padding()]
    report = xfcompile.Report()
    ours = step(compiled(without, route, report), inputs)
    assert [s.route for s in report.sites] == [ROUTE[route]]
    assert step(without, inputs)["gradient 2"][1].isnan().all()
    seen = [0, 2]
    assert all(not ours[f"gradient {n}"][1].any() for n in range(3))
    alive = [x.detach()[seen].requires_grad_(x.requires_grad) for x in inputs]

    def step_of_those(given: list[Tensor]) -> dict[str, Tensor]:
        """The same loss: its weights are drawn for all sequences."""
        weights = torch.randn(ours["output 0"].shape, generator=torch.Generator().manual_seed(0))[seen]
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in given]
        (program(*leaves) * weights.to(given[0].dtype)).sum().backward()
        return {f"gradient {n}": x.grad for n, x in enumerate(leaves) if x.grad is not None}

    mine = {f"gradient {n}": ours[f"gradient {n}"][seen] for n in range(3)}
    judge(step_of_those(doubled(alive)), step_of_those(alive), mine, EPS)


def test_rows_whose_masks_were_added_are_left_to_inductor(route: str) -> None:
    """Gradients go through scores beside which -1e9 stands, as through all others."""

    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (scores(q, k) + torch.where(keep[:, None, None, :], 0.0, -1e9)).softmax(-1) @ v

    inputs = [*qkv(batch=3), padding()]
    report = xfcompile.Report()
    ours = step(compiled(program, route, report), inputs)
    (site,) = report.sites
    if site.route == "inductor":
        assert site.reason
    judge(step(program, doubled(inputs)), step(program, inputs), ours, EPS)


def added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (scores(q, k) + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1) @ v


def added_left(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Causal, over sequences that begin late: their first rows see nothing."""
    j = torch.arange(k.shape[-2])
    seen = keep.flip(-1)[:, None, None, :] & (j <= torch.arange(q.shape[-2])[:, None])
    return (scores(q, k) * 0.5 + torch.zeros(seen.shape).masked_fill(~seen, LEAST)).softmax(-1) @ v


def added_shared(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Two heads of queries share one of keys."""
    k, v = (x[:, :1, None].expand(-1, -1, q.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    return added(q, k, v, keep)


@pytest.mark.parametrize("program", [added, added_left, added_shared], ids=lambda f: f.__name__)
@pytest.mark.parametrize("far", [0.0, 30.0], ids=["", "far"])
def test_rows_whose_masks_were_added(route: str, program: Callable[..., Tensor], far: float) -> None:
    """Gradients go through scores beside which finfo.min stands, as through all others. far: keys and values may have
    means that are large beside what they differ by."""
    q, k, v = qkv(batch=3)
    k, v = (x.detach().add(far).requires_grad_() for x in (k, v))
    inputs = [q, k, v, padding()]
    assert step(program, inputs)["gradient 0"][1].abs().max() > 1e-4, "rows without keys send something"
    check(program, inputs, route, "inductor" if route == "default" else "triton")


@pytest.mark.parametrize("wanted", range(2), ids=["q", "k"])
def test_rows_whose_masks_were_added_without_a_gradient(interpreter: None, wanted: int) -> None:
    inputs = [*qkv(batch=3), padding()]
    for n in {0, 1, 2} - {wanted}:
        inputs[n].requires_grad_(False)
    check(added, inputs, "kernel")


def test_weights_of_rows_whose_masks_were_added_are_dropped_out(interpreter: None) -> None:
    """Gradients are those of the same program with the weights that the kernel has kept, as its result tells: of
    values that are the rows of a unit matrix it is the weights."""

    def masked(q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
        return (scores(q, k) + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1)

    def program(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.dropout(masked(q, k, keep), 0.5) @ v

    q, k, _ = qkv(batch=3)
    inputs = [q, k, torch.eye(23).expand(3, 2, 23, 23).contiguous().requires_grad_(), padding()]
    report = xfcompile.Report()
    ours = step(compiled(program, "kernel", report), inputs)
    assert [site.route for site in report.sites] == ["triton"]
    kept = ours["output 0"] > 0
    assert 0.4 < kept[1].float().mean().item() < 0.6, "no row of the second sequence sees a key"

    def same(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return torch.where(kept, 2 * masked(q, k, keep), 0.0) @ v

    judge(step(same, doubled(inputs)), step(same, inputs), ours, EPS)


def capped(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return ((scores(q, k) / 2).tanh() * 2 + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1) @ v


def masked_twice(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Of what is replaced by a number no gradient comes."""
    late = torch.arange(k.shape[-2]) > 20
    masked = scores(q, k).masked_fill(late, LEAST) + torch.where(keep[:, None, None, :], 0.0, LEAST)
    return masked.softmax(-1) @ v


def scaled_by_row(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    steep = scores(q, k) * (1 + torch.arange(q.shape[-2])[:, None])
    return (steep + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
    return (scores(q, k) + bias + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1) @ v


def masked_after(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """As `masked_twice`, the other way around."""
    late = torch.arange(k.shape[-2]) > 20
    masked = scores(q, k) + torch.where(keep[:, None, None, :], 0.0, LEAST)
    return masked.masked_fill(late, LEAST).softmax(-1) @ v


def sloped(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    slope = torch.arange(k.shape[-2]) * 0.1
    return (scores(q, k) + slope + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1) @ v


def tempered(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, x: Tensor) -> Tensor:
    return (scores(q, k) * torch.sigmoid(x) + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1) @ v


def sinking(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sink: Tensor) -> Tensor:
    masked = scores(q, k) + torch.where(keep[:, None, None, :], 0.0, LEAST)
    column = sink[:, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([masked, column], -1).softmax(-1)[..., :-1] @ v


def shifted(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, shift: Tensor) -> Tensor:
    """By a number for each row, which no softmax sees."""
    return (scores(q, k) + shift[:, None] + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1) @ v


@pytest.mark.parametrize("program", [masked_twice, biased], ids=lambda f: f.__name__)
def test_rows_whose_masks_were_added_to_more_than_a_score(route: str, program: Callable[..., Tensor]) -> None:
    inputs = [*qkv(batch=3), padding()]
    if program is biased:
        inputs.append(numbers(2, 19, 23, seed=4))
    report = xfcompile.Report()
    ours = step(compiled(program, route, report), inputs)
    (site,) = report.sites
    assert site.route == "inductor" and site.reason, site
    assert program is masked_twice or "send gradients" in site.reason
    judge(step(program, doubled(inputs)), step(program, inputs), ours, EPS)


@pytest.mark.parametrize(
    "program, more, expected",
    [
        (capped, [], "triton"),
        (scaled_by_row, [], "triton"),
        (masked_after, [], "inductor"),
        (sloped, [], "triton"),
        (tempered, [torch.tensor(1.5)], "triton"),
        (sinking, [torch.tensor([0.3, -0.2], requires_grad=True)], "triton"),
        (shifted, [torch.linspace(-1, 1, 19).requires_grad_()], "inductor"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gradients_of_rows_whose_masks_were_added(
    program: Callable[..., Tensor], more: list[Tensor], expected: str, interpreter: None
) -> None:
    inputs = [*qkv(batch=3), padding(), *more]
    sent = step(program, inputs)["gradient 0"][1].abs().max().item()
    assert sent > 1e-4 or program is sinking, "rows without keys send something, unless there is a sink"
    check(program, inputs, "kernel", expected)


# -- weights that something else needs -------------------------------------------------------------------------------


def test_weights_that_are_returned(route: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores(q, k).softmax(-1)
        return weights @ v, weights

    report = xfcompile.Report()
    ours = step(compiled(program, route, report), qkv())
    judge(step(program, doubled(qkv())), step(program, qkv()), ours, EPS)
    assert all(site.route == "inductor" or not site.matched for site in report.sites)


def test_weights_of_two_products(route: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1)
        return weights @ v + weights @ v.square()

    report = xfcompile.Report()
    ours = step(compiled(program, route, report), qkv())
    judge(step(program, doubled(qkv())), step(program, qkv()), ours, EPS)


def test_weights_in_a_penalty(route: str) -> None:
    """Their entropy is part of the loss."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores(q, k).softmax(-1)
        return weights @ v, -(weights * weights.log()).sum(-1)

    report = xfcompile.Report()
    ours = step(compiled(program, route, report), qkv())
    judge(step(program, doubled(qkv())), step(program, qkv()), ours, EPS)


def test_a_result_of_which_a_detached_copy_is_kept(route: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = scores(q, k).softmax(-1) @ v
        return out, out.detach() * 2

    check(program, qkv(), route)


# -- gradcheck -------------------------------------------------------------------------------------------------------

DOUBLE = torch.float64
SCALED = S * sympy.Rational(3, 10)
CAUSAL = Band(None, I + 1, True)


def spec(score: sympy.Expr, *shapes: tuple[int, ...], **more: object) -> tuple[ScoreSpec, tuple[tuple[int, ...], ...]]:
    operands = tuple(Operand(DOUBLE, len(shape)) for shape in shapes)
    return ScoreSpec(score, operands=operands, **more), shapes  # type: ignore[arg-type]


SPECS = {
    "plain": spec(SCALED),
    "causal": spec(SCALED, keep=J <= I, band=CAUSAL),
    "sink": spec(SCALED, (2,), sink=Load(0, H)),
    "bias": spec(SCALED + Load(0, B, H, I, J), (2, 2, 5, 6)),
    "bias of keys": spec(SCALED + Load(0, B, J), (2, 6)),
    "alibi": spec(SCALED + Load(0, H) * (J - I), (2,)),
    "temperature": spec(S * Load(0, H), (2,)),
    "table": spec(SCALED + Load(0, H, J - I + 4), (2, 10)),
    "soft cap": spec(2 * sympy.tanh((SCALED + Load(0, I, J)) / 2), (5, 6), keep=J <= I, band=CAUSAL),
    "gate": spec(SCALED * Load(0, B, H, I) + Load(1, H, J), (2, 2, 5), (2, 6)),
    "clamped": spec(Where(Load(0, H) > SCALED, SCALED, Load(0, H)), (2,)),
}


@pytest.mark.parametrize("name", SPECS)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    """In fp64, through the op, whose CPU implementation is the definition and computes in the inputs' own dtype."""
    described, shapes = SPECS[name]
    key = prepare(described)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_()

    def through(q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> Tensor:
        out: Tensor = torch.ops.xfcompile.attention(q, k, v, list(operands), [], [], key)[0]
        assert out.dtype == DOUBLE
        return out

    inputs = [draw(2, 2, 5, 2), draw(2, 2, 6, 2), draw(2, 2, 6, 3), *(draw(*shape) for shape in shapes)]
    assert torch.autograd.gradcheck(through, inputs, fast_mode=name != "plain")
    heads = [draw(2, 4, 5, 2), *inputs[1:]]
    if all(H not in load.free_symbols for load in described.score.atoms(Load)) and described.sink is None:
        assert torch.autograd.gradcheck(through, heads, fast_mode=True)
