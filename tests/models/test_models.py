"""Third-party models under the backend: every attention is matched, and results err no more than eager's do.

The usual run takes a few models of every kind, most of them without Inductor: it is the rewritten graph that is judged,
and Inductor takes most of the time. `pytest tests/models -m slow` takes all of the zoo; `python tests/models/record.py`
does the same and writes RESULTS.md.
"""

from __future__ import annotations

from typing import Any

import pytest
from measure import Outcome, Through, measure
from zoo import Entry, entries

ENTRIES = {entry.name: entry for entry in entries()}

GRAPH = (
    "llama[eager]",
    "llama_no_cache[sdpa]",
    "llama_left_padded[eager]",
    "llama_train[sdpa]",
    "mistral_window[eager]",
    "gemma2[eager]",
    "mixtral[eager]",
    "gpt2[sdpa]",
    "bloom[eager]",
    "cpmant[eager]",
    "falcon_alibi[eager]",
    "bert_right_padded[eager]",
    "bert_train[eager]",
    "deberta_v2[eager]",
    "vit[sdpa]",
    "swin[eager]",
    "swinv2[eager]",
    "timm_vit[eager]",
    "diffusers_dit",
    "x_transformers_alibi",
    "vit_pytorch_deepvit",
    "torch_multihead_attention",
    "torch_encoder_train",
    "torch_decoder_layer",
    "fairseq",
    "openfold_triangle_train",
    "megatron_core",
    "documents_window_train",
    "gpt2_train[eager]",
    "t5_train[eager]",
    "gemma2_train[eager]",
    "vit_train[eager]",
    "swin_train[eager]",
    "gpt_oss_train[eager]",
    "msa_tied_rows",
    "talking_heads",
)
KERNEL = {
    "gpt2_train[eager]": 2,
    "llama_train[sdpa]": 2,
    "bert_train[sdpa]": 2,
    "bert_train[eager]": 2,
    "vit_train[eager]": 2,
    "gemma2_train[eager]": 2,
    "t5_train[eager]": 6,
    "swin_train[eager]": 4,
    "gpt_oss_train[eager]": 2,
}
"""One training step with our kernels in Triton's interpreter, and how many sites they run."""
SLOW = ("swin_train[eager]", "t5_train[eager]", "bert_train[sdpa]")
INDUCTOR = ("nanogpt", "meta_llama_train", "clip_vision[eager]")


def _check(entry: Entry, through: Through, **options: Any) -> Outcome:
    if entry.missing:
        pytest.skip(f"not installed: {', '.join(entry.missing)}")
    outcome = measure(entry, through, **options)
    assert not outcome.report.failures
    reasons = {site.reason for site in outcome.sites if not site.matched}
    assert outcome.matched == entry.attentions, reasons
    assert len(outcome.sites) == entry.attentions + entry.declined, outcome.report
    assert all(site.reason for site in outcome.sites if not site.matched), "declined without a reason"
    assert outcome.errors, "nothing was compared"
    assert not outcome.baseless, "\n".join(map(str, outcome.baseless))
    assert not outcome.wrong, "\n".join(map(str, outcome.wrong))
    return outcome


@pytest.mark.parametrize("name", GRAPH)
def test_model_means_what_it_meant(name: str) -> None:
    _check(ENTRIES[name], "graph")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in KERNEL],
)
def test_model_trains_by_our_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter's gradient, with the forward and the backward interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcome = _check(ENTRIES[name], "graph", routes={"attention": "triton"})
    assert [site.route for site in outcome.sites if site.matched] == ["triton"] * KERNEL[name], outcome.report
    trained = [f"gradient of {n}" for n, p in ENTRIES[name].build().module.named_parameters() if p.requires_grad]
    assert [e.name for e in outcome.errors if e.name.startswith("gradient of")] == trained


@pytest.mark.parametrize("name", INDUCTOR)
def test_model_compiled_by_inductor(name: str) -> None:
    outcome = _check(ENTRIES[name], "inductor")
    assert all(site.route == "sdpa" for site in outcome.sites)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_whole_zoo(name: str) -> None:
    _check(ENTRIES[name], "aot")


def test_names_are_those_of_the_zoo() -> None:
    assert set(GRAPH) | set(INDUCTOR) | KERNEL.keys() <= ENTRIES.keys()
    assert len(ENTRIES) >= 120
