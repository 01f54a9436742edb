"""Philox 4x32-7, the random numbers of dropout: they depend on a seed and on an element's place, on no tile shape.

Counters and keys are uint32. Seven rounds, the fewest with which all of BigCrush's tests pass, for seeds and counters
as regular as these: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC'11. The key is the 64-bit seed, low word first. One call serves eight neighbours: element r of them takes 16 bits of
word r // 2, the lower ones where r is even, and is kept if these are not below `threshold(p)`.

Counters, of the group of eight that an element is in:

- attention's weight (b, h, i, j): (j // 8, i, b * H + h, stream), element j % 8;
- element n of a tensor, counted in the order of its indices whatever its strides: (n // 8, (n // 8) >> 32, 0, stream),
  element n % 8.

`stream` tells apart the sites that share a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

PIECE = 1 << 16
"""A keep decision takes 16 bits."""

FINEST = 2.0**-8
"""Of p and 1 - p: a rate is off by 2**-17 at most, 0.2 % of this. Of smaller ones that is too much."""


def threshold(p: float) -> int:
    """Of 65536 numbers, how many drop an element: 0 for p = 0, 65536 for p = 1."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return round(p * PIECE)


def fine_enough(p: float) -> bool:
    """Whether 16 bits give the rate p: exactly, or nearly so."""
    return p in (0.0, 1.0) or (math.isfinite(p) and FINEST <= p <= 1.0 - FINEST)


def scale(p: float) -> float:
    """What is kept is multiplied by this, as eager's dropout does; at p = 1 all is dropped."""
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def philox(
    seed: Tensor | int, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each counter, as int64 that hold uint32. Counters are broadcast; a seed is any int64."""
    given = next((x.device for x in (c0, c1, c2, c3) if isinstance(x, Tensor)), None)
    x0, x1, x2, x3 = torch.broadcast_tensors(*(_words(x, given) for x in (c0, c1, c2, c3)))
    key = _int64(seed, given).reshape(())
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(ROUNDS):
        # Products wrap around in int64, whose bits are then those of uint64.
        a, b = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = _high(b) ^ x1 ^ k0, b & WORD, _high(a) ^ x3 ^ k1, a & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return x0, x1, x2, x3


def attention_keep(
    seed: Tensor | int,
    p: float,
    batch: int,
    heads: int,
    lq: int,
    lk: int,
    stream: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """What dropout keeps of attention's weights: bool [batch, heads, lq, lk]."""
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    groups, rows, layers = (torch.arange(n, device=device) for n in ((lk + 7) // 8, lq, batch * heads))
    words = philox(seed, groups[None, None, :], rows[None, :, None], layers[:, None, None], stream)
    kept = _pieces(words)[:, :, :lk] >= threshold(p)
    return kept.reshape(batch, heads, lq, lk)


def linear_keep(
    seed: Tensor | int, p: float, shape: Sequence[int], stream: int = 0, device: torch.device | None = None
) -> Tensor:
    """What dropout keeps of a tensor: bool of that shape, contiguous."""
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    count = math.prod(shape)
    groups = torch.arange((count + 7) // 8, device=device)
    words = philox(seed, groups, groups >> 32, 0, stream)
    return (_pieces(words)[:count] >= threshold(p)).reshape(tuple(shape))


def _pieces(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """16-bit numbers of eight neighbours each: [..., n] to [..., 8 n]."""
    halves = [half for word in words for half in (word & (PIECE - 1), word >> 16)]
    return torch.stack(halves, -1).flatten(-2)


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & WORD


def _words(x: Tensor | int, device: torch.device | None) -> Tensor:
    return _int64(x, device) & WORD


def _int64(x: Tensor | int, device: torch.device | None) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(torch.int64)
    return torch.tensor(x - (1 << 64) if x >= 1 << 63 else x, dtype=torch.int64, device=device)


TEXT = '''\
@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox 4x32-7: four uint32 for each counter, of the shape that the counters broadcast to; seed: an int64."""
    k0 = tl.cast(seed, tl.uint32)
    k1 = tl.cast(tl.cast(seed, tl.int64) >> 32, tl.uint32)
    # Counters are broadcast as late as can be: the first two rounds are then of rows or of columns alone.
    c0 = tl.cast(c0, tl.uint32)
    c1 = tl.cast(c1, tl.uint32)
    c2 = tl.cast(c2, tl.uint32)
    c3 = tl.cast(c3, tl.uint32)
    for _ in tl.static_range(7):
        # Both halves of a product by one instruction.
        ab = tl.cast(c0, tl.uint64) * tl.full([], 0xD2511F53, tl.uint64)
        cd = tl.cast(c2, tl.uint64) * tl.full([], 0xCD9E8D57, tl.uint64)
        x0 = tl.cast(cd >> 32, tl.uint32) ^ c1 ^ k0
        x2 = tl.cast(ab >> 32, tl.uint32) ^ c3 ^ k1
        c1 = tl.cast(cd, tl.uint32)
        c3 = tl.cast(ab, tl.uint32)
        c0 = x0
        c2 = x2
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_groups(seed, c0, c1, c2, c3, threshold, M: tl.constexpr, N: tl.constexpr):
    """What dropout keeps [M, N], of groups of eight neighbours whose counters are [M, N // 8] when broadcast."""
    w0, w1, w2, w3 = philox(seed, c0, c1, c2, c3)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [M, N // 2])  # w0, w1, w2, w3 of each group
    pieces = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [M, N])
    return pieces.to(tl.int32) >= threshold


@triton.jit
def keep_attention(seed, i, start, layer, stream, threshold, M: tl.constexpr, N: tl.constexpr):
    """What dropout keeps [M, N] of attention's weights: rows i [M], keys start ... start + N - 1, both start and N
    multiples of 8; layer: b * H + h."""
    groups = start // 8 + tl.arange(0, N // 8)
    return keep_groups(seed, groups[None, :], i[:, None], layer, stream, threshold, M, N)


@triton.jit
def keep_linear(seed, groups, stream, threshold, M: tl.constexpr, N: tl.constexpr):
    """What dropout keeps [M, N] of a tensor; groups: int64 [M, N // 8], the elements' numbers divided by 8."""
    high = tl.cast(groups >> 32, tl.uint32)
    return keep_groups(seed, groups, high, 0, stream, threshold, M, N)


@triton.jit
def keep_each(seed, n, stream, threshold):
    """What dropout keeps of elements with any numbers n, int64: a call for each."""
    groups = n // 8
    w0, w1, w2, w3 = philox(seed, groups, tl.cast(groups >> 32, tl.uint32), 0, stream)
    r = (n % 8).to(tl.int32)
    word = tl.where(r < 4, tl.where(r < 2, w0, w1), tl.where(r < 6, w2, w3))
    piece = tl.where(r % 2 == 0, word & 0xFFFF, word >> 16)
    return piece.to(tl.int32) >= threshold
'''
"""The same for generated modules, which import triton and `triton.language as tl`. Runs in Triton's interpreter."""
