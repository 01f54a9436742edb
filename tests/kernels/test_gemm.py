"""The product of matrices for Hopper without a GPU: which tensors it takes, which tiles, and what runs instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gated_cases import FORMULAS, Case, inputs

from xfcompile import activation
from xfcompile.activation import KEEP, X, tensor, vector
from xfcompile.kernels.attention.launch import FirstThatRuns
from xfcompile.kernels.bias_act_dropout import launch_hopper as linear
from xfcompile.kernels.bias_act_dropout import text_of
from xfcompile.kernels.gated_mlp import launch as gated
from xfcompile.kernels.gated_mlp import launch_hopper as gated_hopper
from xfcompile.kernels.gated_mlp.op import _operands
from xfcompile.kernels.gemm import hopper, launch, tiles
from xfcompile.kernels.gemm.tiles import SHARED, USUAL, choose

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def gluon_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_hopper, "missing", hopper.why_not)
    monkeypatch.setattr(linear, "missing", hopper.why_not)


# -- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "features", "products", "name"),
    [
        (4096, 11008, 2, "wide"), (16384, 14336, 2, "wide"), (16384, 2816, 2, "wide"), (256, 11008, 2, "narrow"),
        (16384, 4096, 1, "wide"), (16384, 3072, 1, "wide"), (300, 256, 1, "narrow"),
    ],
)  # fmt: skip
def test_the_tile_that_was_measured_to_be_fastest(rows: int, features: int, products: int, name: str) -> None:
    assert choose(rows, features, products, 132) == USUAL[name].value


def test_tiles_fit_shared_memory() -> None:
    """With 1 KiB for barriers."""
    for products in (1, 2):
        for tile in (*tiles.VARIANTS.values(), *(fact.value for fact in USUAL.values())):
            assert tile.shared(products) <= SHARED - 1024, tile
            assert tile.dropping.shared(products, drops=True) <= SHARED - 1024, tile


# -- gated MLPs ----------------------------------------------------------------------------------------------------


def gated_reason(case: Case, save: bool = True, drops: bool = False, dtype: torch.dtype | None = None) -> str | None:
    given = inputs(case)
    operands = _operands(given.x, *given.weights, *given.biases, case.layout)
    features = case.features
    out = torch.empty(case.experts or 1, case.rows, features, dtype=dtype or case.dtype)
    saved = torch.empty(case.experts or 1, case.rows, 2 * features, dtype=case.dtype) if save else None
    step = gated.starts(case.layout, features)[2]
    return gated_hopper.declines(FORMULAS[case.name][0], operands, out, saved, step, drops)


TAKEN = Case(rows=256, features=72, inner=40, dtype=BF16, biased=True)


@pytest.mark.parametrize("layout", ["separate", "gate first", "up first"])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("save", [False, True])
def test_gated_mlps_that_it_takes(layout: Any, dtype: torch.dtype, save: bool) -> None:
    assert gated_reason(TAKEN.but(layout=layout, dtype=dtype), save) is None


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"rows": 255}, "rows"), ({"dtype": torch.float32}, "16-bit"), ({"features": 70}, "16 bytes"),
        ({"inner": 42}, "16 bytes"), ({"memory": "transposed"}, "neighbours"), ({"memory": "poisoned"}, "16 bytes"),
        ({"experts": 2}, "experts"), ({"layout": "gate even"}, "in turns"),
    ],
)  # fmt: skip
def test_gated_mlps_that_it_does_not_take(about: dict[str, Any], reason: str) -> None:
    assert reason in str(gated_reason(TAKEN.but(**about)))


def test_dropout_and_a_result_of_another_dtype_are_not_taken() -> None:
    assert "dropout" in str(gated_reason(TAKEN, drops=True))
    assert "one dtype" in str(gated_reason(TAKEN, dtype=torch.float16))


def test_dropout_is_taken_once_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "DROPPING", True)
    assert gated_reason(TAKEN, drops=True) is None
    assert linear.declines(of_linear(), text_of(KEEP * GELU)) is None
    assert choose(16384, 4096, 1, 132, drops=True).registers == 232


def test_biases_of_every_other_number_are_not_taken() -> None:
    given = inputs(TAKEN)
    apart = torch.empty(2 * TAKEN.features, dtype=BF16)[::2]
    operands = _operands(given.x, *given.weights, apart, None, "separate")
    out = torch.empty(1, TAKEN.rows, TAKEN.features, dtype=BF16)
    assert "vectors" in str(gated_hopper.declines(FORMULAS["silu"][0], operands, out, None, 1, False))


# -- linears -------------------------------------------------------------------------------------------------------


def of_linear(**about: Any) -> linear.Operands:
    made: dict[str, Any] = {
        "out": torch.empty(2, 128, 72, dtype=BF16), "pre": None, "x": torch.empty(2, 128, 40, dtype=BF16),
        "weight": torch.empty(72, 40, dtype=BF16), "bias": torch.empty(72, dtype=BF16), "vectors": [], "tensors": [],
    }  # fmt: skip
    return linear.Operands(**{**made, **about})


GELU = activation.gelu(X, "none")


def test_linears_that_it_takes() -> None:
    like = torch.empty(2, 128, 72, dtype=BF16)
    wide = torch.empty(72)
    assert linear.declines(of_linear(), text_of(GELU)) is None
    assert linear.declines(of_linear(pre=like, bias=None), text_of(GELU)) is None
    scaled = text_of(vector(0) * GELU + tensor(0))
    assert linear.declines(of_linear(vectors=[wide], tensors=[like]), scaled) is None
    assert linear.declines(of_linear(weight=torch.empty(40, 72, dtype=BF16).t()), text_of(GELU)) is None
    part = torch.empty(2, 128, 48, dtype=BF16)[..., :40]
    assert linear.declines(of_linear(x=part), text_of(GELU)) is None


LINEARS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "dropout": ({}, KEEP * GELU, "dropout"),
    "rows of several distances": ({"x": torch.empty(2, 130, 40, dtype=BF16)[:, :128]}, GELU, "distances"),
    "a weight of every other number": ({"weight": torch.empty(72, 80, dtype=BF16)[:, ::2]}, GELU, "neighbours"),
    "an odd start": ({"weight": torch.empty(72 * 40 + 4, dtype=BF16)[4:].view(72, 40)}, GELU, "16 bytes"),
    "few rows": ({"x": torch.empty(40, 40, dtype=BF16), "out": torch.empty(40, 72, dtype=BF16)}, GELU, "rows"),
    "two dtypes": ({"out": torch.empty(2, 128, 72)}, GELU, "one dtype"),
    "saved beside a residual": (
        {"pre": torch.empty(2, 128, 72, dtype=BF16), "tensors": [torch.empty(2, 128, 72, dtype=BF16)]},
        GELU + tensor(0),
        "one piece of shared memory",
    ),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linears_that_it_does_not_take(name: str) -> None:
    about, formula, reason = LINEARS[name]
    assert reason in str(linear.declines(of_linear(**about), text_of(formula)))


# -- what is run instead -------------------------------------------------------------------------------------------


def test_a_kernel_that_does_not_start_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    class Fails:
        def __init__(self, *about: object) -> None: ...

        def __call__(self, *tensors: object) -> None:
            tried.append(tensors)
            raise RuntimeError("out of resources")

    monkeypatch.setattr(linear, "Gemm", Fails)
    monkeypatch.setattr(linear, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(linear, "_gemms", {})
    given, text = of_linear(), text_of(GELU)
    assert not linear.linear(given, text)
    assert not linear.linear(given, text)
    assert len(tried) == 1


def test_without_gluon_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(epilogue: object) -> None:
        raise ImportError("no module named gluon")

    monkeypatch.setattr(launch, "kernel", kernel)
    launch.missing.cache_clear()
    assert "no such Gluon" in str(launch.missing(hopper.single(GELU)))
    launch.missing.cache_clear()


def test_what_stands_in_for_another_launch_is_made_once_and_then_forgotten() -> None:
    made: list[str] = []

    def fails(*arguments: object) -> None:
        raise ValueError("no TMA")

    def other() -> Any:
        made.append("other")
        return lambda *arguments: made.append("run")

    call = FirstThatRuns(fails, other)
    call()
    call()
    assert made == ["other", "run", "run"]
    runs = FirstThatRuns(lambda: made.append("first"), other)
    runs()
    assert made[-1] == "first" and runs.other is None
