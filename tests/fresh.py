"""As if a process had begun anew, as far as kernels are concerned."""

from __future__ import annotations

from xfcompile.kernels import asked
from xfcompile.kernels.attention import backward_layout, cache, lists, programs, times
from xfcompile.kernels.bias_act_dropout import calls as bias_calls
from xfcompile.kernels.bias_act_dropout import programs as bias_programs
from xfcompile.kernels.gated_mlp import programs as gated_programs


def forget() -> None:
    """No kernel was prepared, loaded or launched."""
    for known in (programs.known, gated_programs.known, lists._programs):
        known.clear()
    modules = (programs._module, gated_programs._module, bias_programs._module, backward_layout._module)
    more = (
        backward_layout.prepare,
        lists._kernels,
        bias_programs.source_of_kernel,
        cache._private_directory,
        cache._warn_of_a_change,
    )
    for cached in (*modules, *more):
        cached.cache_clear()
    bias_calls.known.clear()
    cache._sources.clear()
    asked._asked.clear()
    times._found.clear()
