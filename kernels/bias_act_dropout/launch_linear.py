"""A product of matrices with the formula after it in one kernel, or in two where its tiles do not fit."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile.kernels.attention import fit
from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.repeat import Blank
from xfcompile.kernels.attention.tiles import HOPPER, device_generation, interpreting
from xfcompile.kernels.bias_act_dropout import calls, launch_hopper, tiles
from xfcompile.kernels.bias_act_dropout.arguments import HALF, constants_of, dense, launch_of, present
from xfcompile.kernels.bias_act_dropout.launch import forward
from xfcompile.kernels.bias_act_dropout.rows import rows_of, taken
from xfcompile.kernels.registration import Site

log = logging.getLogger(__name__)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    text: str,
    p: float,
    dtype: torch.dtype,
    save: bool,
    check: Callable[..., bool],
    site: Site | None = None,
) -> tuple[Tensor, Tensor] | None:
    """x [.., K], weight [N, K]; the result [.., N] and, where it is saved, the product with its bias, else nothing.
    None where the kernels do not run. check: as that of `forward`."""
    if site is not None and site.found is not None:
        return site.found(x, weight, bias, vectors, tensors, seed, stream)
    given = (x, weight, bias, *vectors, *tensors)
    key = ("linear", text, p, dtype, save, len(vectors), seed is None, calls.setting(x), *map(calls.layout_of, given))

    def make() -> Callable[..., tuple[Tensor, Tensor]] | None:
        n = weight.shape[0]
        if not check(x, n, bias, vectors, tensors, dtype, weight) or n == 0:
            return None
        return _linear(x, weight, bias, vectors, tensors, text, p, dtype, save, check)

    call = calls.remembered(key, make)
    calls.keep(site, call, x)
    return None if call is None else call(x, weight, bias, vectors, tensors, seed, stream)


def biased_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own, with the bias in it, rounded once: what a kernel that saves the product saves."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    text: str,
    p: float,
    dtype: torch.dtype,
    save: bool,
    check: Callable[..., bool],
) -> Callable[..., tuple[Tensor, Tensor]]:
    from triton.runtime.errors import OutOfResources

    rows = rows_of(x, *tensors)
    n, k = weight.shape
    tile = tiles.INTERPRETED if x.device.type == "cpu" else tiles.PRODUCT[x.dtype.itemsize].value
    numbers = [rows.count, rows.inner, *itertools.chain(*rows.strides[1:]), *rows.strides[0], *weight.stride(), k]
    constants = constants_of(n, tile, rows, x.dtype, bias) | {
        "BLOCK_K": tile.block_k,
        "GROUP": tiles.GROUP,
        "EVEN_K": k % tile.block_k == 0,
        "SAVE": save,
        "PRECISION": precision(x.dtype),
        "UPCAST": interpreting() and x.dtype in HALF,
    }
    programs = -(-rows.count // tile.block_m) * -(-n // tile.block_n)
    launch = launch_of("linear", (text, len(vectors), len(tensors), p), programs, numbers, constants, tile)
    shape = (*x.shape[:-1], n)
    blank_out, blank_pre = Blank(shape, dtype, x.device), Blank(shape if save else (0,), x.dtype, x.device)
    copied = rows.copied
    fits = True

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vectors: Sequence[Tensor],
        tensors: Sequence[Tensor],
        seed: Tensor | None,
        stream: int,
    ) -> tuple[Tensor, Tensor]:
        nonlocal fits
        if fits:
            out, pre = blank_out(), blank_pre()
            left, *added = taken((x, *tensors), copied) if copied else (x, *tensors)
            given = [out, pre if save else out, left, weight, present(bias, out), *map(dense, vectors), *added]
            try:
                launch([*given, present(seed, out)], [stream])
                return out, pre
            except (OutOfResources, fit.Unavailable) as error:
                fits = False
                where = f"the tiles of a linear with its activation do not fit {fit.name_of(x.device)} ({error})"
                why = error if isinstance(error, fit.Unavailable) else fit.NoTilesFit(where)
                fit.give_way(why, text, "it is computed by PyTorch's product and a kernel after it")
        product = biased_product(x, weight, bias)
        made = forward(product, None, vectors, tensors, seed, stream, text, p, dtype, check)
        assert made is not None
        return made, product if save else blank_pre()

    if x.device.type != "cuda" or device_generation(x.device) != HOPPER:
        return call
    outputs = (blank_out(), blank_pre())
    reason = launch_hopper.declines(x, weight, bias, vectors, tensors, text, outputs, save)
    if reason is not None:
        log.debug("not by the kernel for Hopper: %s", reason)
        return call
    return launch_hopper.Linear(x, weight, bias, vectors, tensors, text, p, outputs, save, call)
