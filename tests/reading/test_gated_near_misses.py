"""What looks like a gated MLP and is none, or none that can be replaced: left alone with a reason, and always right."""

# ruff: noqa: E501 (one line a program, so that the table can be read as one)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import tensors
from gated_programs import ROUTES, check
from torch import Tensor
from torch._subclasses import FakeTensorMode

import xfcompile
from xfcompile.families.gated_mlp import GATED_MLP
from xfcompile.read import Reading
from xfcompile.search import Found, Search

SQUARE = (4, 4, 4)
"""All axes of one size: an axis taken for another is no shape error, only wrong numbers."""

WEIGHT = (4, 4)
PACKED = (8, 4)


@dataclass(frozen=True)
class Program:
    """A program, and a word of the reason for which it is left alone ("": it is no candidate at all); None for one that
    may be replaced (`fused` then says whether it is), and whose numbers are delicate."""

    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    why: str | None
    fused: bool | None = None
    dtype: torch.dtype = torch.float32
    grad: bool = True
    dynamic: bool = False


PROGRAMS: dict[str, Program] = {}


def miss(name: str, why: str | None, fn: Callable[..., Any], *shapes: tuple[int, ...], **about: Any) -> None:
    assert name not in PROGRAMS
    PROGRAMS[name] = Program(fn, shapes or (SQUARE, WEIGHT, WEIGHT), why, **about)


def right(name: str, fn: Callable[..., Any], *shapes: tuple[int, ...], fused: bool | None = True, **about: Any) -> None:
    miss(name, None, fn, *shapes, fused=fused, **about)


L = F.linear


def long_activation(x: Tensor) -> Tensor:
    for _ in range(60):
        x = torch.tanh(x * 1.5 + 0.5)
    return x


def per_expert(x: Tensor, w: Tensor) -> Tensor:
    """A row of each expert."""
    return torch.einsum("ed,edf->ef", x, w)


def into_the_first_rows(out: Tensor, x: Tensor, w: Tensor) -> Tensor:
    out = out * 1
    return out[:4].addmm_(x, w.T, beta=0) + 1, out


@torch._dynamo.allow_in_graph
def linear_and_relu(x: Tensor, w: Tensor) -> Tensor:
    return F.relu(L(x, w))


@torch._dynamo.allow_in_graph
def activated_without_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        return F.silu(L(x, w))


def without_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        return L(x, w)


# -- different inputs, rows and features ---------------------------------------------------------------------------

miss("two inputs", "different inputs", lambda x, y, w, v: F.silu(L(x, w)) * L(y, v), SQUARE, SQUARE, WEIGHT, WEIGHT)
miss("an input and the same plus one", "different inputs", lambda x, w, v: F.silu(L(x, w)) * L(x + 1, v))
miss("an input and its transpose", "different rows", lambda x, w, v: F.silu(L(x, w)) * L(x.mT, v))
miss("an input and its rows reversed", "different inputs", lambda x, w, v: F.silu(L(x, w)) * L(x.flip(1), v))
miss("an input before and after a write", "different inputs",
     lambda x, w, v: (lambda y: F.silu(L(y, w)) * L(y.add_(1), v))(x * 1), grad=False)  # fmt: skip
