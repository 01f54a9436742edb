"""From tensors to the launches of the backward for Hopper: which tensors it takes, and what it needs beside them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels import gluon
from xfcompile.kernels.attention import cache, fit, hopper, hopper_backward, lists
from xfcompile.kernels.attention.backward_call import Call, alike
from xfcompile.kernels.attention.backward_layout import UNKNOWN, prepare
from xfcompile.kernels.attention.backward_writer import Writer
from xfcompile.kernels.attention.exactness import speed
from xfcompile.kernels.attention.hopper_variant import bias_of
from xfcompile.kernels.attention.launch_hopper import described, seen
from xfcompile.kernels.attention.repeat import Blank, Launch, aligned, described_for_gluon
from xfcompile.kernels.attention.tiles import HOPPER, device_generation
from xfcompile.measured import multiprocessors

log = logging.getLogger(__name__)

FEW_QUERIES = 256
"""Fewer than this, and a program has too few tiles to keep the tensor cores busy."""


@functools.cache
def _why_not(forward: str, needed: tuple[int, ...], dtype: torch.dtype, dq: int, dv: int) -> str | None:
    made = prepare(forward, needed)
    return hopper_backward.why_not(made.spec, made.made.gradients, dtype, dq, dv) or _why_no_module(
        forward, needed, dtype
    )


@functools.cache
def _why_no_module(forward: str, needed: tuple[int, ...], dtype: torch.dtype) -> str | None:
    return gluon.why_missing(lambda: _module(forward, needed, dtype))


@functools.cache
def _writer(forward: str, needed: tuple[int, ...], dtype: torch.dtype) -> Writer:
    made = prepare(forward, needed)
    return hopper_backward.writer(made.spec, made.made.gradients, dtype)


@functools.cache
def _module(forward: str, needed: tuple[int, ...], dtype: torch.dtype) -> Any:
    text = hopper_backward.module(_writer(forward, needed, dtype))
    return cache.load(cache.store(text), f"xfcompile_attention_hopper_backward_{cache.key_of(text)}")


def run(call: Call, dq: Tensor, dk: Tensor, dv: Tensor, direct: Mapping[int, Tensor]) -> Sequence[int] | None:
    """The loads whose gradients this kernel wrote, in `direct`, beside the three that it computed; None where it did
    not. It adds dq up in an order that is not the same every time: not where PyTorch is asked for what is."""
    layout = call.layout
    if layout.hopper is None or torch.are_deterministic_algorithms_enabled():
        return None
    if layout.hopper is UNKNOWN:
        reason = _why_not_these(call)
        layout.hopper = HopperBackward(call, dq, dk, dv, direct) if reason is None else None
        if reason is not None:
            log.debug("a backward that is not for Hopper's kernel: %s", reason)
            return None
    hopper: HopperBackward = layout.hopper
    written = [direct[n] for n in hopper.written]
    if not aligned(call.q, call.k, call.v, call.dout, *(call.operands[n] for n in hopper.biases), *written):
        return None
    try:
        hopper(call, dq, dk, dv, written)
    except fit.Unavailable as error:
        log.warning("the backward for Hopper does not run (%s): other kernels take its place", error)
        layout.hopper = None
        return None
    return hopper.written


def _why_not_these(call: Call) -> str | None:
    """Why the kernel does not take tensors of this layout; None if it does. It computes all three gradients at once."""
    device, needs, sizes = call.q.device, call.needs, call.sizes
    if device.type != "cuda" or device_generation(device) != HOPPER:
        return "it is for Hopper"
    if not (needs.q and needs.k and needs.v):
        return "not all gradients are wanted"
    if call.lq < FEW_QUERIES:
        return "few queries"
    if _programs(call) < multiprocessors(device.index):
        return "multiprocessors would have nothing to do, which the others' smaller tiles give it to"
    if call.random:
        return "weights are dropped out"
    if call.program.made.listed and sizes is None:
        return "no lists of tiles"
    if sizes is not None and (sizes[1] != hopper_backward.KEYS or sizes[0] % hopper_backward.ROWS):
        return f"lists of {sizes[0]}x{sizes[1]} tiles"
    if not all(described(x) for x in (call.q, call.k, call.v, call.dout)):
        return "strides that TMA does not take"
    reason = _why_not(call.program.forward, call.program.needed, call.q.dtype, call.dq, call.dv)
    if reason is None:
        bias = bias_of(call.program.spec, call.q.dtype)
        if bias is not None and not described(seen(call.operands[bias.operand], call.lq, call.lk)):
            return "strides of a bias that TMA does not take"
    return reason


def _programs(call: Call) -> int:
    return call.batch * call.kv_heads * -(-call.lk // hopper_backward.KEYS)


class HopperBackward:
    """Launches of the kernel, and of those before and after it, with tensors of one layout."""

    def __init__(self, call: Call, dq: Tensor, dk: Tensor, dv: Tensor, direct: Mapping[int, Tensor]) -> None:
        forward, needed = call.program.forward, call.program.needed
        dtype = call.q.dtype
        module, w = _module(forward, needed, dtype), _writer(forward, needed, dtype)
        rows, keys = hopper_backward.ROWS, hopper_backward.KEYS
        batch, heads, lq, lk = call.batch, call.heads, call.lq, call.lk
        columns = hopper.columns(call.dq)
        # Tiles of a list may be taller, the last ones wholly past the end: what is read of their rows must be there.
        tall = rows if call.sizes is None else call.sizes[0]
        padded = -(-lq // tall) * tall
        device = call.q.device
        self.exact, self.paired = w.exact, w.exact or bool(call.program.made.gradients.loads)
        self.rows = Blank((batch * heads, padded), torch.float32, device)
        self.sum = Blank((batch, heads, padded, columns), torch.float32, device)
        blocks = batch * heads * (padded // rows)
        self.before = Launch(
            module.prepare_rows, blocks, [*call.out.stride(), *call.dout.stride(), heads, lq, padded],
            {"DV": call.dv, "COLUMNS": columns, "ROWS": rows, "PAIRED": self.paired, "EXACT": self.exact},
            {"num_warps": 4},
        )  # fmt: skip
        self.after = Launch(
            module.finish_dq, blocks, [*dq.stride(), heads, lq, padded],
            {"DQ": call.dq, "COLUMNS": columns, "ROWS": rows}, {"num_warps": 4},
        )  # fmt: skip
        constants: dict[str, Any] = {
            "ROWS": rows, "KEYS": keys, "STAGES": hopper_backward.stages(w, columns),
            "LISTED_ROWS": tall, "EACH_HEAD": w.listed,
            "AHEAD": hopper_backward.AHEAD[columns], "LATER": hopper_backward.LATER[columns],
        }  # fmt: skip
        if w.flags:
            constants["FAST"] = speed(call.program.spec, call.q)
        constants |= {"DQ": call.dq, "DV": call.dv, "PRODUCER_REGISTERS": hopper_backward.PRODUCER_REGISTERS}
        numbers = [heads, heads // call.kv_heads, lq, lk, padded, *dk.stride(), *dv.stride()]
        numbers += [stride for x in call.operands for stride in x.stride()]
        blocks_of = ((call.q, rows), (call.k, keys), (call.v, keys), (call.dout, rows))
        tiles = [described_for_gluon(x, [1, 1, n, columns]) for x, n in blocks_of]
        of_rows = described_for_gluon(torch.empty(self.rows.shape, device="meta"), [1, rows])
        tiles += (3 if self.exact else 2) * [of_rows]
        self.biases = [int(load.args[0]) for load in w.tiles]
        tiles += [
            described_for_gluon(seen(call.operands[n], call.lq, call.lk), [1, 1, rows, keys]) for n in self.biases
        ]
        tiles.append(described_for_gluon(torch.empty(self.sum.shape, device="meta"), [1, 1, rows, columns]))
        writes = hopper_backward.written(w)
        self.writes = writes is not None
        self.written = [writes] if writes in call.layout.each_score and described(direct[writes]) else []
        if self.writes:
            constants["WRITE"] = bool(self.written)
            made = [direct[n] for n in self.written] or [seen(call.operands[self.biases[0]], call.lq, call.lk)]
            tiles.append(described_for_gluon(made[0], [1, 1, rows, keys]))
        self.main = Launch(
            module.attention_backward, _programs(call), numbers, constants,
            {"num_warps": hopper_backward.WARPS, **alike(self.exact)}, tiles,
        )  # fmt: skip

    def __call__(self, call: Call, dq: Tensor, dk: Tensor, dv: Tensor, written: Sequence[Tensor]) -> None:
        """written: what it writes of the gradients by loads."""
        call.clear(written)
        if self.paired:
            own = [call.q, call.k, call.v, call.out, call.dout, call.lse, call.pair, call.inverse, call.q]
            unused = [call.q for _ in call.layout.dense]
            call.launch("pair", [*own, *unused], (call.q, *unused))
        of_rows = [self.rows() for _ in range(3 if self.exact else 2)]
        total = self.sum()
        shift = of_rows[-1]  # not written to where there is none
        self.before([call.out, call.dout, call.lse, call.pair, call.inverse, *of_rows[:2], shift, total])
        biases = [call.operands[n] for n in self.biases]
        tensors = [call.q, call.k, call.v, call.dout, *of_rows, *biases, total]
        if self.writes:
            tensors += written or biases
        tensors += [dk, dv, *call.operands]
        free = call.scalars
        if call.program.made.listed:
            assert call.lists is not None
            tensors.append(call.lists[1])
            free = [*free, *lists.steps(call.lists[1])]
        self.main(tensors, free)
        self.after([total, dq], call.scalars)
