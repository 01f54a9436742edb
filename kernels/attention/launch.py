"""Attention with a generated kernel: what follows from the layout of tensors is found out once, and then looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xfcompile.kernels.attention import fit, programs
from xfcompile.kernels.attention.arguments import random_of
from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.forward_call import by_definition, call_of
from xfcompile.kernels.attention.repeat import aligned
from xfcompile.kernels.registration import Site


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    key: str,
    tiles: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    heads_first: bool = False,
    check: Callable[..., None] = lambda *tensors: None,
    seed: Tensor | None = None,
    stream: int = 0,
    tiles_by_key: Tensor | None = None,
    site: Site | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel on a GPU, or interpreted on a CPU. check: called at the first of all calls with such tensors.

    What follows from tensors' layouts is found out once: a call costs its host what is left (examples/bench_host.py).
    """
    prepared = programs.known.get(key) or programs.program(key)
    random = random_of(prepared.spec, seed, stream) if prepared.spec.dropout else ()
    scalars = prepared.numbers(ints, floats)
    usual = site is not None and aligned(q, k, v)
    call = site.found if site is not None and usual else None
    layout: object = None
    if call is None:
        layout = layout_of(q, k, v, operands, tiles, block_m, block_n, heads_first)
        call = prepared.calls.get(layout)
    if call is None:
        if len(prepared.calls) >= programs.MANY_CALLS:
            prepared.calls.clear()
        check(q, k, v, operands, key, tiles, block_m, block_n, tiles_by_key)
        call = prepared.calls[layout] = call_of(
            prepared, q, k, v, operands, tiles is not None, (block_m, block_n), heads_first
        )
    try:
        made = call(q, k, v, operands, scalars, tiles, *random)
    except fit.Unavailable as error:
        fit.give_way(error, key, "it is computed by its definition, in plain PyTorch")
        layout = layout or layout_of(q, k, v, operands, tiles, block_m, block_n, heads_first)
        call = prepared.calls[layout] = by_definition(prepared.spec, heads_first)
        made = call(q, k, v, operands, scalars, tiles, *random)
    if site is not None and usual:
        site.keep(call, q.dtype)
    return made


def layout_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    tiles: Tensor | None,
    block_m: int,
    block_n: int,
    heads_first: bool,
) -> tuple[object, ...]:
    """All that a call depends on but for where its tensors are, as long as they start at multiples of 16 bytes or do
    not, and what scalars it has. That is the user's setting of fp32 products too."""
    dtype = q.dtype
    return (
        q.shape, q.stride(), dtype, q.device,
        k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device,
        aligned(q, k, v),
        heads_first, block_m, block_n,
        None if tiles is None else (tiles.shape, tiles.stride(), tiles.dtype, tiles.device),
        dtype is torch.float32 and precision(dtype),
        *[(x.dtype, x.device, x.stride()) for x in operands],
    )  # fmt: skip
