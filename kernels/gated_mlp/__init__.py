"""Gated MLPs with any activation: Triton kernels, generated, behind `torch.ops.xfcompile.gated_mlp`."""

from xfcompile.kernels.attention.tiles import runs as supports
from xfcompile.kernels.gated_mlp.op import gated_mlp, gated_mlp_backward, gated_mlp_down
from xfcompile.kernels.gated_mlp.programs import prepare, source_of_kernel

__all__ = ["gated_mlp", "gated_mlp_backward", "gated_mlp_down", "prepare", "source_of_kernel", "supports"]
