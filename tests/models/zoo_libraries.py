"""Models of timm, diffusers, x-transformers and vit-pytorch, and PyTorch's own transformer modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision_stub import torchvision_stub
from zoo import Entry, Program


def _timm(name: str, model: str, attentions: int, size: int = 32, declined: int = 0, **fields: Any) -> list[Entry]:
    """A model of timm with its attention written out, and through SDPA where it has that."""

    def making(fused: bool) -> Callable[[], Program]:
        def make() -> Program:
            with torchvision_stub():
                import timm
            module = timm.create_model(model, num_classes=5, **fields)
            for part in module.modules():
                if hasattr(part, "fused_attn"):
                    part.fused_attn = fused
            return Program(module, (torch.randn(2, 3, size, size),))

        return make

    kinds = {"eager": False, "sdpa": True}
    return [
        Entry(f"{name}[{kind}]", making(fused), attentions, declined, needs=("timm",)) for kind, fused in kinds.items()
    ]


_TIMM_VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)

_TIMM = (
    *_timm("timm_vit", "vit_tiny_patch16_224", 2, **_TIMM_VIT),
    *_timm("timm_vit_qk_norm", "vit_tiny_patch16_224", 2, **_TIMM_VIT, qk_norm=True, init_values=0.1),
    *_timm("timm_beit", "beit_base_patch16_224", 2, **_TIMM_VIT),
    *_timm("timm_eva02", "eva02_tiny_patch14_224", 2, **_TIMM_VIT),
    *_timm(
        "timm_swin", "swin_tiny_patch4_window7_224", 4, img_size=32, patch_size=2, window_size=4, embed_dim=16,
        depths=(2, 2), num_heads=(2, 4),
    ),
    *_timm(
        "timm_swinv2", "swinv2_tiny_window8_256", 4, img_size=32, patch_size=2, window_size=4, embed_dim=16,
        depths=(2, 2), num_heads=(2, 4),
    )[:1],
    *_timm("timm_levit", "levit_128s", 11, size=64, img_size=64)[:1],
    *_timm("timm_maxvit", "maxvit_tiny_tf_224", 4, size=64, img_size=64, embed_dim=(32, 64), depths=(1, 1),
           stem_width=8),
)  # fmt: skip


def _diffusers(module: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """A model of diffusers with its classic attention."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for part in module.modules():
        if isinstance(part, Attention):
            part.set_processor(AttnProcessor())
    return Program(module, args, kwargs)


def _unet() -> Program:
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    return _diffusers(module, torch.randn(2, 4, 16, 16), torch.tensor([3, 7]), torch.randn(2, 9, 24))


def _dit() -> Program:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    return _diffusers(module, torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2]))


def _pixart() -> Program:
    from diffusers import PixArtTransformer2DModel

    module = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        cross_attention_dim=64, caption_channels=24, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    keep = torch.ones(2, 7)
    keep[1, 4:] = 0
    return _diffusers(
        module, torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24), torch.tensor([3, 7]), encoder_attention_mask=keep
    )


def _vae() -> Program:
    from diffusers import AutoencoderKL

    module = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, layers_per_block=1,
    )  # fmt: skip
    return _diffusers(module, torch.randn(2, 3, 16, 16))


_DIFFUSERS = (
    Entry("diffusers_unet", _unet, 8, needs=("diffusers",)),
    Entry("diffusers_dit", _dit, 2, needs=("diffusers",)),
    Entry("diffusers_pixart", _pixart, 2, needs=("diffusers",)),
    Entry("diffusers_vae", _vae, 2, needs=("diffusers",)),
)


def _x_transformers(causal: bool, **fields: Any) -> Callable[[], Program]:
    def make() -> Program:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        layers = (Decoder if causal else Encoder)(dim=64, depth=2, heads=4, attn_dim_head=16, **fields)
        module = TransformerWrapper(num_tokens=99, max_seq_len=64, attn_layers=layers)
        return Program(module, (torch.randint(0, 99, (2, 24)),))

    return make


