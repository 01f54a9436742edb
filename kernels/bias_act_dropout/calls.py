"""The calls that were made, by the layout of their tensors, whichever kernel they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.tiles import interpreting
from xfcompile.kernels.registration import Site

MANY_CALLS = 4096
"""Layouts that are remembered; sizes that change at every call make new ones."""

known: dict[object, Callable[..., Any] | None] = {}
"""What runs tensors of one layout; None where the kernels do not."""


def remembered(key: object, make: Callable[[], Callable[..., Any] | None]) -> Callable[..., Any] | None:
    """The call for a layout, made at the first of its tensors."""
    call = known.get(key, key)
    if call is key:
        if len(known) >= MANY_CALLS:
            known.clear()
        call = known[key] = make()
    return call  # type: ignore[return-value]


def layout_of(x: Tensor | None) -> object:
    """All of a tensor that a call depends on."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def keep(site: Site | None, call: Callable[..., Any] | None, x: Tensor) -> None:
    """What a site comes to again, unless it depends on a setting."""
    if site is not None and not setting(x):
        site.keep(call, x.dtype)


def setting(x: Tensor) -> object:
    """What may change between calls besides their tensors: whether Triton interprets, and products in fp32."""
    if x.device.type == "cpu":
        return interpreting()
    return x.dtype is torch.float32 and precision(x.dtype)
