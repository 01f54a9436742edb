"""The tables of what is chosen without tuning: whole for every class of hardware, and each number with its source."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xfcompile import gated_routes
from xfcompile.bench.command import app
from xfcompile.kernels.attention import hopper_variant, tiles
from xfcompile.kernels.attention.tiles import Tiles
from xfcompile.kernels.bias_act_dropout import tiles as bias
from xfcompile.kernels.gated_mlp import tiles as gated
from xfcompile.kernels.gemm import tiles as gemm
from xfcompile.measured import CPU, HARDWARE, Fact, hardware, hardware_of

plan = importlib.import_module("xfcompile.plan")
bias_family = importlib.import_module("xfcompile.families.bias_act_dropout")

ROOT = Path(__file__).parents[2]
GPUS = [name for name in HARDWARE if name != CPU]
TABLES: dict[str, dict[Any, Fact[Any]]] = {
    "attention routes": plan.ROUTES,
    "attention tiles": tiles.TABLE,
    "attention backward": tiles.BACKWARD,
    "attention in windows": tiles.WINDOWS,
    "attention on Hopper": hopper_variant.USUAL,
    "gated routes": gated_routes.USUAL,
    "gated tiles": gated.DUAL,
    "gated tiles, few rows": gated.FEW,
    "bias routes": bias_family.USUAL,
    "bias tiles": bias.PRODUCT,
    "bias shares": bias.POINTWISE,
    "gemm tiles": gemm.USUAL,
}


def facts() -> Iterator[tuple[str, Any, Fact[Any]]]:
    for table, entries in TABLES.items():
        for place, fact in entries.items():
            yield table, place, fact


def there(script: str) -> bool:
    command, _, what = script.rpartition(" ")
    return (
        what in {c.name for c in app.registered_commands}
        if command == "python -m xfcompile bench"
        else (ROOT / script).is_file()
    )


def test_what_was_measured_names_a_script_and_results_that_are_there() -> None:
    measured = [(t, place, f.measured) for t, place, f in facts() if f.measured is not None]
    assert {t for t, _, _ in measured} >= {"attention routes", "attention tiles", "attention backward", "gated routes"}
    for table, place, source in measured:
        assert there(source.script), (table, place)
        assert source.results is None or (ROOT / source.results).is_file(), (table, place)
        assert len(source.date.split("-")) == 3


def test_hardware_that_is_not_here_was_not_measured() -> None:
    assert not [
        (table, place)
        for table, place, fact in facts()
        if fact.measured is not None and isinstance(place, tuple) and {"sm_80", "sm_100", "gfx942"} & set(place)
    ]


@pytest.mark.parametrize("kind", GPUS)
def test_each_gpu_has_a_route_for_each_class_of_sites(kind: str) -> None:
    assert {c for k, c in plan.ROUTES if k == kind} == set(plan.CLASSES)
    assert len([k for k in gated_routes.USUAL if k[0] == kind]) == 14
    assert len([k for k in bias_family.USUAL if k[0] == kind]) == 10


@pytest.mark.parametrize("kind", GPUS)
def test_each_gpu_has_tiles_for_each_dtype_and_head_dim(kind: str) -> None:
    for dtype, dim in itertools.product((torch.float16, torch.bfloat16, torch.float32), (1, 40, 64, 80, 128, 200, 256)):
        assert tiles.choose(kind, dtype, dim, dim, 4096).block_m >= 16
        for name, *traits in (("dq", "window", "linear"), ("dkdv", "dense", "other"), ("load0", "diagonal")):
            assert tiles.choose_backward(name, kind, dtype, dim, dim, traits).block_n >= 16
        assert gated.dual(kind, dtype, 4096).block_k >= 16


def test_the_tiles_that_were_measured_are_those_that_are_taken() -> None:
    half = torch.bfloat16
    assert tiles.choose("sm_90", half, 64, 64, 4096) == Tiles(64, 64, 4, 3)
    assert tiles.choose("sm_90", half, 128, 128, 4096) == Tiles(64, 64, 4, 3)
    for name, dim, traits, expected in (
        ("dq", 128, ["linear"], Tiles(128, 64, 8, 3)),
        ("dq", 128, ["dense", "linear"], Tiles(128, 64, 8, 3)),
        ("dq", 64, ["window", "linear"], Tiles(64, 64, 4, 1)),
        ("dkdv", 64, ["linear"], Tiles(32, 64, 4, 3)),
        ("dkdv", 128, ["other"], Tiles(64, 64, 4, 2)),
        ("dkdv", 128, ["listed", "other"], Tiles(32, 64, 4, 3)),
        ("load0", 128, ["dense"], Tiles(64, 128, 8, 2)),
        ("dq", 32, ["few keys, even", "dense", "linear"], Tiles(32, 16, 2, 3)),
        ("dq", 32, ["few keys", "dense", "linear"], Tiles(64, 32, 4, 1)),
        ("dq", 32, ["dense", "linear"], Tiles(64, 32, 4, 3)),
        ("load1", 32, ["few keys, even", "dense"], Tiles(16, 32, 1, 2)),
    ):
        assert tiles.choose_backward(name, "sm_90", half, dim, dim, traits) == expected, (name, dim, traits)


def test_windows_have_tiles_of_their_own() -> None:
    half = torch.bfloat16
    assert tiles.choose("sm_90", half, 32, 32, 144, tiles.few_keys(32, 32, 144)) == Tiles(32, 16, 2, 3)
    assert tiles.choose("sm_90", half, 32, 32, 49, tiles.few_keys(32, 32, 49)) == Tiles(16, 32, 1, 2)
    usual = tiles.choose("sm_90", half, 64, 64, 144)
    for kind, dtype, dq, dv, lk in (
        ("sm_90", half, 32, 32, 257), ("sm_90", half, 32, 32, None), ("sm_90", half, 32, 16, 144),
        ("sm_90", half, 64, 64, 144), ("sm_90", half, 24, 24, 144),
    ):  # fmt: skip
        few = None if lk is None else tiles.few_keys(dq, dv, lk)
        assert tiles.choose(kind, dtype, dq, dv, 144, few) == usual, (kind, dtype, dq, dv, lk)
    for kind, dtype in (("sm_90", torch.float32), ("sm_80", half), ("gfx942", half)):  # not measured there
        assert tiles.choose(kind, dtype, 32, 32, 144, "few keys, even") == tiles.choose(kind, dtype, 32, 32, 144)
    assert tiles.columns(32, 32, narrow=True) == (32, 32)
    assert tiles.columns(32, 32) == tiles.columns(32, 16) == (64, 64)


def test_classes_of_hardware() -> None:
    assert [hardware(major, False) for major in (8, 9, 10, 12)] == ["sm_80", "sm_90", "sm_100", "sm_80"]
    assert hardware(9, True) == "gfx942"
    assert hardware_of(torch.device("cpu")) == CPU
    assert hardware_of(torch.device("meta")) == "meta"  # no table has it: SDPA, or Inductor
