"""What rows whose keys are all masked send back: no kernel sees them, and their weights are one number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xfcompile.kernels.attention.backward_call import Call


def mean_rows(call: Call, dv: Tensor) -> None:
    """Rows that see no key got the mean of all values: each has its part of what comes back."""
    dead = (call.lse == -math.inf).to(call.dout.dtype)
    back = (dead[:, :, None, :] @ call.dout).float()  # [B, Hq, 1, Dv]
    dv += (back.unflatten(1, (call.kv_heads, -1)).sum(2) / call.lk).to(dv.dtype)


def leaking_rows(call: Call, dq: Tensor | None, dk: Tensor | None) -> None:
    """What rows without keys add to dq and dk: their scores s are all replaced by one number, with the derivative
    of a sum. Their weights are 1/Lk, so that

        ds_ij = c/Lk (dout_i·v_j - mean over j),  dq_i = c/Lk dout_i Σ_j (v_j - v̄)ᵀ(k_j - k̄),
        dk_j = c/Lk (v_j - v̄) Σ_i dout_iᵀ q_i

    where c is the score's derivative by q·k, a number. Keys and values are centred: their means cancel out.
    """
    # A number stays one: a tensor of it on the device would be copied there, which no CUDA graph captures.
    slope = call.evaluator()(call.program.made.gradients.slope)
    slope = slope.float() if isinstance(slope, Tensor) else float(slope)
    dead = call.lse == -math.inf
    # [B, Hkv, g, i, Dv]
    dout = torch.where(dead[..., None], call.dout, 0.0).float().unflatten(1, (call.kv_heads, -1))
    v = _centred(call.v)
    if dq is not None:
        more = dout @ (v.mT @ _centred(call.k))[:, :, None] * (slope / call.lk)
        dq += more.flatten(1, 2).to(dq.dtype)
    if dk is not None:
        q = call.q.float().unflatten(1, (call.kv_heads, -1))
        dk += (v @ (dout.mT @ q).sum(2) * (slope / call.lk)).to(dk.dtype)


def _centred(x: Tensor) -> Tensor:
    """Keys or values [B, Hkv, j, D] less their mean over j, in fp32."""
    wide = x.float()
    return wide - wide.mean(2, keepdim=True)
