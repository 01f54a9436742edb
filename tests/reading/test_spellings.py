"""One attention, however it is spelled: every program of this table is matched, and gives eager's numbers."""

# ruff: noqa: E501 (one line a program, so that the table can be read as one)

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import check, tensors

Q, K = (2, 3, 5, 8), (2, 3, 7, 8)
STANDARD = (Q, K, K)
HALF = 8**-0.5
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Spelling:
    """A program and the shapes of its inputs. `route`: where it runs on a CPU, without gradients."""

    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = STANDARD
    route: str = "sdpa"
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    sites: int = 1


SPELLINGS: dict[str, Spelling] = {}


def spell(name: str, fn: Callable[..., Any], *shapes: tuple[int, ...], **about: Any) -> None:
    assert name not in SPELLINGS
    SPELLINGS[name] = Spelling(fn, shapes or STANDARD, **about)


# -- the product of queries and keys -------------------------------------------------------------------------------


def soft(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (scores * HALF).softmax(-1) @ v


PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "@ transpose": lambda q, k: q @ k.transpose(-2, -1),
    "@ transpose of positive dims": lambda q, k: q @ k.transpose(2, 3),
    "@ mT": lambda q, k: q @ k.mT,
    "@ adjoint": lambda q, k: q @ k.adjoint(),
    "@ mH": lambda q, k: q @ k.mH,
    "@ swapaxes": lambda q, k: q @ k.swapaxes(-1, -2),
    "@ swapdims": lambda q, k: q @ torch.swapdims(k, 3, 2),
    "@ permute": lambda q, k: q @ k.permute(0, 1, 3, 2),
    "@ permute of a list with negative dims": lambda q, k: q @ k.permute([0, 1, -1, -2]),
    "@ torch.permute": lambda q, k: q @ torch.permute(k, (0, 1, 3, 2)),
    "@ movedim": lambda q, k: q @ k.movedim(-1, -2),
    "@ moveaxis of two": lambda q, k: q @ torch.moveaxis(k, (2, 3), (3, 2)),
    "torch.matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "torch.matmul with keywords": lambda q, k: torch.matmul(input=q, other=k.mT),
    "method matmul": lambda q, k: q.matmul(k.mT),
    "dunder rmatmul": lambda q, k: k.mT.__rmatmul__(q),
    "keys first, transposed after": lambda q, k: (k @ q.mT).mT,
    "keys first, permuted after": lambda q, k: torch.matmul(k, q.transpose(2, 3)).permute(0, 1, 3, 2),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "einsum of other letters": lambda q, k: torch.einsum("zyxw,zyvw->zyxv", q, k),
    "einsum with spaces": lambda q, k: torch.einsum(" b h i d , b h j d -> b h i j ", q, k),
    "einsum of capitals": lambda q, k: torch.einsum("BHid,BHjd->BHij", q, k),
    "einsum of capitals and their small letters": lambda q, k: torch.einsum("bBdD,bBiD->bBdi", q, k),
    "einsum with ellipsis": lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
    "einsum with ellipsis on one axis": lambda q, k: torch.einsum("b...qd,b...kd->b...qk", q, k),
    "einsum with implicit ellipsis output": lambda q, k: torch.einsum("...iz,...jz", q, k),
    "einsum of keys first": lambda q, k: torch.einsum("bhjd,bhid->bhij", k, q),
    "einsum to transposed scores": lambda q, k: torch.einsum("bhid,bhjd->bhji", q, k).transpose(2, 3),
    "einsum to permuted heads": lambda q, k: torch.einsum("bhid,bhjd->hbij", q, k).transpose(0, 1),
    "einsum of a list of operands": lambda q, k: torch.einsum("bhid,bhjd->bhij", [q, k]),
    "einsum of transposed keys": lambda q, k: torch.einsum("bhid,bhdj->bhij", q, k.mT),
    "einsum of sublists": lambda q, k: torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3]),
    "bmm": lambda q, k: torch.bmm(q.reshape(6, 5, 8), k.reshape(6, 7, 8).mT).view(2, 3, 5, 7),
    "bmm of flattened": lambda q, k: q.flatten(0, 1).bmm(k.flatten(0, 1).transpose(1, 2)).unflatten(0, (2, 3)),
    "baddbmm with beta 0": lambda q, k: torch.baddbmm(
        torch.empty(6, 5, 7), q.reshape(6, 5, 8), k.reshape(6, 7, 8).mT, beta=0, alpha=0.7
    ).view(2, 3, 5, 7),
    "baddbmm with beta 0 and NaN beside": lambda q, k: torch.baddbmm(
        torch.full((1,), float("nan")), q.reshape(6, 5, 8), k.reshape(6, 7, 8).mT, beta=0
    ).view(2, 3, 5, 7),
    "baddbmm of zeros": lambda q, k: torch.baddbmm(
        torch.zeros(6, 5, 7), q.reshape(6, 5, 8), k.reshape(6, 7, 8).mT
    ).view(2, 3, 5, 7),
    "baddbmm method, keywords": lambda q, k: (
        q.new_zeros(1, 1, 1)
        .baddbmm(batch1=q.reshape(6, 5, 8), batch2=k.reshape(6, 7, 8).mT, beta=2, alpha=0.5)
        .view(2, 3, 5, 7)
    ),
    "baddbmm in place": lambda q, k: (
        torch.zeros(6, 5, 7).baddbmm_(q.reshape(6, 5, 8), k.reshape(6, 7, 8).mT, alpha=0.5).view(2, 3, 5, 7)
    ),
    "queries and keys cloned, contiguous": lambda q, k: q.contiguous().clone() @ k.mT.contiguous(),
    "useless casts": lambda q, k: (q.float().to(torch.float32) @ k.type_as(q).mT.to(q)).to(q.dtype),
    "queries through zeros-free add": lambda q, k: (q + 0) @ (k * 1).mT,
    "unsqueezed and squeezed": lambda q, k: (q.unsqueeze(0) @ k[None].mT).squeeze(0),
    "an axis of one between": lambda q, k: (q[:, :, None] @ k[:, :, None].mT)[:, :, 0],
}
for _name, _product in PRODUCTS.items():
    spell(f"scores: {_name}", lambda q, k, v, product=_product: soft(product(q, k), v))