miss("gate rolled along the rows", "", lambda x, w, v: F.silu(L(x, w)).roll(1, 1) * L(x, v))
miss("gate transposed in a square", "nor that for each expert", lambda x, w, v: F.silu(L(x, w)).mT * L(x, v))
miss("gate's batch and rows swapped", "rows", lambda x, w, v: F.silu(L(x, w)).transpose(0, 1) * L(x, v))
miss(
    "rows of both swapped",
    "rows",
    lambda x, w, v: F.silu(L(x, w).view(2, 8, 4)).reshape(4, 4, 4).transpose(0, 1) * L(x, v),
)
miss("gate of the rows before", "rows", lambda x, w, v: F.silu(L(x, w))[:, 1:] * L(x, v)[:, :-1])
right("some rows of both", lambda x, w, v: F.silu(L(x, w))[:, 1:] * L(x, v)[:, 1:], fused=None)
miss("gate broadcast along the rows", "input", lambda x, w, v: F.silu(L(x[:, :1], w)) * L(x, v))
miss("gate's first row for all", "rows", lambda x, w, v: F.silu(L(x, w))[:, :1] * L(x, v))
miss("gate's first batch for all", "rows", lambda x, w, v: F.silu(L(x, w))[:1] * L(x, v))
miss("gate of one feature", "same for all features", lambda x, w, v: F.silu(L(x, w)) * L(x, v), SQUARE, (1, 4), WEIGHT)
miss("gate and up of one feature", "one feature", lambda x, w, v: F.silu(L(x, w)) * L(x, v), SQUARE, (1, 4), (1, 4))
miss("gate's first feature for all", "same for all features", lambda x, w, v: F.silu(L(x, w))[..., :1] * L(x, v))
miss("features of the gate reversed", "", lambda x, w, v: F.silu(L(x, w)).flip(-1) * L(x, v))
miss(
    "features of the gate taken in another order", "order", lambda x, w, v: F.silu(L(x, w)[..., ::2]) * L(x, v)[..., :2]
)
miss("a gate in fp8", "", lambda x, w, v: F.silu(L(x, w).to(torch.float8_e4m3fn).float()) * L(x, v), grad=False)
miss("rows as features", "nor that for each expert", lambda x, w, v: (F.silu(L(x, w)) * L(x, v).mT).mT)
miss("flattened before the product", "not one of features",
     lambda x, w, v: F.silu(L(x, w)).flatten(1) * L(x, v).mT.flatten(1))  # fmt: skip
right("flattened features", lambda x, w, v: F.silu(L(x, w)).flatten(1) * L(x, v).flatten(1), fused=None)
right("both transposed: rows are the last axis", lambda x, w, v: F.silu(L(x, w)).mT * L(x, v).mT, fused=None)

# -- packed otherwise ----------------------------------------------------------------------------------------------

miss("chunks of the rows", "rows", lambda x, w: (lambda g, u: F.silu(g) * u)(*L(x, w).chunk(2, 1)), SQUARE, WEIGHT)
miss("chunks of the batch", "rows", lambda x, w: (lambda g, u: F.silu(g) * u)(*L(x, w).chunk(2, 0)), SQUARE, WEIGHT)
miss("F.glu of the rows", "rows", lambda x, w: F.glu(L(x, w), 1), SQUARE, WEIGHT)
miss("three parts, two used", "other features", lambda x, w: (lambda g, u, _: F.silu(g) * u)(*L(x, w).chunk(3, -1)),
     SQUARE, (12, 4))  # fmt: skip
miss("overlapping parts", "other features", lambda x, w: F.silu(L(x, w)[..., :4]) * L(x, w)[..., 2:6], SQUARE, PACKED)
miss(
    "every other of one half",
    "other features",
    lambda x, w: F.silu(L(x, w)[..., :4:2]) * L(x, w)[..., 1:4:2],
    SQUARE,
    PACKED,
)
miss("one part twice", "", lambda x, w: F.silu(L(x, w)[..., :4]) * L(x, w)[..., :4], SQUARE, PACKED)
miss(
    "halves of two weights",
    "features",
    lambda x, w, v: F.silu(L(x, w)[..., :4]) * L(x, v)[..., 4:],
    SQUARE,
    PACKED,
    PACKED,
)

# -- no gate of two projections ------------------------------------------------------------------------------------

miss("silu of the projection times itself", "", lambda x, w: (lambda y: F.silu(y) * y)(L(x, w)), SQUARE, WEIGHT)
miss("one projection times the input", "", lambda x, w: torch.sigmoid(L(x, w)) * x, SQUARE, WEIGHT)
miss("an output gate of attention", "different inputs",
     lambda x, w, q, k, v: torch.sigmoid(L(x, w)) * (torch.softmax(q @ k.mT, -1) @ v), SQUARE, WEIGHT, *[SQUARE] * 3)  # fmt: skip
