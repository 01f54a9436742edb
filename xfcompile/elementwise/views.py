"""Rules of views and of repeated tensors: an element is one of the tensor behind, at another position."""

from __future__ import annotations

from typing import Any

from xfcompile.elementwise.elements import Elements, Rule
from xfcompile.elementwise.positions import Index, broadcast, interleaved, permuted, reshaped
from xfcompile.indexing import integer, mod
from xfcompile.values import Value


def _reshape(e: Elements, v: Value, index: Index) -> Any:
    return e.at(v["self"], reshaped(v, index, e.ranges))


def _permute(e: Elements, v: Value, index: Index) -> Any:
    return e.at(v["self"], permuted(v, index))


def _expand(e: Elements, v: Value, index: Index) -> Any:
    return e.at(v["self"], broadcast(index, v.shape, v["self"].shape))


def _slice(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"]
    return e.at(v["self"], (*index[:d], integer(v["start"]) + integer(v["step"]) * index[d], *index[d + 1 :]))


def _select(e: Elements, v: Value, index: Index) -> Any:
    d = v["dim"]
    return e.at(v["self"], (*index[:d], integer(v["index"]), *index[d:]))


def _repeat_interleave(e: Elements, v: Value, index: Index) -> Any:
    source = interleaved(v, index, e.ranges)
    return None if source is None else e.at(v["self"], source)


def _repeat(e: Elements, v: Value, index: Index) -> Any:
    source = v["self"].shape
    tail = index[len(index) - len(source) :]
    return e.at(v["self"], tuple(mod(x, integer(n), e.ranges) for x, n in zip(tail, source, strict=True)))


def _flip(e: Elements, v: Value, index: Index) -> Any:
    dims = {d % v.ndim for d in v["dims"]}
    return e.at(v["self"], tuple(v.shape[k] - 1 - x if k in dims else x for k, x in enumerate(index)))


RULES: dict[str, Rule] = {
    "reshape": _reshape, "permute": _permute, "expand": _expand, "slice": _slice, "select": _select,
    "repeat_interleave": _repeat_interleave, "repeat": _repeat, "flip": _flip,
}  # fmt: skip
