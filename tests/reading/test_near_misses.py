"""What looks like attention and is none, or none that can be replaced: left alone with a reason, and always right."""

# ruff: noqa: E501 (one line a program, so that the table can be read as one)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import Outcome, check, rewriting, tensors

from xfcompile.operands import _widens
from xfcompile.trace import Meta
from xfcompile.values import Values

SQUARE = (4, 4, 4, 4)
"""All axes of one size: an axis taken for another is no shape error, only wrong numbers."""

MIN = torch.finfo(torch.float32).min
INF = float("inf")
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Program:
    """A program, and a word of the reason for which its attention is left alone.

    why: "" is no candidate at all, None a program that may be replaced (`fused` then says whether it is).
    """

    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    why: str | None
    dtype: torch.dtype = torch.float32
    grad: bool = False
    fused: bool | None = None


PROGRAMS: dict[str, Program] = {}


def miss(name: str, why: str | None, fn: Callable[..., Any], *shapes: tuple[int, ...], **about: Any) -> None:
    assert name not in PROGRAMS
    PROGRAMS[name] = Program(fn, shapes or (SQUARE, SQUARE, SQUARE), why, **about)


def right(name: str, fn: Callable[..., Any], *shapes: tuple[int, ...], fused: bool | None = True, **about: Any) -> None:
    """A program that is replaced (or, with `fused=None`, may be), and whose numbers are delicate."""
    miss(name, None, fn, *shapes, fused=fused, **about)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.mT * 0.5


