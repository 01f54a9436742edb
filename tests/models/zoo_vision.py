"""Vision, audio and multi-modal models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from hugging_face import ENCODER, VISION, both, ids, pixels

_SWIN = dict(
    image_size=32, patch_size=2, num_channels=3, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
    drop_path_rate=0.0,
)  # fmt: skip
_WHISPER = dict(
    vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, max_source_positions=24, max_target_positions=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip


def _whisper() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 48), "decoder_input_ids": torch.randint(3, 99, (2, 11))}


def _waves() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800)}


def _clip() -> dict[str, Any]:
    return {**ids()(), "pixel_values": torch.randn(2, 3, 32, 32)}


def _clip_config(kind: str) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")
    text = {**ENCODER, "projection_dim": 32}
    return lambda: config(text_config=text, vision_config=dict(VISION), projection_dim=32)


def _detr() -> Any:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=64,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, num_queries=7, num_labels=5,
    )  # fmt: skip


def _sam() -> Any:
    import transformers

    vision = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=64, image_size=64, patch_size=8,
        window_size=4, global_attn_indexes=[1], output_channels=16, num_pos_feats=8,
    )  # fmt: skip
    return transformers.SamVisionConfig(**vision)


ENTRIES = (
    *both("vit", "ViTModel", ("ViTConfig", VISION), pixels(), 2),
    *both("vit_train", "ViTForImageClassification", ("ViTConfig", VISION), pixels(labels=torch.tensor([0, 1])), 2,
          train=True),
    *both("deit", "DeiTModel", ("DeiTConfig", VISION), pixels(), 2),
    *both("beit", "BeitModel", ("BeitConfig", {**VISION, "use_relative_position_bias": True, "drop_path_rate": 0.0}),
          pixels(), 2),
    *both("dinov2", "Dinov2Model", ("Dinov2Config", {**VISION, "use_swiglu_ffn": True}), pixels(), 2),
    *both("siglip_vision", "SiglipVisionModel", ("SiglipVisionConfig", VISION), pixels(), 3),
    *both("clip", "CLIPModel", _clip_config("CLIP"), _clip, 4),
    *both("clip_text", "CLIPTextModel", ("CLIPTextConfig", ENCODER), ids(), 2),
    *both("clip_vision", "CLIPVisionModel", ("CLIPVisionConfig", VISION), pixels(), 2),
    *both("swin", "SwinModel", ("SwinConfig", _SWIN), pixels(), 4),
    *both("swin_train", "SwinForImageClassification", ("SwinConfig", _SWIN), pixels(labels=torch.tensor([0, 1])), 4,
          train=True),
    *both("swinv2", "Swinv2Model", ("Swinv2Config", _SWIN), pixels(), 4, implementations=["eager"]),
    *both("sam_vision", "SamVisionModel", _sam, pixels(64), 2),
    *both("segformer", "SegformerModel", ("SegformerConfig", dict(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], drop_path_rate=0.0)), pixels(), 2,
        implementations=["eager"]),
    *both("detr", "DetrModel", _detr, pixels(64), 6, implementations=["eager"]),
    *both("wav2vec2", "Wav2Vec2Model", ("Wav2Vec2Config", {
        **ENCODER, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}), _waves, 2),
    *both("whisper", "WhisperModel", ("WhisperConfig", _WHISPER), _whisper, 6),
)  # fmt: skip
