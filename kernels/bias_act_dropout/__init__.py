"""Bias, activation, dropout and what is added: Triton kernels of one formula, with or without the linear before."""

from xfcompile.kernels.bias_act_dropout.formula import text_of
from xfcompile.kernels.bias_act_dropout.op import bias_act_dropout, linear_act_dropout, saves, supports
from xfcompile.kernels.bias_act_dropout.programs import source_of_kernel

__all__ = ["bias_act_dropout", "linear_act_dropout", "saves", "source_of_kernel", "supports", "text_of"]