# -- two-dimensional and other ranks, sequence elsewhere -----------------------------------------------------------

spell("rank 2", lambda q, k, v: (q @ k.T * HALF).softmax(-1) @ v, (5, 8), (7, 8), (7, 8))
spell("rank 2, mm", lambda q, k, v: torch.mm((torch.mm(q, k.t()) * HALF).softmax(1), v), (5, 8), (7, 8), (7, 8))
spell(
    "rank 2, einsum with implicit output",
    lambda q, k, v: torch.einsum("iz,jz", q, k).softmax(-1) @ v,
    (5, 8),
    (7, 8),
    (7, 8),
)
spell(
    "rank 2, addmm",
    lambda q, k, v: torch.mm(torch.addmm(torch.zeros(7), q, k.t(), alpha=HALF).softmax(1), v),
    (5, 8),
    (7, 8),
    (7, 8),
)
spell("rank 3", lambda q, k, v: (q @ k.mT * HALF).softmax(-1) @ v, (4, 5, 8), (4, 7, 8), (4, 7, 8))
spell(
    "rank 3, bmm", lambda q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.mT), dim=2), v), (4, 5, 8), (4, 7, 8), (4, 7, 8)
)
spell("rank 5", lambda q, k, v: (q @ k.mT * HALF).softmax(-1) @ v, (2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8))
spell(
    "rank 5 from a permuted layout",
    lambda q, k, v: torch.einsum("nhwij,nwjhd->nwihd", (torch.einsum("nwihd,nwjhd->nhwij", q, k) * HALF).softmax(-1), v),
    (2, 4, 5, 3, 8), (2, 4, 7, 3, 8), (2, 4, 7, 3, 8),
)  # fmt: skip
spell(
    "queries without batch",
    lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    (5, 8), (2, 3, 7, 8), (2, 3, 7, 8),
)  # fmt: skip
spell(
    "keys shared by the batch",
    lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    (2, 3, 5, 8), (3, 7, 8), (3, 7, 8),
)  # fmt: skip
spell(
    "sequence in axis 1",
    lambda q, k, v: torch.einsum("bhij,bjhd->bihd", (torch.einsum("bihd,bjhd->bhij", q, k) * HALF).softmax(-1), v),
    (2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8),
)  # fmt: skip
spell(
    "sequence in axis 0",
    lambda q, k, v: torch.einsum("bnij,jbnd->ibnd", (torch.einsum("ibnd,jbnd->bnij", q, k) * HALF).softmax(dim=3), v),
    (5, 2, 3, 8), (7, 2, 3, 8), (7, 2, 3, 8),
)  # fmt: skip
spell(
    "keys slowest in the scores",
    lambda q, k, v: torch.einsum("jbhi,jbhd->bhid", (torch.einsum("bhid,bhjd->jbhi", q, k.permute(0, 1, 2, 3)) * HALF).softmax(0), v),
    (2, 3, 5, 8), (2, 3, 7, 8), (7, 2, 3, 8),
)  # fmt: skip
spell("scores transposed, softmax over -2", lambda q, k, v: (k @ q.mT * HALF).softmax(-2).mT @ v)
spell(
    "scores transposed, contracted by einsum", lambda q, k, v: torch.einsum("bhji,bhjd->bhid", (k @ q.mT).softmax(2), v)
)
spell("output features first", lambda q, k, v: v.mT @ (k @ q.mT * HALF).softmax(-2))
spell("output permuted by einsum", lambda q, k, v: torch.einsum("bhij,bhjd->dihb", (q @ k.mT).softmax(-1), v))
spell("output of sequence first", lambda q, k, v: torch.einsum("bhij,bhjd->bihd", (q @ k.mT).softmax(-1), v))
spell("output transposed and merged", lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 24))
spell("output viewed", lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).view(6, 40))
spell("values wider than keys", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, Q, K, (2, 3, 7, 16), route="inductor")
spell("as many queries as keys", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, K, K, K)
spell("one query", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (2, 3, 1, 8), K, K)
spell("one key", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, Q, (2, 3, 1, 8), (2, 3, 1, 8))
spell("one head", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (2, 1, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8))
spell("one batch", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (1, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8))
spell("one feature", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (2, 3, 5, 1), (2, 3, 7, 1), (2, 3, 7, 1))
spell("all sizes equal", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (4, 4, 4, 4), (4, 4, 4, 4), (4, 4, 4, 4))
spell("queries are keys are values", lambda x: (x @ x.mT * HALF).softmax(-1) @ x, K)
spell("packed qkv, unbound", lambda x: soft(x.unbind(0)[0] @ x.unbind(0)[1].mT, x.unbind(0)[2]), (3, *K))


