"""Language models of transformers: decoders, encoders, and both."""

from __future__ import annotations

from typing import Any

from hugging_face import DECODER, ENCODER, both, ids, labelled, padded, seq2seq
from torch import nn

_GPT = dict(
    vocab_size=99, n_positions=128, n_embd=64, n_layer=2, n_head=4, n_inner=128, bos_token_id=1, eos_token_id=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
_T5 = dict(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
_BART = dict(
    vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_LONG_MEMORY = dict(
    vocab_size=99, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1,
    topk_group=1, first_k_dense_replace=1, max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip


def _not_upcast(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "reorder_and_upcast_attn"):
            part.reorder_and_upcast_attn = False


def _plain(name: str, family: str, attentions: int = 2, **fields: Any) -> tuple[Any, ...]:
    """A decoder of the usual configuration."""
    return both(name, f"{family}ForCausalLM", (f"{family}Config", {**DECODER, **fields}), ids(), attentions)


_DECODERS = (
    *_plain("llama", "Llama"),
    *both("llama_no_cache", "LlamaModel", ("LlamaConfig", DECODER), ids(use_cache=False), 2),
    *both("llama_right_padded", "LlamaModel", ("LlamaConfig", DECODER), padded(), 2),
    *both("llama_left_padded", "LlamaModel", ("LlamaConfig", DECODER), padded(left=True), 2),
    *both("llama_train", "LlamaForCausalLM", ("LlamaConfig", DECODER), labelled(), 2, train=True),
    *both("llama_train_padded", "LlamaForCausalLM", ("LlamaConfig", DECODER), labelled(padded()), 2, train=True),
    *_plain("mistral_window", "Mistral", sliding_window=8),
    *both("mistral_left_padded", "MistralModel", ("MistralConfig", {**DECODER, "sliding_window": 8}), padded(True), 2),
    *both(
        "gemma2", "Gemma2ForCausalLM",
        ("Gemma2Config", {**DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}), ids(), 2,
        implementations=["eager"],
    ),
    *both(
        "gemma2_train", "Gemma2ForCausalLM",
        ("Gemma2Config", {**DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}), labelled(), 2,
        implementations=["eager"], train=True,
    ),
    *both(
        "gemma2_left_padded", "Gemma2ForCausalLM",
        ("Gemma2Config", {**DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
        padded(left=True), 2, implementations=["eager"],
    ),
    *both(
        "gemma3", "Gemma3ForCausalLM",
        ("Gemma3TextConfig", {
            **DECODER, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
        }),
        ids(), 2,
    ),
    *_plain("qwen2", "Qwen2"),
    *both("qwen2_train", "Qwen2ForCausalLM", ("Qwen2Config", DECODER), labelled(), 2, train=True),
    *_plain("qwen3", "Qwen3", head_dim=16),
    *_plain("phi", "Phi"),
    *_plain("phi3", "Phi3"),
    *_plain("olmo2", "Olmo2"),
    *_plain("cohere", "Cohere"),
    *_plain("granite", "Granite"),
    *_plain("stablelm", "StableLm"),
    *_plain("starcoder2", "Starcoder2"),
    *_plain("nemotron", "Nemotron"),
    *_plain("glm4", "Glm4", head_dim=16),
    *_plain("persimmon", "Persimmon"),
    # The softmaxes over experts are not attention.
    *both("mixtral", "MixtralForCausalLM", ("MixtralConfig", {**DECODER, **_EXPERTS}), ids(), 2, declined=2),
    *both("qwen2_moe", "Qwen2MoeForCausalLM", ("Qwen2MoeConfig", {
        **DECODER, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2}), ids(), 2, declined=2),
    *both("deepseek_v3", "DeepseekV3ForCausalLM", ("DeepseekV3Config", _LONG_MEMORY), ids(), 2),
    *both(
        "llama4_text", "Llama4ForCausalLM",
        ("Llama4TextConfig", {
            **DECODER, **_EXPERTS, "intermediate_size_mlp": 128, "head_dim": 16, "attention_chunk_size": 8,
            "num_experts_per_tok": 1, "no_rope_layers": [1, 0],
        }),
        ids(), 2,
    ),
    *both(
        "gpt_oss", "GptOssForCausalLM", ("GptOssConfig", {**DECODER, **_EXPERTS, "head_dim": 16, "sliding_window": 8}),
        ids(), 2, declined=2, implementations=["eager"],
    ),
    *both(
        "gpt_oss_train", "GptOssForCausalLM",
        ("GptOssConfig", {**DECODER, **_EXPERTS, "head_dim": 16, "sliding_window": 8}), labelled(), 2, declined=2,
        implementations=["eager"], train=True,
    ),
    *both("gpt2", "GPT2LMHeadModel", ("GPT2Config", _GPT), ids(), 2),
    *both("gpt2_left_padded", "GPT2LMHeadModel", ("GPT2Config", _GPT), padded(left=True), 2),
    *both("gpt2_train", "GPT2LMHeadModel", ("GPT2Config", _GPT), labelled(), 2, train=True),
    *both(
        "gpt2_upcast", "GPT2LMHeadModel",
        ("GPT2Config", {**_GPT, "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}), ids(), 2,
        implementations=["eager"], loosen=_not_upcast,
    ),
    *both(
        "gpt_neo", "GPTNeoForCausalLM",
        ("GPTNeoConfig", dict(
            vocab_size=99, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128, window_size=8,
            max_position_embeddings=128, attention_types=[[["global", "local"], 1]],
        )),
        ids(), 2, implementations=["eager"],
    ),
    *both("gpt_neox", "GPTNeoXForCausalLM", ("GPTNeoXConfig", ENCODER), ids(), 2),
    *both("gptj", "GPTJForCausalLM", ("GPTJConfig", {**_GPT, "rotary_dim": 8}), ids(), 2, implementations=["eager"]),
    *both(
        "cpmant", "CpmAntModel",
        ("CpmAntConfig", dict(vocab_size=99, hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=128,
                              num_hidden_layers=2, prompt_length=8)),
        ids(), 2, implementations=["eager"], grad=True,
    ),
    *both("codegen", "CodeGenForCausalLM", ("CodeGenConfig", {**_GPT, "rotary_dim": 8}), ids(), 2,
          implementations=["eager"]),
    *both("gpt_bigcode", "GPTBigCodeForCausalLM", ("GPTBigCodeConfig", _GPT), ids(), 2),
    *both("bloom", "BloomForCausalLM", ("BloomConfig", dict(vocab_size=99, hidden_size=64, n_layer=2, n_head=4)), ids(),
          2, implementations=["eager"]),
    *both("bloom_left_padded", "BloomForCausalLM", ("BloomConfig", dict(
        vocab_size=99, hidden_size=64, n_layer=2, n_head=4)), padded(left=True), 2, implementations=["eager"]),
    *both(
        "falcon_alibi", "FalconForCausalLM",
        ("FalconConfig", {**ENCODER, "alibi": True, "new_decoder_architecture": False, "multi_query": False}), ids(), 2,
    ),
    *both("falcon_mqa", "FalconForCausalLM", ("FalconConfig", {**ENCODER, "alibi": False, "multi_query": True}), ids(),
          2),
    *both("mpt", "MptForCausalLM", ("MptConfig", dict(
        vocab_size=99, d_model=64, n_heads=4, n_layers=2, max_seq_len=128)), ids(), 2, implementations=["eager"]),
    *both("opt", "OPTForCausalLM", ("OPTConfig", {
        **ENCODER, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}), ids(), 2),
)  # fmt: skip

_QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

_ENCODERS = (
    *both("bert", "BertModel", ("BertConfig", ENCODER), ids(), 2),
    *both("bert_right_padded", "BertModel", ("BertConfig", ENCODER), padded(), 2),
    *both("bert_train", "BertForMaskedLM", ("BertConfig", {**ENCODER, **_QUIET}), labelled(padded()), 2, train=True),
    *both("roberta", "RobertaModel", ("RobertaConfig", ENCODER), ids(), 2),
    *both("albert", "AlbertModel", ("AlbertConfig", {**ENCODER, "embedding_size": 32}), padded(), 2),
    *both("electra", "ElectraModel", ("ElectraConfig", {**ENCODER, "embedding_size": 32}), ids(), 2),
    *both("distilbert", "DistilBertModel", ("DistilBertConfig", dict(
        vocab_size=99, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=128)), padded(), 2),
    *both("modernbert", "ModernBertModel", ("ModernBertConfig", {
        **ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
        padded(), 2),
    *both("esm", "EsmModel", ("EsmConfig", {
        **ENCODER, "mask_token_id": 3, "position_embedding_type": "rotary"}), padded(), 2),
    *both("deberta_v2", "DebertaV2Model", ("DebertaV2Config", {
        **ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16,
        "share_att_key": True, "norm_rel_ebd": "layer_norm"}), padded(), 2, implementations=["eager"]),
    *both("xlnet", "XLNetModel", ("XLNetConfig", dict(
        vocab_size=99, d_model=64, n_layer=2, n_head=4, d_inner=128)), ids(), 2, implementations=["eager"]),
    *both("layoutlmv3", "LayoutLMv3Model", ("LayoutLMv3Config", {
        **ENCODER, "coordinate_size": 8, "shape_size": 16, "has_relative_attention_bias": True,
        "has_spatial_attention_bias": True, "visual_embed": False, "max_2d_position_embeddings": 128,
        "rel_pos_bins": 8, "rel_2d_pos_bins": 8}), padded(), 2, implementations=["eager"]),
)  # fmt: skip

_ENCODER_DECODERS = (
    *both("t5", "T5Model", ("T5Config", _T5), seq2seq, 6),
    *both("t5_gated_train", "T5ForConditionalGeneration", ("T5Config", {
        **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}),
        labelled(padded()), 6, train=True),
    *both("t5_train", "T5ForConditionalGeneration", ("T5Config", {**_T5, "decoder_start_token_id": 0}), labelled(), 6,
          train=True),
    *both("bart", "BartModel", ("BartConfig", _BART), seq2seq, 6),
    *both("m2m100", "M2M100Model", ("M2M100Config", _BART), seq2seq, 6),
)  # fmt: skip

ENTRIES = _DECODERS + _ENCODERS + _ENCODER_DECODERS
