"""From tensors to the launches of the backward for Hopper: which tensors it takes, and what it needs beside them."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import cache, fit, hopper, hopper_backward, launch, lists
from xfcompile.kernels.attention.backward_call import Call
from xfcompile.kernels.attention.backward_layout import UNKNOWN, prepare
from xfcompile.kernels.attention.backward_writer import Writer
from xfcompile.kernels.attention.launch_hopper import described
from xfcompile.kernels.attention.repeat import Blank, Launch, aligned, described_for_gluon
from xfcompile.kernels.attention.tiles import HOPPER, device_generation

log = logging.getLogger(__name__)

FEW_QUERIES = 256
"""Fewer than this, and a program has too few tiles to keep the tensor cores busy."""


@functools.cache
def _why_not(forward: str, needed: tuple[int, ...], dtype: torch.dtype, dq: int, dv: int) -> str | None:
    made = prepare(forward, needed)
    return hopper_backward.why_not(made.spec, made.made.gradients, dtype, dq, dv) or _why_no_module(forward, needed)


@functools.cache
def _why_no_module(forward: str, needed: tuple[int, ...]) -> str | None:
    """This Triton may have no Gluon, or another one: it is experimental, and what it defines changes."""
    try:
        _module(forward, needed)
    except Exception as error:
        log.debug("no backward for Hopper: %s", error)
        return f"this version of Triton has no such Gluon ({type(error).__name__}: {error})"
    return None


@functools.cache
def _writer(forward: str, needed: tuple[int, ...]) -> Writer:
    made = prepare(forward, needed)
    return Writer(made.spec, made.made.gradients)


@functools.cache
def _module(forward: str, needed: tuple[int, ...]) -> Any:
    text = hopper_backward.module(_writer(forward, needed))
    return cache.load(cache.store(text), f"xfcompile_attention_hopper_backward_{cache.key_of(text)}")


def run(call: Call, dq: Tensor, dk: Tensor, dv: Tensor) -> bool:
    """Whether it was this kernel that computed the three gradients. It adds dq up in an order that is not the same
    every time: not where PyTorch is asked for what is."""
    layout = call.layout
    if layout.hopper is None or torch.are_deterministic_algorithms_enabled():
        return False
    if layout.hopper is UNKNOWN:
        layout.hopper = HopperBackward(call, dq, dk, dv) if _suits(call) else None
        if layout.hopper is None:
            return False
    if not aligned(call.q, call.k, call.v, call.dout):
        return False
    try:
        layout.hopper(call, dq, dk, dv)
    except fit.Unavailable as error:
        log.debug("the backward for Hopper failed, others run: %s", error)
        layout.hopper = None
        return False
    return True


def _suits(call: Call) -> bool:
    """Whether the kernel takes tensors of this layout. It computes all three gradients at once."""
    device, needs, sizes = call.q.device, call.needs, call.sizes
    if device.type != "cuda" or device_generation(device) != HOPPER:
        return False
    if not (needs.q and needs.k and needs.v) or call.lq < FEW_QUERIES or call.exact or call.random:
        return False
    if call.program.made.listed and (
        sizes is None or sizes[1] != hopper_backward.KEYS or sizes[0] % hopper_backward.ROWS
    ):
        return False
    forward, needed = call.program.forward, call.program.needed
    if _why_not(forward, needed, call.q.dtype, call.dq, call.dv) is not None:
        return False
    return all(described(x) for x in (call.q, call.k, call.v, call.dout))


class HopperBackward:
    """Launches of the kernel, and of those before and after it, with tensors of one layout."""

    def __init__(self, call: Call, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        forward, needed = call.program.forward, call.program.needed
        module, w = _module(forward, needed), _writer(forward, needed)
        rows, keys = hopper_backward.ROWS, hopper_backward.KEYS
        batch, heads, lq, lk = call.batch, call.heads, call.lq, call.lk
        columns = hopper.columns(call.dq)
        padded = -(-lq // rows) * rows
        device = call.q.device
        self.top = Blank((batch * heads, padded), torch.float32, device)
        self.sum = Blank((batch, heads, padded, columns), torch.float32, device)
        blocks = batch * heads * (padded // rows)
        strides = [*call.out.stride(), *call.dout.stride()]
        self.before = Launch(
            module.prepare_rows, blocks, [*strides, heads, lq, padded],
            {"DV": call.dv, "COLUMNS": columns, "ROWS": rows, "PAIR": bool(call.program.made.gradients.loads)},
            {"num_warps": 4},
        )  # fmt: skip
        self.after = Launch(
            module.finish_dq, blocks, [*dq.stride(), heads, lq, padded],
            {"DQ": call.dq, "COLUMNS": columns, "ROWS": rows}, {"num_warps": 4},
        )  # fmt: skip
        constants: dict[str, Any] = {
            "ROWS": rows, "KEYS": keys, "STAGES": hopper_backward.STAGES[columns],
            "LISTED_ROWS": rows if call.sizes is None else call.sizes[0], "EACH_HEAD": hopper_backward.each_head(w),
            "AHEAD": hopper_backward.AHEAD[columns],
        }  # fmt: skip
        if w.flags:
            constants["FAST"] = launch.speed(call.program.spec, call.q)
        constants |= {"DQ": call.dq, "DV": call.dv, "PRODUCER_REGISTERS": hopper_backward.PRODUCER_REGISTERS}
        numbers = [heads, heads // call.kv_heads, lq, lk, padded, *dk.stride(), *dv.stride()]
        numbers += [stride for x in call.operands for stride in x.stride()]
        blocks_of = ((call.q, rows), (call.k, keys), (call.v, keys), (call.dout, rows))
        tiles = [described_for_gluon(x, [1, 1, n, columns]) for x, n in blocks_of]
        of_rows = torch.empty_strided(self.top.shape, self.top.strides, dtype=torch.float32, device="meta")
        tiles += 2 * [described_for_gluon(of_rows, [1, rows])]
        programs = batch * call.kv_heads * -(-lk // keys)
        self.main = Launch(
            module.attention_backward, programs, numbers, constants, {"num_warps": hopper_backward.WARPS}, tiles
        )

    def __call__(self, call: Call, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        top, delta, total = self.top(), self.top(), self.sum()
        self.before([call.out, call.dout, call.lse, top, delta, call.pair, total])
        tensors, free = [call.q, call.k, call.v, call.dout, top, delta, total, dk, dv, *call.operands], call.scalars
        if call.program.made.listed:
            assert call.lists is not None
            tensors.append(call.lists[1])
            free = [*free, *lists.steps(call.lists[1])]
        self.main(tensors, free)
        self.after([total, dq], call.scalars)
