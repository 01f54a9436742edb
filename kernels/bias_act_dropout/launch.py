"""The kernel without a product: a formula over tensors that are there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xfcompile.kernels.attention.repeat import Blank
from xfcompile.kernels.bias_act_dropout import calls, tiles
from xfcompile.kernels.bias_act_dropout.arguments import constants_of, dense, launch_of, present
from xfcompile.kernels.bias_act_dropout.rows import rows_of, taken
from xfcompile.kernels.registration import Site


def forward(
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
    dtype: torch.dtype,
    check: Callable[..., bool],
    site: Site | None = None,
) -> Tensor | None:
    """The result, contiguous; None where the kernels do not run. Raises `fit.Unavailable`.

    check: whether they do, for tensors, the first of all that are laid out like these.
    """
    if site is not None and site.found is not None:
        return site.found(x, bias, vectors, tensors, seed, stream)
    given = (x, bias, *vectors, *tensors)
    key = ("forward", text, p, dtype, len(vectors), seed is None, calls.setting(x), *map(calls.layout_of, given))

    def make() -> Callable[..., Tensor] | None:
        if not check(x, x.shape[-1], bias, vectors, tensors, dtype):
            return None
        return _forward(x, bias, vectors, tensors, text, p, dtype)

    call = calls.remembered(key, make)
    calls.keep(site, call, x)
    return None if call is None else call(x, bias, vectors, tensors, seed, stream)


def _forward(
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    text: str,
    p: float,
    dtype: torch.dtype,
) -> Callable[..., Tensor]:
    rows = rows_of(x, *tensors)
    n = x.shape[-1]
    tile = tiles.pointwise(n, "forward")
    numbers = [rows.count, rows.inner, *itertools.chain(*rows.strides[1:]), *rows.strides[0]]
    parts, loop = tiles.loop(rows.count, n, tile, "forward")
    constants = constants_of(n, tile, rows, x.dtype, bias) | loop
    programs = parts * -(-n // tile.block_n)
    launch = launch_of("forward", (text, len(vectors), len(tensors), p), programs, numbers, constants, tile)
    blank = Blank(x.shape, dtype, x.device)
    copied = rows.copied

    def call(
        x: Tensor,
        bias: Tensor | None,
        vectors: Sequence[Tensor],
        tensors: Sequence[Tensor],
        seed: Tensor | None,
        stream: int,
    ) -> Tensor:
        out = blank()
        if copied:
            x, *tensors = taken((x, *tensors), copied)
        launch([out, x, present(bias, out), *map(dense, vectors), *tensors, present(seed, out)], [stream])
        return out

    return call
