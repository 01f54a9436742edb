"""Twelve attention programs in plain PyTorch, forward and with their backward, at three lengths.

From projections to the next one: queries, keys and values are laid out as projections leave them, and what comes out
is [batch, length, heads times head dim], as the next one takes it. A result that is laid out otherwise is copied there.
"""

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
    dout = _for_projection(torch.randn_like(x[0]))
    axes = ("bhsd", "bhsd", "bhsd", *program.axes)

    def heads_of(t: Tensor) -> Tensor:
        return t.unflatten(-1, (sizes.heads, sizes.dim)).transpose(1, 2)

    def narrow(t: Tensor, names: str) -> Tensor:
        """The part that the first heads have in a tensor."""
        return t.narrow(names.index("h"), 0, CHECKED) if "h" in names else t

    def reference(change: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        given = [change(narrow(t.detach(), names)) for t, names in zip(x, axes, strict=True)]
        if not train:
            return [program.plain(*given)]
        for n in leaves:
            given[n] = given[n].clone().requires_grad_()
        out = program.plain(*given)
        return torch.autograd.grad(out, [given[n] for n in leaves], change(narrow(heads_of(dout), "bhsd")))

    def seen(outcome: Any) -> Sequence[Tensor]:
        if not train:
            return [narrow(heads_of(outcome), "bhsd")]
        return [narrow(t, axes[n]) for t, n in zip(outcome, leaves, strict=True)]

    def way(column: str) -> Call:
        forward = _forward(column, program, x)
        if not train:
            return forward

        def both() -> Sequence[Tensor]:
            return torch.autograd.grad(forward(), [x[n] for n in leaves], dout)

        return c.within(column, both) if column in c.SDPAS else both

    exact = Check(lambda: reference(_wide), lambda: reference(lambda t: t), seen)
    return Work(way, exact, grad=train)


def _for_projection(t: Tensor) -> Tensor:
    """From [batch, heads, length, head dim] to [batch, length, features], a view where a result is laid out as that."""
    return t.transpose(1, 2).flatten(2)


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _forward(column: str, program: Program, x: list[Tensor]) -> Call:
    if column in c.SDPAS:
        return _sdpa(column, program, x)
    if column == c.FLEX:
        return _flex(program, x)
    fn = c.compiled(lambda *x: _for_projection(program.plain(*x)), column, FAMILY, dynamic=False)
    return lambda: fn(*x)


def _sdpa(column: str, program: Program, x: list[Tensor]) -> Call:
    q, k, v, *rest = x
    if program.sdpa is None:
        raise Skip("SDPA has no words for it")
    if column in ("sdpa-cudnn", "sdpa-efficient") and not q.is_cuda:
        raise Skip("CPUs have no such kernel")
    said = program.sdpa
    if program.learned and torch.is_grad_enabled():  # the mask is made in the call: it has a gradient
        return c.within(column, lambda: _for_projection(F.scaled_dot_product_attention(q, k, v, **said(q, *rest))))
    words = said(q, *rest)
    return c.within(column, lambda: _for_projection(F.scaled_dot_product_attention(q, k, v, **words)))


def _flex(program: Program, x: list[Tensor]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, *rest = x
    score, mask = program.flex(*rest)
    n, batch = q.shape[2], q.shape[0]
    block_mask = None if mask is None else create_block_mask(mask, batch, None, n, n, device=q.device.type)
    scale = 1.0 if program.name == "T5 bias" else None

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _for_projection(flex_attention(q, k, v, score_mod=score, block_mask=block_mask, scale=scale))

    compiled = torch.compile(fn, dynamic=False)
    return lambda: compiled(q, k, v)


BENCHMARK = Benchmark(
    "attention",
    "twelve attention programs in plain PyTorch",
    (c.EAGER, c.INDUCTOR, c.MAX, c.FLEX, *c.SDPAS, c.XFORMERS, c.XFORMERS_MAX, "xformers-triton"),
    rows,
    prepare,
)
