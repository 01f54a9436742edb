"""The op `xfcompile::attention`: any attention that a `ScoreSpec` describes, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.kernels.attention import forward_call, launch, launch_backward, lists, programs, reference
from xfcompile.kernels.attention.arguments import random_of
from xfcompile.kernels.attention.backward_layout import Gradients, Needs, outputs
from xfcompile.kernels.attention.programs import prepare
from xfcompile.kernels.attention.tiles import interpreting, supports
from xfcompile.kernels.registration import Site, refused, register

__all__ = ["attention", "attention_tiles", "prepare"]

LIBRARY = torch.library.Library("xfcompile", "FRAGMENT")

# Lists may be None: AOTInductor's packages (torch 2.13) hand that to an operator in place of an empty one.
# needs_exact_strides: Inductor must pass q, k and v as they are (transposed, expanded, slices of a packed projection).
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[]? operands, SymInt[]? ints, float[]? floats, str kernel,"
    " Tensor? tiles=None, int block_m=0, int block_n=0, bool heads_first=False,"
    " Tensor? tiles_by_key=None, Tensor? seed=None, int stream=0) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


# needs: whether a gradient is wanted, of q, k, v and each operand; what is not wanted comes back empty.
LIBRARY.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] operands,"
    " SymInt[] ints, float[] floats, str kernel, bool[] needs, Tensor? tiles=None, Tensor? tiles_by_key=None,"
    " int block_m=0, int block_n=0, Tensor? seed=None, int stream=0)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] doperands)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)

# Made once for a mask, and given to every attention under it. `like` says where: on its device.
LIBRARY.define(
    "attention_tiles(Tensor like, Tensor[]? operands, SymInt[]? ints, float[]? floats, SymInt[] shape, int block_m,"
    " int block_n, str kernel, bool by_key=False) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    key: str,
    tiles: Tensor | None,
    block_m: int,
    block_n: int,
    tiles_by_key: Tensor | None = None,
) -> None:
    """Shapes, dtypes and devices; an error says what was expected and what was found."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"xfcompile::attention: {name} must be [batch, heads, length, dim], not {list(x.shape)}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"xfcompile::attention: batch, key length or head dim disagree: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"xfcompile::attention: query heads must be a multiple of key heads: {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"xfcompile::attention: q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; cast them")
    if any(x.device != q.device for x in (k, v, *operands)):
        raise ValueError("xfcompile::attention: q, k, v and operands must be on one device")
    expected = programs.program(key).spec.operands
    found = [(x.dtype, x.ndim) for x in operands]
    if found != [(x.dtype, x.ndim) for x in expected]:
        raise ValueError(f"xfcompile::attention: kernel {key} loads from operands {list(expected)}, not {found}")
    for lists_, by_key in ((tiles, False), (tiles_by_key, True)):
        if lists_ is not None:
            _check_tiles(q, k, lists_, block_m, block_n, key, by_key)


def _check_tiles(q: Tensor, k: Tensor, tiles: Tensor, block_m: int, block_n: int, key: str, by_key: bool) -> None:
    prepared = programs.program(key)
    if prepared.mask is None:
        raise ValueError(f"xfcompile::attention: kernel {key} takes no lists of tiles")
    if block_m < 1 or block_n < 1:
        raise ValueError(f"xfcompile::attention: tiles are listed by their sizes, not of {block_m} by {block_n}")
    shape = (*q.shape[:3], k.shape[2])
    wanted = lists.output(q, lists.program(prepared.mask), shape, block_m, block_n, by_key)
    if tiles.shape != wanted.shape or tiles.dtype != torch.int32 or not tiles.is_contiguous():
        raise ValueError(
            f"xfcompile::attention: lists of tiles of {block_m} by {block_n}{', by keys,' if by_key else ''} are "
            f"contiguous int32 of {list(wanted.shape)}, not {tiles.dtype} of {list(tiles.shape)}"
        )
    if tiles.device != q.device:
        raise ValueError(f"xfcompile::attention: lists of tiles must be on {q.device}, not on {tiles.device}")


def _checked(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> None:
    check(q, k, v, *others)
    reason = supports(q.device, q.dtype, q.shape[3], v.shape[3])
    if reason is not None:
        raise NotImplementedError(f"xfcompile::attention: {reason}")


def _attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] | None,
    ints: Sequence[int] | None,
    floats: Sequence[float] | None,
    kernel: str,
    tiles: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    heads_first: bool = False,
    tiles_by_key: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
    site: Site | None = None,
) -> tuple[Tensor, Tensor]:
    operands, ints, floats = operands or (), ints or (), floats or ()
    return launch.run(
        q,
        k,
        v,
        operands,
        ints,
        floats,
        kernel,
        tiles,
        block_m,
        block_n,
        heads_first,
        _checked,
        seed,
        stream,
        tiles_by_key,
        site,
    )


def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] | None,
    ints: Sequence[int] | None,
    floats: Sequence[float] | None,
    kernel: str,
    tiles: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    heads_first: bool = False,
    tiles_by_key: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    operands, ints, floats = operands or (), ints or (), floats or ()
    check(q, k, v, operands, kernel, tiles, block_m, block_n, tiles_by_key)
    if interpreting() and supports(q.device, q.dtype, q.shape[3], v.shape[3]) is None:
        more: dict[str, Any] = {"seed": seed, "stream": stream}
        return launch.run(q, k, v, operands, ints, floats, kernel, tiles, block_m, block_n, heads_first, **more)
    spec = programs.program(kernel).spec
    random_of(spec, seed, stream)
    dtype = torch.promote_types(q.dtype, torch.float32)
    value, logsumexp = reference.attention(spec, q, k, v, operands, ints, floats, dtype, seed, stream)
    out, lse = forward_call.outputs(q, v, heads_first)
    return out.copy_(value), lse.copy_(logsumexp)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] | None,
    ints: Sequence[int] | None,
    floats: Sequence[float] | None,
    kernel: str,
    tiles: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    heads_first: bool = False,
    tiles_by_key: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    operands, ints, floats = operands or (), ints or (), floats or ()
    check(q, k, v, operands, kernel, tiles, block_m, block_n, tiles_by_key)
    return forward_call.outputs(q, v, heads_first)


