"""The models that are measured, as their libraries make them from configs: no weights are downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xfcompile.bench.job import Scale, Skip

Attention = Literal["sdpa", "eager", "flex_attention", "told"]
"""How a model's attention is computed. "told": SDPA without the mask, is_causal told to it by hand."""
Arguments = dict[str, Any]
Made = tuple[nn.Module, Arguments]


@dataclass(frozen=True)
class Model:
    """make: the model and the arguments of one call, on the CPU in fp32, by scale and implementation of attention; with
    labels where it is to be trained. library: what has to be installed for it.

    attentions: those that it is measured with, its default first. flex: whether its library offers FlexAttention for
    it. told: whether its structure can be said to SDPA without a mask, and what that ignores. modes: of "infer",
    "train" and "decode".
    """

    make: Callable[[Scale, Attention, bool], Made]
    library: str = "transformers"
    attentions: tuple[Attention, ...] = ("sdpa", "eager")
    flex: bool = False
    told: bool = False
    ignores: str = ""
    modes: tuple[str, ...] = ("infer", "train")

    def needs(self) -> None:
        """Raises `Skip` where its library is missing."""
        if importlib.util.find_spec(self.library) is None:
            raise Skip(f"{self.library} is not installed")


def _transformers(kind: str, config: Any, attention: Attention) -> nn.Module:
    import transformers

    if attention == "told":
        _tell()
    implementation = TOLD if attention == "told" else attention
    model: nn.Module = getattr(transformers, kind)._from_config(config, attn_implementation=implementation)
    return model


TOLD = "xfcompile_told"


def _tell() -> None:
    """Register an attention that transformers makes no mask for: SDPA then takes is_causal from the module."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(TOLD, sdpa_attention_forward)


def _labelled(ids: Tensor, train: bool) -> Arguments:
    return {"input_ids": ids, "labels": ids} if train else {"input_ids": ids}


def _tokens(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(3, vocabulary, shape)


# -- decoders -----------------------------------------------------------------------------------------------------

_DECODER: Mapping[Scale, dict[str, Any]] = {
    "gpu": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=32000, max_position_embeddings=16384, pad_token_id=0),
    "cpu": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12,
                num_key_value_heads=12, vocab_size=1000, max_position_embeddings=16384, pad_token_id=0),
    "quick": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, vocab_size=99, max_position_embeddings=512, pad_token_id=0),
}  # fmt: skip


def _decoder(
    family: str, batch: int, length: int, *, left_padded: bool = False, window: int | None = None, **gpu: Any
) -> Callable[[Scale, Attention, bool], Made]:
    """gpu: what differs from the usual sizes there."""

    def make(scale: Scale, attention: Attention, train: bool) -> Made:
        import transformers

        sizes = dict(_DECODER[scale]) | (gpu if scale == "gpu" else {})
        if window is not None:
            sizes["sliding_window"] = 16 if scale == "quick" else window
        config = getattr(transformers, f"{family}Config")(**sizes)
        shape = {"gpu": (batch, length), "cpu": (2 if left_padded else 1, 2048), "quick": (2, 40)}[scale]
        arguments = _labelled(_tokens(config.vocab_size, *shape), train)
        if left_padded:
            mask = torch.ones(shape, dtype=torch.long)
            mask[: shape[0] // 2, : shape[1] // 4] = 0
            arguments["attention_mask"] = mask
        return _transformers(f"{family}ForCausalLM", config, attention), arguments

    return make


def _gpt2(scale: Scale, attention: Attention, train: bool) -> Made:
    from transformers import GPT2Config

    sizes: dict[str, Any] = {
        "gpu": {}, "cpu": dict(n_layer=4, n_positions=2048),
        "quick": dict(n_embd=32, n_layer=1, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=2),
    }[scale]  # fmt: skip
    config = GPT2Config(**sizes)
    shape = {"gpu": (16, 1024), "cpu": (1, 2048), "quick": (2, 40)}[scale]
    return _transformers("GPT2LMHeadModel", config, attention), _labelled(_tokens(config.vocab_size, *shape), train)


def _gpt_oss(scale: Scale, attention: Attention, train: bool) -> Made:
    """Attention sinks, every second layer with a window; a few experts of each token's layers."""
    from transformers import GptOssConfig

    sizes = dict(_DECODER[scale]) | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=128)
    if scale == "gpu":
        sizes |= dict(num_attention_heads=64, num_key_value_heads=8, head_dim=64, intermediate_size=2048)
    else:
        sizes |= dict(num_hidden_layers=2, head_dim=16, sliding_window=16)
    config = GptOssConfig(**sizes)
    shape = {"gpu": (2, 4096), "cpu": (1, 1024), "quick": (2, 40)}[scale]
    return _transformers("GptOssForCausalLM", config, attention), _labelled(_tokens(config.vocab_size, *shape), train)