def packed(x: torch.Tensor) -> torch.Tensor:
    q, k, v = x.view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    return soft(q @ k.mT, v).transpose(1, 2).reshape(2, 7, 24)


def chunked(x: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.view(2, 7, 3, 8).transpose(1, 2) for t in x.chunk(3, dim=-1))
    return soft(q @ k.mT, v)


def split_views(x: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.view(2, 7, 3, 8).transpose(1, 2) for t in x.split([24, 24, 24], -1))
    return soft(q @ k.mT, v)


def fairseq(x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor) -> torch.Tensor:
    q = F.linear(x, wq)
    q *= HALF
    k, v = F.linear(x, wk), F.linear(x, wv)
    q, k, v = (t.contiguous().view(7, 6, 8).transpose(0, 1) for t in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2))
    probs = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
    F.dropout(probs, p=0.1, training=False).view(2, 3, 7, 7).mean(1)
    return torch.bmm(probs, v).transpose(0, 1).contiguous().view(7, 2, 24)


spell("packed qkv, permuted", packed, (2, 7, 72))
spell("packed qkv, chunked", chunked, (2, 7, 72))
spell("packed qkv, split", split_views, (2, 7, 72))
spell("sequence first, heads folded into the batch", fairseq, (7, 2, 24), (24, 24), (24, 24), (24, 24))

# -- scale ---------------------------------------------------------------------------------------------------------

