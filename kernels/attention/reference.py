"""What attention with a `ScoreSpec` means, in plain PyTorch: the definition that kernels are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from xfcompile.evaluate import Evaluator, Value
from xfcompile.kernels import philox
from xfcompile.kernels.attention.gradient import Gradients
from xfcompile.score import POSITION, S
from xfcompile.site import ScoreSpec


def attention(
    spec: ScoreSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] = (),
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
    dtype: torch.dtype = torch.float32,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """Softmax over j of the score where kept, some of it dropped out, times v, computed in `dtype`.

    q [B, Hq, Lq, Dq], k [B, Hkv, Lk, Dq], v [B, Hkv, Lk, Dv] -> out [B, Hq, Lq, Dv], lse [B, Hq, Lq], both in `dtype`.
    """
    batch, heads, lq, _ = q.shape
    lk = k.shape[2]
    group = heads // max(k.shape[1], 1)
    q, k, v = (x.to(dtype) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))

    shape = (batch, heads, lq, lk)
    evaluate = evaluator(spec, shape, operands, ints, floats, dtype, q.device, q @ k.mT)
    # Where there is a full score, masked keys are kept with the numbers that they then have.
    masked = spec.full is None
    score = _full(evaluate(spec.score if masked else spec.full), shape, dtype, q.device)
    keep = _full(evaluate(spec.keep if masked else sympy.true), shape, torch.bool, q.device)

    logits = score.masked_fill(~keep, -math.inf)
    if spec.sink is not None:
        sink = _full(evaluate(spec.sink), (batch, heads, lq, 1), dtype, q.device)
        logits = torch.cat([logits, sink], -1)
    lse = logits.logsumexp(-1) if logits.shape[-1] else logits.new_full(shape[:3], -math.inf)
    nothing = lse[..., None] == -math.inf
    # Of 0 / 0 comes NaN, but no gradient of NaN.
    weights = logits.masked_fill(nothing, 0.0).softmax(-1)[..., :lk].masked_fill(nothing, math.nan)
    if spec.sink is None and lk:
        empty = ~keep.any(-1, keepdim=True)
        weights = weights.masked_fill(empty, {"nan": math.nan, "mean": 1 / lk, "zero": 0.0}[spec.dead])
        if spec.leaks:  # the number beside which nothing is left of a score has the derivative 1 by it
            weights = torch.where(empty, (score - score.detach()).softmax(-1), weights)
        if spec.dead == "zero":  # SDPA counts a row of infinite scores as one without keys
            weights = weights.masked_fill(nothing, 0.0)
    if spec.dropout:
        weights = _dropped(spec, weights, seed, stream)
    return weights @ v, lse


def _dropped(spec: ScoreSpec, weights: Tensor, seed: Tensor | None, stream: int) -> Tensor:
    """Weights, or their gradients, some of them dropped out and the others larger by as much."""
    assert seed is not None
    batch, heads, lq, lk = weights.shape
    kept = philox.attention_keep(seed, spec.dropout, batch, heads, lq, lk, stream, weights.device)
    return torch.where(kept, weights * philox.scale(spec.dropout), 0.0)


def evaluator(
    spec: ScoreSpec,
    shape: Sequence[int],
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    dot: Tensor | None = None,
) -> Evaluator:
    """Evaluates formulas of a score over the positions [B, 1, 1, 1] to [1, 1, 1, Lk] of a shape [B, Hq, Lq, Lk].

    dot: q·k, of that shape, where the formulas speak of it.
    """
    scope: dict[sympy.Symbol, Value] = {
        position: torch.arange(n, device=device).view([-1 if a == axis else 1 for a in range(4)])
        for axis, (position, n) in enumerate(zip(POSITION, shape, strict=True))
    }
    scope.update(bind(spec.scalars, ints, floats))
    if dot is not None:
        scope[S] = dot
    return Evaluator(scope, operands, dtype, device)


def bind(scalars: Sequence[sympy.Symbol], ints: Sequence[int], floats: Sequence[float]) -> dict[sympy.Symbol, Value]:
    """The value of each scalar: integers come from `ints` in order, all others from `floats`."""
    whole, real = iter(ints), iter(floats)
    return {x: next(whole) if x.is_integer else next(real) for x in scalars}


def _full(value: Value, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(value, device=device).to(dtype).expand(shape)


def backward(
    spec: ScoreSpec,
    found: Gradients,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] = (),
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
    dtype: torch.dtype = torch.float32,
    absolute: bool = False,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of `attention`'s out by q, k, v, and by each load of `found`, computed in `dtype`.

    dq, dk, dv have the shapes of q, k, v; that of a load [B, H, Lq, Lk] (of a sink [B, H, Lq, 1]) with 1 for the axes
    that it has not. absolute: of a load, the sum of the sizes of what its gradient is the sum of. Rows that see no key
    have none, but for v's where they get the mean of v, and for q's and k's where the spec says `leaks`.
    """
    out, lse = attention(spec, q, k, v, operands, ints, floats, dtype, seed, stream)
    batch, heads, lq, _ = q.shape
    kv_heads, lk = k.shape[1:3]
    group = heads // max(kv_heads, 1)
    dout, q, k, v = (x.to(dtype) for x in (dout, q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))

    shape = (batch, heads, lq, lk)
    evaluate = evaluator(spec, shape, operands, ints, floats, dtype, q.device, q @ k.mT)
    keep = _full(evaluate(spec.keep), shape, torch.bool, q.device)
    score = _full(evaluate(spec.score), shape, dtype, q.device).masked_fill(~keep, -math.inf)
    dead = lse[..., None] == -math.inf
    sink = score[..., :0]
    if spec.sink is not None:
        sink = _full(evaluate(spec.sink), (*shape[:3], 1), dtype, q.device)
    # Not exp(score - lse): beside finfo.min nothing is left of the number of keys.
    weights = torch.cat([score, sink], -1).masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    weights, sink_weights = weights[..., :lk], weights[..., lk:]
    delta = (dout * torch.where(dead, 0.0, out)).sum(-1, keepdim=True)
    dweights, kept = dout @ v.mT, weights
    if spec.dropout:
        dweights, kept = (_dropped(spec, x, seed, stream) for x in (dweights, weights))
    dscore = weights * (dweights - delta)
    if spec.leaks:
        dscore = torch.where(dead, (dweights - dweights.mean(-1, keepdim=True)) / max(lk, 1), dscore)
    ds = dscore * _full(evaluate(found.slope), shape, dtype, q.device)
    terms = []
    for x in found.loads:
        whole = -delta * sink_weights if x.kind == "sink" else dscore
        by = whole * _full(evaluate(x.derivative), tuple(whole.shape), dtype, q.device)
        terms.append((by.abs() if absolute else by, [a for a, p in enumerate(POSITION) if p not in x.axes]))
    if spec.dead == "mean" and spec.sink is None and lk:
        equal = (dead / lk).to(dtype).expand(shape)
        kept = kept + (_dropped(spec, equal, seed, stream) if spec.dropout else equal)
    dv = kept.mT @ dout
    loads = [by.sum(gone, keepdim=True) if gone else by for by, gone in terms]
    own = [y.unflatten(1, (kv_heads, group)).sum(2) for y in (ds.mT @ q, dv)]
    return ds @ k, own[0], own[1], loads
