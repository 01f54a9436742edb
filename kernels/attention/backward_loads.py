"""Gradients by what scores load: by a kernel for each load, or of the main kernels' sums; and where they belong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from xfcompile.evaluate import Evaluator
from xfcompile.kernels.attention.backward_call import Call
from xfcompile.kernels.attention.blocks import DISTANCE, along_diagonal
from xfcompile.kernels.attention.gradient import LoadGradient
from xfcompile.kernels.attention.repeat import Blank, Launch
from xfcompile.kernels.attention.tiles import Tiles
from xfcompile.measured import multiprocessors
from xfcompile.score import POSITION, B, H, Load


def of_load(
    call: Call, n: int, x: LoadGradient, rows: dict[int, Tensor], columns_: dict[int, Tensor]
) -> tuple[Tensor, bool]:
    """The gradient by a load as [b, h, i, j], 1 where it has no axis, or as [b, h, distances]; and whether that."""
    if x.kind == "rows":
        return _summed(rows[n][..., None], x.axes), False
    if x.kind == "columns":
        return _summed(columns_[n][:, :, None, :], x.axes), False
    if x.kind == "sink":
        return _summed(_of_sink(call, x), x.axes), False
    own = (call.batch if B in x.axes else 1, call.heads if H in x.axes else 1)
    if x.kind == "dense":
        alone = sum(y.load.operand == x.load.operand for y in call.program.made.gradients.loads) == 1
        dtype = call.operands[x.load.operand].dtype if alone else torch.float32
        total = call.q.new_empty((*own, call.lq, call.lk), dtype=dtype)
        launch_load(call, n, total)
        return total, False
    return _of_diagonal(call, n, own), True


def launch_load(call: Call, n: int, dense: Tensor | None = None, own: tuple[int, int] = (1, 1)) -> Tensor:
    """The kernel of a load writes its gradient as [b, h, i, j] to `dense`; without, that of a diagonal is returned:
    [b, h, diagonals of tiles, T, T], where `own` are the first two sizes."""
    from triton.runtime.errors import OutOfResources

    name = f"load{n}"
    before, after = [call.q, call.k, call.v, call.dout, call.pair, call.inverse], [*call.operands, *call.random[:1]]
    free = [*call.scalars, *call.random[1:]]
    ready = call.layout.launches.get(name)
    if ready is not None:
        blank = call.layout.totals.get(name)
        total = dense if blank is None else blank()
        assert total is not None
        ready([*before, total, *after], free)
        return _whole(total, dense)

    strides = [stride for x in (call.q, call.k, call.v, call.dout) for stride in x.stride()]
    numbers = [call.heads, call.heads // call.kv_heads, call.lq, call.lk]
    numbers += [stride for x in call.operands for stride in x.stride()]
    made: dict[Tiles, tuple[Launch, Tensor]] = {}

    def launch_with(sizes: Tiles) -> Any:
        rows, tiles = -(-call.lq // sizes.block_m), -(-call.lk // sizes.block_n)
        if dense is not None:
            programs = dense.shape[0] * dense.shape[1] * rows * tiles
            parts = _parts(call, programs, call.batch // dense.shape[0] * (call.heads // dense.shape[1]))
            total = dense[None] if parts == 1 else Blank((parts, *dense.shape), torch.float32, call.q.device)()
            programs, places = programs * parts, [*total.stride(), call.batch, parts]
        else:
            if sizes.block_m != sizes.block_n:  # as if it did not fit: the next one may be square
                raise OutOfResources(sizes.block_m, sizes.block_n, "square tiles")
            blocks = rows + tiles - 1
            total = Blank((*own, blocks, sizes.block_m, sizes.block_n), torch.float32, call.q.device)()
            programs, places = own[0] * own[1] * blocks, [call.batch]
        tensors = [*before, total, *after]
        one = call.made(name, programs, [*strides, *places, *numbers], call.constants(sizes), sizes, tensors)
        made[sizes] = one, total
        return one(tensors, free)

    chosen, total = made[call.tiles(name, launch_with)]
    if dense is None or total.shape[0] > 1:
        call.layout.totals[name] = Blank.like(total)
    call.layout.launches[name] = chosen
    return _whole(total, dense)


PROGRAMS = 6
"""Of the kernel of a dense load, on a multiprocessor: where there are fewer tiles, what shares one is divided."""

MULTIPROCESSORS = 2
"""In the interpreter."""


def _parts(call: Call, programs: int, shared: int) -> int:
    """Into how many parts `shared` batches and heads, which have one gradient together, are divided."""
    device = call.q.device
    wanted = PROGRAMS * (MULTIPROCESSORS if device.type == "cpu" else multiprocessors(device.index))
    return max(1, min(shared, -(-wanted // max(programs, 1))))


def _whole(total: Tensor, dense: Tensor | None) -> Tensor:
    """What a kernel wrote, with the parts of a dense gradient added up: always in one order."""
    if dense is None:
        return total
    if total.ndim > dense.ndim and total.shape[0] > 1:
        dense.copy_(total.sum(0))
    return dense


FOLD = "fold"
"""The kernel that adds up what the kernel of a load leaves along diagonals."""

ROWS, DISTANCES = 16, 128
"""Of a tile, what a program of it adds up at a time; and the distances that it has."""


def _of_diagonal(call: Call, n: int, own: tuple[int, int]) -> Tensor:
    """[b, h, Lq + Lk - 1]: what scores at distances 1 - Lq ... Lk - 1 have together."""
    out = call.q.new_empty((*own, call.lq + call.lk - 1), dtype=torch.float32)
    fold(call, n, out)
    return out


def fold(call: Call, n: int, out: Tensor) -> None:
    """Fills out [b, h, Lq + Lk - 1], 1 where the load has no axis, with its gradient at each distance.

    The kernel of the load leaves a tile [T, T] of sums for each diagonal of tiles; element (r, c) of diagonal d is at
    the distance (d - rows + 1) T + c - r.
    """
    tiles = launch_load(call, n, own=(out.shape[0], out.shape[1]))
    name = f"{FOLD}{n}"
    ready = call.layout.launches.get(name)
    if ready is None:
        batches, heads, diagonals, size, _ = tiles.shape
        count = out.shape[2]
        first = (-(-call.lq // size) - 1) * size - call.lq + 1
        numbers = [*out.stride(), heads, diagonals, first, count]
        constants = {"SIZE": size, "ROWS": min(ROWS, size), "DISTANCES": DISTANCES}
        programs = batches * heads * -(-count // DISTANCES)
        ready = call.made(FOLD, programs, numbers, constants, Tiles(size, size, 4, 1), [tiles, out])
        call.layout.launches[name] = ready
    ready([tiles, out])


def _of_sink(call: Call, x: LoadGradient) -> Tensor:
    """Of p = exp(sink - lse), the sink's weight, which meets no value: -p delta."""
    spec = call.program.spec
    assert spec.sink is not None
    evaluate = call.evaluator()
    weights = (torch.as_tensor(evaluate(spec.sink), device=call.q.device) - call.pair[..., :1]).exp()
    if call.exact:
        weights = weights * call.inverse[..., None]
    weights = weights.masked_fill((call.lse == -math.inf)[..., None], 0.0)
    by = torch.as_tensor(evaluate(x.derivative), device=call.q.device)
    return -weights * call.pair[..., 1:] * by