miss("a router", "", lambda x, w, v: L(x, w).softmax(-1) * L(x, v))
miss("squeeze-excite", "", lambda x, w, v: x * torch.sigmoid(L(F.relu(L(x.mean(1), w)), v))[:, None])
miss("adaLN", "", lambda x, c, w: (lambda a, b: F.layer_norm(x, (4,)) * (1 + a[:, None]) + b[:, None])(
    *L(F.silu(c), w).chunk(2, -1)), SQUARE, WEIGHT, PACKED)  # fmt: skip
miss("silu before one linear", "", lambda x, w, v: L(F.silu(L(x, w)), v))
miss("a sum of projections", "", lambda x, w, v: F.silu(L(x, w)) + L(x, v))
miss("three projections in a sum", "", lambda x, w, v, u: F.silu(L(x, w)) * (L(x, v) + L(x, u)), SQUARE, *[WEIGHT] * 3)
miss("a gate of two layers' inputs", "different inputs", lambda x, w, v: F.silu(L(x, w)) * L(L(x, w), v))
miss("a tensor on the way", "", lambda x, w, v, t: F.silu(L(x, w) * t) * L(x, v), SQUARE, WEIGHT, WEIGHT, SQUARE)
miss("a vector on the way", "", lambda x, w, v, t: F.silu(L(x, w) * t) * L(x, v), SQUARE, WEIGHT, WEIGHT, (4,))
miss(
    "a bias of each row",
    "bias",
    lambda x, w, v, t: F.silu(L(x, w) + t[:, None]) * L(x, v),
    SQUARE,
    WEIGHT,
    WEIGHT,
    (4,),
)
miss("two biases", "bias", lambda x, w, v, b, c: F.silu(L(x, w, b) + c) * L(x, v), SQUARE, WEIGHT, WEIGHT, (4,), (4,))
miss(
    "half a bias",
    "bias",
    lambda x, w, v, b: F.silu(torch.add(L(x, w), b, alpha=0.5)) * L(x, v),
    SQUARE,
    WEIGHT,
    WEIGHT,
    (4,),
)
miss("a bias subtracted", "", lambda x, w, v, b: F.silu(L(x, w) - b) * L(x, v), SQUARE, WEIGHT, WEIGHT, (4,))
miss(
    "a bias after the activation",
    "bias",
    lambda x, w, v, b: (F.silu(L(x, w)) + b) * L(x, v),
    SQUARE,
    WEIGHT,
    WEIGHT,
    (4,),
)
miss(
    "a bias that is an activation's",
    "bias",
    lambda x, w, v, t: F.silu(L(x, w) + t) * L(x, v),
    SQUARE,
    WEIGHT,
    WEIGHT,
    (1, 4, 4),
)
miss(
    "a bias of more digits than the projection",
    "more digits",
    lambda x, w, v, b: F.silu(L(x, w) + (b.float() + 5).cosh()) * L(x, v),
    SQUARE,
    WEIGHT,
    WEIGHT,
    (4,),
    dtype=torch.bfloat16,
)
right(
    "a bias read backwards",
    lambda x, w, v, b: F.silu(L(x, w) + b.flip(0)) * L(x, v),
    SQUARE,
    WEIGHT,
    WEIGHT,
    (4,),
    fused=None,
)
right("a slice of a bias", lambda x, w, v, b: F.silu(L(x, w) + b[2:6]) * L(x, v), SQUARE, WEIGHT, WEIGHT, (8,))
right(
    "every third of a bias",
    lambda x, w, v, b: F.silu(L(x, w) + b[::3]) * L(x, v),
    SQUARE,
    WEIGHT,
    WEIGHT,
    (12,),
    fused=None,
)
right("alpha 1", lambda x, w, v, b: F.silu(torch.add(L(x, w), b, alpha=1)) * L(x, v), SQUARE, WEIGHT, WEIGHT, (4,))
miss("addmm with beta", "bias",
     lambda x, w, v, b: F.silu(torch.addmm(b, x, w.T, beta=0.5)) * L(x, v), (4, 4), WEIGHT, WEIGHT, (4,))  # fmt: skip
