"""Decoding: the cases of the attention kernel with few query rows, caches that are partly filled, and what is dead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from attention_cases import BOOL, FLOAT, LONG, SCALE, Case, Inputs, Sizes, inputs, normal
from sympy import Ne
from torch import Tensor

from xfcompile.evaluate import Evaluator
from xfcompile.score import B, H, I, J, Load, S, Where
from xfcompile.site import Band, Operand, ScoreSpec

LQ, LK = sympy.symbols("lq lk", integer=True, positive=True)


def few(case: Case, dtype: torch.dtype, lq: int, layout: str = "contiguous", **sizes: int) -> Inputs:
    """The first few query rows of a case. Its operands speak of more, as masks of a whole sequence do."""
    whole = replace(case.sizes, lq=max(lq, 8), **sizes)
    x = inputs(case, dtype, layout, whole)
    # What a case computes from its number of queries is to be true of these few.
    return replace(x, q=x.q[:, :, :lq], ints=case.ints(replace(whole, lq=lq)))


def filled(length: int, lk: int) -> Tensor:
    return torch.arange(lk) < length


@dataclass(frozen=True)
class Cache:
    """A cache that is longer than what is in it: how a program says which keys are live."""

    name: str
    keep: sympy.Basic
    operand: Operand

    @property
    def spec(self) -> ScoreSpec:
        return ScoreSpec(SCALE, self.keep, "nan", (self.operand,))

    def tensor(self, live: Tensor, lq: int) -> Tensor:
        """live [B, lk]: a mask, or the position of the last live key of each row."""
        if self.operand.dtype == BOOL:
            return live[:, None, None, :].expand(-1, 1, lq if self.keep.has(I) else 1, -1).contiguous()
        last = live.shape[1] - 1 - live.flip(1).int().argmax(1)
        return {0: last.max(), 1: last.max().expand(lq), 2: last[:, None].expand(-1, lq)}[self.operand.ndim].clone()


CACHES = [
    Cache("mask", Ne(Load(0, B, 0, 0, J), 0), Operand(BOOL, 4)),
    Cache("mask_of_rows", Ne(Load(0, B, 0, I, J), 0), Operand(BOOL, 4)),
    Cache("position", Load(0) >= J, Operand(LONG, 0)),
    Cache("positions", Load(0, I) >= J, Operand(LONG, 1)),
    Cache("positions_of_each", Load(0, B, I) >= J, Operand(LONG, 2)),
    Cache("window", sympy.And(Load(0, B, I) >= J, Load(0, B, I) - 20 < J), Operand(LONG, 2)),
]


def kept(spec: ScoreSpec, x: Inputs) -> Tensor:
    """Which keys [B, H, lk] some query row of a head keeps."""
    batch, heads, lq, _ = x.q.shape
    lk = x.k.shape[2]
    scope = {
        symbol: torch.arange(n).view([-1 if d == axis else 1 for d in range(4)])
        for axis, (symbol, n) in enumerate(((B, batch), (H, heads), (I, lq), (J, lk)))
    }
    scope.update(zip(spec.scalars, x.ints, strict=True))
    keep = Evaluator(scope, x.operands, torch.float64, torch.device("cpu"))(spec.keep)
    return torch.as_tensor(keep).expand(batch, heads, lq, lk).any(2)


def poison_dead_tiles(spec: ScoreSpec, x: Inputs, tile: int) -> tuple[Inputs, int]:
    """NaN for all keys and values of tiles in which no row keeps a key; how many such tiles there are."""
    lk, group = x.k.shape[2], x.q.shape[1] // x.k.shape[1]
    live = kept(spec, x).unflatten(1, (-1, group)).any(2)  # [B, kv_heads, lk]
    tiles = torch.nn.functional.pad(live, (0, -lk % tile)).unflatten(2, (-1, tile)).any(3)
    dead = ~tiles.repeat_interleave(tile, 2)[:, :, :lk, None]
    return replace(x, k=x.k.masked_fill(dead, torch.nan), v=x.v.masked_fill(dead, torch.nan)), int((~tiles).sum())


def apart(first: sympy.Expr, second: sympy.Expr) -> sympy.Expr:
    return Where(H < 2, first, second)


# Rows of one program are of different heads: guards over heads meet loads that know none.
HEADS_APART = [
    Case(
        "other_heads_have_another_bias",
        ScoreSpec(SCALE + apart(Load(0, H, J), Load(1, H - 2, J)), operands=(Operand(FLOAT, 2), Operand(FLOAT, 2))),
        lambda z: [normal(2, z.lk), normal(z.heads - 2, z.lk)],
    ),
    Case(
        "some_heads_have_a_bias_of_keys",
        ScoreSpec(SCALE + apart(Load(0, J + 1), Load(0, J)), operands=(Operand(FLOAT, 1),)),
        lambda z: [normal(z.lk + 1)],
    ),
    Case(
        "some_heads_have_a_bias",
        ScoreSpec(S * apart(Load(0, B + 1), sympy.S.One), operands=(Operand(FLOAT, 1),)),
        lambda z: [normal(z.batch + 1)],
    ),
    Case(
        "some_heads_have_a_window",
        ScoreSpec(SCALE, sympy.Or(J > I + 40, H >= 2), "mean"),
    ),
    Case(
        "a_window_for_each_head",
        ScoreSpec(SCALE, Load(0, H) <= J, "nan", (Operand(LONG, 1),)),
        lambda z: [torch.arange(z.heads) * 16],
    ),
]

BOTTOM_RIGHT_WINDOW = Case(
    "bottom_right_window",
    ScoreSpec(
        SCALE,
        sympy.And(J <= I + LK - LQ, J > I + LK - LQ - 20),
        "nan",
        scalars=(LQ, LK),
        band=Band(I + LK - LQ - 19, I + LK - LQ + 1, True),
    ),
    ints=lambda z: [z.lq, z.lk],
)

MANY_KEYS = Sizes(batch=2, heads=4, kv_heads=2, lq=2, lk=250, dq=16, dv=16)