def add(call: Call, x: LoadGradient, found: tuple[Tensor, bool], doperands: Sequence[Tensor]) -> None:
    """Adds the gradient by a load to that of its operand, at the places that it is loaded from."""
    value, diagonal = found
    evaluate = call.evaluator()
    load = x.load
    if diagonal:
        moved = along_diagonal(load)
        assert moved is not None
        load = moved
        evaluate.scope = {  # [b, h, distance]
            **{s: v.view(v.shape[:3]) if isinstance(v, Tensor) and s in (B, H) else v
               for s, v in evaluate.scope.items()},
            DISTANCE: torch.arange(1 - call.lq, call.lk, device=call.q.device).view(1, 1, -1),
        }  # fmt: skip
    deposit(doperands[x.load.operand], load, value, evaluate)


def _summed(x: Tensor, axes: Sequence[sympy.Symbol]) -> Tensor:
    gone = [a for a, p in enumerate(POSITION) if p not in axes and x.shape[a] > 1]
    return x.sum(gone, keepdim=True) if gone else x


def deposit(doperand: Tensor, load: Load, value: Tensor, evaluate: Evaluator) -> None:
    """Adds `value`, the gradient by a load for each position, to the operand's gradient where the load reads it.

    value: of the shape that the load's indices have when they are evaluated and broadcast.
    """
    if not load.indices:
        doperand += value.reshape(()).to(doperand.dtype)
        return
    positions = [x for x in load.indices if x != 0]
    if all(x in POSITION for x in positions) and len(set(positions)) == len(positions):
        # Positions as they are: the gradient is one for each element, in another order. Where the operand is shorter,
        # a condition of the score keeps loads inside.
        order = [POSITION.index(x) for x in load.indices if x != 0]
        rest = [a for a in range(4) if a not in order]
        placed = value.permute(*order, *rest).reshape([value.shape[a] for a in order])
        lengths = [
            min(size, value.shape[POSITION.index(x)] if x != 0 else 1)
            for x, size in zip(load.indices, doperand.shape, strict=True)
        ]
        placed = placed[tuple(slice(0, n) for n, x in zip(lengths, load.indices, strict=True) if x != 0)]
        for d, x in enumerate(load.indices):
            if x == 0:
                placed = placed.unsqueeze(d)
        doperand[tuple(slice(0, n) for n in lengths)] += placed.to(doperand.dtype)
        return
    index = []
    for size, x in zip(doperand.shape, load.indices, strict=True):
        index.append(torch.as_tensor(evaluate(x), device=doperand.device).clamp(0, max(size - 1, 0)))
    whole = torch.zeros(doperand.shape, dtype=torch.float32, device=doperand.device)
    shape = torch.broadcast_shapes(*(x.shape for x in index), value.shape)
    places = tuple(x.expand(shape) for x in index)
    if torch.are_deterministic_algorithms_enabled():
        whole.index_put_(places, value.float().expand(shape), accumulate=True)
    else:  # which sorts all places first
        flat = sum(x * stride for x, stride in zip(places, whole.stride(), strict=True))
        assert isinstance(flat, Tensor)
        whole.view(-1).scatter_add_(0, flat.reshape(-1), value.float().expand(shape).reshape(-1))
    doperand += whole.to(doperand.dtype)