right("addmm with alpha", lambda x, w, v: F.silu(torch.addmm(torch.zeros(4), x, w.T, alpha=0.5)) * L(x, v),
      (4, 4), WEIGHT, WEIGHT, fused=None)  # fmt: skip

# -- activations ---------------------------------------------------------------------------------------------------

miss("an activation that is not known", "", lambda x, w, v: F.softplus(L(x, w)) * L(x, v))
miss("a softmax", "", lambda x, w, v: L(x, w).softmax(-1) * L(x, v))
miss("exp", "none that is known", lambda x, w, v: L(x, w).exp() * L(x, v))
miss("1 / (2 + exp)", "no number", lambda x, w, v: L(x, w) / (2 + torch.exp(-L(x, w))) * L(x, v))
miss("a quotient of projections", "no number", lambda x, w, v: L(x, w) / L(x, v))
miss("whole quotients", "whole numbers", lambda x, w, v: torch.div(L(x, w), 2, rounding_mode="floor") * L(x, v))
miss("a square root", "power", lambda x, w, v: F.relu(L(x, w)) ** 0.5 * L(x, v), grad=False)
miss("a power that is a tensor", "to a power", lambda x, w, v: 2 ** L(x, w) * L(x, v))
miss("a clamp by a tensor", "clamped by a tensor", lambda x, w, v: torch.clamp(L(x, w), max=L(x, v)) * L(x, v))
miss("an upside-down clamp", "clamp from", lambda x, w, v: L(x, w).clamp(1, -1) * L(x, v))
miss("comparison", "", lambda x, w, v: torch.where(L(x, w) > 0, L(x, w), 0) * L(x, v))
miss("threshold", "", lambda x, w, v: F.threshold(L(x, w), 0.5, 0) * L(x, v))
miss("whole numbers", "no bias", lambda x, w, v: L(x, w).to(torch.int32) * L(x, v))
miss("a detached gate", "", lambda x, w, v: F.silu(L(x, w).detach()) * L(x, v))
miss("dropout of the gate", "", lambda x, w, v: F.dropout(F.silu(L(x, w)), 1.0) * L(x, v))
miss("infinity", "no finite number", lambda x, w, v: F.silu(L(x, w)) * float("inf") * L(x, v), grad=False)
right("gelu, both kinds", lambda x, w, v: F.gelu(L(x, w)) * F.gelu(L(x, v), approximate="tanh"))
right("relu at 0", lambda x, w, v: F.relu(L(x * 0, w)) * (L(x, v) + 1), fused=None)
right(
    "NaN in the input",
    lambda x, w, v: F.relu(L(x.masked_fill(x > 1, float("nan")), w)) * L(x.masked_fill(x > 1, float("nan")), v),
)
right("large gates", lambda x, w, v: F.silu(L(x * 1e4, w)) * L(x * 1e4, v))
right("large gates, gelu", lambda x, w, v: F.gelu(L(x * 1e4, w), approximate="tanh") * L(x * 1e4, v))
right("no rows", lambda x, w, v: F.silu(L(x, w)) * L(x, v), (0, 4), WEIGHT, WEIGHT, fused=None)

# -- used elsewhere, changed, or under other modes -----------------------------------------------------------------


def gate_too(x: Tensor, w: Tensor, v: Tensor) -> Any:
    gate = L(x, w)
    return F.silu(gate) * L(x, v), gate


def activation_too(x: Tensor, w: Tensor, v: Tensor) -> Any:
    gate = F.silu(L(x, w))
    return gate * L(x, v), gate


