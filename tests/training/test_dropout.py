"""Dropout of attention's weights in whole programs: one seed a graph, and what is dropped in the forward is dropped in
its recomputation and in the backward. Of values that are the rows of a unit matrix a result is the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step import OPTIONS, Launches, compiled, doubled, judge, numbers, step
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import xfcompile

N, RATE = 23, 0.25
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("interpreter")


def inputs() -> list[Tensor]:
    q, k = (numbers(2, 2, N, 16, seed=s) for s in range(2))
    return [q, k, torch.eye(N).expand(2, 2, N, N).contiguous().requires_grad_()]


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1)


def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(weights(q, k), RATE) @ v


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(RATE)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.drop(weights(q, k)) @ v


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "a function": called,
    "a module": Module(),
    "in place": lambda q, k, v: F.dropout(weights(q, k), RATE, True, True) @ v,
    "torch's own": lambda q, k, v: torch.dropout(weights(q, k), RATE, True) @ v,
    "in einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", F.dropout(weights(q, k), p=RATE), v),
    "after a cast": lambda q, k, v: F.dropout((q @ k.mT * 0.25).float().softmax(-1).type_as(q), RATE) @ v,
    "before a cast": lambda q, k, v: F.dropout((q @ k.mT * 0.25).float().softmax(-1), RATE).to(q.dtype) @ v,
    "scores in fp32": lambda q, k, v: F.dropout(F.softmax(q @ k.mT * 0.25, -1, dtype=torch.float32), RATE) @ v,
    "of SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=RATE, scale=0.25),
    "two heads in a batch": lambda q, k, v: torch.bmm(
        F.dropout(torch.baddbmm(q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.25).softmax(-1), RATE),
        v.flatten(0, 1),
    ).view(2, 2, N, N),
}


def assert_kept_is_kept(ours: dict[str, Tensor], given: Sequence[Tensor]) -> Tensor:
    """A step's gradients are those of the program that keeps what the step's result says; returns what that is."""
    kept = ours["output 0"] != 0

    def same(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(kept, weights(q, k) / (1 - RATE), 0.0) @ v

    judge(step(same, doubled(given)), step(same, given), ours, EPS)
    rate = 1 - kept.double().mean().item()
    assert abs(rate - RATE) < 5 * (RATE * (1 - RATE) / kept.numel()) ** 0.5
    return kept


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_a_result_keeps_its_gradients_keep(name: str, launches: Launches) -> None:
    report = xfcompile.Report()
    ours = step(compiled(SPELLINGS[name], "kernel", report), inputs())
    assert [site.route for site in report.sites] == ["triton"], report
    assert launches.forwards == len(launches.needs) == 1
    assert_kept_is_kept(ours, inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["after a cast", "before a cast"])
def test_on_either_side_of_a_cast_of_halves(name: str, dtype: torch.dtype) -> None:
    given = [x.detach().to(dtype).requires_grad_() for x in inputs()]
    report = xfcompile.Report()
    ours = step(compiled(SPELLINGS[name], "kernel", report), given)
    assert [site.route for site in report.sites] == ["triton"], report
    kept = ours["output 0"] != 0

    def same(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.where(kept, (q @ k.mT * 0.25).to(wide).softmax(-1) / (1 - RATE), 0.0).to(q.dtype) @ v

    judge(step(same, doubled(given)), step(same, given), ours, torch.finfo(dtype).eps)
    assert abs(1 - kept.double().mean().item() - RATE) < 0.05


# -- recomputed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same_again(reentrant: bool, launches: Launches) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(called, q, k, v, use_reentrant=reentrant)

    report = xfcompile.Report()
    ours = step(compiled(program, "kernel", report), inputs())
    assert [site.route for site in report.sites] == ["triton"], report
    assert launches.forwards == 2, "the forward was not run again"
    assert_kept_is_kept(ours, inputs())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_compiled_program_drops_the_same_again(reentrant: bool, launches: Launches) -> None:
    report = xfcompile.Report()
    inner = compiled(called, "kernel", report)
    ours = step(lambda *x: checkpoint(inner, *x, use_reentrant=reentrant), inputs())
    assert {site.route for site in report.sites} == {"triton"}, report
    assert launches.forwards == 2, "the forward was not run again"
    assert_kept_is_kept(ours, inputs())


def test_through_inductor_a_checkpoint_drops_the_same_again(launches: Launches) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(called, q, k, v, use_reentrant=False)

    ours = step(torch.compile(program, backend=xfcompile.xformers, options=OPTIONS["kernel"]), inputs())
    assert launches.forwards == 2, "the forward was not run again"
    assert_kept_is_kept(ours, inputs())


def test_a_graph_that_is_kept_drops_the_same_again() -> None:
    leaves = inputs()
    total = compiled(called, "kernel", xfcompile.Report())(*leaves).square().sum()
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# -- seeds ----------------------------------------------------------------------------------------------------------


def layers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three attentions of the same scores."""
    return called(q, k, v), called(q, k, v), F.dropout(weights(q, k).clone(), RATE) @ v


def test_a_graph_draws_one_seed_and_each_attention_drops_out_by_itself() -> None:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Any:
        assert len(xfcompile.rewrite(gm, examples, OPTIONS["kernel"]).sites) == 3
        graphs.append(gm)
        return gm

    run = torch.compile(layers, backend=backend)
    kept = [x != 0 for x in run(*inputs())]
    (graph,) = graphs
    (seed,) = [n for n in graph.graph.nodes if n.target is torch.randint]
    calls = [n for n in graph.graph.nodes if "xfcompile.attention" in str(n.target)]
    assert [n.kwargs["seed"] for n in calls] == [seed] * 3
    assert sorted(n.kwargs["stream"] for n in calls) == [0, 1, 2]
    kept += [x != 0 for x in run(*inputs())]  # the next call draws another seed
    for n, a in enumerate(kept):
        for b in kept[:n]:
            together = (a & b).double().mean().item()
            expected = (1 - RATE) ** 2
            assert abs(together - expected) < 5 * (expected * (1 - expected) / a.numel()) ** 0.5


def test_the_users_seed_decides() -> None:
    run = compiled(called, "kernel", xfcompile.Report())
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(run(*inputs()))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
