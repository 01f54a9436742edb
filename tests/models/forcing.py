"""Whether generated text is as exact as eager's: both are compared with fp64 on the same tokens.

Texts in bf16 drift apart: one rounding decides a token, and the next ones follow it. So the tokens that were generated
are given to eager at once, in fp64 and in the text's own precision ("teacher forcing"), and the logits compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPREAD_OF_MEANS, SPREAD_OF_MAXIMA = 1.25, 1.5
"""What errors of equally exact programs differ by. With SDPA they were 0.96 to 1.04 times eager's in their root mean
squares, and 0.89 to 1.19 times in their maxima: twelve models as in test_forcing.py, on a CPU. A scale that is 3 %
off gave 2.5 and 3."""


@dataclass(frozen=True)
class Forced:
    """Logits [B, tokens, vocabulary] of each token that was generated: those of the steps that generated them, eager's
    in the same precision, and fp64's, all after the same text."""

    ours: Tensor
    eager: Tensor
    exact: Tensor
    chosen: Tensor

    def errors(self) -> tuple[Tensor, Tensor]:
        return self.ours.double() - self.exact, self.eager.double() - self.exact

    def check(self) -> None:
        ours, eager = self.errors()
        ratio = (ours.square().mean() / eager.square().mean()).sqrt().item()
        assert ratio <= SPREAD_OF_MEANS, f"{ratio:.3g} times eager's error"
        bound = SPREAD_OF_MAXIMA * eager.abs().max().item()
        assert ours.abs().max().item() <= bound, f"{ours.abs().max().item():.3g} > {bound:.3g}"
        # A token is another than eager's only where both may be the likeliest, within the error of two logits.
        other = self.chosen != self.eager.argmax(-1)
        gap = self.exact.amax(-1) - self.exact.gather(-1, self.chosen[..., None])[..., 0]
        assert (gap[other] <= 2 * bound).all(), f"tokens that are less likely by {gap[other].max().item():.3g}"


def forced(model: Any, prompt: dict[str, Tensor], generated: Any) -> Forced:
    """model: an eager one. prompt: its ids and mask, [B, prompt]. generated: with logits, of `generate`."""
    tokens, start = generated.sequences, prompt["input_ids"].shape[1]
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(tokens[:, start:])], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            found = of(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return found[:, start - 1 : -1]

    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")  # its softmax is in fp64; eager's is in fp32
    return Forced(torch.stack(generated.logits, 1), logits(model), logits(exact), tokens[:, start:])