SCALES: dict[str, Callable[..., torch.Tensor]] = {
    "none": lambda q, k: q @ k.mT,
    "on q": lambda q, k: (q * HALF) @ k.mT,
    "on k": lambda q, k: q @ (k * HALF).mT,
    "on k after its transpose": lambda q, k: q @ (k.mT * HALF),
    "on both": lambda q, k: (q * 8**-0.25) @ (k * 8**-0.25).mT,
    "on all three": lambda q, k: ((q * 0.7) @ (k / 1.3).mT) * 0.9,
    "on scores": lambda q, k: (q @ k.mT) * HALF,
    "number first": lambda q, k: HALF * (q @ k.mT),
    "torch.mul": lambda q, k: torch.mul(q @ k.mT, HALF),
    "torch.multiply": lambda q, k: torch.multiply(q @ k.mT, HALF),
    "in place": lambda q, k: (q @ k.mT).mul_(HALF),
    "division": lambda q, k: (q @ k.mT) / math.sqrt(8),
    "division by an int": lambda q, k: (q @ k.mT) / 3,
    "torch.div": lambda q, k: torch.div(q @ k.mT, math.sqrt(8)),
    "true_divide": lambda q, k: torch.true_divide(q @ k.mT, math.sqrt(8)),
    "division in place": lambda q, k: (q @ k.mT).div_(math.sqrt(8)),
    "division of q": lambda q, k: (q / math.sqrt(8)) @ k.mT,
    "0-d tensor": lambda q, k: (q @ k.mT) * torch.tensor(HALF),
    "division by a 0-d tensor": lambda q, k: (q @ k.mT) / torch.tensor(8.0).sqrt(),
    "division by a one-element tensor": lambda q, k: (q @ k.mT) / torch.full((1,), 3.0),
    "0-d tensor on q": lambda q, k: (q * torch.tensor(HALF)) @ k.mT,
    "a power": lambda q, k: (q @ k.mT) * q.size(-1) ** -0.5,
    "negative": lambda q, k: -(q @ k.mT) * HALF,
    "negative on q": lambda q, k: (-q) @ k.mT * 0.3,
    "zero point": lambda q, k: (q @ k.mT) * HALF + 1.5,
    "twice": lambda q, k: (q @ k.mT) * 0.5 * 0.25,
    "doubled by add": lambda q, k: torch.add(q @ k.mT, q @ k.mT),
    "alpha of add": lambda q, k: torch.add(torch.zeros(5, 7), q @ k.mT, alpha=0.3),
    "rsub": lambda q, k: 1.0 - (q @ k.mT),
}
for _name, _product in SCALES.items():
    spell(f"scale: {_name}", lambda q, k, v, product=_product: product(q, k).softmax(-1) @ v)

spell("scale: learned, a head", lambda q, k, v, s: (q @ k.mT * s.exp()).softmax(-1) @ v, *STANDARD, (3, 1, 1))
spell("scale: learned, on q", lambda q, k, v, s: ((q * s) @ k.mT).softmax(-1) @ v, *STANDARD, (1, 3, 1, 1))
spell("scale: learned, a feature", lambda q, k, v, s: ((q * s) @ k.mT).softmax(-1) @ v, *STANDARD, (8,))
spell("scale: learned, a number", lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v, *STANDARD, ())
spell("scale: learned, a query", lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v, *STANDARD, (2, 3, 5, 1))
spell("scale: learned, divided", lambda q, k, v, s: (q @ k.mT / (s.abs() + 1)).softmax(-1) @ v, *STANDARD, (3, 1, 1))
spell(
    "scale: cosine",
    lambda q, k, v, s: (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * s.clamp(max=4.0).exp()).softmax(-1) @ v,
    *STANDARD, (3, 1, 1),
)  # fmt: skip


class FloatScale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaling = 0.3217

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * self.scaling).softmax(-1) @ v


class DividedBy(FloatScale):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT / self.scaling).softmax(-1) @ v


class OnQuery(FloatScale):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q * self.scaling) @ k.mT).softmax(-1) @ v


spell("scale: SymFloat", FloatScale(), dynamic=True)
spell("scale: division by a SymFloat", DividedBy(), dynamic=True)
spell("scale: SymFloat on q", OnQuery(), dynamic=True)
spell("scale: from a symbolic size", lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v, dynamic=True)
spell("dynamic shapes", lambda q, k, v: soft(q @ k.mT, v), dynamic=True)
spell(
    "dynamic shapes, heads split",
    lambda q, k, v: soft(
        *(lambda a, b, c: (a @ b.mT, c))(*(t.view(t.shape[0], t.shape[1], 3, 8).transpose(1, 2) for t in (q, k, v)))
    ).transpose(1, 2).flatten(2),
    (2, 5, 24), (2, 7, 24), (2, 7, 24), dynamic=True,
)  # fmt: skip

# -- softmax -------------------------------------------------------------------------------------------------------


def by_hand(x: torch.Tensor) -> torch.Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def with_dead_nodes(x: torch.Tensor) -> torch.Tensor:
    x.clone().mean()
    weights = x.softmax(-1)
    weights.view(6, 5, 7).sum(0)
    return weights


