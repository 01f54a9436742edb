"""Attention with any score: Triton kernels and their gradients, generated, behind `torch.ops.xfcompile.attention`."""

from xfcompile.kernels.attention.arguments import mask_arguments
from xfcompile.kernels.attention.gradient import why_no_gradient
from xfcompile.kernels.attention.lists_sizes import FEW_TILES, always_listed, tile_sizes
from xfcompile.kernels.attention.op import attention, attention_tiles, prepare
from xfcompile.kernels.attention.programs import mask_of, source_of_kernel, source_of_lists
from xfcompile.kernels.attention.tiles import supports

__all__ = [
    "FEW_TILES",
    "always_listed",
    "attention",
    "attention_tiles",
    "mask_arguments",
    "mask_of",
    "prepare",
    "source_of_kernel",
    "source_of_lists",
    "supports",
    "tile_sizes",
    "why_no_gradient",
]
