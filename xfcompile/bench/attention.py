"""Twelve attention programs in plain PyTorch, forward and with their backward, at three lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile.bench import columns as c
from xfcompile.bench.job import Benchmark, Call, Check, Place, Row, Scale, Skip, Work
from xfcompile.bench.programs import Program, Sizes, programs, tensors

FAMILY = "attention"
FORWARD, BOTH = "forward", "forward+backward"
DIMS = (64, 128)
LENGTHS = (4096, 1024, 16384)
"""The middle one first: what a short run leaves is then the most telling."""
TOKENS, WIDTH = 16384, 2048
"""Of all sizes on GPUs: batch times length, and heads times their dimension."""
CHECKED = 1
"""Heads whose results are compared with fp64's: the scores of all would not fit."""


def rows(scale: Scale) -> list[Row]:
    shapes = {
        "gpu": [(TOKENS // n, WIDTH // d, n, d) for n in LENGTHS for d in DIMS],
        "cpu": [(1, 12, n, 64) for n in (1024, 4096)],
        "quick": [(1, 2, 64, 16)],
    }[scale]
    lengths = dict.fromkeys(n for _, _, n, _ in shapes)
    return [
        Row(program.name, mode, (("B", b), ("H", h), ("S", n), ("D", d)))
        for length in lengths
        for mode in (FORWARD, BOTH)
        for b, h, n, d in shapes
        if n == length
        for program in programs(torch.float32)
    ]


def prepare(row: Row, place: Place) -> Work:
    (program,) = (p for p in programs(place.dtype) if p.name == row.name)
    sizes = Sizes(row.size("B"), row.size("H"), row.size("S"), row.size("D"))
    x = tensors(program, sizes, torch.device(place.device), place.dtype)
    train = row.mode == BOTH
    leaves = [*range(len(x) if program.learned else 3)] if train else []
    for n in leaves:
        x[n].requires_grad_()
    dout = torch.randn_like(x[0])
    axes = ("bhsd", "bhsd", "bhsd", *program.axes)

    def narrow(t: Tensor, names: str) -> Tensor:
        """The part that the first heads have in a tensor."""
        return t.narrow(names.index("h"), 0, CHECKED) if "h" in names else t

    def reference(change: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        given = [change(narrow(t.detach(), names)) for t, names in zip(x, axes, strict=True)]
        if not train:
            return [program.plain(*given)]
        for n in leaves:
            given[n] = given[n].clone().requires_grad_()
        return torch.autograd.grad(program.plain(*given), [given[n] for n in leaves], change(narrow(dout, "bhsd")))

    def seen(outcome: Any) -> Sequence[Tensor]:
        if not train:
            return [narrow(outcome, "bhsd")]
        return [narrow(t, axes[n]) for t, n in zip(outcome, leaves, strict=True)]

    def way(column: str) -> Call:
        forward = _forward(column, program, x)
        if not train:
            return forward
        laid: list[
            Tensor
        ] = []  # as what comes back to a column's own result is: one laid out otherwise is copied first

        def both() -> Sequence[Tensor]:
            out = forward()
            if not laid:
                laid.append(torch.empty_like(out).copy_(dout))
            return torch.autograd.grad(out, [x[n] for n in leaves], laid[0])

        return c.within(column, both) if column in c.SDPAS else both

    exact = Check(lambda: reference(_wide), lambda: reference(lambda t: t), seen)
    return Work(way, exact, grad=train)


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _forward(column: str, program: Program, x: list[Tensor]) -> Call:
    if column in c.SDPAS:
        return _sdpa(column, program, x)
    if column == c.FLEX:
        return _flex(program, x)
    fn = c.compiled(program.plain, column, FAMILY, dynamic=False)
    return lambda: fn(*x)


def _sdpa(column: str, program: Program, x: list[Tensor]) -> Call:
    q, k, v, *rest = x
    if program.sdpa is None:
        raise Skip("SDPA has no words for it")
    said = program.sdpa
    if program.learned and torch.is_grad_enabled():  # the mask is made in the call: it has a gradient
        return c.within(column, lambda: F.scaled_dot_product_attention(q, k, v, **said(q, *rest)))
    words = said(q, *rest)
    return c.within(column, lambda: F.scaled_dot_product_attention(q, k, v, **words))


def _flex(program: Program, x: list[Tensor]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, *rest = x
    score, mask = program.flex(*rest)
    n, batch = q.shape[2], q.shape[0]
    block_mask = None if mask is None else create_block_mask(mask, batch, None, n, n, device=q.device.type)
    scale = 1.0 if program.name == "T5 bias" else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=score, block_mask=block_mask, scale=scale)


BENCHMARK = Benchmark(
    "attention",
    "twelve attention programs in plain PyTorch",
    (c.EAGER, c.INDUCTOR, c.MAX, c.FLEX, *c.SDPAS, c.XFORMERS, c.XFORMERS_MAX, "xformers-triton"),
    rows,
    prepare,
)
