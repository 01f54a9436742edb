"""Where a model's step spends its time, in the example that shows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import profile_model


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attention_forward", "attention by this backend"),
        ("attention_backward_dkdv", "attention by this backend"),
        ("decode_split", "attention by this backend"),
        ("gemm", "gated MLPs and activations by this backend"),
        ("gated_few_hopper", "gated MLPs and activations by this backend"),
        ("backward", "gated MLPs and activations by this backend"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention by SDPA"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention by SDPA"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products of matrices"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products of matrices"),
        ("aten::addmm", "products of matrices"),
        ("triton_red_fused_add_native_layer_norm_3", "fused by Inductor"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void at::native::embedding_backward_feature_kernel", "the rest"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert profile_model.kind_of(name) == kind


def test_what_kernels_take_adds_up() -> None:
    x = torch.randn(300, 300)
    found = profile_model.profiled("eager", lambda: (x @ x).relu(), "cpu", 4)
    by_name = {kernel.name: kernel for kernel in found.kernels}
    assert by_name["aten::mm"].launches == 1
    assert by_name["aten::relu"].launches == 1
    assert found.kernels == sorted(found.kernels, key=lambda kernel: -kernel.ms)
    assert sum(found.by_kind().values()) == pytest.approx(found.busy_ms)
    assert found.by_kind()["products of matrices"] >= by_name["aten::mm"].ms > 0
    assert found.waiting >= 0


def test_lines_that_are_at_work_are_seen_with_those_that_call_them() -> None:
    def busy() -> int:
        return sum(range(20_000))

    found = profile_model.looked_at(lambda: busy(), lambda: None, 0.3)
    here = {line: share for line, share in found.items() if line.endswith((" busy", " <lambda>"))}
    assert any(line.startswith("at ") and line.endswith(" busy") for line in here), found
    assert sum(line.endswith(" <lambda>") and not line.startswith("at ") for line in here) >= 1
    assert all(0 < share <= 1 for share in found.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_model_is_profiled_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    arguments = ["GPT-2", "--mode", "infer", "--scale", "quick", "--steps", "1", "--most", "3"]
    profile_model.main([*arguments, "--backends", "eager,xformers", "--json", str(path)])
    found = json.loads(path.read_text())
    assert [column["column"] for column in found["columns"]] == ["eager", "xformers"]
    assert all(column["kernels"] and column["step_ms"] > 0 for column in found["columns"])
    shown = capsys.readouterr().out
    assert "products of matrices" in shown
    assert "the step" in shown


def test_a_route_can_be_asked_for(tmp_path: Path) -> None:
    """Of eager attention on a CPU, where SDPA is the usual one."""

    def seen(name: str, *more: str) -> tuple[bool, dict[str, str]]:
        arguments = ["GPT-2", "--mode", "infer", "--attention", "eager", "--scale", "quick", "--steps", "1", *more]
        profile_model.main([*arguments, "--backends", "xformers", "--json", str(tmp_path / name)])
        found = json.loads((tmp_path / name).read_text())
        return any("attention" in kernel["name"] for kernel in found["columns"][0]["kernels"]), found["routes"]

    assert seen("usual.json") == (True, {})
    assert seen("asked.json", "--route", "attention=inductor") == (False, {"attention": "inductor"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["GPT-2", "--route", "attention"], "--route attention: it is one of"),
        (["GPT-2", "--route", "attention=cublas"], "attention=triton|sdpa|inductor"),
        (["GPT-2", "--backends", "nothing"], "nothing: there are eager"),
        (["BLOOM", "--attention", "sdpa"], "BLOOM has eager"),
    ],
)
def test_what_there_is_not_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_model.main(arguments)
    assert said in capsys.readouterr().err
