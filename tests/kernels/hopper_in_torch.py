"""The attention kernels for Hopper as they are launched, their text run by torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gluon_in_torch
import pytest
import torch
from attention_cases import Inputs
from torch import Tensor

from xfcompile.kernels.attention import (
    cache,
    forward_call,
    hopper,
    hopper_backward,
    launch_hopper,
    launch_hopper_backward,
    lists,
    lists_sizes,
    prepare,
    programs,
)
from xfcompile.kernels.attention.arguments import mask_values
from xfcompile.kernels.attention.exactness import speed
from xfcompile.kernels.attention.hopper_variant import Variant
from xfcompile.kernels.attention.repeat import Launch
from xfcompile.site import ScoreSpec


def attention(
    spec: ScoreSpec,
    x: Inputs,
    variant: Variant | None = None,
    multiprocessors: int = 3,
    more: int = 0,
    heads_first: bool = False,
    seed: int = 0,
    changed: tuple[str, str] | None = None,
) -> tuple[Tensor, Tensor]:
    """out, lse. variant: how the text is written, if not as usual. more: programs than there are by right.
    changed: a piece of the text, and what stands in its place."""

    def launched(self: Launch, tensors: Sequence[Tensor], free: Sequence[Any] = ()) -> None:
        gluon_in_torch.run(self, tensors, free, seed)

    prepared = programs.program(prepare(spec))
    flags = {"UNIT": forward_call._unit(prepared.key, x.q.dtype), "FAST": speed(prepared.spec, x.q)}
    flags = {name: flag for name, flag in flags.items() if name in prepared.kernel(False).arg_names}
    strides = [stride for operand in x.operands for stride in operand.stride()]
    scalars = prepared.numbers(x.ints, x.floats)
    tiles = None
    if prepared.mask is not None:
        values = mask_values(prepared, x.operands, scalars)
        tiles = lists.tightest(x.q, *values, (*x.q.shape[:3], x.k.shape[2]), hopper.ROWS, hopper.KEYS, prepared.mask)
    out, lse = forward_call.outputs(x.q, x.v, heads_first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", launched)
        if changed is not None:
            patch.setattr(launch_hopper, "_module", functools.partial(_changed_module, changed))
        patch.setattr(launch_hopper, "multiprocessors", lambda device: multiprocessors)
        kernel = launch_hopper.Hopper(prepared, x.q, x.k, x.v, strides, flags, heads_first, x.operands, variant)
        kernel.launch.grid = (kernel.launch.grid[0] + more, 1, 1)
        kernel(x.q, x.k, x.v, out.fill_(torch.nan), lse.fill_(torch.nan), x.operands, scalars, tiles)
    return out, lse


def _changed_module(changed: tuple[str, str], key: str, variant: Variant) -> Any:
    return _with(changed, hopper.module(*launch_hopper._made_of(key), variant))


def backward(patch: pytest.MonkeyPatch, changed: tuple[str, str] | None = None) -> list[str]:
    """From now on all backwards are by the kernels for Hopper, in torch. Returns the names of those that ran."""
    ran: list[str] = []
    launch = Launch.__call__

    def launched(self: Launch, tensors: Sequence[Tensor], free: Sequence[Any] = ()) -> None:
        if "hopper" not in self.kernel.fn.__module__:
            launch(self, tensors, free)
            return
        ran.append(self.kernel.__name__)
        gluon_in_torch.run(self, tensors, free)

    def module(forward: str, needed: tuple[int, ...], dtype: torch.dtype) -> Any:
        assert changed is not None
        return _with(changed, hopper_backward.module(launch_hopper_backward._writer(forward, needed, dtype)))

    patch.setattr(Launch, "__call__", launched)
    patch.setattr(launch_hopper_backward, "_why_not_these", lambda call: None)
    if changed is not None:
        patch.setattr(launch_hopper_backward, "_module", module)
    patch.setattr(lists_sizes, "FEW_TILES", 0)
    patch.setattr(lists_sizes, "tile_sizes", lambda *about: (hopper.ROWS, hopper_backward.KEYS))
    patch.setattr(lists, "run", lists.tightest)
    return ran


def _with(changed: tuple[str, str], text: str) -> Any:
    assert changed[0] in text
    text = text.replace(*changed)
    return cache.load(cache.store(text), f"changed_hopper_{cache.key_of(text)}")