SOFTMAXES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F.softmax": lambda x: F.softmax(x, -1),
    "F.softmax with keywords": lambda x: F.softmax(input=x, dim=3),
    "F.softmax with _stacklevel": lambda x: F.softmax(x, dim=-1, _stacklevel=5),
    "F.softmax with dtype": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "F.softmax in double": lambda x: F.softmax(x, dim=-1, dtype=torch.float64).float(),
    "torch.softmax": lambda x: torch.softmax(x, -1),
    "torch.softmax with dtype": lambda x: torch.softmax(x, 3, torch.float32),
    "method": lambda x: x.softmax(-1),
    "method with dtype": lambda x: x.softmax(dim=-1, dtype=torch.float32),
    "special": lambda x: torch.special.softmax(x, dim=-1),
    "nn.Softmax": torch.nn.Softmax(dim=-1),
    "float before": lambda x: x.float().softmax(-1).to(x.dtype),
    "written out": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "written out, functions": lambda x: torch.div(torch.exp(x), torch.sum(torch.exp(x), dim=-1, keepdim=True)),
    "written out, unsqueezed": lambda x: x.exp() / x.exp().sum(dim=3).unsqueeze(-1),
    "written out, less the maximum": by_hand,
    "exp of log_softmax": lambda x: F.log_softmax(x, dim=-1).exp(),
    "exp of log_softmax, torch": lambda x: torch.exp(torch.log_softmax(x, -1)),
    "less amax": lambda x: (x - x.amax(dim=-1, keepdim=True)).softmax(-1),
    "less amax, unsqueezed": lambda x: (x - x.amax(dim=-1).unsqueeze(-1)).softmax(-1),
    "less max": lambda x: (x - x.max(dim=-1, keepdim=True).values).softmax(-1),
    "less max, positional": lambda x: (x - torch.max(x, -1, True)[0]).softmax(-1),
    "less amax, detached": lambda x: (x - x.amax(-1, keepdim=True).detach()).softmax(-1),
    "PB-relax": lambda x: ((x / 32 - (x / 32).amax(-1).unsqueeze(-1)) * 32).softmax(-1),
    "dropout in eval": lambda x: F.dropout(x.softmax(-1), p=0.3, training=False),
    "dropout of p 0": lambda x: F.dropout(x.softmax(-1), 0.0, True, False),
    "nn.Dropout in eval": torch.nn.Sequential(torch.nn.Softmax(-1), torch.nn.Dropout(0.5)).eval(),
    "dropout method": lambda x: torch.dropout(x.softmax(-1), 0.2, False),
    "dead nodes beside": with_dead_nodes,
    "weights cloned": lambda x: x.softmax(-1).clone().contiguous(),
    "weights reshaped and back": lambda x: x.softmax(-1).reshape(6, 5, 7).view(2, 3, 5, 7),
    "weights permuted and back": lambda x: x.softmax(-1).permute(1, 0, 2, 3).transpose(0, 1),
}
for _name, _softmax in SOFTMAXES.items():
    spell(f"softmax: {_name}", lambda q, k, v, softmax=_softmax: softmax(q @ k.mT * HALF) @ v)

BF16_SOFTMAXES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "native": lambda x: x.softmax(-1),
    "dtype": lambda x: F.softmax(x, dim=-1, dtype=torch.float32).to(torch.bfloat16),
    "dtype and type_as": lambda x: F.softmax(x, dim=-1, dtype=torch.float32).type_as(x),
    "float before": lambda x: x.float().softmax(-1).bfloat16(),
    "float before, cast by type": lambda x: x.type(torch.float32).softmax(-1).type(x.dtype),
    "in bf16 after float scores": lambda x: F.softmax(x.float(), dim=-1, dtype=torch.bfloat16),
    "less amax": lambda x: (x - x.amax(-1, keepdim=True)).softmax(-1, dtype=torch.float32).to(x.dtype),
}
for _name, _softmax in BF16_SOFTMAXES.items():
    spell(f"bf16 softmax: {_name}", lambda q, k, v, softmax=_softmax: softmax(q @ k.mT * HALF) @ v, dtype=BF16)
