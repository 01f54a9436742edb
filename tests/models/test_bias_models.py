"""Bias, activation and dropout of third-party models: each is matched, and results err no more than eager's do.

Without dropout, values and gradients are compared. With it, what is read of the models in training is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hugging_face import BATCH, DECODER, ENCODER, LENGTH, VISION, VOCABULARY
from measure import Through, measure
from torch import nn
from torchvision_stub import torchvision_stub
from zoo import entries

import xfcompile

FAMILY = "bias-act-dropout"
ENTRIES = {e.name: e for e in entries()}

GELU = "x*(erf(0.707107*x) + 1)/2"
NEW_GELU = "0.5*x*(tanh(0.0356774*x**3 + 0.797885*x) + 1)"
GELU_TANH = "x*(tanh(0.0356774*x**3 + 0.797885*x) + 1)/2"
RELU = "Where(x <= 0, 0, x)"
ADD = "keep*x + r0, dropout 0.1"


@dataclass(frozen=True)
class Sites:
    """What is read of a model, and how often; how many near misses are named."""

    read: dict[str, int]
    declined: int = 0


MODELS: dict[str, Sites] = {
    "bert[eager]": Sites({GELU: 2, "tanh(x)": 1}),  # of the pooler
    "bert_train[eager]": Sites({GELU: 3}),  # the head's transform is one
    "vit[sdpa]": Sites({GELU: 2, "tanh(x)": 1}),
    "vit_train[eager]": Sites({GELU: 2}),
    "gpt2[sdpa]": Sites({NEW_GELU: 2}),
    "gpt2_train[eager]": Sites({NEW_GELU: 2}),
    "gpt_neox[eager]": Sites({GELU: 2}),
    "bloom[eager]": Sites({"0.5*x*(tanh(0.797885*x*(0.044715*x**2 + 1)) + 1)": 2}),
    "falcon_alibi[eager]": Sites({GELU: 2}),
    "opt[eager]": Sites({RELU: 2}),
    "nemotron[eager]": Sites({f"{RELU}**2": 2}),
    "starcoder2[eager]": Sites({GELU_TANH: 2}),
    "bart[eager]": Sites({GELU: 4}),
    "whisper[eager]": Sites({GELU: 4}),
    "clip_vision[eager]": Sites({"x*sigmoid(1.702*x)": 2}),
    "swin[eager]": Sites({GELU: 4}),
    "swinv2[eager]": Sites({GELU: 4, RELU: 4}),  # the positions' MLP: relu in place
    "timm_vit[eager]": Sites({GELU: 2}),
    "timm_swin[eager]": Sites({GELU: 4}),
    "timm_swinv2[eager]": Sites({GELU: 4, RELU: 4}),
    "torch_encoder_train": Sites({RELU: 2}),
    "vit_pytorch_vit": Sites({GELU: 2}),
    # Gates are no sites of this family.
    "llama[eager]": Sites({}),
    "gemma2[eager]": Sites({"30*tanh(x/30)": 1}),  # the soft-capped logits
}
USUAL = (
    "bert_train[eager]", "vit[sdpa]", "gpt2_train[eager]", "falcon_alibi[eager]", "bloom[eager]", "nemotron[eager]",
    "clip_vision[eager]", "timm_swinv2[eager]", "torch_encoder_train", "llama[eager]",
)  # fmt: skip


def check(name: str, through: Through, route: str) -> None:
    entry, expected = ENTRIES[name], MODELS[name]
    if entry.missing:
        pytest.skip(f"not installed: {', '.join(entry.missing)}")
    outcome = measure(entry, through, patterns=[FAMILY], routes={FAMILY: route})
    assert not outcome.report.failures
    sites = outcome.report.sites
    matched = [site for site in sites if site.matched]
    assert Counter(site.expression for site in matched) == expected.read
    assert len(sites) - len(matched) == expected.declined, sites
    assert {site.route for site in matched} <= {route}, sites
    assert outcome.errors and not outcome.baseless
    assert not outcome.wrong, "\n".join(map(str, outcome.wrong))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", USUAL)
def test_models_without_dropout(name: str) -> None:
    check(name, "aot", "triton")


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("route", ["triton", "epilogue"])
@pytest.mark.parametrize("name", MODELS)
def test_all_models_without_dropout(name: str, route: str) -> None:
    check(name, "aot", route)


# -- dropout ------------------------------------------------------------------------------------------------------


def text(kind: str, config: str, **fields: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    """A language model of transformers in training, with the dropout of its configuration."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
        model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
        return model, {"input_ids": ids, "labels": ids}

    return make


def vision(kind: str, config: str, **fields: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        model = getattr(transformers, kind)(getattr(transformers, config)(**{**VISION, **fields}))
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}

    return make


def timm_vit() -> tuple[nn.Module, dict[str, Any]]:
    with torchvision_stub():
        import timm

        sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)
        model = timm.create_model("vit_tiny_patch16_224", **sizes, proj_drop_rate=0.1, init_values=0.1)
    return model, {"x": torch.randn(2, 3, 32, 32)}