def up_too(x: Tensor, w: Tensor, v: Tensor) -> Any:
    up = L(x, v)
    return F.silu(L(x, w)) * up, up.sum()


def gate_twice(x: Tensor, w: Tensor, v: Tensor, u: Tensor) -> Any:
    gate = F.silu(L(x, w))
    return gate * L(x, v), gate * L(x, u)


def product_too(x: Tensor, w: Tensor, v: Tensor, d: Tensor) -> Any:
    product = F.silu(L(x, w)) * L(x, v)
    return L(product, d), product


def gate_changed_after(x: Tensor, w: Tensor, v: Tensor) -> Any:
    gate = L(x, w)
    a = torch.sigmoid(gate)
    gate.add_(1)
    return a * L(x, v)


def gate_changed_and_used(x: Tensor, w: Tensor, v: Tensor) -> Any:
    gate = L(x, w)
    a = torch.tanh(gate)
    up = L(x, v)
    gate.mul_(2)
    return a * up + gate


def weight_changed(x: Tensor, w: Tensor, v: Tensor) -> Any:
    w = w * 1
    gate = F.silu(L(x, w))
    w.add_(1)
    return gate * L(x, v), w


def input_changed(x: Tensor, w: Tensor, v: Tensor) -> Any:
    x = x * 1
    gate, up = F.silu(L(x, w)), L(x, v)
    x.zero_()
    return gate * up, x


def into_another(x: Tensor, w: Tensor, v: Tensor, out: Tensor) -> Any:
    out = out * 1
    torch.mul(F.silu(L(x, w)), L(x, v), out=out)
    return out


def half_without_grad(x: Tensor, w: Tensor, v: Tensor) -> Any:
    with torch.no_grad():
        gate = F.silu(L(x, w))
    return gate * L(x, v)


miss("the gate is a result too", "projections are used", gate_too)
miss("the activation is a result too", "projections are used", activation_too)
miss("up is used elsewhere", "projections are used", up_too)
miss("a gate of two products", "another product", gate_twice, SQUARE, *[WEIGHT] * 3)
right("the product is used elsewhere too", product_too, SQUARE, *[WEIGHT] * 3)
right("the gate is changed after it was read", gate_changed_after, fused=None, grad=False)
right("the gate is changed and used", gate_changed_and_used, fused=None, grad=False)
miss("a weight is changed in between", "changed", weight_changed, grad=False)
miss("the input is changed in between", "changed", input_changed, grad=False)
right("into another tensor", into_another, SQUARE, WEIGHT, WEIGHT, SQUARE, fused=None, grad=False)
right("silu in place on a part of a packed projection",
      lambda x, w: (lambda g, u: F.silu(g, inplace=True) * u)(*L(x, w).chunk(2, -1)), SQUARE, PACKED, fused=None, grad=False)  # fmt: skip
right("up in place on a part of a packed projection",
      lambda x, w: (lambda g, u: F.silu(g) * u.add_(1))(*L(x, w).chunk(2, -1)), SQUARE, PACKED, fused=None, grad=False)  # fmt: skip
right("both in place on overlapping parts",
      lambda x, w: (lambda p: F.silu(p[..., :4].mul_(2)) * p[..., 2:6].add_(1))(L(x, w)), SQUARE, PACKED, fused=None, grad=False)  # fmt: skip
right(
    "a product in place of what nothing else sees",
    lambda x, w, v: F.silu(L(x, w)).mul_(L(x, v)),
    fused=True,
    grad=False,
)
right("a product in place, by its other name too",
      lambda x, w, v: (lambda a: (a.mul_(L(x, v)), a + 1))(F.silu(L(x, w))), fused=None, grad=False)  # fmt: skip
miss("a gate without gradient", "border", half_without_grad, grad=False)
miss("experts and rows in another order", "experts are not the first",
     lambda x, w, v: F.silu(torch.einsum("etd,edf->tef", x, w)) * torch.einsum("etd,edf->tef", x, v), *[SQUARE] * 3)  # fmt: skip
