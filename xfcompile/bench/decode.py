"""Attention of one query a sequence to a cache of keys and values, filled wholly or in part: a step of decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile.bench import columns as c
from xfcompile.bench.job import Benchmark, Call, Check, Place, Row, Scale, Work
from xfcompile.bench.timing import copy_bandwidth

FAMILY = "attention"
MODE = "step"
NONE, MASK, POSITION = "no mask", "boolean mask", "j <= position"
SHAPES = {"gpu": (8, 32, 8, 8192, 128), "cpu": (2, 16, 4, 4096, 64), "quick": (2, 8, 2, 256, 16)}
"""Sequences, heads of queries, of keys, the cache's length, the dimension of heads."""
PARTS = (1, 2, 4, 16)
"""One part in so many of the cache is filled."""
COPIED = {"cuda": 2**30, "cpu": 2**24}
"""Bytes of the copy that bandwidths are compared with."""


def expanded(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ expanded(k, q).mT / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ expanded(v, q)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ expanded(k, q).mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ expanded(v, q)


def positioned(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    return masked(q, k, v, torch.arange(k.shape[2], device=k.device) <= position)


PROGRAMS: dict[str, Callable[..., Tensor]] = {NONE: plain, MASK: masked, POSITION: positioned}


def rows(scale: Scale) -> list[Row]:
    b, h, kv, length, d = SHAPES[scale]
    cases = [(NONE, 1), *((mask, part) for mask in (POSITION, MASK) for part in PARTS)]
    return [
        Row(name, MODE, (("B", b), ("H", h), ("KV", kv), ("S", length), ("D", d), ("filled", length // part)))
        for name, part in cases
    ]


def prepare(row: Row, place: Place) -> Work:
    b, h, kv, length, d, live = (number for _, number in row.sizes)
    q = torch.randn(b, h, 1, d, device=place.device, dtype=place.dtype)
    k, v = (torch.randn(b, kv, length, d, device=place.device, dtype=place.dtype) for _ in range(2))
    keep = torch.arange(length, device=place.device) < live
    extra = {
        NONE: [],
        MASK: [keep.expand(b, 1, 1, -1).contiguous()],
        POSITION: [torch.tensor([live - 1], device=place.device)],
    }[row.name]
    x, program = [q, k, v, *extra], PROGRAMS[row.name]

    def way(column: str) -> Call:
        if column in c.SDPAS:
            return c.within(column, _sdpa(row.name, x))
        if column == c.FLEX:
            return _flex(row.name, x)
        fn = c.compiled(program, column, FAMILY, dynamic=False)
        return lambda: fn(*x)

    def exact() -> Sequence[Tensor]:
        return [program(*(t.double() if t.is_floating_point() else t for t in x))]

    def seen(outcome: Any) -> Sequence[Tensor]:
        return [outcome]

    moved, copied = 2 * b * kv * live * d * place.dtype.itemsize, copy_bandwidth(place.device, COPIED[place.device])

    def facts(ms: float) -> dict[str, float]:
        return {"gb_per_s": moved / ms / 1e6, "of_copy": moved / ms / 1e6 / copied}

    return Work(way, Check(exact, lambda: [program(*x)], seen), graph=True, facts=facts)


def _sdpa(name: str, x: list[Tensor]) -> Call:
    q, k, v, *extra = x

    def run() -> Tensor:
        mask = extra[0] if name == MASK else None
        if name == POSITION:  # in the call: a step later the position is another
            mask = (torch.arange(k.shape[2], device=k.device) <= extra[0])[None, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return run


def _flex(name: str, x: list[Tensor]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, *extra = x
    block_mask = None
    if name != NONE:

        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return extra[0][b, 0, 0, j] if name == MASK else j <= extra[0][0]

        block_mask = create_block_mask(keep, q.shape[0], None, 1, k.shape[2], device=q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


BENCHMARK = Benchmark(
    "decode",
    "attention to a cache, one step of decoding",
    (c.EAGER, c.INDUCTOR, c.MAX, c.FLEX, *c.SDPAS, c.XFORMERS, c.XFORMERS_MAX, "xformers-triton"),
    rows,
    prepare,
)