_GPT = dict(
    vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4, n_inner=128, bos_token_id=1, eos_token_id=2
)
_SEQ2SEQ = dict(
    vocab_size=VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip

DROPPING: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], dict[str, int]]] = {
    "GPT-2": (text("GPT2LMHeadModel", "GPT2Config", **_GPT), {ADD: 4, NEW_GELU: 2}),
    "BERT": (text("BertForMaskedLM", "BertConfig", **ENCODER), {ADD: 4, GELU: 3}),
    # The attention's result and the MLP's are added at once: either is the other's residual.
    "GPT-NeoX": (
        text("GPTNeoXForCausalLM", "GPTNeoXConfig", **ENCODER, hidden_dropout=0.1),
        {GELU: 2, "keep*x + r0 + r1, dropout 0.1": 4},
    ),
    "Falcon": (
        text("FalconForCausalLM", "FalconConfig", **ENCODER, hidden_dropout=0.1, bias=True, parallel_attn=False),
        {GELU: 2, ADD: 2},
    ),
    "BLOOM": (
        text("BloomForCausalLM", "BloomConfig", vocab_size=99, hidden_size=64, n_layer=2, n_head=4, hidden_dropout=0.1),
        {ADD: 4, "0.5*x*(tanh(0.797885*x*(0.044715*x**2 + 1)) + 1)": 2},
    ),
    "Nemotron": (text("NemotronForCausalLM", "NemotronConfig", **DECODER), {f"{RELU}**2": 2}),
    "BART": (
        text("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ, activation_dropout=0.1, decoder_layerdrop=0.0),
        # A layer is a graph of its own here: of the encoder, of the decoder.
        {ADD: 5, f"keep*{GELU}, dropout 0.1": 2},
    ),
    "ViT": (vision("ViTModel", "ViTConfig", hidden_dropout_prob=0.1), {ADD: 4, GELU: 2, "tanh(x)": 1}),
    "CLIP": (vision("CLIPVisionModel", "CLIPVisionConfig"), {"x*sigmoid(1.702*x)": 2}),
    "timm ViT": (timm_vit, {"keep*v0*x + r0, dropout 0.1": 4, f"keep*{GELU}, dropout 0.1": 2}),
    "nn.TransformerEncoderLayer": (
        lambda: (nn.TransformerEncoderLayer(64, 4, 128, 0.1, batch_first=True), {"src": torch.randn(2, 7, 64)}),
        {f"keep*{RELU}, dropout 0.1": 1, ADD: 2},
    ),
    "nn.TransformerEncoderLayer, norm first": (
        lambda: (
            nn.TransformerEncoderLayer(64, 4, 128, 0.1, activation="gelu", norm_first=True),
            {"src": torch.randn(7, 2, 64)},
        ),
        {f"keep*{GELU}, dropout 0.1": 1, ADD: 2},
    ),
}


_NO_LINEAR = {"no linear makes what is activated": 1}  # torch's own attention ends in one of its own
LEFT: dict[tuple[str, str], dict[str, int]] = {
    **{("GPT-NeoX", route): {"another site with the same result is replaced": 2} for route in ("triton", "epilogue")},
    ("nn.TransformerEncoderLayer", "epilogue"): _NO_LINEAR,
    ("nn.TransformerEncoderLayer, norm first", "epilogue"): _NO_LINEAR,
}
"""Why sites of these models are left to Inductor, by a route."""


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("route", ["triton", "epilogue"])
@pytest.mark.parametrize("name", DROPPING)
def test_models_that_drop_out(name: str, route: str) -> None:
    """What is read, and that a training step runs: the same seed gives the same gradients."""
    make, expected = DROPPING[name]
    if "timm" in name:
        pytest.importorskip("timm")
    elif not name.startswith("nn."):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = make()
    model.train()
    report = xfcompile.Report()

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
        report.extend(
            xfcompile.rewrite(gm, examples, {"strict": True, "patterns": [FAMILY], "routes": {FAMILY: route}})
        )
        return torch._dynamo.lookup_backend("aot_eager")(gm, examples)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)

    def step() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        out = compiled(**inputs)
        value = out if isinstance(out, torch.Tensor) else out.loss if "labels" in inputs else out.last_hidden_state
        value.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    first = step()
    found = Counter(site.expression if site.matched else f"near miss: {site.reason}" for site in report.sites)
    assert found == expected
    left = Counter(site.reason for site in report.sites if site.matched and site.route != route)
    assert left == LEFT.get((name, route), {}), "a site is not replaced"
    assert all(torch.isfinite(g).all() for g in first)
    assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_names_are_those_of_the_zoo() -> None:
    assert MODELS.keys() <= ENTRIES.keys()
    assert set(USUAL) <= MODELS.keys()
