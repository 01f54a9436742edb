"""Weights that come of a mask's bytes and of random numbers: products of them, as they are compiled for GPUs.

Triton multiplies wrongly there where a product adds up few numbers (`tiles.DEEP`), which the interpreter does not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sympy
import torch
from test_ahead import A100, H200, compiled, folder, laid_out  # noqa: F401 (a fixture)

from xfcompile import ahead
from xfcompile.ahead import Gpu
from xfcompile.kernels.attention import backward_call, launch_blocks, prepare
from xfcompile.kernels.attention.tiles import DEEP, DEPTH, Tiles, deepened, depth
from xfcompile.pretend import instead
from xfcompile.score import B, J, Load, S
from xfcompile.site import Operand, ScoreSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from resources import shallow

PADDED = ScoreSpec(S / 8, sympy.Ne(Load(0, B, J), 0), "mean", (Operand(torch.bool, 2),))
DROPPED = replace(PADDED, dropout=0.25)


@dataclass(frozen=True)
class Shape:
    """With as many keys as queries. direct: whether fp32 is multiplied by tensor cores."""

    gpu: Gpu
    dtype: torch.dtype
    length: int
    dim: int
    direct: bool = False


TINY = Tiles(16, 16, 1, 2)
SHAPES = {
    "bf16": Shape(H200, torch.bfloat16, 144, 32),
    "fp16": Shape(A100, torch.float16, 140, 32),
    "tf32": Shape(A100, torch.float32, 100, 32, direct=True),
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """As windows have tiles where nothing is dropped out."""
    monkeypatch.setattr(launch_blocks, "choose", lambda *about: TINY)
    monkeypatch.setattr(backward_call, "choose_backward", lambda *about: TINY)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", SHAPES)
def test_products_add_up_enough(name: str, folder: Path) -> None:  # noqa: F811
    shape, products = SHAPES[name], torch.backends.cuda.matmul
    with instead(products, "fp32_precision", "tf32" if shape.direct else products.fp32_precision):
        text = made(shape, folder)
    assert "kWidth = 8" in text and shallow(text) == []


@pytest.mark.usefixtures("tiny")
def test_what_is_looked_for_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Without more depth products were wrong on an H200: dk and dv of masks of one byte a key."""
    for module in (backward_call, launch_blocks):
        monkeypatch.setattr(module, "depth", lambda spec: DEPTH)
    other = replace(DROPPED, dropout=0.5)  # of which no tiles are remembered
    assert len(shallow(made(SHAPES["bf16"], folder, other))) >= 4, "out, dq, dk and dv"


def made(shape: Shape, folder: Path, spec: ScoreSpec = DROPPED) -> str:  # noqa: F811
    """All that was compiled for a forward and a backward, in Triton's language for GPUs."""
    q = laid_out(2, 4, shape.length, shape.dim, dtype=shape.dtype)
    lse, seed = laid_out(2, 4, shape.length, dtype=torch.float32), laid_out(1, dtype=torch.int64)
    kept, key, random = laid_out(2, shape.length, dtype=torch.bool), prepare(spec), {"seed": seed, "stream": 1}
    needs = (True, True, True, False)
    forward = (q, q, q, (kept,), (), (), key)
    backward = (q, q, q, q, q, lse, (kept,), (), (), key, needs)
    for op, args in (("attention", forward), ("attention_backward", backward)):
        compiled(ahead.call_of(getattr(torch.ops.xfcompile, op).default, args, random, shape.gpu))
    return "\n".join(path.read_text() for path in sorted(folder.glob("*/attention_*.ttgir")))


def test_which_sites_take_more() -> None:
    data = replace(DROPPED, operands=(Operand(torch.float32, 2),))
    assert [depth(spec) for spec in (PADDED, DROPPED, data, replace(data, operands=()))] == [DEPTH, DEEP, DEPTH, DEPTH]


@pytest.mark.parametrize(
    ("tiles", "over_queries", "wanted"),
    [((16, 32), False, (16, 32)), ((16, 32), True, (32, 32)), ((16, 16), False, (16, 32)), ((64, 64), True, (64, 64))],
)
def test_tiles_are_deepened(tiles: tuple[int, int], over_queries: bool, wanted: tuple[int, int]) -> None:
    assert deepened(Tiles(*tiles, 1, 2), DEEP, over_queries=over_queries) == Tiles(*wanted, 1, 2)


OPERANDS = "tensor<32x{k}x{dtype}, #ttg.dot_op<{{opIdx = 0, parent = #mma, kWidth = {width}}}>> * tensor<{k}x32x{dtype}"


@pytest.mark.parametrize(
    ("k", "width", "dtype", "found"),
    [
        (16, 8, "bf16", True),
        (32, 8, "bf16", False),
        (16, 4, "f16", False),
        (16, 8, "f32", True),
        (16, 2, "bf16", False),
    ],
)
def test_products_that_repeat_numbers(k: int, width: int, dtype: str, found: bool) -> None:
    line = f"%dv_338 = tt.dot %a, %b, %c : {OPERANDS.format(k=k, width=width, dtype=dtype)}, ...> -> tensor<32x32xf32>"
    assert bool(shallow(f"before\n{line}\nafter")) == found
