"""The example that trains a small GPT: that it runs, and what its stored results say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = {"eager", "eager in fp64", "inductor", "xformers"}


def farthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_the_stored_curves_are_of_200_steps_and_together_within_noise() -> None:
    page: dict[str, Any] = json.loads((EXAMPLES / "results" / "train_gpt.json").read_text())
    losses = page["losses"]
    assert set(losses) == RUNS
    assert {len(x) for x in losses.values()} == {200} and page["config"]["steps"] == 200
    apart = {name: farthest(x, losses["eager in fp64"]) for name, x in losses.items()}
    assert apart["xformers"] <= 2 * max(apart["eager"], apart["inductor"]) < 1e-3
    assert losses["xformers"][0] - losses["xformers"][-1] > 2, "it has not learned"
    assert "3 sdpa" in page["data"]["attention"]
    assert (EXAMPLES / "results" / "train_gpt.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_few_steps_give_the_same_losses() -> None:
    example = runpy.run_path(str(EXAMPLES / "train_gpt.py"))
    config = example["Config"](layers=1, width=32, heads=2, length=48, batch=2, steps=3, warmup=1)
    runs, data = example["train"](config)
    assert set(runs) == RUNS
    assert "1 matched (1 sdpa)" in data["attention"]
    exact = runs["eager in fp64"].losses
    assert all(len(run.losses) == 3 and farthest(run.losses, exact) < 1e-5 for run in runs.values())
    assert exact[-1] < exact[0]
