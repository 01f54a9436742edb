"""Gated MLPs of third-party models: each is matched, and results and gradients err no more than eager's do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from measure import Through, measure
from zoo import entries
from zoo_libraries import _timm

GIANT = dict(img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=4)
ENTRIES = {e.name: e for e in (*entries(), *_timm("timm_dinov2_giant", "vit_giant_patch14_dinov2", 2, **GIANT))}

SILU = "gate*up*sigmoid(gate)"
GELU = "gate*up*(erf(0.707107*gate) + 1)/2"
GELU_TANH = "gate*up*(tanh(0.0356774*gate**3 + 0.797885*gate) + 1)/2"


@dataclass(frozen=True)
class Gated:
    """How many gated MLPs a model has, what is read of them, and how many other candidates are named and left."""

    sites: int
    read: tuple[str, ...] = (f"{SILU}, separate",)
    declined: int = 0


MODELS: dict[str, Gated] = {
    "llama[eager]": Gated(2),
    "llama_train[sdpa]": Gated(2),
    "mistral_window[eager]": Gated(2),
    "gemma2[eager]": Gated(2, (f"{GELU_TANH}, separate",)),
    "gemma3[eager]": Gated(2, (f"{GELU_TANH}, separate",)),
    "qwen2[eager]": Gated(2),
    "qwen2_train[eager]": Gated(2),
    "qwen3[eager]": Gated(2),
    "phi3[eager]": Gated(2, (f"{SILU}, gate first",)),
    "glm4[eager]": Gated(2, (f"{SILU}, gate first",)),
    "olmo2[eager]": Gated(2),
    "cohere[eager]": Gated(2),
    "granite[eager]": Gated(2),
    "stablelm[eager]": Gated(2),
    # The shared expert's; its own gate, one number a token, is declined. Routed experts, grouped products, are too.
    "qwen2_moe[eager]": Gated(2, declined=4),
    "deepseek_v3[eager]": Gated(2, declined=1),
    # Routed experts, a product of each for all its tokens, and shared ones.
    "llama4_text[eager]": Gated(4, (f"{SILU}, gate first", f"{SILU}, separate")),
    "mixtral[eager]": Gated(0, (), declined=2),
    "gpt_oss[eager]": Gated(0, (), declined=2),
    "modernbert[eager]": Gated(2, (f"{GELU}, gate first",)),
    "t5_gated_train[eager]": Gated(4, (f"{GELU_TANH}, separate",)),
    "dinov2[eager]": Gated(2, (f"{SILU}, gate first",)),
    "timm_dinov2_giant[sdpa]": Gated(2, (f"{SILU}, gate first",)),
    "timm_eva02[sdpa]": Gated(2, (f"{SILU}, gate first",)),
    "diffusers_unet": Gated(4, (f"{GELU}, up first",)),
    # Scale and shift of adaptive norms.
    "diffusers_dit": Gated(0, (), declined=4),
    "x_transformers_rotary_gqa": Gated(2, (f"{SILU}, up first",)),
    "x_transformers_encoder_qk_norm": Gated(2, (f"{GELU}, up first",)),
    # Gates of the attention's results.
    "x_transformers_memory_keys": Gated(0, (), declined=2),
    "openfold_triangle": Gated(0, (), declined=1),
    # Models without a gate.
    "gpt2[sdpa]": Gated(0, ()),
    "vit[sdpa]": Gated(0, ()),
}

USUAL = (
    "llama[eager]",
    "llama_train[sdpa]",
    "gemma2[eager]",
    "phi3[eager]",
    "qwen2_moe[eager]",
    "llama4_text[eager]",
    "gpt_oss[eager]",
    "modernbert[eager]",
    "t5_gated_train[eager]",
    "timm_dinov2_giant[sdpa]",
    "timm_eva02[sdpa]",
    "diffusers_unet",
    "x_transformers_encoder_qk_norm",
    "x_transformers_memory_keys",
    "gpt2[sdpa]",
)


def check(name: str, through: Through, route: str) -> None:
    entry, expected = ENTRIES[name], MODELS[name]
    if entry.missing:
        pytest.skip(f"not installed: {', '.join(entry.missing)}")
    outcome = measure(entry, through, patterns=["gated_mlp"], routes={"gated_mlp": route})
    assert not outcome.report.failures
    sites = outcome.report.sites
    matched = [site for site in sites if site.matched]
    assert len(matched) == expected.sites, sites
    assert len(sites) - len(matched) == expected.declined, sites
    assert all(site.reason for site in sites if not site.matched)
    assert {site.expression for site in matched} == set(expected.read)
    if route == "triton":
        assert all(site.route == "triton" for site in matched), sites
    assert outcome.errors and not outcome.baseless
    assert not outcome.wrong, "\n".join(map(str, outcome.wrong))


@pytest.mark.parametrize("name", USUAL)
def test_gated_mlps_of_models(name: str) -> None:
    check(name, "graph", "triton")


@pytest.mark.slow
@pytest.mark.parametrize("route", ["triton", "cublas"])
@pytest.mark.parametrize("name", MODELS)
def test_gated_mlps_of_all_models(name: str, route: str) -> None:
    check(name, "aot", route)


def test_names_are_those_of_the_zoo() -> None:
    assert MODELS.keys() <= ENTRIES.keys()
    assert set(USUAL) <= MODELS.keys()
