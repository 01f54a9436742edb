"""How far results are from fp64's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from xfcompile.bench import attention, bias_act_dropout, decode, gated_mlp, models
from xfcompile.bench.errors import InDouble, compared, distance, distances, relative
from xfcompile.bench.job import Benchmark, Place, Work

QUICK = Place("cpu", torch.float32, "quick")


def test_a_nan_of_one_side_alone_is_an_infinite_error() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert distance(nan, nan.double()).difference == 0
    assert distance(nan, torch.ones(2, dtype=torch.double)).difference == math.inf
    assert distance(torch.ones(2), nan.double()).difference == math.inf
    assert compared([distance(nan, torch.ones(2).double())], [distance(nan, nan.double())], torch.float32) == {
        "error": math.inf, "error_by_eager": math.inf,
    }  # fmt: skip


def test_infinities_are_equal_to_themselves() -> None:
    inf = torch.tensor([1.0, float("inf")])
    assert distance(inf, inf.double()).difference == 0
    assert distance(torch.ones(2), inf.double()).difference == math.inf


def test_other_shapes_are_no_results() -> None:
    with pytest.raises(ValueError, match=r"shape \[2\] where \[1\]"):
        distance(torch.ones(2), torch.ones(1).double())


def test_the_worst_result_counts_in_units_of_eagers() -> None:
    exact = [torch.ones(4).double(), torch.full((4,), 2.0).double()]
    eager = distances([torch.ones(4) * 1.01, torch.full((4,), 2.02)], exact)
    ours = distances([torch.ones(4) * 1.01, torch.full((4,), 2.1)], exact)
    found = compared(ours, eager, torch.bfloat16)
    assert found["error_by_eager"] == pytest.approx(5, rel=1e-4)
    assert found["error"] == pytest.approx(relative(ours)) == pytest.approx(0.0449, rel=1e-2)


def test_a_gradient_that_is_zero_but_for_rounding_counts_for_nothing() -> None:
    exact = [torch.ones(4).double(), torch.zeros(4).double()]
    eager = distances([torch.ones(4) * 1.001, torch.zeros(4)], exact)
    ours = distances([torch.ones(4) * 1.001, torch.full((4,), 1e-9)], exact)
    assert compared(ours, eager, torch.float32)["error_by_eager"] == pytest.approx(1, rel=1e-3)
    assert compared(ours, eager, torch.bfloat16)["error_by_eager"] < 1


def test_in_double_a_model_that_casts_to_fp32_computes_in_fp64() -> None:
    class Casts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.float().softmax(-1, dtype=torch.float32).to(torch.float32)
            return y + torch.zeros(3, dtype=torch.float16) + x.half()

    x = torch.randn(3).double()
    with InDouble():
        found = Casts()(x)
    assert found.dtype == torch.float64
    assert torch.equal(found, x.softmax(-1) + x)


ROWS = [
    (attention.BENCHMARK, "documents, forward+backward"),
    (attention.BENCHMARK, "T5 bias, forward+backward"),
    (attention.BENCHMARK, "dense bias, forward"),
    (gated_mlp.BENCHMARK, "block, forward+backward"),
    (bias_act_dropout.BENCHMARK, "mlp, inference"),
    (decode.BENCHMARK, "j <= position"),
    (models.BENCHMARK, "Llama, train, eager"),
    (models.BENCHMARK, "GPT-OSS, infer"),
    (models.BENCHMARK, "ModernBERT, packed, infer, eager"),
    (models.BENCHMARK, "Whisper, train, sdpa"),
    (models.BENCHMARK, "Llama, static cache, decode, sdpa"),
]


def work(benchmark: Benchmark, title: str) -> Work:
    (row, *_) = [row for row in benchmark.rows("quick") if row.title.startswith(title)]
    torch.manual_seed(0)
    made = benchmark.prepare(row, QUICK)
    assert isinstance(made, Work)
    return made


@pytest.mark.parametrize("benchmark,title", ROWS, ids=[title for _, title in ROWS])
def test_eager_is_as_near_to_the_exact_results_as_rounding_lets_it(benchmark: Benchmark, title: str) -> None:
    made = work(benchmark, title)
    assert not isinstance(made.check, str), made.check
    with torch.set_grad_enabled(made.grad):
        exact = [t.detach().clone() for t in made.check.exact()]
        assert all(t.dtype == torch.float64 for t in exact)
        made.clear()
        outcome = made.way("eager")()
        seen = made.check.seen(outcome)
        assert all(t.dtype == torch.float32 for t in seen)
        error = relative(distances(seen, exact))
    assert 0 < error < 2e-6


@pytest.mark.parametrize("program", ["ALiBi", "sliding window", "prefix LM", "documents", "key padding", "T5 bias"])
def test_sdpa_is_told_what_the_program_says(program: str) -> None:
    made = work(attention.BENCHMARK, f"{program}, forward,")
    assert not isinstance(made.check, str)
    with torch.no_grad():
        found = distances(made.check.seen(made.way("sdpa")()), made.check.exact())
    assert relative(found) < 1e-6


@pytest.mark.parametrize("program", ["dense bias", "T5 bias"])
def test_sdpa_gives_learned_biases_their_gradients(program: str) -> None:
    made = work(attention.BENCHMARK, f"{program}, forward+backward")
    assert not isinstance(made.check, str)
    outcome = made.way("sdpa-math")()
    assert len(outcome) == 4
    assert relative(distances(made.check.seen(outcome), made.check.exact())) < 1e-6


def test_told_by_hand_gives_what_the_model_gives() -> None:
    made = work(models.BENCHMARK, "ViT-L 384, train, eager")
    assert not isinstance(made.check, str)
    exact = [t.clone() for t in made.check.exact()]
    made.clear()
    # Inductor itself is not what is tested.
    with torch._dynamo.config.patch(disable=True):
        outcome = made.way("told")()
    assert relative(distances(made.check.seen(outcome), exact)) < 2e-6
