"""Attention's kernel for Hopper, written in each way that there is, against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, SCALE, Case, Inputs, Sizes, check, inputs, named, normal
from test_attention_gpu import HALVES, on_gpu
from test_blocks import MORE
from test_blocks_gpu import wide

from xfcompile.kernels.attention import hopper, launch, launch_hopper, prepare
from xfcompile.kernels.attention.hopper import Variant
from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Operand, ScoreSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

VARIANTS = {
    "turns": Variant(turns=True, tree=True),
    "twice": Variant(twice=True, backwards=True, early=True),
    "three": Variant(3, turns=True),
    "three, persistent": Variant(3, turns=True, persistent=True, tree=True),
    "emulated": Variant(turns=True, emulated=2),
    "columns": Variant(columns=True, turns=True, stages=2),
    "columns, three": Variant(3, columns=True, persistent=True),
    "bounded": Variant(bounded=True, emulated=4, persistent=True),
    "bounded, three": Variant(3, bounded=True, turns=True),
    "tiles": Variant(tiles=True, persistent=True),
    "tiles, turns": Variant(tiles=True, turns=True),
    "tiles, three": Variant(3, tiles=True, turns=True, stages=3),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Case, torch.dtype], Variant]]:
    """Has a case computed by a variant, as far as there is one for it."""
    wanted: Variant = request.param

    def choose(case: Case, dtype: torch.dtype) -> Variant:
        prepared = launch.program(prepare(case.spec))
        prepared.calls.clear()
        return launch_hopper.usual(prepared.key, dtype, case.sizes.dq)

    def usual(key: str, dtype: torch.dtype, dq: int) -> Variant:
        width = hopper.columns(min(dq, hopper.HEAD_DIMS[-1]))
        return hopper.suited(wanted, *launch_hopper._made_of(key), dtype, width)

    launch_hopper._why_not.cache_clear()
    monkeypatch.setattr(launch_hopper, "usual", usual)
    yield choose
    launch_hopper._why_not.cache_clear()
    for prepared in launch._programs.values():
        prepared.calls.clear()


def dense(dtype: torch.dtype, shared: str, masked: float | None) -> Case:
    """A bias of each score, in the dtype of what is multiplied; masked: what some scores get, and -inf whole rows."""

    def tensors(sizes: Sizes) -> list[torch.Tensor]:
        x = normal(1 if "b" in shared else sizes.batch, 1 if "h" in shared else sizes.heads, sizes.lq, sizes.lk)
        if masked is not None:
            x[..., ::5, 7:200] = masked
        if masked == -torch.inf:
            x[..., 3, :] = masked
        return [x.to(dtype)]

    load = Load(0, 0 if "b" in shared else B, 0 if "h" in shared else H, I, J)
    spec = ScoreSpec(SCALE + load, operands=(Operand(dtype, 4),), far=masked is not None, dead="nan")
    return Case(f"{dtype} {shared} {masked}", spec, tensors)


DENSE = [
    dense(dtype, shared, masked)
    for dtype in HALVES
    for shared in ("", "b")
    for masked in (None, float(torch.finfo(dtype).min), -torch.inf)
]
NAMES = (
    "plain", "causal", "bottom_right_dead_rows", "prefix", "padding_mean", "alibi", "soft_cap", "soft_cap_causal",
    "sink",
)  # fmt: skip
USUAL = [named(name) for name in NAMES]


def at(case: Case, dtype: torch.dtype, dim: int, lq: int, lk: int) -> Inputs:
    sizes = wide(case, dim, lq, lk)
    return on_gpu(inputs(replace(case, sizes=sizes), dtype, "transposed", sizes))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", USUAL, ids=lambda case: case.name)
def test_scores(case: Case, dim: int, variant: Callable[..., Variant]) -> None:
    for dtype in HALVES:
        for lq, lk in ((300, 420), (1000, 129), (65, 1500)):
            variant(case, dtype)
            check(case, at(case, dtype, dim, lq, lk))


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_every_case(case: Case, variant: Callable[..., Variant]) -> None:
    variant(case, torch.bfloat16)
    check(case, at(case, torch.bfloat16, 64, 300, 420))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_a_bias_of_each_score(case: Case, dim: int, variant: Callable[..., Variant]) -> None:
    dtype = case.spec.operands[0].dtype
    for lq, lk in ((300, 424), (1000, 136), (65, 1504), (300, 421)):
        chosen = variant(case, dtype)
        x = at(case, dtype, dim, lq, lk)
        taken = launch_hopper.suits(
            launch.program(prepare(case.spec)), x.q, x.k, x.v, x.operands, (chosen.rows, hopper.KEYS)
        )
        assert taken == (chosen.tiles and lk % 8 == 0)
        check(case, x)