spell("fp16", lambda q, k, v: soft(q @ k.mT, v), dtype=torch.float16)
spell("fp64", lambda q, k, v: soft(q @ k.mT, v), dtype=torch.float64)
spell("bf16, scores in fp32", lambda q, k, v: (q.float() @ k.float().mT * HALF).softmax(-1).to(v.dtype) @ v, dtype=BF16)
spell("bf16, all in fp32", lambda q, k, v: soft(q.float() @ k.float().mT, v.float()).to(BF16), dtype=BF16)

# -- terms, masks, soft-capping, sinks ------------------------------------------------------------------------------

FULL, HEADS, KEYS, PLANE = (2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (5, 7)


def keys_mask() -> torch.Tensor:
    return torch.arange(7) < torch.tensor([6, 4])[:, None]


def blocked() -> torch.Tensor:
    return torch.ones(5, 7, dtype=torch.bool).triu(3)


TERMS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...]]] = {
    "a full bias": (lambda s, m: s + m, FULL),
    "a bias a head": (lambda s, m: s + m, HEADS),
    "a bias a head of rank 3": (lambda s, m: s + m, (3, 5, 7)),
    "a bias a key": (lambda s, m: s + m, KEYS),
    "a plane": (lambda s, m: m + s, PLANE),
    "a vector of keys": (lambda s, m: s + m, (7,)),
    "a bias in place": (lambda s, m: s.add_(m), HEADS),
    "a bias by +=": (lambda s, m: torch.Tensor.__iadd__(s, m), HEADS),
    "a bias with alpha": (lambda s, m: torch.add(s, m, alpha=0.5), HEADS),
    "a bias subtracted": (lambda s, m: s - m, HEADS),
    "a bias subtracted with alpha": (lambda s, m: torch.sub(s, m, alpha=2), HEADS),
    "a bias of which the score is subtracted": (lambda s, m: m - s, HEADS),
    "a bias before the scale": (lambda s, m: (s + m) * 0.5, HEADS),
    "two biases": (lambda s, m: s + m + m[..., :1, :], HEADS),
    "a bias added twice": (lambda s, m: (s + m) + m, HEADS),
    "biases added to each other": (lambda s, m: s + (m + m.flip(-1)), HEADS),
    "a bias of queries alone": (lambda s, m: s + m[..., :1], HEADS),
    "a bias transposed": (lambda s, m: s + m.mT, (1, 3, 7, 5)),
    "a bias expanded": (lambda s, m: s + m.expand(2, 3, 5, 7), PLANE),
    "a bias table": (
        lambda s, m: s + m[torch.arange(7)[None, :] - torch.arange(5)[:, None] + 4].permute(2, 0, 1),
        (11, 3),
    ),
    "ALiBi": (lambda s, m: s + m * (torch.arange(7) - 6), (3, 1, 1)),
    "ALiBi by distance": (
        lambda s, m: s - m * (torch.arange(7)[None, :] - torch.arange(5)[:, None]).abs(),
        (3, 1, 1),
    ),
    "the queries' own term": (lambda s, m: s + torch.einsum("hik,kj->hij", m, torch.ones(4, 7)), (3, 5, 4)),
    "where, keys kept": (lambda s, m: torch.where(m > -1, s, -torch.inf), KEYS),
    "where, keys dropped": (lambda s, m: torch.where(m <= -1, torch.finfo(s.dtype).min, s), KEYS),
    "where, 0-d tensor": (lambda s, m: torch.where(m > -1, s, torch.tensor(-1e9)), KEYS),
    "where, full_like": (lambda s, m: torch.where(m > -1, s, torch.full_like(s, -1e9)), KEYS),
    "where method": (lambda s, m: s.where(m > -1, -1e30), KEYS),
    "masked_fill": (lambda s, m: s.masked_fill(m < -1, -1e9), KEYS),
    "masked_fill, inverted": (lambda s, m: s.masked_fill(~(m > -1), float("-inf")), KEYS),
    "masked_fill, logical_not": (lambda s, m: s.masked_fill(torch.logical_not(m > -1), float("-inf")), KEYS),
    "masked_fill, == 0": (lambda s, m: s.masked_fill((m > -1).int() == 0, float("-inf")), KEYS),
    "masked_fill, == False": (lambda s, m: torch.masked_fill(s, (m > -1) == False, float("-inf")), KEYS),  # noqa: E712
    "masked_fill, tensor value": (lambda s, m: s.masked_fill(m < -1, torch.tensor(-1e9)), KEYS),
    "masked_fill_": (lambda s, m: s.masked_fill_(m < -1, -1e9), KEYS),
    "additive, where of zeros": (lambda s, m: s + torch.where(m > -1, 0.0, -1e9), KEYS),
    "additive, masked_fill of zeros": (lambda s, m: s + torch.zeros(KEYS).masked_fill(m < -1, -torch.inf), KEYS),
    "additive, (1 - mask) * min": (lambda s, m: s + (1.0 - (m > -1).float()) * torch.finfo(torch.float32).min, KEYS),
    "additive, (1 - mask) * -1e9": (lambda s, m: s + (1 - (m > -1).to(s.dtype)) * -1e9, KEYS),
    "additive, inverted.float() * min": (lambda s, m: s + (m < -1).float() * -1e30, KEYS),
    "two masks": (lambda s, m: s.masked_fill(m < -1, -1e9).masked_fill(blocked(), -1e9), KEYS),
    "two masks by and": (lambda s, m: s.masked_fill(~((m > -1) & ~blocked()), -torch.inf), KEYS),
    "two masks by or": (lambda s, m: s.masked_fill((m < -1) | blocked(), -torch.inf), KEYS),
    "two masks by multiplication": (lambda s, m: s.masked_fill(~((m > -1) * ~blocked()), -torch.inf), KEYS),
    "bias, then mask": (lambda s, m: (s + m).masked_fill(blocked(), -1e9), HEADS),
    "mask, then scale": (lambda s, m: s.masked_fill(blocked(), -1e9) / 2, HEADS),
    "-100 and -10000 as arithmetic": (lambda s, m: s + (m < -1) * -100.0 + blocked() * -10000.0, KEYS),
}
for _name, (_term, _shape) in TERMS.items():
    spell(f"term: {_name}", lambda q, k, v, m, term=_term: term(q @ k.mT * HALF, m).softmax(-1) @ v, *STANDARD, _shape)

