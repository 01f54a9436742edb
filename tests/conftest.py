"""What all tests share: none sees what another compiled."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

THINNED = {
    "test_bias_act_dropout.py": 4,
    "test_gated_spellings.py": 4,
    "test_gated_near_misses.py": 2,
    "test_gated_mlp.py": 3,
    "test_generate.py": 2,
    "test_guards.py": 3,
    "test_decode.py": 2,
    "test_far_masks.py": 2,
    "test_backward.py": 2,
    "test_gradients.py": 2,
    "test_bias_models.py": 3,
    "test_distances_by_sdpa.py": 3,
    "test_backward_distances.py": 2,
    "test_dead_rows.py": 2,
    "test_gated_models.py": 3,
}
"""Long tables, of which one case in so many runs each time; the others are `slow`: they vary what these do too."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run one test in so many of each file: a first look")


def numbered(items: list[pytest.Item]) -> list[tuple[int, pytest.Item]]:
    """Each with its number in its file."""
    numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
    return [(next(numbers[item.path.name]), item) for item in items]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--every")
    items[:] = [item for number, item in numbered(items) if number % every == 0]
    for number, item in numbered(items):
        if number % THINNED.get(item.path.name, 1):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