def _bloom(scale: Scale, attention: Attention, train: bool) -> Made:
    from transformers import BloomConfig

    sizes = {
        "gpu": dict(hidden_size=1024, n_layer=24, n_head=16, vocab_size=32000),
        "cpu": dict(hidden_size=768, n_layer=4, n_head=12, vocab_size=1000),
        "quick": dict(hidden_size=32, n_layer=1, n_head=2, vocab_size=99),
    }[scale]
    config = BloomConfig(**sizes)
    shape = {"gpu": (4, 2048), "cpu": (1, 1024), "quick": (2, 40)}[scale]
    return _transformers("BloomForCausalLM", config, attention), _labelled(_tokens(config.vocab_size, *shape), train)


# -- encoders -----------------------------------------------------------------------------------------------------

_ENCODER: Mapping[Scale, dict[str, Any]] = {
    "gpu": {},
    "cpu": dict(num_hidden_layers=4),
    "quick": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99),
}


def _bert(scale: Scale, attention: Attention, train: bool) -> Made:
    from transformers import BertConfig

    config = BertConfig(**_ENCODER[scale])
    batch, length = {"gpu": (32, 512), "cpu": (4, 512), "quick": (2, 40)}[scale]
    lengths = torch.randint(length // 4, length + 1, (batch, 1))
    arguments = _labelled(_tokens(config.vocab_size, batch, length), train)
    arguments["attention_mask"] = (torch.arange(length) < lengths).long()
    return _transformers("BertForMaskedLM", config, attention), arguments


class PackedDocuments(nn.Module):
    """ModernBERT over several documents a row: the model takes masks that its user has made, here from numbers of
    documents, within the compiled program."""

    def __init__(self, model: Any, attention: Attention) -> None:
        super().__init__()
        self.model, self.attention = model, attention
        self.config: Any = model.config

    def forward(self, input_ids: Tensor, document: Tensor, position_ids: Tensor, labels: Tensor | None = None) -> Any:
        masks = {
            "full_attention": self.mask(document, None),
            "sliding_attention": self.mask(document, self.config.sliding_window),
        }
        return self.model(input_ids, attention_mask=masks, position_ids=position_ids, labels=labels)

    def mask(self, document: Tensor, window: int | None) -> Any:
        n = torch.arange(document.shape[1], device=document.device)
        if self.attention == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                same = document[b, i] == document[b, j]
                return same if window is None else same & ((i - j).abs() <= window)

            length, device = document.shape[1], document.device.type
            return create_block_mask(kept, document.shape[0], None, length, length, device=device)
        keep = document[:, None, :, None] == document[:, None, None, :]
        if window is not None:
            keep = keep & ((n[:, None] - n[None, :]).abs() <= window)
        if self.attention == "sdpa":
            return keep
        dtype = next(self.model.parameters()).dtype
        return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


def _modernbert(scale: Scale, attention: Attention, train: bool) -> Made:
    from transformers import ModernBertConfig

    sizes: dict[str, Any] = dict(_ENCODER[scale], reference_compile=False)
    if scale != "gpu":
        sizes |= dict(num_hidden_layers=4 if scale == "cpu" else 2, global_attn_every_n_layers=2)
    if scale == "quick":
        sizes |= dict(
            local_attention=16, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        )
    config = ModernBertConfig(**sizes)
    batch, length = {"gpu": (4, 4096), "cpu": (1, 2048), "quick": (2, 40)}[scale]
    # Eight documents a row, of unequal lengths, at other places in each row.
    borders = torch.rand(batch, 7).sort(-1).values * length
    document = (torch.arange(length)[None, :, None] >= borders[:, None]).sum(-1)
    starts = torch.where(document != document.roll(1, -1), torch.arange(length), 0)
    starts[:, 0] = 0
    positions = torch.arange(length) - starts.cummax(-1).values
    arguments = _labelled(_tokens(config.vocab_size, batch, length), train)
    arguments |= {"document": document, "position_ids": positions}
    return PackedDocuments(_transformers("ModernBertForMaskedLM", config, attention), attention), arguments


def _vit(scale: Scale, attention: Attention, train: bool) -> Made:
    from transformers import ViTConfig

    sizes = {
        "gpu": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                    image_size=384),
        "cpu": dict(num_hidden_layers=4, image_size=384),
        "quick": dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=48),
    }[scale]  # fmt: skip
    images = _images({"gpu": 32, "cpu": 2, "quick": 2}[scale], sizes["image_size"], train)
    return _transformers("ViTForImageClassification", ViTConfig(patch_size=16, **sizes), attention), images


