"""Launches of the kernels for what rows without keys send back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from xfcompile.kernels.attention.backward_call import Call
from xfcompile.kernels.attention.backward_dead import CHUNK, KEYS, MARKED, ROWS
from xfcompile.kernels.attention.tiles import Tiles


def add(call: Call, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes what rows without keys have of dq, and adds what they send to dk and dv: of those that are wanted."""
    needs, leaks = call.needs, call.program.spec.leaks
    changed = leaks and (needs.q or needs.k)
    if not (changed or needs.v):
        return
    marks = call.layout.marks()
    delta = call.layout.row() if changed else call.lse
    of_rows = [call.lse, marks, delta]
    flags = {"NEED_DX": changed, "NEED_DQ": leaks and needs.q, "MARKED": MARKED}
    made = [dq if needs.q else call.q]
    _launch(call, ROWS, [call.q, call.k, call.v, call.dout], of_rows, made, flags, call.batch * call.heads, call.lq)
    if not (needs.v or (leaks and needs.k)):
        return
    flags = {"NEED_DK": leaks and needs.k, "NEED_DV": needs.v, "MARKED": MARKED, "CHUNK": CHUNK}
    made = [dk if needs.k else call.k, dv if needs.v else call.v]
    _launch(call, KEYS, [call.q, call.k, call.v, call.dout], of_rows, made, flags, call.batch * call.kv_heads, call.lk)


def _launch(
    call: Call,
    name: str,
    read: Sequence[Tensor],
    of_rows: Sequence[Tensor],
    made: Sequence[Tensor],
    flags: dict[str, Any],
    heads: int,
    length: int,
) -> None:
    """Programs for blocks of queries, or of keys, whose number is `length`. read, made: what they have strides of."""
    tensors = [*read, *of_rows, *made, *call.operands, *call.random[:1]]
    free = [*call.scalars, *call.random[1:]]
    ready = call.layout.launches.get(name)
    if ready is not None:
        ready(tensors, free)
        return
    numbers = [stride for x in (*read, *made) for stride in x.stride()]
    numbers += [call.heads, call.heads // call.kv_heads, call.lq, call.lk]
    numbers += [stride for x in call.operands for stride in x.stride()]

    def with_tiles(sizes: Tiles) -> Any:
        programs = heads * -(-length // (sizes.block_n if name == KEYS else sizes.block_m))
        return call.made(name, programs, numbers, call.constants(sizes) | flags, sizes, tensors)

    call.fitting(name, with_tiles, tensors, free)
