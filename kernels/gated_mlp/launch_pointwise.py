"""The two kernels that do not multiply: the product of saved projections, and the gradients of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention.repeat import Blank, Launch
from xfcompile.kernels.gated_mlp import tiles
from xfcompile.kernels.gated_mlp.operands import Dropout, starts, three
from xfcompile.kernels.gated_mlp.programs import Program, layout_of, program
from xfcompile.site import Layout


def product(key: str, saved: Tensor, layout: Layout, dropout: Dropout, out: Tensor) -> None:
    """Fills out [.., M, N] from saved [.., M, 2 N]."""
    prepared = program(key)
    if out.numel() == 0:
        return
    features = out.shape[-1]
    tensors = [saved, out, dropout.seed]
    described = ("product", layout, dropout.p, *map(layout_of, tensors))

    def make() -> Callable[..., None]:
        numbers = [out.numel() // features, features, *starts(layout, features)[:2]]
        return _pointwise(prepared, "gated_product", out, numbers, layout, dropout, {})

    call = prepared.remembered(described, make)
    call([saved if t is None else t for t in tensors])


def backward(
    key: str, dout: Tensor, saved: Tensor, layout: Layout, seed: Tensor | None, p: float, product: bool
) -> tuple[Tensor, Tensor]:
    """grad [.., M, 2 N], laid out as saved, from dout [.., M, N]; and the product [.., M, N] if it is wanted, else
    nothing."""
    prepared = program(key)
    seed = seed if p != 0.0 else None
    tensors = (dout, saved, seed)
    described = ("backward", layout, p, product, *map(layout_of, tensors))

    def make() -> Callable[..., tuple[Tensor, Tensor]]:
        return _backward(prepared, dout, saved, layout, Dropout(seed, p), product)

    return prepared.remembered(described, make)(*tensors)


def backward_outputs(dout: Tensor, saved: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    """Memory for what `backward` returns."""
    return torch.empty_like(saved), dout.new_empty(dout.shape if product else (0,))


def _backward(
    prepared: Program, dout: Tensor, saved: Tensor, layout: Layout, dropout: Dropout, product: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    blank_grad, blank_made = (Blank.like(x) for x in backward_outputs(dout, saved, product))
    if dout.numel() == 0:
        return lambda *tensors: (blank_grad(), blank_made())
    features = dout.shape[-1]
    whole = three(dout)
    sizes = [dout.numel() // features, features, whole.shape[1], *whole.stride()]
    numbers = [*sizes, *starts(layout, features)[:2]]
    launch = _pointwise(prepared, "gated_backward", dout, numbers, layout, dropout, {"PRODUCT": product})

    def call(dout: Tensor, saved: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        grad, made = blank_grad(), blank_made()
        launch([dout, saved, grad, made if product else saved, saved if seed is None else seed])
        return grad, made

    return call


def _pointwise(
    prepared: Program,
    name: str,
    like: Tensor,
    numbers: list[Any],
    layout: Layout,
    dropout: Dropout,
    more: dict[str, Any],
) -> Callable[..., None]:
    interpreted = like.device.type == "cpu"
    block_m, block_n, warps = tiles.INTERPRETED_POINTWISE if interpreted else tiles.POINTWISE
    rows, features = numbers[:2]
    known = {
        **more,
        "STEP": starts(layout, features)[2],
        "DROPOUT": dropout.p != 0.0,
        "ALIGNED": features % 8 == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    kernel = prepared.kernel(name, interpreted)
    ordered = {n: known[n] for n in kernel.arg_names if n in known}
    programs = -(-rows // block_m) * -(-features // block_n)
    return Launch(kernel, programs, [*numbers, *dropout.numbers], ordered, {"num_warps": warps})