spell("softcap", lambda q, k, v: (torch.tanh(q @ k.mT / 5.0) * 5.0).softmax(-1) @ v, route="inductor")
spell("softcap method", lambda q, k, v: (q @ k.mT).div(5.0).tanh().mul(5.0).softmax(-1) @ v, route="inductor")
spell(
    "softcap between bias and mask",
    lambda q, k, v, m: ((q @ k.mT + m).div(5).tanh() * 5).masked_fill(blocked(), -1e9).softmax(-1) @ v,
    *STANDARD, HEADS, route="inductor",
)  # fmt: skip
spell("clamped scores", lambda q, k, v: (q @ k.mT).clamp(-2, 2).softmax(-1) @ v, route="inductor")


def sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    scores = torch.cat([q @ k.mT * HALF, sink.reshape(1, -1, 1, 1).expand(2, -1, 5, -1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1, dtype=torch.float32)[..., :-1] @ v


spell("sinks", sinks, *STANDARD, (3,), route="inductor")
spell(
    "sinks without the maximum",
    lambda q, k, v, s: torch.cat([q @ k.mT, s.view(1, 3, 1, 1).expand(2, 3, 5, 1)], 3).softmax(-1)[:, :, :, :-1] @ v,
    *STANDARD, (3,), route="inductor",
)  # fmt: skip


def windows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = (q * HALF) @ k.mT + bias.unsqueeze(0)
    scores = scores.view(-1, 4, 2, 6, 6) + mask.unsqueeze(1).unsqueeze(0)
    return scores.view(-1, 2, 6, 6).softmax(-1) @ v


spell("Swin's windows", windows, (8, 2, 6, 8), (8, 2, 6, 8), (8, 2, 6, 8), (2, 6, 6), (4, 6, 6))


def bloom(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alibi: torch.Tensor) -> torch.Tensor:
    scores = alibi.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=HALF).view(2, 3, 5, -1)
    weights = F.softmax(scores.masked_fill(blocked(), -1e9), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(F.dropout(weights, 0.1, False, False).view(6, 5, -1), v).view(2, 3, 5, 8)


spell("baddbmm with a real bias", bloom, (6, 5, 8), (6, 7, 8), (6, 7, 8), (6, 1, 7))
spell(
    "baddbmm with alpha and beta",
    lambda q, k, v, m: torch.bmm(torch.baddbmm(m, q, k.mT, beta=0.5, alpha=0.25).softmax(-1), v),
    (6, 5, 8), (6, 7, 8), (6, 7, 8), (6, 5, 7),
)  # fmt: skip
spell(
    "rank 5 with in-place biases",
    lambda q, k, v, a, b: (q @ k.mT).add_(a).add_(b).softmax(-1) @ v,
    (2, 4, 3, 5, 8), (2, 4, 3, 5, 8), (2, 4, 3, 5, 8), (2, 4, 1, 1, 5), (2, 1, 3, 5, 5),
)  # fmt: skip

# -- grouped heads -------------------------------------------------------------------------------------------------

GQ, GK = (2, 6, 5, 8), (2, 2, 7, 8)

GROUPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expand and reshape": lambda x: x[:, :, None].expand(2, 2, 3, 7, 8).reshape(2, 6, 7, 8),
    "unsqueeze, expand, flatten": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(1, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "torch.repeat_interleave": lambda x: torch.repeat_interleave(x, repeats=3, dim=-3),
    "broadcast_to": lambda x: torch.broadcast_to(x[:, :, None], (2, 2, 3, 7, 8)).reshape(2, 6, 7, 8),
    "repeat": lambda x: x[:, :, None].repeat(1, 1, 3, 1, 1).reshape(2, 6, 7, 8),
    "stack": lambda x: torch.stack([x, x, x], dim=2).reshape(2, 6, 7, 8),
    "heads repeated": lambda x: x.repeat(1, 3, 1, 1),
    "heads concatenated": lambda x: torch.cat([x, x, x], dim=1),
}
for _name, _grow in GROUPS.items():
    spell(f"grouped: {_name}", lambda q, k, v, grow=_grow: soft(q @ grow(k).mT, grow(v)), GQ, GK, GK)
spell(
    "grouped: rank 5 products",
    lambda q, k, v: soft(q.view(2, 2, 3, 5, 8) @ k[:, :, None].mT, v[:, :, None]).view(2, 6, 5, 8), GQ, GK, GK,
)  # fmt: skip
spell(
    "grouped: einsum",
    lambda q, k, v: torch.einsum("bgrij,bgjd->bgrid", (torch.einsum("bgrid,bgjd->bgrij", q.view(2, 2, 3, 5, 8), k)).softmax(-1), v),
    GQ, GK, GK,
)  # fmt: skip
spell("one key head, broadcast", lambda q, k, v: soft(q @ k.mT, v), GQ, (2, 1, 7, 8), (2, 1, 7, 8))
spell(
    "one key head, expanded",
    lambda q, k, v: soft(q @ k.expand(2, 6, 7, 8).mT, v.expand(2, 6, 7, 8)),
    GQ,
    (2, 1, 7, 8),
    (2, 1, 7, 8),
)
spell(
    "one key head, einsum",
    lambda q, k, v: torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k).softmax(-1), v),
    GQ, (2, 7, 8), (2, 7, 8),
)  # fmt: skip
spell(
    "one key head, queries and heads in one axis",
    lambda q, k, v: ((q.reshape(2, 30, 8) @ k.mT * HALF).view(2, 6, 5, 7).softmax(-1).view(2, 30, 7) @ v).view(2, 6, 5, 8),
    GQ, (2, 7, 8), (2, 7, 8),
)  # fmt: skip

# -- calls that are an attention already ---------------------------------------------------------------------------

spell("SDPA", lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
spell("SDPA with a scale", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3))
spell("SDPA, causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), K, K, K)
spell(
    "SDPA with a mask made here",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(7, 7, dtype=torch.bool).tril()), K, K, K,
)  # fmt: skip
spell("SDPA with a bias", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *STANDARD, FULL)
spell("SDPA with groups", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), GQ, GK, GK)
spell("SDPA of rank 3", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (4, 5, 8), (4, 7, 8), (4, 7, 8))
spell(
    "two attentions of the same scores",
    lambda q, k, v, w: ((q @ k.mT).softmax(-1) @ v, (q @ k.mT).softmax(-1) @ w),
    Q,
    K,
    K,
    K,
    sites=2,
)


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_matched_and_equal_to_eager(name: str) -> None:
    s = SPELLINGS[name]
    outcome = check(s.fn, *tensors(*s.shapes, dtype=s.dtype), dynamic=s.dynamic)
    assert [site.matched for site in outcome.sites] == [True] * s.sites, outcome.reasons
    assert [site.route for site in outcome.sites] == [s.route] * s.sites, outcome.sites