def _swin(scale: Scale, attention: Attention, train: bool) -> Made:
    from transformers import SwinConfig

    sizes: dict[str, Any] = {
        "gpu": dict(image_size=384, patch_size=4, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32],
                    window_size=12),
        "cpu": dict(image_size=224, patch_size=4, embed_dim=96, depths=[2, 2, 2, 2], num_heads=[3, 6, 12, 24],
                    window_size=7),
        "quick": dict(image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4),
    }[scale]  # fmt: skip
    images = _images({"gpu": 32, "cpu": 2, "quick": 2}[scale], sizes["image_size"], train)
    return _transformers("SwinForImageClassification", SwinConfig(**sizes), attention), images


def _images(batch: int, size: int, train: bool) -> Arguments:
    images: Arguments = {"pixel_values": torch.randn(batch, 3, size, size)}
    return images | {"labels": torch.arange(batch) % 2} if train else images


# -- encoders with decoders ---------------------------------------------------------------------------------------


def _t5(scale: Scale, attention: Attention, train: bool) -> Made:
    from transformers import T5Config

    sizes = {
        "gpu": dict(d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, vocab_size=32128),
        "cpu": dict(d_model=768, d_kv=64, d_ff=2048, num_layers=2, num_heads=12, vocab_size=1000),
        "quick": dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=99),
    }[scale]
    config = T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, **sizes)
    batch, length, target = {"gpu": (8, 1024, 256), "cpu": (1, 1024, 256), "quick": (2, 40, 16)}[scale]
    answer = _tokens(config.vocab_size, batch, target)
    arguments = {"input_ids": _tokens(config.vocab_size, batch, length)}
    arguments["labels" if train else "decoder_input_ids"] = answer
    return _transformers("T5ForConditionalGeneration", config, attention), arguments


