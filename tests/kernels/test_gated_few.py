"""Gated MLPs of few rows on Hopper without a GPU: which tensors their kernel takes, its tiles, what runs instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gated_cases import FORMULAS, Case, inputs

from xfcompile.kernels.attention.fallback import FirstThatRuns
from xfcompile.kernels.gated_mlp import hopper_few, launch, launch_few, tiles
from xfcompile.kernels.gated_mlp.operands import Dropout, Operands, operands_of, starts
from xfcompile.kernels.gated_mlp.programs import program
from xfcompile.kernels.gated_mlp.tiles import SHARED, Stream

BF16 = torch.bfloat16
TAKEN = Case(rows=16, features=70, inner=40, dtype=BF16, biased=True)
LAYOUTS = ("separate", "gate first", "up first", "gate even", "up even")


def operands(case: Case) -> Operands:
    given = inputs(case)
    return operands_of(given.x, *given.weights, *given.biases, case.layout)


def reason(case: Case, drops: bool = False, dtype: torch.dtype | None = None) -> str | None:
    out = torch.empty(case.experts or 1, case.rows, case.features, dtype=dtype or case.dtype)
    return launch_few.declines(FORMULAS[case.name][0], operands(case), out, drops)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("rows", [2, 7, 128])
def test_gated_mlps_that_it_takes(layout: Any, dtype: torch.dtype, rows: int) -> None:
    assert reason(TAKEN.but(layout=layout, dtype=dtype, rows=rows)) is None


@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_has_a_kernel(name: str) -> None:
    assert launch_few.missing(FORMULAS[name][0]) is None
    compile(launch_few.source_of_kernel(FORMULAS[name][0]), name, "exec")


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"rows": 129}, "rows"), ({"dtype": torch.float32}, "16 bits"), ({"inner": 42}, "16 bytes"),
        ({"memory": "transposed"}, "neighbours"), ({"memory": "poisoned"}, "16 bytes"), ({"experts": 2}, "experts"),
    ],
)  # fmt: skip
def test_gated_mlps_that_it_does_not_take(about: dict[str, Any], why: str) -> None:
    assert why in str(reason(TAKEN.but(**about)))


def test_dropout_and_a_result_in_fp32_are_not_taken() -> None:
    assert "dropout" in str(reason(TAKEN, drops=True))
    assert "16 bits" in str(reason(TAKEN, dtype=torch.float32))


def test_without_gluon_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(formula: object) -> None:
        raise ImportError("no module named gluon")

    monkeypatch.setattr(launch_few, "kernel", kernel)
    launch_few.missing.cache_clear()
    assert "no such Gluon" in str(reason(TAKEN))
    launch_few.missing.cache_clear()


# -- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 33, 64, 65, 128])
@pytest.mark.parametrize("features", [1, 2816, 11008, 14336, 100_000])
def test_the_stages_of_a_tile_fill_shared_memory(rows: int, features: int) -> None:
    made, columns = tiles.stream(rows, features, 132), tiles.columns(rows)
    assert columns >= rows and made.stages >= 3
    assert made.shared(columns) <= SHARED
    assert made.shared(columns) + made.stage(columns) + 16 > SHARED or (made.groups, made.stages) == (1, 6)


@pytest.mark.parametrize("features", [32, 2816, 11008, 14336])
def test_no_other_tile_would_have_the_busiest_program_read_less(features: int) -> None:
    def most(groups: int) -> int:
        return -(-features // (32 * groups * 132)) * groups

    assert most(tiles.stream(16, features, 132).groups) == min(map(most, range(1, hopper_few.MOST_GROUPS + 1)))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_registers_of_all_warps_are_there(groups: int) -> None:
    """Warpgroups that compute, of which the first has what the others leave, and one that loads."""
    assert 128 * (groups * hopper_few.registers(groups) + hopper_few.LOADING) <= 65536


# -- launches ------------------------------------------------------------------------------------------------------


class Launched:
    """In place of `Launch`: what it was made with."""

    def __init__(self, kernel: Any, programs: int, numbers: Any, constants: Any, options: Any, described: Any) -> None:
        self.programs, self.options = programs, options
        names = [n for n in kernel.arg_names[8:] if n not in constants]
        self.numbers = dict(zip(names, numbers, strict=True))
        assert kernel.arg_names[len(kernel.arg_names) - len(constants) :] == list(constants)
        self.constants, self.described = constants, described


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_few, "Launch", Launched)
    monkeypatch.setattr(launch_few, "multiprocessors", lambda index: 132)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_launch_says(layout: Any) -> None:
    case = TAKEN.but(layout=layout, features=300, inner=136)
    gate_start, up_start, step = starts(layout, case.features)
    few: Any = launch_few.Few(
        FORMULAS["silu"][0], operands(case), (gate_start, up_start, step), True, Stream(2, 2, 4)
    ).launch
    assert few.numbers == {
        "rows": 16, "features": 300, "steps": 2, "tiles": 5, "stride_gb": 1, "stride_ub": 1,
        "gate_start": gate_start, "up_start": up_start,
    }  # fmt: skip
    assert few.programs == 5 and few.constants["STEP"] == step
    x, gate, up = few.described
    assert (x.shape, gate.shape, up.shape) == ((16, 136), (300, 136), (300, 136))
    pitch = 272 if layout.endswith("even") else 136
    assert (gate.strides, up.strides) == ((pitch, 1), (pitch, 1))


@pytest.mark.usefixtures("launched")
def test_programs_that_share_a_multiprocessor_share_its_registers() -> None:
    few: Any = launch_few.Few(FORMULAS["silu"][0], operands(TAKEN), (0, 70, 1), False, Stream(1, 1, 8, 2)).launch
    assert few.options["maxnreg"] * 2 * 256 == 65536


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(("rows", "taken"), [(1, False), (2, True), (128, True), (129, False)])
def test_few_rows_run_by_it_on_hopper(rows: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Out:
        """Of a device that is not here."""

        def __init__(self, *shape: int) -> None:
            self.shape, self.dtype, self.device = shape, BF16, torch.device("cuda", 0)

    monkeypatch.setattr(launch, "device_generation", lambda device: launch.HOPPER)
    monkeypatch.setattr(launch, "by_triton", lambda *about: "by Triton")
    monkeypatch.setattr(launch.launch_hopper, "declines", lambda *about: "not asked")
    case = TAKEN.but(rows=rows)
    out: Any = Out(1, rows, case.features)
    runner: Any = launch._forward(program(case.key), operands(case), case.layout, Dropout(), out, None)
    if not taken:
        assert runner == "by Triton"
        return
    assert isinstance(runner, FirstThatRuns) and isinstance(runner.launch, launch_few.Few)
    assert runner.other is not None and runner.other() == "by Triton"
