"""The attention kernels compile for GPUs that are not here; their main configurations fit in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from xfcompile.kernels.attention.tiles import FEW_SPILLS
from xfcompile.kernels.bias_act_dropout.tiles import POINTWISE
from xfcompile.kernels.gated_mlp.tiles import stream

ROOT = Path(__file__).parents[2]


def compiled(path: Path, *options: str) -> list[dict[str, Any]]:
    # A process of its own: Triton must not have been imported for its interpreter.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples/cross_compile.py"), "--json", str(path), *options]
    subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(path.read_text())["results"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("cross") / "results.json")


BACKWARD = ("dq", "dkdv", "load0")
KERNELS = ("attention_forward", "decode_split", "decode_combine")


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_target_compiles(kernel: str, results: list[dict[str, Any]]) -> None:
    assert {(r["target"], r["dim"]) for r in results if r["kernel"] == kernel} == {
        (target, dim) for target in ("sm_80", "sm_90", "sm_100", "gfx942") for dim in (64, 128)
    }


TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@pytest.mark.parametrize("kernel", ["attention_forward", *BACKWARD, "dq_load0", "bias_linear", "gated_forward"])
def test_products_are_those_of_the_tensor_cores(kernel: str, results: list[dict[str, Any]]) -> None:
    found = {r["target"]: r["matrix"] for r in results if r["kernel"] == kernel}
    assert found == TENSOR_CORES


def test_no_product_takes_numbers_twice(results: list[dict[str, Any]]) -> None:
    assert [r for r in results if r["repeating"]] == []


@pytest.mark.parametrize("kernel", ["attention_forward", "gated_forward"])
def test_tiles_are_loaded_by_16_bytes_a_thread(kernel: str, results: list[dict[str, Any]]) -> None:
    for r in results:
        if r["kernel"] == kernel:
            assert r["wide"] > 0 and r["narrow"] == 0, r


def test_lists_of_tiles_compile_for_every_target(results: list[dict[str, Any]]) -> None:
    found = {(r["target"], r["program"]) for r in results if r["kernel"] == "tile_verdicts"}
    assert found == {
        (target, name)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for name in ("documents", "causal from a buffer")
    }


def test_bias_activation_and_dropout_compile_for_every_target(results: list[dict[str, Any]]) -> None:
    mine = {(r["target"], r["kernel"]): r for r in results if r["kernel"].startswith("bias_")}
    assert set(mine) == {
        (target, kernel)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for kernel in ("bias_forward", "bias_linear", "bias_backward", "bias_total")
    }
    assert all(r["spills"] == 0 for (_, kernel), r in mine.items() if kernel == "bias_total")
    assert mine["sm_90", "bias_linear"]["matrix"] == "wgmma.mma_async"
    for target in ("sm_80", "sm_90", "sm_100"):
        # A mask is made where it is used: eight neighbours by one thread, which exchanges nothing with others. What is
        # shared are rows that are read ahead.
        share = POINTWISE["forward"].value
        assert mine[target, "bias_forward"]["shared"] == 2 * share.elements * (share.stages - 1)
        assert mine[target, "bias_forward"]["narrow"] <= 2, "the seed, and the bias, once"


LEAVES_FEW = {("hopper", "key padding"), ("hopper_backward", "causal"), ("hopper_backward_load0", "dense bias")}
"""Kernels whose accumulators leave few registers: what is spilled, most of it outside of the loop, was measured."""


def test_main_configurations_do_not_spill(results: list[dict[str, Any]]) -> None:
    forward = [r for r in results if r["kernel"] not in BACKWARD]
    main = [r for r in forward if (r["kernel"], r["program"]) not in LEAVES_FEW]
    # Older assemblers leave few registers on sm_100.
    few = FEW_SPILLS if triton.__version__ < "3.7" else 0
    assert [r for r in main if r["spills"] > (few if r["target"] == "sm_100" else 0)] == []
    assert [r for r in forward if r["spills"] > (80 if r["kernel"].startswith("hopper_backward") else 64)] == []


def test_the_backward_compiles_for_every_target(results: list[dict[str, Any]]) -> None:
    """Its accumulators, of keys and of values, leave few registers: what is spilled was measured to cost less than
    smaller tiles, on Hopper; elsewhere little is spilled."""
    found = [r for r in results if r["kernel"] in BACKWARD]
    assert {(r["target"], r["dim"], r["kernel"]) for r in found} == {
        (target, dim, kernel)
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for dim in (64, 128)
        for kernel in BACKWARD
    }
    assert [r for r in found if r["spills"] > 64 and r["target"] not in ("sm_90", "sm_100")] == []


def test_windows_leave_room_for_many_programs(results: list[dict[str, Any]]) -> None:
    """On a multiprocessor: 64 K registers and 227 KB of shared memory; and spill none."""
    found = {r["kernel"]: r for r in results if r["kernel"].startswith("window_")}
    assert set(found) == {f"window_{kernel}" for kernel in ("forward", *BACKWARD)}
    for r in found.values():
        threads = 32 * r["tiles"]["num_warps"]
        assert r["spills"] == 0, r
        assert min(65536 // (r["registers"] * threads), 227 * 1024 // r["shared"]) >= 8, r


def test_kernels_of_rows_without_keys_compile(results: list[dict[str, Any]]) -> None:
    found = {(r["target"], r["kernel"]): r["matrix"] for r in results if r["kernel"].startswith("dead_")}
    assert found == {
        (target, kernel): name
        for target, name in (("sm_90", "wgmma.mma_async"), ("gfx942", "v_mfma"))
        for kernel in ("dead_rows", "dead_keys")
    }


def test_the_kernel_for_hopper_multiplies_with_wgmma(results: list[dict[str, Any]]) -> None:
    found = {(r["program"], r["dim"]): r for r in results if r["kernel"] == "hopper"}
    assert set(found) == {(program, dim) for program in ("causal", "key padding") for dim in (64, 128)}
    for r in found.values():
        assert r["matrix"] == "wgmma.mma_async", r
        assert r["shared"] <= 227 * 1024, r


@pytest.mark.parametrize("kernel", ["hopper_backward", "hopper_backward_load0"])
def test_the_backward_for_hopper_adds_dq_up_by_tma(kernel: str, results: list[dict[str, Any]]) -> None:
    found = {r["dim"]: r for r in results if r["kernel"] == kernel}
    assert set(found) == {64, 128}
    for r in found.values():
        assert r["matrix"] == "wgmma.mma_async", r
        assert r["shared"] <= 227 * 1024, r


def test_the_product_for_hopper_fits_its_shared_memory_and_registers(results: list[dict[str, Any]]) -> None:
    found = {r["program"]: r for r in results if r["kernel"] == "gemm"}
    assert set(found) == {"SwiGLU", "gelu, dropout, saving"}
    for r in found.values():
        assert (r["target"], r["matrix"] == "wgmma.mma_async", r["spills"]) == ("sm_90", True, 0), r
        assert r["shared"] <= 227 * 1024, r


def test_a_cache_is_read_16_bytes_at_a_time(results: list[dict[str, Any]]) -> None:
    splits = [r for r in results if r["kernel"] == "decode_split"]
    assert {r["program"] for r in splits} == {"plain", "growing cache", "mask of a cache"}
    for r in splits:
        assert r["wide"] > 0, r
        # A mask has a byte for each key. (AMD's instructions also read the few queries in pieces.)
        assert r["narrow"] == 0 or r["program"] == "mask of a cache" or r["target"] == "gfx942", r


def test_a_mask_of_each_score_is_read_16_bytes_at_a_time(results: list[dict[str, Any]]) -> None:
    found = [r for r in results if (r["kernel"], r["program"]) == ("tile_verdicts", "causal from a buffer")]
    for r in found:
        # Tiles at an edge are read a number at a time.
        assert r["wide"] > 0 or r["target"] == "gfx942", r


@pytest.mark.slow
def test_every_program_compiles_for_hopper_and_hardly_spills(tmp_path: Path) -> None:
    results = compiled(tmp_path / "results.json", "--all", "--target", "sm_90")
    assert [r for r in results if r["repeating"]] == []
    found = {r["program"] for r in results if r["kernel"] == "attention_forward"}
    assert len(found - {"added padding", "added padding, dropout", "added padding, soft-cap"}) == 12
    hopper = {(r["program"], r["dim"]) for r in results if r["kernel"] == "hopper"}
    programs = {name for name, _ in hopper}
    assert len(programs) == 10 and not programs & {"sliding window", "documents"}
    assert ("dense bias", 128) in hopper and ("dense bias", 64) not in hopper
    backward = {(r["program"], r["dim"]) for r in results if r["kernel"] == "hopper_backward"}
    assert len(backward) == 21 and ("sliding window", 64) not in backward and "T5 bias" not in dict(backward)
    # The bias of each distance is gathered for few tiles only, those near the diagonal.
    # What an accumulator of 128 columns leaves few registers for was measured as it is.
    measured = {("hopper", "dense bias", 128), ("hopper", "ALiBi", 128), ("hopper_backward", "ALiBi", 128)}
    measured |= {("hopper_backward", "key padding", dim) for dim in (64, 128)}
    measured.add(("hopper_backward", "documents", 128))  # it is not launched there: their lists are of smaller tiles
    measured.add(("hopper_backward", "soft-cap, causal", 128))
    measured.add(("hopper_backward", "sliding window", 128))  # no more than others of 128 columns
    measured |= {("hopper", name, 64) for name in ("no mask", "soft-cap")}  # in three warpgroups: fewer registers each
    measured.add(("hopper_backward_load0", "dense bias", 64))
    others = [r for r in results if r["program"] != "T5 bias" and (r["kernel"], r["program"], r["dim"]) not in measured]
    # The tiles of these stand in `tiles.BACKWARD`, as they were measured to be fastest, spilled or not.
    others = [r for r in others if r["kernel"] not in ("dq", "dkdv")]
    assert [(r["kernel"], r["program"], r["dim"], r["spills"]) for r in others if r["spills"] > 64] == []


def test_gated_mlps_compile_for_every_target(results: list[dict[str, Any]]) -> None:
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    for kernel in ("gated_forward", "gated_few", "gated_product", "gated_backward"):
        assert {r["target"] for r in results if r["kernel"] == kernel} == set(targets)
    through_tma = [r for r in results if r["kernel"] == "gated_forward_tma"]
    assert {r["target"] for r in through_tma} == {"sm_90", "sm_100"}
    gated = [r for r in results if r["kernel"].startswith("gated")]
    assert [r for r in gated if r["spills"]] == []
    for r in gated:
        if r["target"] == "sm_90" and r["kernel"].startswith("gated_forward"):
            assert r["matrix"] == "wgmma.mma_async", r
            assert r["shared"] <= 227 * 1024, r


def test_few_rows_compile_for_hopper_as_their_tiles_say(results: list[dict[str, Any]]) -> None:
    found = [r for r in results if r["kernel"] == "gated_few_hopper"]
    assert {r["target"] for r in found} == {"sm_90"}
    assert sorted(r["tiles"]["block_m"] for r in found) == [16, 16, 128, 128]
    for r in found:
        assert r["matrix"] == "wgmma.mma_async" and r["spills"] == 0, r
        rows = r["tiles"]["block_m"]
        assert r["shared"] <= stream(rows, 11008, 132).shared(rows) <= 227 * 1024, r
