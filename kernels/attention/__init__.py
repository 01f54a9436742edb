"""Attention with any score: generated Triton forward kernels behind one op, `torch.ops.xfcompile.attention`."""

from xfcompile.kernels.attention.op import attention, prepare
from xfcompile.kernels.attention.tiles import supports

__all__ = ["attention", "prepare", "supports"]
