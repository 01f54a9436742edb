"""Attention's kernel for Hopper, written in each way that there is, against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import SCALE, Case, Inputs, Sizes, check, inputs, named, normal
from test_attention_gpu import HALVES, on_gpu
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

ANY = ("plain", "causal", "bottom_right_dead_rows", "padding_mean", "sink")
TESTED: dict[str, tuple[Variant, tuple[str, ...]]] = {
    "turns": (Variant(turns=True, tree=True), ANY),
    "twice": (Variant(twice=True, backwards=True, early=True), ANY),
    "three": (Variant(3, turns=True), (*ANY, "prefix", "alibi", "soft_cap_causal")),
    "three, persistent": (Variant(3, turns=True, persistent=True, tree=True), ANY),
    "emulated": (Variant(turns=True, emulated=2), ANY),
    "columns": (Variant(columns=True, turns=True, stages=2), ("alibi",)),
    "columns, three": (Variant(3, columns=True, persistent=True), ("alibi",)),
    "bounded": (Variant(bounded=True, emulated=4, persistent=True), ("soft_cap", "soft_cap_causal")),
    "bounded, three": (Variant(3, bounded=True, turns=True), ("soft_cap", "soft_cap_causal")),
}
"""Variants, and the cases that say something of them."""

BIASED = {
    "tiles": Variant(tiles=True, persistent=True),
    "tiles, turns": Variant(tiles=True, turns=True),
    "tiles, three": Variant(3, tiles=True, turns=True, stages=3),
}

Choose = Callable[[Variant, Case, torch.dtype, int], Variant]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Choose]:
    """Has a case computed by a variant, as far as there is one for it, and sees to it that it is."""

    def chosen(wanted: Variant, case: Case, dtype: torch.dtype, dim: int) -> Variant:
        def usual(key: str, dtype: torch.dtype, dq: int) -> Variant:
            return hopper.suited(wanted, *launch_hopper._made_of(key), dtype, hopper.columns(min(dq, 128)))

        monkeypatch.setattr(launch_hopper, "usual", usual)
        launch_hopper._why_not.cache_clear()
        prepared = launch.program(prepare(case.spec))
        prepared.calls.clear()
        return usual(prepared.key, dtype, dim)

    yield chosen
    launch_hopper._why_not.cache_clear()
    for prepared in launch._programs.values():
        prepared.calls.clear()
    assert not [record for record in caplog.records if "another kernel takes its place" in record.message]


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


def at(case: Case, dtype: torch.dtype, dim: int, lq: int, lk: int) -> Inputs:
    sizes = wide(case, dim, lq, lk)
    return on_gpu(inputs(replace(case, sizes=sizes), dtype, "transposed", sizes))


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float16)], ids=str)
@pytest.mark.parametrize(("name", "case"), [(name, named(x)) for name, (_, xs) in TESTED.items() for x in xs])
def test_scores(name: str, case: Case, dim: int, dtype: torch.dtype, choose: Choose) -> None:
    for lq, lk in ((300, 420), (1000, 129), (65, 1500)):
        choose(TESTED[name][0], case, dtype, dim)
        check(case, at(case, dtype, dim, lq, lk))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_of_each_score(name: str, case: Case, dim: int, choose: Choose) -> None:
    if BIASED[name].stages == 3 and dim == 128:
        pytest.skip("shared memory has no room for three stages beside a bias")
    dtype = case.spec.operands[0].dtype
    for lq, lk in ((300, 424), (1000, 136), (65, 1504), (300, 421)):
        chosen = choose(BIASED[name], case, dtype, dim)
        x = at(case, dtype, dim, lq, lk)
        prepared = launch.program(prepare(case.spec))
        taken = launch_hopper.suits(prepared, x.q, x.k, x.v, x.operands, (chosen.rows, hopper.KEYS))
        assert taken == (lk % 8 == 0)
        check(case, x)
