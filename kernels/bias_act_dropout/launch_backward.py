"""Gradients of the formula: of x element by element, and of the bias and vectors as sums over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xfcompile.kernels.attention.repeat import Blank
from xfcompile.kernels.bias_act_dropout import calls, tiles
from xfcompile.kernels.bias_act_dropout.arguments import constants_of, dense, launch_of, present
from xfcompile.kernels.bias_act_dropout.rows import rows_of, taken
from xfcompile.kernels.parts import Total

Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None]]
"""Of x, of the bias and of vectors; None where none is wanted."""


def backward(
    dout: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
    tensors: int,
    needed: Sequence[bool],
    dtypes: Sequence[torch.dtype],
    runs: Callable[..., bool],
) -> Gradients | None:
    """The gradient of x, contiguous; and those of the bias and of vectors, which are sums over rows. needed, dtypes:
    of x, the bias and each vector. None where the kernels do not run, which `runs` says of tensors."""
    given = (dout, x, bias, *vectors)
    key = (
        "backward",
        text,
        p,
        tensors,
        *needed,
        *dtypes,
        seed is None,
        tiles.POINTWISE["backward"].value.programs,
        calls.setting(dout),
        *map(calls.layout_of, given),
    )

    def make() -> Callable[..., Gradients] | None:
        if not runs(*[t for t in given if t is not None]):
            return None
        return _backward(dout, x, bias, vectors, text, p, tensors, needed, dtypes)

    call = calls.remembered(key, make)
    return None if call is None else call(dout, x, bias, vectors, seed, stream)


def _backward(
    dout: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    text: str,
    p: float,
    tensors: int,
    needed: Sequence[bool],
    dtypes: Sequence[torch.dtype],
) -> Callable[..., Gradients]:
    needs_x, needs_bias, *needs = needed
    rows = rows_of(dout) if x is None else rows_of(dout, x)
    n = dout.shape[-1]
    tile = tiles.pointwise(n, "backward")
    parts, loop = tiles.loop(rows.count, n, tile, "backward")
    numbers = [rows.count, rows.inner, *rows.strides[0], *rows.strides[-1]]
    constants = constants_of(n, tile, rows, dout.dtype if x is None else x.dtype, bias) | {
        **loop,
        "NEED_X": needs_x,
        "NEED_BIAS": needs_bias,
        **{f"NEED_V{k}": yes for k, yes in enumerate(needs)},
    }
    programs = parts * -(-n // tile.block_n)
    launch = launch_of("backward", (text, len(vectors), tensors, p), programs, numbers, constants, tile)
    blank = Blank(dout.shape, dtypes[0], dout.device)
    totals = [
        Total(parts, n, dtype, dout.device) if yes else None for dtype, yes in zip(dtypes[1:], needed[1:], strict=True)
    ]
    copied = rows.copied

    def call(
        dout: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        vectors: Sequence[Tensor],
        seed: Tensor | None,
        stream: int,
    ) -> Gradients:
        dx = blank() if needs_x else None
        sums = [None if total is None else total.blank() for total in totals]
        laid: tuple[Tensor, ...] = (dout,) if x is None else (dout, x)
        if copied:
            laid = taken(laid, copied)
        dout = laid[0]
        given = [present(dx, dout), *[dout if d is None else d for d in sums], dout, laid[-1]]
        launch([*given, present(bias, dout), *map(dense, vectors), present(seed, dout)], [stream])
        dbias, *dv = [None if total is None or d is None else total(d) for total, d in zip(totals, sums, strict=True)]
        return dx, dbias, dv

    return call
