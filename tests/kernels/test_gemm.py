"""The product of matrices for Hopper without a GPU: which tensors it takes, which tiles, and what runs instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gated_cases import FORMULAS, Case, inputs

from xfcompile import activation
from xfcompile.activation import KEEP, X, tensor, vector
from xfcompile.kernels.attention.fallback import FirstThatRuns
from xfcompile.kernels.bias_act_dropout import launch_hopper as linear
from xfcompile.kernels.bias_act_dropout import text_of
from xfcompile.kernels.gated_mlp import launch_hopper as gated_hopper
from xfcompile.kernels.gated_mlp.operands import operands_of, starts
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
    operands = operands_of(given.x, *given.weights, *given.biases, case.layout)
    features = case.features
    out = torch.empty(case.experts or 1, case.rows, features, dtype=dtype or case.dtype)
    saved = torch.empty(case.experts or 1, case.rows, 2 * features, dtype=case.dtype) if save else None
    step = starts(case.layout, features)[2]
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
    assert reason_of_linear(KEEP * GELU) is None
    assert choose(16384, 4096, 1, 132, drops=True).registers == 232


def test_biases_of_every_other_number_are_not_taken() -> None:
    given = inputs(TAKEN)
    apart = torch.empty(2 * TAKEN.features, dtype=BF16)[::2]
    operands = operands_of(given.x, *given.weights, apart, None, "separate")
    out = torch.empty(1, TAKEN.rows, TAKEN.features, dtype=BF16)
    assert "vectors" in str(gated_hopper.declines(FORMULAS["silu"][0], operands, out, None, 1, False))


# -- linears -------------------------------------------------------------------------------------------------------


def reason_of_linear(formula: Any, **about: Any) -> str | None:
    """about: what differs from x [2, 128, 40] and a weight [72, 40], of which nothing is saved."""
    given: dict[str, Any] = {
        "x": torch.empty(2, 128, 40, dtype=BF16), "weight": torch.empty(72, 40, dtype=BF16),
        "bias": torch.empty(72, dtype=BF16), "vectors": [], "tensors": [], "save": False, "dtype": BF16, **about,
    }  # fmt: skip
    save, dtype, shape = given.pop("save"), given.pop("dtype"), (*given["x"].shape[:-1], 72)
    outputs = torch.empty(shape, dtype=dtype), torch.empty(shape if save else (0,), dtype=BF16)
    return linear.declines(**given, text=text_of(formula), outputs=outputs, save=save)


GELU = activation.gelu(X, "none")


def test_linears_that_it_takes() -> None:
    like = torch.empty(2, 128, 72, dtype=BF16)
    assert reason_of_linear(GELU) is None
    assert reason_of_linear(GELU, save=True, bias=None) is None
    assert reason_of_linear(vector(0) * GELU + tensor(0), vectors=[torch.empty(72)], tensors=[like]) is None
    assert reason_of_linear(GELU, weight=torch.empty(40, 72, dtype=BF16).t()) is None
    assert reason_of_linear(GELU, x=torch.empty(2, 128, 48, dtype=BF16)[..., :40]) is None


LINEARS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "dropout": (KEEP * GELU, {}, "dropout"),
    "rows of several distances": (GELU, {"x": torch.empty(2, 130, 40, dtype=BF16)[:, :128]}, "distances"),
    "a weight of every other number": (GELU, {"weight": torch.empty(72, 80, dtype=BF16)[:, ::2]}, "neighbours"),
    "an odd start": (GELU, {"weight": torch.empty(72 * 40 + 4, dtype=BF16)[4:].view(72, 40)}, "16 bytes"),
    "few rows": (GELU, {"x": torch.empty(40, 40, dtype=BF16)}, "rows"),
    "two dtypes": (GELU, {"dtype": torch.float32}, "one dtype"),
    "saved beside a residual": (
        GELU + tensor(0),
        {"save": True, "tensors": [torch.empty(2, 128, 72, dtype=BF16)]},
        "one piece of shared memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEARS)
def test_linears_that_it_does_not_take(name: str) -> None:
    formula, about, reason = LINEARS[name]
    assert reason in str(reason_of_linear(formula, **about))


# -- what is run instead -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [True, False])
def test_a_kernel_that_does_not_start_is_not_tried_again(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Made:
        def __init__(self, *about: object) -> None: ...

        def repeat(self, *pointers: object) -> None: ...

        def __call__(self, *tensors: object) -> None:
            tried.append("ours")
            if fails:
                raise RuntimeError("out of resources")

    def other(*arguments: object) -> Any:
        tried.append("other")
        return torch.ones(1), torch.ones(0)

    monkeypatch.setattr(linear, "Gemm", Made)
    monkeypatch.setattr(linear, "multiprocessors", lambda index: 132)
    x, weight = torch.empty(256, 40, dtype=BF16), torch.empty(72, 40, dtype=BF16)
    outputs = torch.empty(256, 72, dtype=BF16), torch.empty(0)
    call = linear.Linear(x, weight, None, [], [], text_of(GELU), 0.0, outputs, False, other)
    for _ in range(2):
        call(x, weight, None, [], [], None, 0)
    assert tried == (["ours", "other", "other"] if fails else ["ours", "ours"])
    apart = torch.empty(256 * 40 + 4, dtype=BF16)[4:].view(256, 40)
    call(apart, weight, None, [], [], None, 0)
    assert tried[-1] == "other"  # TMA reads from multiples of 16 bytes


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
