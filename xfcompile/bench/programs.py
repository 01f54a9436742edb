"""Twelve attention programs: as one writes them in PyTorch, as FlexAttention and SDPA want them, and as specs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import Band, Operand, ScoreSpec

WINDOW = 256
CAP = 50.0
CAUSAL_BAND = Band(None, I + 1, True)
NO_BAND = Band()

Score = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    length: int
    dim: int


@dataclass(frozen=True)
class Program:
    """One attention: plain(q, k, v, *tensors) is what the author wrote; flex gives (score_mod, mask_mod)."""

    name: str
    plain: Callable[..., Tensor]
    spec: Callable[[Sizes], ScoreSpec]
    tensors: Callable[[Sizes, torch.device, torch.dtype], list[Tensor]] = lambda sizes, device, dtype: []
    flex: Callable[..., tuple[Score | None, Score | None]] = lambda *tensors: (None, None)
    # SDPA's arguments for it, given q and the tensors, where it has any: `is_causal`, or a mask.
    sdpa: Callable[..., dict[str, Any]] | None = None
    # The dimensions of each of its tensors: one of heads is "h".
    axes: tuple[str, ...] = ()
    # What the spec loads from, of the sizes and the tensors.
    operands: Callable[..., list[Tensor]] = lambda sizes, *tensors: list(tensors)
    # Whether the tensors are parameters, which need gradients in training.
    learned: bool = False


def scale(sizes: Sizes) -> sympy.Expr:
    return S / sympy.sqrt(sizes.dim)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def positions(q: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.arange(q.shape[-2], device=q.device)
    return n[:, None], n[None, :]


def none(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return scores(q, k).masked_fill(mask, float("-inf")).softmax(-1) @ v


def causal_buffer(q: Tensor, k: Tensor, v: Tensor, buffer: Tensor) -> Tensor:
    n = q.shape[-2]
    return scores(q, k).masked_fill(buffer[:, :, :n, :n] == 0, float("-inf")).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    i, j = positions(q)
    return (scores(q, k) + slopes[:, None, None] * (j - i)).to(q.dtype).softmax(-1) @ v


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (CAP * torch.tanh(scores(q, k) / CAP)).softmax(-1) @ v


def soft_cap_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q)
    capped = (CAP * torch.tanh(scores(q, k) / CAP)).masked_fill(j > i, float("-inf"))
    return capped.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q)
    keep = (j <= i) & (j > i - WINDOW)
    return scores(q, k).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def prefix_lm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q)
    return scores(q, k).masked_fill(~((j <= i) | (j < WINDOW)), float("-inf")).softmax(-1) @ v


def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    i, j = positions(q)
    keep = (document[:, None, :, None] == document[:, None, None, :]) & (j <= i)
    return scores(q, k).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def key_padding(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (scores(q, k) + bias).softmax(-1) @ v


def t5_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i, j = positions(q)
    bias = table[_t5_bucket(j - i)].permute(2, 0, 1)
    return (q @ k.transpose(-1, -2) + bias).float().softmax(-1).to(q.dtype) @ v


def dense_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (scores(q, k) + bias).softmax(-1) @ v


def _t5_bucket(position: Tensor) -> Tensor:
    n = position.abs()
    large = 8 + (torch.log(n.clamp(min=1).float() / 8) / math.log(16) * 8).to(torch.int64)
    return torch.where(position > 0, 16, 0) + torch.where(n < 8, n, large.clamp(max=15))


def _t5_positions(table: Tensor, length: int) -> list[Tensor]:
    """The bias of each relative position, [heads, 2·length - 1]: as small as the program's meaning, and exact."""
    position = torch.arange(1 - length, length, device=table.device)
    return [table[_t5_bucket(position)].T.contiguous()]