miss("an expert's rows as another's", "rows", lambda x, w, v: F.silu(x @ w).transpose(0, 1) * (x @ v), *[SQUARE] * 3)
miss("two axes of experts", "nor that for each expert",
     lambda x, w, v: F.silu(x @ w) * (x @ v), *[(2, 4, 4, 4)] * 3)  # fmt: skip
miss("contracted over two axes", "more than one axis",
     lambda x, w, v: F.silu(torch.einsum("bsd,fsd->bf", x, w)) * torch.einsum("bsd,fsd->bf", x, v), *[SQUARE] * 3)  # fmt: skip


def grouped(x: Tensor, w: Tensor, of_rows: Tensor | None = None) -> Tensor:
    """Experts as transformers runs them: rows sorted by expert, four each; some belong to none."""
    h = torch._grouped_mm(x, w, offs=torch.arange(4, 20, 4, dtype=torch.int32))
    if of_rows is not None:
        h = (h + of_rows).masked_fill((torch.arange(16) > 12)[:, None], 0.0)
    gate, up = h.chunk(2, -1)
    return F.silu(gate.clamp(max=7)) * (up + 1)


miss("chosen by a mask", "", lambda x, w, v: F.silu(L(x, w)) * torch.where(x > 0, L(x, v), 0.0))

# -- one guard each ------------------------------------------------------------------------------------------------

ROWS = (4, 4)

miss("projections of whole numbers", "", lambda x, w, v: L(x.long(), w.long()) * L(x.long(), v.long()), grad=False)
miss("a product of two numbers", "", lambda x, w, v: torch.sigmoid(x @ w) * (x @ v), *[(4,)] * 3)
miss("a sum of projections, scaled", "", lambda x, w, v: (L(x, w) + L(x, v)) * torch.full((4,), 2.0))
miss("rows of a symbolic number, as a factor", "known at run time only",
     lambda x, w, v: F.silu(L(x, w)) * L(x, v) * torch.full((4,), x.shape[0]), (7, 5), (4, 5), (4, 5), dynamic=True)  # fmt: skip
miss("up that cancels", "a product of 1 projections", lambda x, w, v: F.silu(L(x, w)) * (L(x, v) - L(x, v) + 1))
miss("a gate and its transpose", "a product of 3 projections",
     lambda x, w, v: (lambda g: F.silu(g + g.mT) * L(x, v))(L(x, w)))  # fmt: skip
miss("a long activation", "none that is known", lambda x, w, v: long_activation(L(x, w)) * L(x, v))
miss("experts of gate and up crossed", "one is broadcast",
     lambda x, w, v: F.silu(per_expert(x, w)[:, None]) * per_expert(x, v), ROWS, SQUARE, SQUARE)  # fmt: skip
miss("an outer product", "none that both have",
     lambda x, w, v: F.silu(torch.einsum("bs,fd->bsf", x, w)) * torch.einsum("bs,fd->bsf", x, v), *[ROWS] * 3)  # fmt: skip
miss("a sum of the input alone", "none that both have",
     lambda x, w, v: F.silu(torch.einsum("bsd,f->bsf", x, w)) * torch.einsum("bsd,f->bsf", x, v), SQUARE, (4,), (4,))  # fmt: skip
miss(
    "one input for all experts", "broadcast against", lambda x, w, v: F.silu(x @ w) * (x @ v), (1, 4, 4), SQUARE, SQUARE
)
miss("one input feature for all", "broadcast against",
     lambda x, w, v: F.silu(torch.einsum("bd,fd->bf", x, w)) * torch.einsum("bd,fd->bf", x, v), (4, 1), WEIGHT, WEIGHT)  # fmt: skip