def _whisper(scale: Scale, attention: Attention, train: bool) -> Made:
    """Whisper small."""
    from transformers import WhisperConfig

    layers, width, heads, frames, vocabulary = {
        "gpu": (12, 768, 12, 3000, 51865), "cpu": (2, 768, 12, 3000, 1000), "quick": (1, 32, 2, 48, 99)
    }[scale]  # fmt: skip
    config = WhisperConfig(
        encoder_layers=layers, decoder_layers=layers, d_model=width, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, vocab_size=vocabulary,
        max_source_positions=frames // 2, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    batch, target = {"gpu": (16, 256), "cpu": (1, 128), "quick": (2, 16)}[scale]
    answer = _tokens(vocabulary, batch, target)
    arguments = {"input_features": torch.randn(batch, config.num_mel_bins, frames)}
    arguments["labels" if train else "decoder_input_ids"] = answer
    return _transformers("WhisperForConditionalGeneration", config, attention), arguments


# -- of other libraries -------------------------------------------------------------------------------------------


def _timm(scale: Scale, attention: Attention, train: bool) -> Made:
    """Its default is SDPA; without "fused attention" it writes attention out."""
    import timm

    timm.layers.set_fused_attn(attention == "sdpa")
    try:
        more: dict[str, Any] = {
            "gpu": {}, "cpu": dict(depth=4),
            "quick": dict(depth=1, embed_dim=32, num_heads=2, img_size=48),
        }[scale]  # fmt: skip
        model = timm.create_model("vit_base_patch16_224", **more)
    finally:
        timm.layers.set_fused_attn(True)
    size = 48 if scale == "quick" else 224
    return model, {"x": torch.randn({"gpu": 128, "cpu": 4, "quick": 2}[scale], 3, size, size)}


def _unet(scale: Scale, attention: Attention, train: bool) -> Made:
    """Stable Diffusion 1.5's. Eager attention is diffusers' older processor, a softmax between two baddbmm."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    by_scale: dict[str, dict[str, Any]] = {
        "gpu": dict(sample_size=64, cross_attention_dim=768),
        "cpu": dict(sample_size=32, layers_per_block=1, cross_attention_dim=256),
        "quick": dict(sample_size=16, layers_per_block=1, block_out_channels=(16,), norm_num_groups=8,
                      cross_attention_dim=24, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",),
                      up_block_types=("CrossAttnUpBlock2D",)),
    }  # fmt: skip
    sizes = by_scale[scale]
    model = UNet2DConditionModel(**sizes)
    model.set_attn_processor(AttnProcessor2_0() if attention == "sdpa" else AttnProcessor())
    batch, size = {"gpu": 8, "cpu": 1, "quick": 2}[scale], sizes["sample_size"]
    return model, {
        "sample": torch.randn(batch, 4, size, size),
        "timestep": torch.full((batch,), 7),
        "encoder_hidden_states": torch.randn(batch, 77 if scale != "quick" else 9, sizes["cross_attention_dim"]),
    }


MODELS: dict[str, Model] = {
    "Llama": Model(_decoder("Llama", 2, 4096), flex=True, told=True),
    "ViT-L 384": Model(_vit, flex=True, told=True),
    "Mistral, window": Model(_decoder("Mistral", 1, 8192, window=1024), flex=True),
    "Gemma-2": Model(
        _decoder("Gemma2", 2, 4096, hidden_size=2304, intermediate_size=9216, num_attention_heads=8,
                 num_key_value_heads=4, head_dim=256), flex=True,
    ),
    "T5 1.1": Model(_t5, flex=True),
    "GPT-2": Model(_gpt2, told=True),
    "BERT, padded": Model(_bert, flex=True, told=True, ignores="it ignores the padding"),
    "Swin-B 384": Model(_swin),
    "Llama, left-padded": Model(_decoder("Llama", 2, 4096, left_padded=True), flex=True),
    "GPT-OSS": Model(_gpt_oss, attentions=("eager",), flex=True),
    "BLOOM": Model(_bloom, attentions=("eager",)),
    "Whisper": Model(_whisper, flex=True),
    "ModernBERT, packed": Model(_modernbert, flex=True),
    "Stable Diffusion UNet": Model(_unet, library="diffusers"),
    "timm ViT-B": Model(_timm, library="timm"),
    "Llama, static cache": Model(_decoder("Llama", 8, 1024), modes=("decode",)),
}  # fmt: skip
"""The first nine are those whose numbers the goals began with. The sizes on GPUs are those of the functions above."""
