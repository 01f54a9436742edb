"""What all tests share: none sees what another compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