miss("one expert of several", "picked out", lambda x, w, v: F.silu((x @ w)[1]) * (x @ v)[1], *[SQUARE] * 3)
miss("one expert only", "one only", lambda x, w, v: F.silu(x @ w) * (x @ v), *[(1, 4, 4)] * 3)
right("an input without an axis", lambda x, w, v: F.silu(L(x.view(1, 1), w)) * L(x.view(1, 1), v), (), (4, 1), (4, 1))
right("rows that are two of the input's", lambda x, w, v: F.silu(L(x.view(4, 8), w)) * L(x.view(4, 8), v),
      (8, 4), (4, 8), (4, 8))  # fmt: skip
right("a vector after it", lambda x, w, v, d: (F.silu(L(x, w)) * L(x, v)) @ d, SQUARE, WEIGHT, WEIGHT, (4,))
right("multiplied with itself", lambda x, w, v: (lambda p: p @ p)(F.silu(L(x, w)) * L(x, v)), ROWS, WEIGHT, WEIGHT)
right("a batch of weights after it", lambda x, w, v, d: (F.silu(L(x, w)) * L(x, v)) @ d, SQUARE, WEIGHT, WEIGHT, SQUARE)
right("summed and multiplied", lambda x, w, v, d: torch.einsum("bsk,sf->bsf", F.silu(L(x, w)) * L(x, v), d),
      SQUARE, WEIGHT, WEIGHT, (4, 4))  # fmt: skip
right("a linear whose features come first", lambda x, w, v, d: torch.einsum("bsk,fk->bfs", F.silu(L(x, w)) * L(x, v), d),
      SQUARE, WEIGHT, WEIGHT, WEIGHT)  # fmt: skip
right(
    "one linear twice",
    lambda x, w, v, d: (lambda p: L(p, d) + L(p, d).relu())(F.silu(L(x, w)) * L(x, v)),
    SQUARE,
    *[WEIGHT] * 3,
)
right("addmm after it", lambda x, w, v, d, b: torch.addmm(b, F.silu(L(x, w)) * L(x, v), d.T), ROWS, *[WEIGHT] * 3, (4,))
right("a linear after it, into another tensor", lambda x, w, v, d, out: into_the_first_rows(out, F.silu(L(x, w)) * L(x, v), d),
      ROWS, *[WEIGHT] * 3, (8, 4))  # fmt: skip
right(
    "a linear without gradient after it",
    lambda x, w, v, d: without_grad(F.silu(L(x, w)) * L(x, v), d),
    ROWS,
    *[WEIGHT] * 3,
)
right("a linear and its activation after it, as one", lambda x, w, v, d: linear_and_relu(F.silu(L(x, w)) * L(x, v), d),
      ROWS, *[WEIGHT] * 3)  # fmt: skip

miss("a gate without gradient, as one", "", lambda x, w, v: activated_without_grad(x, w) * L(x, v))
miss(
    "weights of one dimension", "no bias stands between", lambda x, w, v: F.silu(L(x, w)) * L(x, v), SQUARE, (4,), (4,)
)
right("times truth values", lambda x, w, v: F.silu(L(x, w) * torch.full((4,), True)) * L(x, v))
miss("times a truth value", "truth value", lambda x, w, v: F.silu(L(x, w)) * True * L(x, v))
miss("a part of a bias that starts where the rows end", "no bias of its features",
     lambda x, w, v, b: F.silu(L(x, w) + b[x.shape[0] : x.shape[0] + 4]) * L(x, v),
     (7, 5), (4, 5), (4, 5), (40,), dynamic=True)  # fmt: skip
miss("a bias of one number", "no bias of its features", lambda x, w, v, b: F.silu(L(x, w) + b) * L(x, v),
     SQUARE, WEIGHT, WEIGHT, (1,))  # fmt: skip
miss("a bias of each row of a batch", "no bias of its features", lambda x, w, v, b: F.silu(L(x, w) + b) * L(x, v),
     (2, 4, 4, 4), WEIGHT, WEIGHT, SQUARE)  # fmt: skip
miss("biases of the experts before", "another order than the experts",
     lambda x, w, v, b: F.silu(x @ w + b[1:, None]) * (x @ v), *[SQUARE] * 3, (5, 4))  # fmt: skip
