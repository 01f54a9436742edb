"""The product of two projections: which kernel computes it for such tensors, and calls that know that already."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.fallback import FirstThatRuns
from xfcompile.kernels.attention.repeat import Blank, Launch, aligned
from xfcompile.kernels.attention.tiles import HOPPER, device_generation
from xfcompile.kernels.gated_mlp import launch_few, launch_hopper
from xfcompile.kernels.gated_mlp.launch_triton import by_triton
from xfcompile.kernels.gated_mlp.operands import Dropout, Operands, operands_of, outputs, starts, three
from xfcompile.kernels.gated_mlp.programs import Program, layout_of, program
from xfcompile.kernels.registration import Site
from xfcompile.site import Layout

log = logging.getLogger(__name__)


def forward(
    key: str,
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    layout: Layout,
    save: bool,
    dtype: torch.dtype,
    seed: Tensor | None,
    p: float,
    check: Callable[[], None],
    site: Site | None = None,
) -> tuple[Tensor, Tensor]:
    """What `outputs` says, filled.

    check: called at the first of all calls with such tensors. Raises `Unavailable` where no kernel can be launched.
    """
    prepared = program(key)
    seed = seed if p != 0.0 else None
    given = (x, weight, up_weight, gate_bias, up_bias, seed)
    usual = site is not None and aligned(*given)
    if site is not None and usual and site.found is not None:
        return site.found(*given)
    setting = x.dtype is torch.float32 and precision(x.dtype)
    described = ("forward", layout, save, dtype, p, setting, *map(layout_of, given))

    def make() -> Callable[..., tuple[Tensor, Tensor]]:
        check()
        return _Forward(prepared, x, weight, up_weight, gate_bias, up_bias, layout, save, dtype, Dropout(seed, p))

    call = prepared.remembered(described, make)
    if site is not None and usual:
        site.keep(call, x.dtype)
    return call(*given)


class _Forward:
    """Calls of the dual GEMM with tensors of one layout."""

    def __init__(
        self,
        prepared: Program,
        x: Tensor,
        weight: Tensor,
        up_weight: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        layout: Layout,
        save: bool,
        dtype: torch.dtype,
        dropout: Dropout,
    ) -> None:
        self.layout, self.save = layout, save
        out, saved = outputs(x, weight, up_weight, save, dtype)
        self.out, self.saved = Blank.like(out), Blank.like(saved)
        self.ready: Launch | launch_hopper.Hopper | None = None
        self.empty = out.numel() == 0
        if self.empty:
            return
        operands = operands_of(x, weight, up_weight, gate_bias, up_bias, layout)
        self.launch = _forward(prepared, operands, layout, dropout, three(out), three(saved) if save else None)
        # Gate and up start so many bytes after what they are views of.
        self.to_gate = operands.gate.data_ptr() - weight.data_ptr()
        self.to_up = operands.up.data_ptr() - (weight if up_weight is None else up_weight).data_ptr()

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        up_weight: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, saved = self.out(), self.saved()
        if self.empty:
            return out, saved
        ready = self.ready
        if ready is not None:
            # In place of what is not there, pointers that are not looked at.
            start, gate = x.data_ptr(), weight.data_ptr()
            pointers = [
                start,
                gate + self.to_gate,
                (gate if up_weight is None else up_weight.data_ptr()) + self.to_up,
                out.data_ptr(),
                saved.data_ptr() if self.save else start,
                start if gate_bias is None else gate_bias.data_ptr(),
                start if up_bias is None else up_bias.data_ptr(),
                start if seed is None else seed.data_ptr(),
            ]
            if ready.repeat(pointers) is not None:
                return out, saved
        at = operands_of(x, weight, up_weight, gate_bias, up_bias, self.layout)
        tensors = [
            at.x,
            at.gate,
            at.up,
            three(out),
            three(saved) if self.save else None,
            at.gate_bias,
            at.up_bias,
            seed,
        ]
        self.launch([at.x if t is None else t for t in tensors])
        self.ready = _come_to(self.launch)
        return out, saved


def _come_to(runner: Any) -> Launch | launch_hopper.Hopper:
    """The launch that a runner has come to."""
    while not hasattr(runner, "repeat"):
        runner = runner.launch
    return runner


def _forward(
    prepared: Program, operands: Operands, layout: Layout, dropout: Dropout, out: Tensor, saved: Tensor | None
) -> Callable[..., None]:
    """How such tensors are computed with, from now on."""
    if out.device.type != "cuda" or device_generation(out.device) != HOPPER:
        return by_triton(prepared, operands, layout, dropout, out, saved is not None)
    *start, step = starts(layout, out.shape[2])
    drops = dropout.p != 0.0
    if launch_few.declines(prepared.formula, operands, out, drops) is None:
        few = launch_few.Few(prepared.formula, operands, (*start, step), saved is not None)
        return FirstThatRuns(few, lambda: by_triton(prepared, operands, layout, dropout, out, saved is not None))
    reason = launch_hopper.declines(prepared.formula, operands, out, saved, step, drops)
    if reason is not None:
        log.debug("not by the kernel for Hopper: %s", reason)
        return by_triton(prepared, operands, layout, dropout, out, saved is not None)
    dropping = dropout.numbers if drops else []
    first = launch_hopper.Hopper(prepared.formula, operands, None if saved is None else start, dropping)
    return FirstThatRuns(first, lambda: by_triton(prepared, operands, layout, dropout, out, saved is not None))