def _x(name: str, causal: bool, **fields: Any) -> Entry:
    return Entry(f"x_transformers_{name}", _x_transformers(causal, **fields), 2, needs=("x_transformers",))


_X_TRANSFORMERS = (
    _x("decoder", True),
    _x("decoder_flash", True, attn_flash=True),
    _x("rotary_gqa", True, rotary_pos_emb=True, ff_swish=True, ff_glu=True, attn_kv_heads=2),
    _x("alibi", True, alibi_pos_bias=True, alibi_num_heads=4),
    _x("t5_bias_soft_clamp", True, rel_pos_bias=True, attn_softclamp_logits=True),
    _x("memory_keys", True, attn_num_mem_kv=3, attn_gate_values=True),
    _x("encoder_qk_norm", False, attn_qk_norm=True, attn_qk_norm_dim_scale=True, ff_glu=True),
)


def _vit_pytorch(name: str, kind: str, attentions: int, declined: int = 0, **fields: Any) -> Entry:
    def make() -> Program:
        import importlib

        with torchvision_stub():
            part = importlib.import_module(f"vit_pytorch.{name}")
        sizes = dict(image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=4, mlp_dim=128)
        return Program(getattr(part, kind)(**{**sizes, **fields}), (torch.randn(2, 3, 32, 32),))

    return Entry(f"vit_pytorch_{name}", make, attentions, declined, needs=("vit_pytorch", "einops"))


_VIT_PYTORCH = (
    _vit_pytorch("vit", "ViT", 2),
    _vit_pytorch("simple_vit", "SimpleViT", 2),
    _vit_pytorch("parallel_vit", "ViT", 4),
    # Heads are mixed between the products: no attention that a fused kernel computes.
    _vit_pytorch("deepvit", "DeepViT", 0, declined=2),
)


def _multihead(causal: bool = False, padded: bool = False, **call: Any) -> Callable[[], Program]:
    def make() -> Program:
        module = nn.MultiheadAttention(64, 4, batch_first=True)
        x = torch.randn(2, 24, 64)
        more = dict(call)
        if causal:
            more["attn_mask"] = torch.ones(24, 24, dtype=torch.bool).triu(1)
        if padded:
            more["key_padding_mask"] = torch.arange(24) >= torch.tensor([[24], [17]])
        return Program(module, (x, x, x), more)

    return make


def _encoder_layer() -> Program:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return Program(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(2, 24, 64),))


def _decoder_layer() -> Program:
    layer = nn.TransformerDecoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(24)
    return Program(layer, (torch.randn(2, 24, 64), torch.randn(2, 17, 64)), {"tgt_mask": mask, "tgt_is_causal": True})


_TORCH = (
    Entry("torch_multihead_attention", _multihead(), 1, needs=()),
    Entry("torch_multihead_attention_no_weights", _multihead(need_weights=False), 1, needs=()),
    Entry("torch_multihead_attention_causal", _multihead(causal=True, need_weights=False), 1, needs=()),
    Entry("torch_multihead_attention_padded", _multihead(padded=True, need_weights=False), 1, needs=()),
    Entry("torch_multihead_attention_train", _multihead(need_weights=False), 1, train=True, needs=()),
    # Without gradients each layer is one call of PyTorch's own fused layer, in which there is nothing to find.
    Entry("torch_encoder", _encoder_layer, 0, needs=()),
    Entry("torch_encoder_grad", _encoder_layer, 2, grad=True, needs=()),
    Entry("torch_encoder_train", _encoder_layer, 2, train=True, needs=()),
    Entry("torch_decoder_layer", _decoder_layer, 2, needs=()),
    Entry("torch_decoder_layer_train", _decoder_layer, 2, train=True, needs=()),
)

ENTRIES = (*_TIMM, *_DIFFUSERS, *_X_TRANSFORMERS, *_VIT_PYTORCH, *_TORCH)
