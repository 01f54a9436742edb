"""The random numbers of the kernel for Hopper, whose text is run here on arrays: no interpreter runs Gluon."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from xfcompile.kernels import philox
from xfcompile.kernels.gemm import hopper_text


class Block:
    """An array that promotes integers as Triton does: to the wider type, and numbers to the array's."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)
        self.shape, self.type = self.values.shape, type("Type", (), {"layout": None})

    def to(self, dtype: Any) -> Block:
        return Block(self.values.astype(dtype))


def _operator(apply: Callable[[Any, Any], Any]) -> Callable[[Block, Any], Block]:
    def run(a: Block, b: Any) -> Block:
        mine = a.values.dtype
        other = b.values if isinstance(b, Block) else np.asarray(b).astype(mine)
        wide = max(mine, other.dtype, key=lambda d: d.itemsize)
        return Block(apply(a.values.astype(wide), other.astype(wide)))

    return run


for _name in ("add", "mul", "xor", "or_", "and_", "rshift", "lshift", "ge"):
    setattr(Block, f"__{_name.rstrip('_')}__", _operator(getattr(operator, _name)))


class Gluon:
    uint32, uint64, int32, int64, static_range = np.uint32, np.uint64, np.int32, np.int64, range

    @staticmethod
    def full(shape: tuple[int, ...], value: int, dtype: Any, layout: None) -> Block:
        return Block(np.full(shape, value, dtype))


def functions() -> dict[str, Any]:
    """`philox` and `pieces` of the kernel's text."""
    found: dict[str, Any] = {"gl": Gluon}
    for part in hopper_text.DROPOUT.split("@gluon.jit\n"):
        if part.startswith(("def philox(", "def pieces(")):
            exec(part.split("@triton")[0], found)
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # products that wrap around
@pytest.mark.parametrize("seed", [0, 12345, -(2**61) - 77, 2**62 + 3])
@pytest.mark.parametrize("start", [0, 2**32 - 5])
def test_they_are_those_of_the_definition(seed: int, start: int) -> None:
    p, stream, groups = 0.3, 5, np.arange(start, start + 400)
    text = functions()
    words = text["philox"](Block(np.int64(seed)), Block(groups), Block(np.int32(stream)))
    eight = Block(np.zeros(len(groups), np.int32))
    for n, word in enumerate(words):
        eight |= text["pieces"](word, philox.threshold(p)) << 2 * n
    kept = (eight.values[:, None] >> np.arange(8)) & 1
    exact = philox.philox(seed, torch.from_numpy(groups), torch.from_numpy(groups) >> 32, 0, stream)
    halves = torch.stack([half for w in exact for half in (w & 0xFFFF, w >> 16)], -1)
    assert np.array_equal(kept != 0, (halves >= philox.threshold(p)).numpy())
    assert 0.6 < kept.mean() < 0.8