miss("divided by nothing", "divided by 0", lambda x, w, v: F.silu(L(x, w)) / 0 * L(x, v))
miss(
    "divided by infinity",
    "divided by",
    lambda x, w, v: F.silu(L(x, w)) * (L(x, v) + L(x, w) / torch.tensor(float("inf"))),
)
right("to the power of true", lambda x, w, v: F.relu(L(x, w)) ** True * L(x, v))
right(
    "no product of a function of the gate and one of up", lambda x, w, v: (lambda g: F.silu(g) * (L(x, v) + g))(L(x, w))
)


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_left_alone_and_equal_to_eager(name: str) -> None:
    p = PROGRAMS[name]
    for grad in (False, True) if p.grad else (False,):
        inputs = tensors(*p.shapes, dtype=p.dtype, grad=grad)
        outcome = check(p.fn, *inputs, grad=grad, routes=ROUTES, dynamic=p.dynamic)
        sites = [site for site in outcome.sites if site.family == "gated_mlp"]
        fused = [site for site in sites if site.matched and site.route != "inductor"]
        if p.why is None:
            assert p.fused is None or bool(fused) == p.fused, outcome.sites
            continue
        assert not fused, outcome.sites
        if p.why:
            assert sites and all(p.why in str(site.reason) for site in sites), sites
        else:
            assert not sites, sites


class Seen(Exception):
    """Enough was read: without the GPU the program does not run."""


def found_on_a_gpu(fn: Callable[..., Any]) -> Found:
    """What is found in a program of bf16 tensors on a GPU, the one device where a product may have another dtype."""
    found: list[Found] = []

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
        found.append(Search([GATED_MLP]).found(Reading(gm, examples), GATED_MLP))
        raise Seen

    with FakeTensorMode():
        inputs = [torch.empty(16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Seen"):
            torch.compile(fn, backend=backend)(*inputs)
    return found[0]


def test_gate_and_up_of_different_dtypes_are_left_alone() -> None:
    wide = {"out_dtype": torch.float32}
    found = found_on_a_gpu(lambda x, w, v, d: F.silu(torch.mm(x, w, **wide)) * torch.mm(x, v))
    assert [miss.reason for _, miss in found.misses] == ["gate and up have different dtypes"]
    assert found_on_a_gpu(lambda x, w, v, d: F.silu(torch.mm(x, w)) * torch.mm(x, v)).sites


@pytest.mark.parametrize("wide", [False, True])
def test_a_linear_whose_result_has_another_dtype_is_none_of_the_site(wide: bool) -> None:
    how = {"out_dtype": torch.float32} if wide else {}
    (site,) = found_on_a_gpu(lambda x, w, v, d: torch.mm(F.silu(x @ w) * (x @ v), d, **how)).sites
    assert (site.down is None) == wide


def test_a_gate_without_gradient_is_no_projection_in_training() -> None:
    outcome = check(half_without_grad, *tensors(SQUARE, WEIGHT, WEIGHT, grad=True), grad=True, routes=ROUTES)
    assert not [site for site in outcome.sites if site.family == "gated_mlp" and site.matched]


@pytest.mark.parametrize("of_rows", [False, True])
def test_experts_whose_products_are_grouped(of_rows: bool) -> None:
    """Left alone with a reason. Grouped products know no fp64, so that what comes out is compared with eager's."""
    args = [x.to(torch.bfloat16) for x in tensors((16, 32), (4, 32, 64), (16, 64))]
    args = args if of_rows else args[:2]
    report = xfcompile.Report()

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
        report.extend(xfcompile.rewrite(gm, examples, {"strict": True, "routes": ROUTES}))
        return gm.forward

    out = torch.compile(grouped, backend=backend)(*args)
    (site,) = report.sites
    assert not site.matched and "grouped by expert" in str(site.reason)
    assert torch.equal(out, grouped(*args))
