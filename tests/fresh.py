"""As if a process had begun anew, as far as kernels are concerned."""

from __future__ import annotations

from xfcompile.kernels import asked
from xfcompile.kernels.attention import backward_layout, cache, lists, programs
from xfcompile.kernels.bias_act_dropout import launch as bias_launch
from xfcompile.kernels.gated_mlp import launch as gated_launch


def forget() -> None:
    """No kernel was prepared, loaded or launched."""
    for known in (programs.known, gated_launch._programs, lists._programs):
        known.clear()
    modules = (programs._module, backward_layout._module, gated_launch._module, bias_launch._module)
    more = (lists._kernels, bias_launch.source_of_kernel, cache._private_directory, cache._warn_of_a_change)
    for cached in (backward_layout.prepare, *modules, *more):
        cached.cache_clear()
    bias_launch._calls.clear()
    cache._sources.clear()
    asked._asked.clear()