def _tiles_cpu(
    like: Tensor,
    operands: Sequence[Tensor] | None,
    ints: Sequence[int] | None,
    floats: Sequence[float] | None,
    shape: Sequence[int],
    block_m: int,
    block_n: int,
    kernel: str,
    by_key: bool = False,
) -> Tensor:
    operands, ints, floats = operands or (), ints or (), floats or ()
    make = lists.run if interpreting() else lists.tightest
    return make(like, operands, ints, floats, shape, block_m, block_n, kernel, by_key)


def _tiles_cuda(
    like: Tensor,
    operands: Sequence[Tensor] | None,
    ints: Sequence[int] | None,
    floats: Sequence[float] | None,
    shape: Sequence[int],
    block_m: int,
    block_n: int,
    kernel: str,
    by_key: bool = False,
    site: Site | None = None,
) -> Tensor:
    return lists.run(like, operands or (), ints or (), floats or (), shape, block_m, block_n, kernel, by_key, site)


def _tiles_fake(
    like: Tensor,
    operands: Sequence[Tensor] | None,
    ints: Sequence[int] | None,
    floats: Sequence[float] | None,
    shape: Sequence[int],
    block_m: int,
    block_n: int,
    kernel: str,
    by_key: bool = False,
) -> Tensor:
    operands, ints, floats = operands or (), ints or (), floats or ()
    return lists.output(like, lists.program(kernel), shape, block_m, block_n, by_key)


# -- gradients ----------------------------------------------------------------------------------------------------


def _backward_cuda(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    kernel: str,
    needs: Sequence[bool],
    tiles: Tensor | None = None,
    tiles_by_key: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    seed: Tensor | None = None,
    stream: int = 0,
    site: Site | None = None,
) -> Gradients:
    wanted = Needs.of(needs)
    listed = (tiles, tiles_by_key, block_m, block_n)
    tensors = (dout, q, k, v, out, lse, operands)
    return launch_backward.run(*tensors, ints, floats, kernel, wanted, *listed, seed, stream, site)


def _backward_cpu(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    kernel: str,
    needs: Sequence[bool],
    tiles: Tensor | None = None,
    tiles_by_key: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Gradients:
    if interpreting() and supports(q.device, q.dtype, q.shape[3], v.shape[3]) is None:
        more = (tiles, tiles_by_key, block_m, block_n, seed, stream)
        return _backward_cuda(dout, q, k, v, out, lse, operands, ints, floats, kernel, needs, *more)
    wanted = Needs.of(needs)
    return launch_backward.by_definition(dout, q, k, v, operands, ints, floats, kernel, wanted, seed, stream)


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    kernel: str,
    needs: Sequence[bool],
    *rest: Any,
) -> Gradients:
    return outputs(q, k, v, operands, Needs.of(needs))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps q, k, v, out, the log-sum-exps and what the score loads: no weights, and nothing as large as they are."""
    q, k, v, operands, ints, floats, kernel, tiles, block_m, block_n, _, tiles_by_key, seed, stream = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.lists = tiles is not None and tiles_by_key is not None
    listed = (tiles, tiles_by_key) if ctx.lists else ()
    ctx.random = seed is not None
    seeds = (seed,) if ctx.random else ()
    ctx.save_for_backward(q, k, v, out, lse, *listed, *seeds, *(operands or ()))
    ctx.numbers = ints or [], floats or [], kernel, block_m, block_n, stream


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    # Arguments at their defaults are not among those that torch expects gradients for, and empty lists are lists.
    others: tuple[Any, ...] = tuple([] if isinstance(x, list) else None for x in ctx.needs_input_grad[4:])
    of_operands = ctx.needs_input_grad[3] if isinstance(ctx.needs_input_grad[3], list) else None
    if dout is None:
        return None, None, None, None if of_operands is None else [None] * len(of_operands), *others
    ints, floats, kernel, block_m, block_n, stream = ctx.numbers
    q, k, v, out, lse, *rest = ctx.saved_tensors
    tiles, tiles_by_key = (rest.pop(0), rest.pop(0)) if ctx.lists else (None, None)
    seed = rest.pop(0) if ctx.random else None
    needs = [bool(x) for x in (*ctx.needs_input_grad[:3], *(of_operands or ()))]
    *qkv, operands = torch.ops.xfcompile.attention_backward(
        dout, q, k, v, out, lse, rest, ints, floats, kernel, needs, tiles, tiles_by_key, block_m, block_n, seed, stream
    )
    made = [x if needed else None for x, needed in zip([*qkv, *operands], needs, strict=True)]
    return *made[:3], None if of_operands is None else made[3:], *others


register(LIBRARY, "attention", _attention_cuda, _attention_cpu, _attention_fake, (_gradients, _save))
register(
    LIBRARY, "attention_backward", _backward_cuda, _backward_cpu, _backward_fake, refused("attention", "attention")
)
register(LIBRARY, "attention_tiles", _tiles_cuda, _tiles_cpu, _tiles_fake)

attention = torch.ops.xfcompile.attention
attention_tiles = torch.ops.xfcompile.attention_tiles