def with_bias(bias: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An attention with a bias of positions."""

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        j = torch.arange(4)
        return (scores(q, k) + bias(j[:, None], j)).softmax(-1) @ v

    return program


# -- the softmax runs over another axis ----------------------------------------------------------------------------

miss("softmax over queries", "axis", lambda q, k, v: scores(q, k).softmax(-2) @ v)
miss("softmax over heads", "axis", lambda q, k, v: scores(q, k).softmax(1) @ v)
miss("softmax over the batch", "axis", lambda q, k, v: scores(q, k).softmax(0) @ v)
miss(
    "softmax over queries, by einsum",
    "axis",
    lambda q, k, v: torch.einsum("bhij,bhid->bhjd", scores(q, k).softmax(3), v),
)
right("softmax of transposed scores: keys ask queries", lambda q, k, v: scores(q, k).mT.softmax(-1) @ v)
miss(
    "softmax with no dim",
    "axis",
    lambda q, k, v: F.softmax(q @ k.mT, _stacklevel=0) @ v,
    (4, 4, 4),
    (4, 4, 4),
    (4, 4, 4),
)
miss("weights transposed", "axis", lambda q, k, v: scores(q, k).softmax(-1).mT @ v)
miss("heads and keys swapped", "axis", lambda q, k, v: scores(q, k).softmax(-1).transpose(1, 3) @ v)
right("heads and batch swapped", lambda q, k, v: scores(q, k).softmax(-1).transpose(0, 1) @ v, fused=None)
right("heads and queries swapped", lambda q, k, v: scores(q, k).softmax(-1).transpose(1, 2) @ v, fused=None)
right("batch reversed", lambda q, k, v: scores(q, k).softmax(-1).flip(0) @ v, fused=None)
right(
    "keys reversed",
    lambda q, k, v: scores(q, k).softmax(-1).flip(-1) @ v,
    fused=False,
)
right("weights rolled", lambda q, k, v: scores(q, k).softmax(-1).roll(1, -1) @ v, fused=False)
right(
    "weights reshaped across axes",
    lambda q, k, v: scores(q, k).softmax(-1).reshape(4, 4, 2, 8)[..., :4] @ v[..., :4, :],
    fused=False,
)
right(
    "queries and keys folded",
    lambda q, k, v: scores(q, k).reshape(4, 4, 16).softmax(-1).reshape(4, 4, 4, 4) @ v,
    fused=False,
)
miss(
    "the softmax is over a part of the keys",
    None,
    lambda q, k, v: scores(q, k)[..., :2].softmax(-1) @ v[..., :2, :],
    fused=None,
)
miss(
    "the weights of a part of the keys",
    None,
    lambda q, k, v: scores(q, k).softmax(-1)[..., :3] @ v[..., :3, :],
    fused=False,
)
miss("the weights but the first", None, lambda q, k, v: scores(q, k).softmax(-1)[..., 1:] @ v[..., 1:, :], fused=False)
right("every second query", lambda q, k, v: scores(q, k)[..., ::2, :].softmax(-1) @ v, fused=None)
right("every second query of the weights", lambda q, k, v: scores(q, k).softmax(-1)[..., ::2, :] @ v, fused=None)
right("one query of the weights", lambda q, k, v: scores(q, k).softmax(-1)[:, :, 1] @ v[0, 0], fused=None)

# -- it is no softmax of a product of queries and keys -------------------------------------------------------------

miss("sigmoid", "", lambda q, k, v: scores(q, k).sigmoid() @ v)
miss("x * sigmoid", "", lambda q, k, v: (scores(q, k) * scores(q, k).sigmoid()) @ v)
miss("log_softmax without exp", "", lambda q, k, v: F.log_softmax(scores(q, k), -1) @ v)
miss("no values", "not multiplied with values", lambda q, k: scores(q, k).softmax(-1), SQUARE, SQUARE)
miss("no queries", "no product", lambda x, v: x.softmax(-1) @ v, SQUARE, SQUARE)
miss(
    "exp over the sum of another",
    None,
    lambda q, k, v: (scores(q, k).exp() / (scores(q, k) + q).exp().sum(-1, keepdim=True)) @ v,
    fused=False,
)
miss(
    "exp over the sum of all",
    None,
    lambda q, k, v: (scores(q, k).exp() / scores(q, k).exp().sum((-1, -2), keepdim=True)) @ v,
    fused=False,
)
miss(
    "exp over the sum without keepdim",
    None,
    lambda q, k, v: (scores(q, k).exp() / scores(q, k).exp().sum(-1)) @ v,
    fused=False,
)
miss(
    "exp over a floor of the sum",
    None,
    lambda q, k, v: torch.div(scores(q, k).exp(), scores(q, k).exp().sum(-1, keepdim=True), rounding_mode="floor") @ v,
    fused=False,
)
miss(
    "exp over the sum plus one",
    None,
    lambda q, k, v: (scores(q, k).exp() / (1 + scores(q, k).exp().sum(-1, keepdim=True))) @ v,
    fused=False,
)
miss(
    "exp over its sum in whole numbers",
    "",
    lambda q, k, v: (lambda e: e / e.sum(-1, keepdim=True, dtype=torch.long))(scores(q, k).exp()) @ v,
)
miss("exp over the sum of everything", "", lambda q, k, v: (scores(q, k).exp() / scores(q, k).exp().sum()) @ v)
right("a number over the scores", lambda q, k, v: torch.div(2.0, scores(q, k)).softmax(-1) @ v, fused=False)
miss("gumbel noise", "", lambda q, k, v: F.relu(scores(q, k)) @ v)
miss(
    "softmax of softmax",
    "",
    lambda q, k, v: scores(q, k).softmax(-1).softmax(-1) @ v,
)
miss("softmax squared", "multiplied with values", lambda q, k, v: scores(q, k).softmax(-1).square() @ v)
miss("softmax times a mask", "do not add up to 1", lambda q, k, v: (scores(q, k).softmax(-1) * (v > 0)) @ v)
miss("softmax plus a number", "multiplied with values", lambda q, k, v: (scores(q, k).softmax(-1) + 1e-3) @ v)
miss(
    "softmax, top-k",
    "multiplied with values",
    lambda q, k, v: torch.zeros_like(q).scatter(-1, *reversed(scores(q, k).softmax(-1).topk(2))) @ v,
)


def renormalised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = scores(q, k).softmax(-1) * torch.ones(4, 4).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v


miss("weights renormalised after masking", "multiplied with values", renormalised)
miss(
    "scores over their own deviation",
    "between",
    lambda q, k, v: (lambda s: (s / s.std(-1, keepdim=True)).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores less their mean",
    None,
    lambda q, k, v: (lambda s: (s - s.mean(-1, keepdim=True)).softmax(-1) @ v)(scores(q, k)),
    fused=False,
)
miss(
    "scores over their maximum",
    "shift",
    lambda q, k, v: (lambda s: (s / s.amax(-1, keepdim=True)).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores times their maximum",
    "shift",
    lambda q, k, v: (lambda s: (s * s.amax(-1, keepdim=True)).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores less the maximum of the queries",
    None,
    lambda q, k, v: (lambda s: (s - s.amax(-2, keepdim=True)).softmax(-1) @ v)(scores(q, k)),
    fused=False,
)
miss(
    "scores less the maximum, keepdim forgotten",
    None,
    lambda q, k, v: (lambda s: (s - s.amax(-1)).softmax(-1) @ v)(scores(q, k)),
    fused=False,
)
miss(
    "scores less the maximum of other scores",
    None,
    lambda q, k, v: (scores(q, k) - scores(k, q).amax(-1)).softmax(-1) @ v,
    fused=None,
)
miss("scores normalised", "between", lambda q, k, v: F.normalize(scores(q, k), dim=-1).softmax(-1) @ v)
miss("scores layer-normalised", "between", lambda q, k, v: F.layer_norm(scores(q, k), (4,)).softmax(-1) @ v)
miss("scores sorted", "between", lambda q, k, v: scores(q, k).sort(-1).values.softmax(-1) @ v)
miss("scores rolled", "between", lambda q, k, v: scores(q, k).roll(1, -1).softmax(-1) @ v)
miss("scores summed", "cumsum", lambda q, k, v: scores(q, k).cumsum(-1).softmax(-1) @ v)
miss(
    "scores compared",
    "compared",
    lambda q, k, v: (lambda s: s.masked_fill(s < 0.3, -INF).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores compared, and named second",
    "compared",
    lambda q, k, v: (lambda s: s.masked_fill(torch.gt(v[..., :1], s), -INF).softmax(-1) @ v)(scores(q, k)),
)
miss("scores times infinity", "infinity", lambda q, k, v: (scores(q, k) * INF).softmax(-1) @ v)
miss("SDPA with an infinite scale", "not finite", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=INF))
miss("scores over nothing", "division by zero", lambda q, k, v: (scores(q, k) / 0).softmax(-1) @ v)
miss(
    "a mask made by division by nothing",
    "division by zero",
    lambda q, k, v: (scores(q, k) - torch.ones(4, 4) / torch.ones(4, 4).tril()).softmax(-1) @ v,
)
miss(
    "a mask of complex numbers",
    "complex",
    lambda q, k, v: scores(q, k).masked_fill(torch.complex(q[0, 0], k[0, 0]) == 0, -INF).softmax(-1) @ v,
)
miss("scores to a fraction", "pow", lambda q, k, v: (scores(q, k).abs() ** 0.5).softmax(-1) @ v)
miss(
    "scores less the place of their maximum",
    "form of max",
    lambda q, k, v: (lambda s: (s - s.max(-1, keepdim=True).indices).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores less the maximum of all keys and queries",
    "form of amax",
    lambda q, k, v: (lambda s: (s - s.amax((-1, -2), keepdim=True)).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores less the maximum of all",
    "form of max",
    lambda q, k, v: (lambda s: (s - s.max()).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores less their minimum",
    "form of min",
    lambda q, k, v: (lambda s: (s - s.min(-1, keepdim=True).values).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores less the maximum of a part",
    "form of amax",
    lambda q, k, v: (lambda s: (s - s[..., :3].amax(-1, keepdim=True)).softmax(-1) @ v)(scores(q, k)),
)
miss(
    "scores of top-k",
    None,
    lambda q, k, v: (lambda s: s.masked_fill(s < s.topk(2).values[..., -1:], -INF).softmax(-1) @ v)(scores(q, k)),
    fused=False,
)
miss(
    "scores read at two positions", None, lambda q, k, v: (scores(q, k) + scores(q, k).mT).softmax(-1) @ v, fused=False
)
right("scores and their double", lambda q, k, v: (lambda s: (s + 2 * s).softmax(-1) @ v)(scores(q, k)))
miss(
    "scores gated by themselves", "linear", lambda q, k, v: (lambda s: (s * s.sigmoid()).softmax(-1) @ v)(scores(q, k))
)
miss(
    "scores that cancel out",
    "linear",
    lambda q, k, v, m: (lambda s: ((s + m) * v - s * v).softmax(-1) @ v)(scores(q, k)),
    *[SQUARE] * 4,
)
miss(
    "keys beyond the last",
    "no key is kept",
    lambda q, k, v: scores(q, k).masked_fill(torch.arange(4) < 9, -INF).softmax(-1) @ v,
)
miss("scores squared", "linear", lambda q, k, v: scores(q, k).square().softmax(-1) @ v)
miss("scores rounded", "between", lambda q, k, v: scores(q, k).round().softmax(-1) @ v)
miss("scores as integers", None, lambda q, k, v: scores(q, k).int().float().softmax(-1) @ v, fused=False)
miss(
    "scores through half precision integers",
    None,
    lambda q, k, v: scores(q, k).long().softmax(-1, dtype=torch.float32) @ v,
    fused=False,
)
miss("weights as whole numbers", "to stands between", lambda q, k, v: scores(q, k).softmax(-1).int().float() @ v)
miss("weights as booleans", "to stands between", lambda q, k, v: scores(q, k).softmax(-1).bool().float() @ v)
miss(
    "a product of whole numbers that overflows",
    "whole numbers",
    lambda q, k, v: ((50 * q).to(torch.int8) @ (50 * k).to(torch.int8).mT).float().softmax(-1) @ v,
)
miss("scores in fp8", "quantize", lambda q, k, v: scores(q, k).to(FP8).float().softmax(-1) @ v)
miss("weights in fp8", "not multiplied with values", lambda q, k, v: scores(q, k).softmax(-1).to(FP8).float() @ v)
right("queries and values in fp8", lambda q, k, v: scores(q.to(FP8).float(), k).softmax(-1) @ v.to(FP8).float())
miss("nan_to_num of the scores", None, lambda q, k, v: scores(q, k).nan_to_num().softmax(-1) @ v, fused=None)
miss(
    "a mixing of heads before",
    None,
    lambda q, k, v, w: torch.einsum("bhij,hg->bgij", scores(q, k), w).softmax(-1) @ v,
    SQUARE,
    SQUARE,
    SQUARE,
    (4, 4),
    fused=False,
)
miss(
    "a mixing of heads after",
    None,
    lambda q, k, v, w: torch.einsum("bhij,hg->bgij", scores(q, k).softmax(-1), w) @ v,
    SQUARE,
    SQUARE,
    SQUARE,
    (4, 4),
    fused=False,
)
miss(
    "a convolution over heads",
    None,
    lambda q, k, v, w: F.conv2d(scores(q, k), w[..., None, None]).softmax(-1) @ v,
    SQUARE,
    SQUARE,
    SQUARE,
    (4, 4),
    fused=False,
)
miss(
    "rows tied",
    "product",
    lambda q, k, v: torch.einsum("hnij,rjnhd->rinhd", torch.einsum("rinhd,rjnhd->hnij", q, k).softmax(-1), v),
    (3, 4, 2, 4, 5),
    (3, 4, 2, 4, 5),
    (3, 4, 2, 4, 5),
)
miss(
    "heads contracted with the values",
    None,
    lambda q, k, v: torch.einsum("bhij,bhjd->bid", scores(q, k).softmax(-1), v),
    fused=False,
)
miss(
    "values without features",
    "not multiplied with values",
    lambda q, k, v: scores(q, k).softmax(-1) @ v,
    SQUARE,
    SQUARE,
    (4,),
)
miss(
    "weights summed by themselves",
    "no contracted axis",
    lambda q, k, v: torch.einsum("bhij,bhd->bhid", scores(q, k).softmax(-1), v[:, :, 0]),
)
miss(
    "values summed by themselves",
    "no contracted axis",
    lambda q, k, v: torch.einsum("bhij,bhjd->bhij", scores(q, k).softmax(-1), v),
)
miss(
    "values of each query",
    "not [.., queries, keys]",
    lambda q, k, v: torch.einsum("bhij,bhijd->bhid", scores(q, k).softmax(-1), v),
    SQUARE,
    SQUARE,
    (4, *SQUARE),
)
miss(
    "the weights on a diagonal",
    "axis",
    lambda q, k, v: scores(q, k).softmax(-1).reshape(4, 4, 16)[..., ::5].unsqueeze(-2) @ v,
)
miss(
    "weights whose keys are shuffled",
    "axis",
    lambda q, k, v: scores(q, k).softmax(-1).unflatten(-1, (2, 2)).mT.flatten(-2) @ v,
)
right("one head of one batch", lambda q, k, v: scores(q, k).softmax(-1) @ v, *[(1, 1, 4, 4)] * 3)
miss(
    "two columns more than keys",
    "more columns",
    lambda q, k, v: torch.cat([scores(q, k), q[..., :2]], -1).softmax(-1)[..., :-2] @ v,
)
miss(
    "queries with themselves alone",
    "not one of queries with keys",
    lambda q, v: torch.einsum("bhid,bhid->bhi", q, q).unsqueeze(-2).softmax(-1) @ v,
    SQUARE,
    SQUARE,
)
miss("SDPA of keys of fewer axes", "different ranks", lambda q, k, v: F.scaled_dot_product_attention(q, k[0], v))
miss("SDPA of values of fewer axes", "different ranks", lambda q, k, v: F.scaled_dot_product_attention(q, k, v[0]))
miss("a diagonal of the keys", None, lambda q, k, v: torch.einsum("bhid,bhdd->bhid", q, k).softmax(-1) @ v, fused=False)
miss(
    "an outer product",
    None,
    lambda q, k, v: torch.einsum("bhi,bhj->bhij", q[..., 0], k[..., 0]).softmax(-1) @ v,
    fused=False,
)
miss(
    "three factors",
    None,
    lambda q, k, v: torch.einsum("bhid,bhjd,d->bhij", q, k, v[0, 0, 0]).softmax(-1) @ v,
    fused=False,
)
right("scores of queries with themselves", lambda x, v: scores(x, x).softmax(-1) @ v, SQUARE, SQUARE)
right("scores are the values too", lambda q, k: (lambda s: s.softmax(-1) @ s)(scores(q, k)), SQUARE, SQUARE, fused=None)
right("weights on both sides", lambda q, k: (lambda w: w @ w)(scores(q, k).softmax(-1)), SQUARE, SQUARE, fused=False)
right("values first", lambda q, k, v: v @ scores(q, k).softmax(-1), fused=False)
right("values first, keys softmaxed", lambda q, k, v: v.mT @ scores(k, q).softmax(-2), fused=None)
right(
    "a linear layer follows", lambda q, k, w: F.linear(scores(q, k).softmax(-1), w), SQUARE, SQUARE, (4, 4), fused=None
)
right("a linear layer of values", lambda q, k, w: scores(q, k).softmax(-1) @ w, SQUARE, SQUARE, (4, 4), fused=None)
right(
    "channel attention",
    lambda q, k, v: (q.mT @ k * 0.5).softmax(-1) @ v.mT,
    (2, 3, 5, 8),
    (2, 3, 5, 8),
    (2, 3, 5, 8),
    fused=None,
)
right("linear attention", lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), fused=False)

# -- operands that are views or multiples of others ----------------------------------------------------------------

right("queries times a number that is a tensor", lambda q, k, v: ((torch.full((), 0.5) * q) @ k.mT).softmax(-1) @ v)
right("queries over a number that is a tensor", lambda q, k, v: ((q / torch.full((), 0.5)) @ k.mT).softmax(-1) @ v)
right("queries times a number for each feature", lambda q, k, v: ((torch.full((4,), 0.5) * q) @ k.mT).softmax(-1) @ v)
right("a number over queries", lambda q, k, v: ((torch.full((), 0.5) / q) @ k.mT).softmax(-1) @ v)
right("queries times true", lambda q, k, v: ((q * True) @ k.mT).softmax(-1) @ v)
right(
    "whole numbers that overflow, then a number",
    lambda q, k, v: (((50 * q).to(torch.int8) * 100 * 0.01) @ k.mT).softmax(-1) @ v,
)
right(
    "queries over a number, rounded",
    lambda q, k, v: (torch.div(q, 0.5, rounding_mode="floor") @ k.mT).softmax(-1) @ v,
)
right("one query for all", lambda q, k, v: scores(q.expand(SQUARE), k).softmax(-1) @ v, (4, 4, 1, 4), SQUARE, SQUARE)
right("one key for all", lambda q, k, v: scores(q, k.expand(SQUARE)).softmax(-1) @ v, SQUARE, (4, 4, 1, 4), SQUARE)
right(
    "keys that are repeated by a tensor",
    lambda q, k, v: scores(q, torch.repeat_interleave(k, torch.tensor([1, 3]), dim=1, output_size=4)).softmax(-1) @ v,
    SQUARE,
    (4, 2, 4, 4),
    SQUARE,
)

# -- arguments that are not accounted for --------------------------------------------------------------------------

right("alpha of add on the bias", lambda q, k, v, m: torch.add(scores(q, k), m, alpha=2).softmax(-1) @ v, *[SQUARE] * 4)
right(
    "alpha of sub on the scores", lambda q, k, v, m: torch.sub(m, scores(q, k), alpha=3).softmax(-1) @ v, *[SQUARE] * 4
)
right(
    "a division that rounds",
    lambda q, k, v: torch.div(scores(q, k), 0.1, rounding_mode="floor").softmax(-1) @ v,
    fused=False,
)
right("a bool mask added", lambda q, k, v, m: (scores(q, k) + (m > 0)).softmax(-1) @ v, *[SQUARE] * 4)
right("a bool mask multiplied", lambda q, k, v, m: (scores(q, k) * (m > 0)).softmax(-1) @ v, *[SQUARE] * 4, fused=None)
right("bool masks that are added to each other", with_bias(lambda i, j: ((i <= j) + (i == j)).float() * -3))

right("a bool mask to which nothing is added", with_bias(lambda i, j: torch.add(i < j, i == j, alpha=False) * 3.0))
right(
    "a bias that is padded by its mirror image",
    with_bias(lambda i, j: F.pad(torch.arange(3.0)[None], (1, 0), "reflect")),
)
right("a bias that is padded by its end", with_bias(lambda i, j: F.pad(torch.arange(2.0)[None], (1, 1), "replicate")))
right("a bias that is padded in a circle", with_bias(lambda i, j: F.pad(torch.arange(2.0)[None], (1, 1), "circular")))
right("an integer bias", lambda q, k, v, m: (scores(q, k) + m.int()).softmax(-1) @ v, *[SQUARE] * 4)
right("a keyword scale", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=-0.7))
right("softmax in a narrower dtype", lambda q, k, v: scores(q, k).softmax(-1, dtype=torch.bfloat16) @ v.bfloat16())
right(
    "values wider than the weights",
    lambda q, k, v: scores(q, k).softmax(-1, dtype=torch.float64) @ v.double(),
    fused=None,
)
right(
    "products in fp64, inputs in fp32",
    lambda q, k, v: (q.double() @ k.double().mT).softmax(-1) @ v.double(),
    fused=None,
)
right("queries rounded to bf16", lambda q, k, v: (q.bfloat16().float() @ k.mT).softmax(-1) @ v)
right("queries rounded to integers", lambda q, k, v: ((q * 3).int().float() @ k.mT).softmax(-1) @ v)
right("scores rounded to bf16", lambda q, k, v: (q @ k.mT).bfloat16().float().softmax(-1) @ v, fused=None)
right(
    "a sigmoid scale from data",
    lambda q, k, v: (q @ k.mT * q.mean(-1, keepdim=True).sigmoid()).softmax(-1) @ v,
    fused=None,
)
right("a scale a key", lambda q, k, v: (q @ k.mT * k.mean(-1).unsqueeze(-2)).softmax(-1) @ v, fused=None)

# -- mutation ------------------------------------------------------------------------------------------------------


def mutate(
    name: str, fn: Callable[..., Any], *shapes: tuple[int, ...], fused: bool | None = None, **about: Any
) -> None:
    right(f"mutation: {name}", fn, *(shapes or [SQUARE] * 4), fused=fused, **about)


def q_after_scores(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    q.add_(1)
    return s.softmax(-1) @ v


def q_through_a_view(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    q[..., 0].mul_(3)
    return s.softmax(-1) @ v + q


def k_through_its_base(q: Any, k: Any, v: Any, m: Any) -> Any:
    t = k.transpose(-1, -2)
    s = q @ t
    k.zero_()
    return s.softmax(-1) @ v


def k_before_the_product(q: Any, k: Any, v: Any, m: Any) -> Any:
    t = k.transpose(-1, -2)
    k.mul_(2)
    return (q @ t).softmax(-1) @ v


def v_after_softmax(q: Any, k: Any, v: Any, m: Any) -> Any:
    w = (q @ k.mT).softmax(-1)
    v.mul_(2)
    return w @ v


def v_after_the_product(q: Any, k: Any, v: Any, m: Any) -> Any:
    out = (q @ k.mT).softmax(-1) @ v
    v.mul_(2)
    return out + v


def v_between_two_products(q: Any, k: Any, v: Any, m: Any) -> Any:
    w = (q @ k.mT).softmax(-1)
    a = w @ v
    v.add_(1)
    return a + w @ v


def mask_filled(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT + m
    m.fill_(0)
    return s.softmax(-1) @ v


def bool_mask_changed(q: Any, k: Any, v: Any, m: Any) -> Any:
    keep = m > -1
    s = (q @ k.mT).masked_fill(~keep, -1e9)
    keep.logical_not_()
    return s.softmax(-1) @ v + keep


def scores_through_a_view(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    s.view(16, 4, 4)[:, :2].mul_(3)
    return s.softmax(-1) @ v


def scores_through_their_transpose(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    s.transpose(0, 1).add_(m)
    return s.softmax(-1) @ v


def scores_in_place(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    s *= 0.5
    s += m
    s.masked_fill_(m < 0, -1e9)
    return s.softmax(-1) @ v


def scores_escape_changed(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    out = s.softmax(-1) @ v
    s.add_(1)
    return out, s


def weights_in_place(q: Any, k: Any, v: Any, m: Any) -> Any:
    w = (q @ k.mT).softmax(-1)
    w.mul_(m)
    return w @ v


def weights_through_a_view(q: Any, k: Any, v: Any, m: Any) -> Any:
    w = (q @ k.mT).softmax(-1)
    w[..., 0] = 0
    return w @ v


def weights_changed_after(q: Any, k: Any, v: Any, m: Any) -> Any:
    w = (q @ k.mT).softmax(-1)
    out = w @ v
    w.zero_()
    return out


def output_in_place(q: Any, k: Any, v: Any, m: Any) -> Any:
    out = (q @ k.mT).softmax(-1) @ v
    out += q
    out[..., 0].fill_(1)
    return out


def output_into_a_buffer(q: Any, k: Any, v: Any, m: Any) -> Any:
    m.copy_((q @ k.mT).softmax(-1) @ v)
    return m * 2


def output_by_out(q: Any, k: Any, v: Any, m: Any) -> Any:
    torch.matmul((q @ k.mT).softmax(-1), v, out=m)
    return m * 2


def setitem_on_scores(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    s[:, :, :, 0] = -INF
    return s.softmax(-1) @ v


def setitem_by_mask(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    s[m > 0] = -1e9
    return s.softmax(-1) @ v


def cache_update(q: Any, k: Any, v: Any, m: Any) -> Any:
    k[:, :, 1:2] = q[:, :, :1]
    v.index_copy_(2, torch.tensor([1]), q[:, :, :1])
    return (q @ k.mT).softmax(-1) @ v


def a_row_of_q(q: Any, k: Any, v: Any, m: Any) -> Any:
    q[:, 1].zero_()
    return (q @ k.mT).softmax(-1) @ v


def aliased_inputs(x: Any) -> Any:
    q, k, v = x[0], x[1], x[2]
    s = q @ k.mT
    x[0, 0].add_(1)
    return s.softmax(-1) @ v, q * 2


def expanded_then_written(q: Any, k: Any, v: Any, m: Any) -> Any:
    big = k[:, :1].expand(4, 4, 4, 4)
    s = q @ big.mT
    k.add_(1)
    return s.softmax(-1) @ v


def resized_view(q: Any, k: Any, v: Any, m: Any) -> Any:
    t = k.clone()
    t.transpose_(-1, -2)
    return (q @ t).softmax(-1) @ v


def squeezed_in_place(q: Any, k: Any, v: Any, m: Any) -> Any:
    t = k.unsqueeze(0)
    t.squeeze_(0).unsqueeze_(0)
    return (q @ t.mT)[0].softmax(-1) @ v


def silu_then_write(q: Any, k: Any, v: Any, m: Any) -> Any:
    a = F.silu(q)
    s = a @ k.mT
    a.add_(1)
    return s.softmax(-1) @ v + a


def relu_in_place(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    F.relu(q, inplace=True)
    return F.dropout(s.softmax(-1), 0.0, True, True) @ v + q


def custom_between(q: Any, k: Any, v: Any, m: Any) -> Any:
    s = q @ k.mT
    torch._foreach_add_([q, v], 1.0)
    return s.softmax(-1) @ v


def q_after_baddbmm(q: Any, k: Any, v: Any) -> Any:
    s = torch.baddbmm(q.new_ones(1, 1, 4), q, k.mT, beta=0.5)
    q.mul_(2)
    return s.softmax(-1) @ v


mutate("q after the scores", q_after_scores)
mutate("q after baddbmm", q_after_baddbmm, (2, 1, 8), (2, 4, 8), (2, 4, 8), fused=False)
mutate("q through a view", q_through_a_view)
mutate("k through its base", k_through_its_base)
mutate("k before the product", k_before_the_product, fused=True)
mutate("v after the softmax", v_after_softmax, fused=True)
mutate("v after the product", v_after_the_product, fused=True)
mutate("v between two products", v_between_two_products)
mutate("mask filled", mask_filled)
mutate("bool mask changed", bool_mask_changed)
mutate("scores through a view", scores_through_a_view)
mutate("scores through their transpose", scores_through_their_transpose, fused=True)
mutate("scores in place", scores_in_place, fused=True)
mutate("scores escape changed", scores_escape_changed)
mutate("weights in place", weights_in_place, fused=False)
mutate("weights through a view", weights_through_a_view, fused=False)
mutate("weights changed after", weights_changed_after)
mutate("output in place", output_in_place, fused=True)
mutate("output in place, in training", output_in_place, fused=True, grad=True)
mutate(
    "output in place after a view, in training", lambda q, k, v, m: ((q @ k.mT).softmax(-1) @ v).mT.add_(m), grad=True
)
mutate("output into a buffer", output_into_a_buffer, fused=True)
mutate("output by out=", output_by_out)
mutate("setitem on scores", setitem_on_scores)
mutate("setitem by a mask", setitem_by_mask)
mutate("a cache updated", cache_update)
mutate("a row of q", a_row_of_q)
mutate("inputs that share memory", aliased_inputs, (3, *SQUARE))
mutate("expanded, then its base written", expanded_then_written)
mutate("transposed in place", resized_view)
mutate("squeezed in place", squeezed_in_place)
mutate("an activation changed after use", silu_then_write)
mutate("relu in place", relu_in_place)
mutate("several tensors by one call", custom_between)


# -- what escapes --------------------------------------------------------------------------------------------------


def weights_returned(q: Any, k: Any, v: Any) -> Any:
    w = scores(q, k).softmax(-1)
    return w @ v, w


def weights_used_twice(q: Any, k: Any, v: Any) -> Any:
    w = scores(q, k).softmax(-1)
    return w @ v + w @ q


def scores_returned(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    return s.softmax(-1) @ v, s


def scores_in_two_softmaxes(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    return s.softmax(-1) @ v + s.softmax(-2) @ v


def mask_returned(q: Any, k: Any, v: Any) -> Any:
    keep = torch.ones(4, 4, dtype=torch.bool).tril()
    return scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v, keep


def mean_of_weights(q: Any, k: Any, v: Any) -> Any:
    w = scores(q, k).softmax(-1)
    return w @ v, w.mean(1)


miss("weights returned", "used elsewhere", weights_returned)
miss("weights averaged", "used elsewhere", mean_of_weights)
right("weights used twice", weights_used_twice, fused=None)
right("scores returned", scores_returned, fused=None)
right("scores in two softmaxes", scores_in_two_softmaxes, fused=None)
right("mask returned", mask_returned)
right("output viewed by strides", lambda q, k, v: (scores(q, k).softmax(-1) @ v).as_strided((4, 64), (64, 1)))
right("output transposed and returned", lambda q, k, v: (scores(q, k).softmax(-1) @ v).transpose(1, 2))


# -- regions -------------------------------------------------------------------------------------------------------


def no_grad_scores(q: Any, k: Any, v: Any) -> Any:
    with torch.no_grad():
        s = scores(q, k)
    return s.softmax(-1) @ v


def no_grad_weights(q: Any, k: Any, v: Any) -> Any:
    with torch.no_grad():
        w = scores(q, k).softmax(-1)
    return w @ v


def no_grad_all(q: Any, k: Any, v: Any) -> Any:
    with torch.no_grad():
        out = scores(q, k).softmax(-1) @ v
    return out + v


def no_grad_mask(q: Any, k: Any, v: Any) -> Any:
    with torch.no_grad():
        keep = torch.ones(4, 4, dtype=torch.bool).tril()
    return scores(q, k).masked_fill(~keep, -INF).softmax(-1) @ v


def autocast_values(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return s.softmax(-1) @ v


def autocast_scores(q: Any, k: Any, v: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = scores(q, k)
    return s.float().softmax(-1) @ v


def autocast_all(q: Any, k: Any, v: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return scores(q, k).softmax(-1) @ v


def autocast_off(q: Any, k: Any, v: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = scores(q, k)
        with torch.autocast("cpu", enabled=False):
            w = s.float().softmax(-1)
        return w @ v


miss("no_grad around the scores, in training", "detach", no_grad_scores, grad=True)
miss("no_grad around the weights, in training", "not multiplied", no_grad_weights, grad=True)
right("no_grad around the scores", no_grad_scores, fused=None)
right("no_grad around all, in training", no_grad_all, grad=True, fused=None)
right("no_grad around the mask, in training", no_grad_mask, grad=True)
miss("autocast around the values", "region", autocast_values)
miss("autocast around the scores", "region", autocast_scores)
right("autocast around all", autocast_all)
right("autocast around all, in training", autocast_all, grad=True)
right("autocast switched off inside", autocast_off, fused=None)
right("weights detached, in training", lambda q, k, v: scores(q, k).softmax(-1).detach() @ v, grad=True, fused=None)
right("scores detached, in training", lambda q, k, v: scores(q, k).detach().softmax(-1) @ v, grad=True, fused=None)
right("queries detached, in training", lambda q, k, v: scores(q.detach(), k).softmax(-1) @ v, grad=True, fused=None)
right(
    "half of the scores detached",
    lambda q, k, v: (lambda s: (s + s.detach()).softmax(-1) @ v)(scores(q, k)),
    grad=True,
    fused=None,
)
right(
    "the maximum detached, in training",
    lambda q, k, v: (lambda s: (s - s.amax(-1, keepdim=True).detach()).softmax(-1) @ v)(scores(q, k)),
    grad=True,
)
right(
    "the maximum not detached, in training",
    lambda q, k, v: (lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1) @ v)(scores(q, k)),
    grad=True,
)
right("a hook on nothing, in training", lambda q, k, v: scores(q, k).softmax(-1) @ v, grad=True)
right(
    "a learned bias, in training",
    lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v,
    *[SQUARE] * 3,
    (4, 4, 4),
    grad=True,
    fused=None,
)
right(
    "a learned scale, in training",
    lambda q, k, v, m: (q @ k.mT * m.exp()).softmax(-1) @ v,
    *[SQUARE] * 3,
    (4, 1, 1),
    grad=True,
    fused=None,
)
right(
    "a learned soft-cap, in training",
    lambda q, k, v, m: ((q @ k.mT / m).tanh() * m).softmax(-1) @ v,
    *[SQUARE] * 3,
    (1,),
    grad=True,
    fused=None,
)
right(
    "a bias of queries, in training",
    lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v,
    *[SQUARE] * 3,
    (4, 1),
    grad=True,
    fused=None,
)
right(
    "a causal mask, in training",
    lambda q, k, v: scores(q, k).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -INF).softmax(-1) @ v,
    grad=True,
)


def attend(q: Any, k: Any, v: Any) -> Any:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)


def cond_body(q: Any, k: Any, v: Any) -> Any:
    return torch.cond(q.sum() > 0, lambda a, b, c: attend(a, b, c), lambda a, b, c: attend(b, a, c), (q, k, v))


def checkpointed(q: Any, k: Any, v: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(lambda a, b, c: scores(a, b).softmax(-1) @ c, q, k, v, use_reentrant=False)


def checkpointed_half(q: Any, k: Any, v: Any) -> Any:
    w = torch.utils.checkpoint.checkpoint(lambda a, b: scores(a, b).softmax(-1), q, k, use_reentrant=False)
    return w @ v


@torch.library.custom_op("reading_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_fake(torch.empty_like)


@torch.library.custom_op("reading_tests::add_one_", mutates_args=("x",))
def add_one_(x: torch.Tensor) -> None:
    x.add_(1)


def custom_on_scores(q: Any, k: Any, v: Any) -> Any:
    return twice(scores(q, k)).softmax(-1) @ v


def custom_on_q(q: Any, k: Any, v: Any) -> Any:
    return scores(twice(q), k).softmax(-1) @ v


def custom_writes(q: Any, k: Any, v: Any) -> Any:
    s = scores(q, k)
    add_one_(q)
    add_one_(s)
    add_one_(v)
    return s.softmax(-1) @ v


right("inside of cond", cond_body, fused=None)
miss("checkpointed, without gradients", "checkpointed", checkpointed)
right("checkpointed, in training", checkpointed, grad=True)
right("checkpointed weights, in training", checkpointed_half, grad=True, fused=None)
miss("a custom op between", "twice", custom_on_scores)
right("a custom op on q", custom_on_q)
right("a custom op that writes", custom_writes, fused=None)

# -- dropout -------------------------------------------------------------------------------------------------------

DROPPED = "drop"
right("dropout of all", lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 1.0, True) @ v, fused=None)
miss("dropout twice", "twice", lambda q, k, v: F.dropout(F.dropout(scores(q, k).softmax(-1), 1.0, True), 1.0, True) @ v)
right("dropout of the scores", lambda q, k, v: F.dropout(scores(q, k), 1.0, True).softmax(-1) @ v, fused=None)
right("dropout of q", lambda q, k, v: scores(F.dropout(q, 1.0, True), k).softmax(-1) @ v, fused=None)
right(
    "weights times zeros and ones",
    lambda q, k, v, m: (scores(q, k).softmax(-1) * (m > 0)) @ v,
    *[SQUARE] * 4,
    fused=False,
)

# -- rows without keys: what eager gives there ---------------------------------------------------------------------


def dead_row() -> torch.Tensor:
    """Query 2 sees nothing, query 3 one key."""
    return torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)


def data(m: torch.Tensor) -> torch.Tensor:
    """A mask that nothing is known of: rows 2 of it are empty."""
    return (m > 0) & dead_row()


DEAD: dict[str, Callable[..., torch.Tensor]] = {
    "-inf": lambda s, m: s.masked_fill(~data(m), -INF),
    "-inf, where": lambda s, m: torch.where(data(m), s, -INF),
    "-inf, added": lambda s, m: s + torch.zeros_like(m).masked_fill(~data(m), -INF),
    "finfo.min": lambda s, m: s.masked_fill(~data(m), torch.finfo(s.dtype).min),
    "finfo.min, added": lambda s, m: s + torch.zeros_like(m).masked_fill(~data(m), torch.finfo(s.dtype).min),
    "finfo.min, added by product": lambda s, m: s + (1.0 - data(m).float()) * MIN,
    "finfo.min, added before the scale": lambda s, m: (s + torch.where(data(m), 0.0, MIN)) * 0.5,
    "-1e9": lambda s, m: s.masked_fill(~data(m), -1e9),
    "-1e9, added": lambda s, m: s + torch.where(data(m), 0.0, -1e9),
    "-1e9, subtracted": lambda s, m: s - torch.where(data(m), 0.0, 1e9),
    "-1e9, subtracted from": lambda s, m: -(torch.where(data(m), 0.0, 1e9) - s),
    "-1e9, added before a scale below 0": lambda s, m: (torch.where(data(m), 0.0, 1e9) - s) * -0.3,
    "-1e9, where one of two masks is 0": lambda s, m: s + (1 - (m > 0).float() * dead_row().float()) * -1e9,
    "-1e9, then a bias": lambda s, m: s.masked_fill(~data(m), -1e9) + m,
    "-1e4": lambda s, m: s.masked_fill(~data(m), -1e4),
    "-1e4, added": lambda s, m: s + torch.where(data(m), 0.0, -1e4),
    "-100, added": lambda s, m: s + torch.where(data(m), 0.0, -100.0),
    "finfo.min twice, added": lambda s, m: s + torch.where(m > 0, 0.0, MIN) + torch.where(dead_row(), 0.0, MIN),
    "finfo.min, replaced and added": lambda s, m: s.masked_fill(m <= 0, MIN) + torch.where(dead_row(), 0.0, MIN),
    "finfo.min, added and replaced": lambda s, m: (s + torch.where(m > 0, 0.0, MIN)).masked_fill(~dead_row(), MIN),
    "two different fills": lambda s, m: s.masked_fill(m <= 0, -1e9).masked_fill(~dead_row(), -1e30),
    "two different fills, added": lambda s, m: s + torch.where(m > 0, 0.0, -1e31) + torch.where(dead_row(), 0.0, -1e33),
    "-inf and finfo.min": lambda s, m: s.masked_fill(m <= 0, MIN).masked_fill(~dead_row(), -INF),
    "finfo.min and -inf": lambda s, m: s.masked_fill(m <= 0, -INF).masked_fill(~dead_row(), MIN),
    "the same fill twice": lambda s, m: s.masked_fill(m <= 0, -1e9).masked_fill(~dead_row(), -1e9),
    "-inf less the maximum": lambda s, m: (lambda x: x - x.amax(-1, keepdim=True))(s.masked_fill(~data(m), -INF)),
    "finfo.min less the maximum": lambda s, m: (lambda x: x - x.amax(-1, keepdim=True))(
        s.masked_fill(~data(m), torch.finfo(s.dtype).min)
    ),
    "-1e9 less the maximum": lambda s, m: (lambda x: x - x.amax(-1, keepdim=True))(s.masked_fill(~data(m), -1e9)),
    "zero fill": lambda s, m: s.masked_fill(~data(m), 0.0),
    "positive fill": lambda s, m: s.masked_fill(data(m), 1e9),
    "+inf fill": lambda s, m: s.masked_fill(m > 1, INF),
    "NaN fill": lambda s, m: s.masked_fill(m > 1, float("nan")),
    "a static mask of -inf": lambda s, m: s.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(0), -INF),
    "a static mask of finfo.min": lambda s, m: s.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(0), MIN),
    "nothing is seen, -inf": lambda s, m: s.masked_fill(torch.ones(4, 4, dtype=torch.bool), -INF),
    "nothing is seen, finfo.min": lambda s, m: s.masked_fill(torch.ones(4, 4, dtype=torch.bool), MIN),
    "mask times -inf": lambda s, m: s + (1.0 - dead_row().float()) * -INF,
    "NaN in the mask": lambda s, m: s.masked_fill(torch.where(m > 1, torch.nan, m) < 0.5, -INF),
    "NaN in the mask, inverted": lambda s, m: s.masked_fill(~(torch.where(m > 1, torch.nan, m) < 0.5), -1e9),
    "NaN in the bias": lambda s, m: s + torch.where(m > 1.5, torch.nan, m),
    "-inf in the bias": lambda s, m: s + torch.where(m > 0, -INF, m),
    "a scaled mask of finfo.min": lambda s, m: s.masked_fill(~data(m), torch.finfo(s.dtype).min) * 2,
    "a soft-capped mask": lambda s, m: s.masked_fill(~data(m), -1e9).div(5).tanh() * 5,
    "a clamped mask": lambda s, m: s.masked_fill(~data(m), -1e9).clamp(min=-50),
}
for _name, _mask in DEAD.items():
    right(
        f"dead rows: {_name}",
        lambda q, k, v, m, mask=_mask: mask(scores(q, k), m).softmax(-1) @ v,
        *[SQUARE] * 4,
        fused=None,
    )
    right(
        f"dead rows, in training: {_name}",
        lambda q, k, v, m, mask=_mask: mask(scores(q, k), m.detach()).softmax(-1) @ v, *[SQUARE] * 4, fused=None, grad=True,
    )  # fmt: skip
for _name in ("finfo.min", "-1e9", "-inf", "-inf, added", "finfo.min, added", "-1e9, added"):
    right(
        f"dead rows, bf16: {_name}",
        lambda q, k, v, m, mask=DEAD[_name]: mask(scores(q, k), m).softmax(-1, dtype=torch.float32).to(v.dtype) @ v,
        *[SQUARE] * 4, fused=None, dtype=torch.bfloat16,
    )  # fmt: skip
miss(
    "dead rows: no less than finfo.min",
    "more than sums",
    lambda q, k, v, m: torch.max(DEAD["finfo.min, added"](scores(q, k), m), torch.tensor(MIN)).softmax(-1) @ v,
    *[SQUARE] * 4,
)
miss(
    "dead rows: no less than finfo.min, and -inf",
    "more than sums",
    lambda q, k, v, m: DEAD["-inf"](scores(q, k), m).clamp(min=MIN).softmax(-1) @ v,
    *[SQUARE] * 4,
)
miss(
    "dead rows: a mask that is data, no less than finfo.min",
    "more than sums",
    lambda q, k, v, m: torch.max(scores(q, k) + m, torch.tensor(MIN)).softmax(-1) @ v,
    *[SQUARE] * 4,
)
miss(
    "dead rows: the size of masked scores",
    "more than sums",
    lambda q, k, v, m: (-DEAD["-1e9"](scores(q, k), m).abs()).softmax(-1) @ v,
    *[SQUARE] * 4,
)
miss(
    "dead rows: less the maximum of masked scores",
    "maximum of other scores",
    lambda q, k, v, m: (lambda s: (s - DEAD["-1e9"](s, m).amax(-1, keepdim=True)).softmax(-1) @ v)(scores(q, k)),
    *[SQUARE] * 4,
)
miss(
    "dead rows: scores that data scale",
    "a row may see no key",
    lambda q, k, v, m: (scores(q, k) * m[..., :1, :1]).masked_fill(torch.arange(4)[:, None] < 1, -1e30).softmax(-1) @ v,
    *[SQUARE] * 4,
)
right(
    "live rows: scores that data scale",
    lambda q, k, v, m: (
        (scores(q, k) * m[..., :1, :1]).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -1e30).softmax(-1) @ v
    ),
    *[SQUARE] * 4,
)
SDPA = F.scaled_dot_product_attention
right("dead rows: SDPA, bool", lambda q, k, v, m: SDPA(q, k, v, attn_mask=data(m)), *[SQUARE] * 4)
right(
    "dead rows: SDPA, static bool", lambda q, k, v: SDPA(q, k, v, attn_mask=torch.ones(4, 4, dtype=torch.bool).tril(-1))
)
right(
    "dead rows: SDPA, -inf",
    lambda q, k, v, m: SDPA(q, k, v, attn_mask=torch.zeros_like(m).masked_fill(~data(m), -INF)),
    *[SQUARE] * 4,
)
right(
    "dead rows: SDPA, finfo.min",
    lambda q, k, v, m: SDPA(q, k, v, attn_mask=torch.where(data(m), 0.0, MIN)),
    *[SQUARE] * 4,
)
right(
    "dead rows: SDPA, -1e9", lambda q, k, v, m: SDPA(q, k, v, attn_mask=torch.where(data(m), 0.0, -1e9)), *[SQUARE] * 4
)
right(
    "dead rows: SDPA, causal with fewer keys",
    lambda q, k, v: SDPA(q, k, v, is_causal=True),
    (2, 3, 7, 8),
    (2, 3, 5, 8),
    (2, 3, 5, 8),
)
right(
    "dead rows: SDPA, bottom-right with fewer keys",
    lambda q, k, v: SDPA(q, k, v, attn_mask=torch.ones(7, 5, dtype=torch.bool).tril(-2)),
    (2, 3, 7, 8),
    (2, 3, 5, 8),
    (2, 3, 5, 8),
)
right(
    "dead rows: sinks",
    lambda q, k, v, m: torch.cat([scores(q, k).masked_fill(~data(m), -INF), q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
    *[SQUARE] * 4,
    fused=None,
)


ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "positions": lambda n: torch.arange(260, dtype=torch.bfloat16).expand(260, 260),
    "data": lambda n: n.expand(260, 260).bfloat16(),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_positions_of_few_digits_are_compared_as_they_are(name: str) -> None:
    """In bfloat16 257 is 256: a query sees a key that comes after it. (In fp64 it would not.)"""

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        i = ROUNDED[name](n)
        return (q @ k.mT).masked_fill(i > i.mT, -INF).softmax(-1) @ v

    inputs = [*tensors(*[(1, 1, 260, 8)] * 3), torch.arange(260)]
    outcome = Outcome()
    out = torch.compile(program, backend=rewriting(outcome))(*inputs)
    assert [s.route for s in outcome.matched] == ["sdpa"]
    torch.testing.assert_close(out, program(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_left_alone_and_equal_to_eager(name: str) -> None:
    p = PROGRAMS[name]
    inputs = tensors(*p.shapes, dtype=p.dtype, grad=p.grad)
    outcome = check(p.fn, *inputs, grad=p.grad)
    fused = [site for site in outcome.sites if site.matched and site.route != "inductor"]
    if p.why is None:
        assert p.fused is None or bool(fused) == p.fused, outcome.sites
        return
    assert not fused, outcome.sites
    if p.why:
        assert outcome.sites and all(p.why in str(site.reason) for site in outcome.sites), outcome.sites


def test_how_many_heads_share_one_is_known() -> None:
    def program(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    outcome = check(program, *tensors((2, 8, 5, 16), (2, 4, 5, 16), (2, 4, 5, 16)), dynamic=True)
    assert "do not broadcast" in outcome.reasons


def test_a_copy_to_another_device_is_no_wider_reading() -> None:
    values = Values()

    def meta(dtype: torch.dtype, device: str) -> Meta:
        return Meta((4,), (1,), dtype, torch.device(device))

    half = values.leaf(meta(torch.float16, "cpu"))
    assert _widens(values.cast(half, meta(torch.float32, "cpu")))
    assert not _widens(values.cast(half, meta(torch.float32, "cuda")))
