"""The criterion for generated text: SDPA's steps meet it, and wrong attention does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forcing import Forced, forced
from torch import Tensor

transformers = pytest.importorskip("transformers")
BATCH, PROMPT, TOKENS, VOCABULARY = 2, 10, 24, 99


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        initializer_range=0.05,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    return made.bfloat16().eval()


def _generated(model: Any) -> tuple[dict[str, Tensor], Any]:
    ids = torch.randint(3, VOCABULARY, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    prompt = {"input_ids": ids * mask, "attention_mask": mask}
    more = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    text = model.generate(**prompt, **more)
    assert len(text.sequences.unique()) > 5, "text that hardly changes says nothing"
    return prompt, text


def _attention(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    from transformers.models.llama import modeling_llama

    right = modeling_llama.eager_attention_forward

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Any:
        return right(module, *wrong(q, k, v, mask), **more)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)


def _without_the_newest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """A mask that is off by one: a step does not see the newest key."""
    newest = (torch.arange(k.shape[2]) == k.shape[2] - 1) & (q.shape[2] == 1)
    mask = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=q.dtype) if mask is None else mask
    return q, k, v, mask.masked_fill(newest, torch.finfo(q.dtype).min)


def _with_the_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """A mask that is off by one at the other end: a step sees the last key of the padding."""
    if mask is None or q.shape[2] > 1:
        return q, k, v, mask
    mask = mask.clone()
    mask[..., 3] = 0
    return q, k, v, mask


def _a_scale_of_another_head_dim(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    return q * (64 / 60) ** 0.5, k, v, mask


def test_other_kernels_are_as_exact_as_eager() -> None:
    model = _model()
    model.set_attn_implementation("sdpa")
    prompt, text = _generated(model)
    model.set_attn_implementation("eager")
    found = forced(model, prompt, text)
    assert not torch.equal(found.ours, found.eager), "they round differently"
    found.check()


@pytest.mark.parametrize("wrong", [_without_the_newest, _with_the_padding, _a_scale_of_another_head_dim])
def test_wrong_attention_is_found(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    with monkeypatch.context() as patched:
        _attention(patched, wrong)
        prompt, text = _generated(model)
    with pytest.raises(AssertionError, match="times eager's error"):
        forced(model, prompt, text).check()


def test_a_token_that_is_not_as_likely_is_found() -> None:
    model = _model()
    found = forced(model, *_generated(model))
    least = found.exact.argmin(-1)
    with pytest.raises(AssertionError, match="less likely"):
        Forced(found.ours, found.eager, found.exact, least).check()