def _slopes(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [2 ** (-8 * torch.arange(1, sizes.heads + 1, device=device) / sizes.heads)]


def _buffer(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.ones(1, 1, sizes.length, sizes.length, device=device).tril()]


def _document(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Eight documents of unequal length in each sequence."""
    borders = torch.tensor([0.05, 0.2, 0.3, 0.45, 0.5, 0.7, 0.9], device=device) * sizes.length
    document = (torch.arange(sizes.length, device=device)[:, None] >= borders).sum(1)
    return [document.expand(sizes.batch, -1).contiguous()]


def _padding(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The last eighth of the keys is padding in every second sequence."""
    bias = torch.zeros(sizes.batch, 1, 1, sizes.length, device=device, dtype=dtype)
    bias[1::2, ..., sizes.length - sizes.length // 8 :] = float("-inf")
    return [bias]


def _table(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(32, sizes.heads, device=device, dtype=dtype)]


def _dense(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, sizes.heads, sizes.length, sizes.length, device=device, dtype=dtype)]


def _flex_t5(table: Tensor) -> tuple[Score, None]:
    def bucket(position: Tensor) -> Tensor:
        n = position.abs()
        large = 8 + (torch.log(torch.clamp(n, min=1).float() / 8) / math.log(16) * 8).to(torch.int64)
        return torch.where(position > 0, 16, 0) + torch.where(n < 8, n, torch.clamp(large, max=15))

    return lambda s, b, h, i, j: s + table[bucket(j - i), h], None


def _capped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return CAP * torch.tanh(s / CAP)


def _below(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _distance(q: Tensor) -> Tensor:
    """j - i, [length, length]."""
    i, j = positions(q)
    return j - i


def tensors(program: Program, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v in the layout of projections, and the program's own tensors."""
    torch.manual_seed(0)
    shape = (sizes.batch, sizes.length, sizes.heads, sizes.dim)
    qkv = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    return [*qkv, *program.tensors(sizes, device, dtype)]


def programs(dtype: torch.dtype) -> list[Program]:
    """The twelve, for q, k and v of this dtype (biases have it too)."""

    def spec(score: sympy.Expr, keep: sympy.Basic = sympy.true, *operands: Operand, band: Band = NO_BAND) -> ScoreSpec:
        return ScoreSpec(score, keep, "nan", operands, band=band, coarse=dtype == torch.bfloat16)

    def cap(z: Sizes) -> sympy.Expr:
        return CAP * sympy.tanh(scale(z) / CAP)

    fp32 = torch.float32
    causal_spec = lambda z: spec(scale(z), J <= I, band=CAUSAL_BAND)  # noqa: E731
    is_causal = lambda q, *tensors: {"is_causal": True}  # noqa: E731
    mask = lambda q, bias: {"attn_mask": bias}  # noqa: E731
    return [
        Program("no mask", none, lambda z: spec(scale(z)), sdpa=lambda q: {}),
        Program("causal", causal, causal_spec, flex=lambda: (None, _below), sdpa=is_causal),
        Program(
            "causal from a buffer",
            causal_buffer,
            causal_spec,
            _buffer,
            lambda buffer: (None, _below),
            is_causal,
            ("11ij",),
            lambda z, buffer: [],
        ),
        Program(
            "ALiBi",
            alibi,
            lambda z: spec(scale(z) + Load(0, H) * (J - I), sympy.true, Operand(fp32, 1)),
            _slopes,
            lambda slopes: (lambda s, b, h, i, j: s + slopes[h] * (j - i), None),
            lambda q, slopes: {"attn_mask": (slopes[:, None, None] * _distance(q)).to(q.dtype)[None]},
            ("h",),
        ),
        Program("soft-cap", soft_cap, lambda z: spec(cap(z)), flex=lambda: (_capped, None)),
        Program(
            "soft-cap, causal",
            soft_cap_causal,
            lambda z: spec(cap(z), J <= I, band=CAUSAL_BAND),
            flex=lambda: (_capped, _below),
        ),
        Program(
            "sliding window",
            sliding_window,
            lambda z: spec(scale(z), sympy.And(J <= I, J > I - WINDOW), band=Band(I - WINDOW + 1, I + 1, True)),
            flex=lambda: (None, lambda b, h, i, j: (j <= i) & (j > i - WINDOW)),
            sdpa=lambda q: {"attn_mask": (_distance(q) <= 0) & (_distance(q) > -WINDOW)},
        ),
        Program(
            "prefix LM",
            prefix_lm,
            lambda z: spec(scale(z), sympy.Or(J <= I, J < WINDOW), band=Band(None, sympy.Max(I + 1, WINDOW), True)),
            flex=lambda: (None, lambda b, h, i, j: (j <= i) | (j < WINDOW)),
            sdpa=lambda q: {"attn_mask": (_distance(q) <= 0) | (positions(q)[1] < WINDOW)},
        ),
        Program(
            "documents",
            documents,
            lambda z: spec(
                scale(z),
                sympy.And(sympy.Eq(Load(0, B, I), Load(0, B, J)), J <= I),
                Operand(torch.int64, 2),
                band=Band(None, I + 1, False),
            ),
            _document,
            lambda document: (None, lambda b, h, i, j: (document[b, i] == document[b, j]) & (j <= i)),
            lambda q, document: {
                "attn_mask": (document[:, None, :, None] == document[:, None, None, :]) & (_distance(q) <= 0)
            },
            ("bi",),
        ),
        Program(
            "key padding",
            key_padding,
            lambda z: spec(scale(z) + Load(0, B, 0, 0, J), sympy.true, Operand(dtype, 4)),
            _padding,
            lambda bias: (lambda s, b, h, i, j: s + bias[b, 0, 0, j], None),
            mask,
            ("b11j",),
        ),
        Program(
            "T5 bias",
            t5_bias,
            lambda z: spec(S + Load(0, H, J - I + (z.length - 1)), sympy.true, Operand(dtype, 2)),
            _table,
            _flex_t5,
            lambda q, table: {"attn_mask": table[_t5_bucket(_distance(q))].permute(2, 0, 1)[None], "scale": 1.0},
            ("th",),
            operands=lambda z, table: _t5_positions(table, z.length),
            learned=True,
        ),
        Program(
            "dense bias",
            dense_bias,
            lambda z: spec(scale(z) + Load(0, 0, H, I, J), sympy.true, Operand(dtype, 4)),
            _dense,
            lambda bias: (lambda s, b, h, i, j: s + bias[0, h, i, j], None),
            mask,
            ("1hij",),
            learned=True,
        ),
    ]
