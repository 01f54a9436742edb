"""Gated MLPs as programs of plain PyTorch: shapes of their inputs, and what is to be read of them."""

# ruff: noqa: E501 (one line a program, so that the table can be read as one)

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equivalence
import torch
import torch.nn.functional as F
from torch import Tensor

X, W, PACKED, B, DOWN = (2, 5, 8), (12, 8), (24, 8), (12,), (6, 12)
"""An input, a weight of gate or up, one of both, a bias, and a weight after them."""

ROUTES = {"gated_mlp": "triton"}

check = functools.partial(equivalence.check, family="gated_mlp")
rewriting = functools.partial(equivalence.rewriting, family="gated_mlp")


@dataclass(frozen=True)
class Spelling:
    """A program and the shapes of its inputs; `layout` and the formula that are read of it (None: any)."""

    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    formula: str | None = "gate*up*sigmoid(gate)"
    layout: str = "separate"
    dtype: torch.dtype = torch.float32
    sites: int = 1
    dynamic: bool = False


SPELLINGS: dict[str, Spelling] = {}


def spell(name: str, fn: Callable[..., Any], *shapes: tuple[int, ...], **about: Any) -> None:
    assert name not in SPELLINGS
    SPELLINGS[name] = Spelling(fn, shapes or (X, W, W), **about)


# -- projections ---------------------------------------------------------------------------------------------------

PROJECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "@ T": lambda x, w: x @ w.T,
    "@ t()": lambda x, w: x @ w.t(),
    "@ transpose": lambda x, w: x @ w.transpose(0, 1),
    "@ permute": lambda x, w: torch.matmul(x, w.permute(1, 0)),
    "method matmul": lambda x, w: x.matmul(w.mT),
    "einsum": lambda x, w: torch.einsum("bsd,fd->bsf", x, w),
    "einsum with ellipsis": lambda x, w: torch.einsum("...d,fd->...f", x, w),
    "einsum of weights first": lambda x, w: torch.einsum("fd,bsd->bsf", w, x),
    "einsum of sublists": lambda x, w: torch.einsum(x, [0, 1, 2], w, [3, 2], [0, 1, 3]),
    "mm of flattened": lambda x, w: torch.mm(x.view(-1, 8), w.t()).view(2, 5, 12),
    "bmm of an expanded weight's rows": lambda x, w: torch.mm(x.flatten(0, 1), w.T).unflatten(0, (2, 5)),
    "weights first": lambda x, w: (w @ x.mT).mT,
    "tensordot-like": lambda x, w: (x.reshape(10, 8) @ w.T).reshape(2, 5, 12),
    "of one more axis": lambda x, w: F.linear(x[:, None], w)[:, 0],
    "useless casts": lambda x, w: F.linear(x.float(), w.to(torch.float32)).type_as(x),
    "contiguous, cloned": lambda x, w: F.linear(x.contiguous(), w).clone(),
    "unsqueezed and squeezed": lambda x, w: F.linear(x, w).unsqueeze(0).squeeze(0),
}
for _name, _project in PROJECTIONS.items():
    spell(f"projections: {_name}", lambda x, w, v, p=_project: F.silu(p(x, w)) * p(x, v))
spell("projections of two spellings", lambda x, w, v: F.silu(x @ w.T) * F.linear(x, v))
spell(
    "projections of a view of the input",
    lambda x, w, v: F.silu(F.linear(x.view(10, 8), w)) * F.linear(x, v).view(10, 12),
)
spell("weights [in, out]", lambda x, w, v: F.silu(x @ w) * (x @ v), X, (8, 12), (8, 12))
spell(
    "weights [in, out], einsum",
    lambda x, w, v: F.silu(torch.einsum("bsd,df->bsf", x, w)) * (x @ v),
    X,
    (8, 12),
    (8, 12),
)
spell("two dimensions", lambda x, w, v: F.silu(x @ w.T) * F.linear(x, v), (5, 8), W, W)
spell("one dimension", lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v), (8,), W, W)
spell("four dimensions", lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v), (2, 1, 3, 8), W, W)
spell("one row", lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v), (1, 1, 8), W, W)
spell("a transposed input", lambda x, w, v: F.silu(F.linear(x.mT, w)) * F.linear(x.mT, v), (2, 8, 5), W, W)
spell(
    "a permuted input, by einsum",
    lambda x, w, v: F.silu(torch.einsum("dsb,fd->bsf", x, w)) * torch.einsum("dsb,fd->bsf", x, v),
    (8, 5, 2), W, W,
)  # fmt: skip
spell("dynamic rows", lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v), dynamic=True)
spell("dynamic rows, packed", lambda x, w: F.silu(F.linear(x, w)[..., :12]) * F.linear(x, w)[..., 12:], X, PACKED,
      layout="gate first", dynamic=True)  # fmt: skip

# -- biases --------------------------------------------------------------------------------------------------------

BIASED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear's": lambda x, w, b: F.linear(x, w, b),
    "added": lambda x, w, b: F.linear(x, w) + b,
    "added first": lambda x, w, b: b + x @ w.T,
    "added in place": lambda x, w, b: F.linear(x, w).add_(b),
    "iadd": lambda x, w, b: _iadd(x @ w.T, b),
    "of shape [1, n]": lambda x, w, b: torch.add(x @ w.T, b[None]),
    "of shape [1, 1, n]": lambda x, w, b: x @ w.T + b.view(1, 1, -1),
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(10, 8), w.T).view(2, 5, 12),
    "addmm method": lambda x, w, b: b.addmm(x.reshape(10, 8), w.T).view(2, 5, 12),
    "expanded": lambda x, w, b: x @ w.T + b.expand(2, 5, 12),
}


def _iadd(y: Tensor, b: Tensor) -> Tensor:
    y += b
    return y


for _name, _project3 in BIASED.items():
    spell(f"biases: {_name}", lambda x, w, v, b, c, p=_project3: F.silu(p(x, w, b)) * p(x, v, c), X, W, W, B, B)
spell("a bias of the gate only", lambda x, w, v, b: F.silu(F.linear(x, w, b)) * F.linear(x, v), X, W, W, B)
spell("a bias of up only", lambda x, w, v, b: F.silu(F.linear(x, w)) * F.linear(x, v, b), X, W, W, B)
spell("one bias for both", lambda x, w, v, b: F.silu(F.linear(x, w, b)) * F.linear(x, v, b), X, W, W, B)
spell(
    "a bias in the other dtype's cast",
    lambda x, w, v, b: F.silu(F.linear(x, w) + b.float()) * F.linear(x, v),
    X,
    W,
    W,
    B,
)

# -- packed --------------------------------------------------------------------------------------------------------


def pair(p: Any) -> Tensor:
    gate, up = p
    return F.silu(gate) * up


PACKINGS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "chunk": ("gate first", lambda p: p.chunk(2, -1)),
    "chunk of a positive dim": ("gate first", lambda p: p.chunk(2, dim=2)),
    "torch.chunk": ("gate first", lambda p: torch.chunk(p, 2, dim=-1)),
    "chunk, reversed": ("up first", lambda p: reversed(p.chunk(2, -1))),
    "split": ("gate first", lambda p: p.split(12, -1)),
    "split of sizes": ("gate first", lambda p: p.split([12, 12], dim=-1)),
    "tensor_split": ("gate first", lambda p: p.tensor_split(2, -1)),
    "slices": ("gate first", lambda p: (p[..., :12], p[..., 12:])),
    "slices, reversed": ("up first", lambda p: (p[:, :, 12:], p[:, :, :12])),
    "narrow": ("gate first", lambda p: (p.narrow(-1, 0, 12), p.narrow(-1, 12, 12))),
    "unflatten and unbind": ("gate first", lambda p: p.unflatten(-1, (2, 12)).unbind(-2)),
    "view and select": ("up first", lambda p: (p.view(2, 5, 2, 12)[:, :, 1], p.view(2, 5, 2, 12)[:, :, 0])),
    "every other": ("gate even", lambda p: (p[..., ::2], p[..., 1::2])),
    "every other, reversed": ("up even", lambda p: (p[..., 1::2], p[..., ::2])),
    "view and unbind of pairs": ("gate even", lambda p: p.view(2, 5, 12, 2).unbind(-1)),
}
for _name, (_layout, _parts) in PACKINGS.items():
    spell(f"packed: {_name}", lambda x, w, p=_parts: pair(p(F.linear(x, w))), X, PACKED, layout=_layout)
    spell(f"packed with a bias: {_name}", lambda x, w, b, p=_parts: pair(p(F.linear(x, w, b))), X, PACKED, (24,),
          layout=_layout)  # fmt: skip
spell("packed, a bias of each half", lambda x, w, b, c: pair((F.linear(x, w)[..., :12] + b, F.linear(x, w)[..., 12:] + c)),
      X, PACKED, B, B, layout="gate first")  # fmt: skip
spell("packed, [in, out]", lambda x, w: pair((x @ w).chunk(2, -1)), X, (8, 24), layout="gate first")
spell("slices of one weight", lambda x, w: F.silu(F.linear(x, w[:12])) * F.linear(x, w[12:]), X, PACKED)
spell(
    "F.glu", lambda x, w, b: F.glu(F.linear(x, w, b)), X, PACKED, (24,), layout="up first", formula="up*sigmoid(gate)"
)
spell(
    "F.glu of a positive dim",
    lambda x, w: F.glu(F.linear(x, w), 2),
    X,
    PACKED,
    layout="up first",
    formula="up*sigmoid(gate)",
)
spell("nn.GLU", lambda x, w: torch.nn.GLU()(F.linear(x, w)), X, PACKED, layout="up first", formula="up*sigmoid(gate)")

# -- products and orders -------------------------------------------------------------------------------------------

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "*": lambda a, u: a * u,
    "reversed": lambda a, u: u * a,
    "torch.mul": lambda a, u: torch.mul(a, u),
    "torch.multiply": lambda a, u: torch.multiply(u, other=a),
    "useless cast": lambda a, u: (a * u).to(u.dtype),
}
for _name, _product in PRODUCTS.items():
    spell(f"product: {_name}", lambda x, w, v, p=_product: p(F.silu(F.linear(x, w)), F.linear(x, v)))
spell("up is computed first", lambda x, w, v: (lambda u: F.silu(F.linear(x, w)) * u)(F.linear(x, v)))
spell("contiguous parts", lambda x, w: (lambda g, u: F.silu(g.contiguous()) * u.contiguous())(*F.linear(x, w).chunk(2, -1)),
      X, PACKED, layout="gate first")  # fmt: skip
spell("contiguous result", lambda x, w, v: (F.silu(F.linear(x, w)) * F.linear(x, v)).contiguous() + 1, formula=None)
spell("result viewed", lambda x, w, v: (F.silu(F.linear(x, w)) * F.linear(x, v)).view(2, 5, 3, 4))
spell("result transposed", lambda x, w, v: (F.silu(F.linear(x, w)) * F.linear(x, v)).mT)

# -- activations ---------------------------------------------------------------------------------------------------

ROOT = math.sqrt(2 / math.pi)
GELU_TANH = "gate*up*(tanh(0.0356774*gate**3 + 0.797885*gate) + 1)/2"
GELU = "gate*up*(erf(0.707107*gate) + 1)/2"
QUICK = "gate*up*sigmoid(1.702*gate)"
RELU = "up*Where(gate <= 0, 0, gate)"

ACTIVATIONS: dict[str, tuple[str | None, Callable[[Tensor], Tensor]]] = {
    "silu in place": ("gate*up*sigmoid(gate)", lambda g: F.silu(g, inplace=True)),
    "nn.SiLU": ("gate*up*sigmoid(gate)", lambda g: torch.nn.SiLU()(g)),
    "silu written out": ("gate*up*sigmoid(gate)", lambda g: g * torch.sigmoid(g)),
    "silu as a fraction": ("gate*up*sigmoid(gate)", lambda g: g / (1 + torch.exp(-g))),
    "silu by a reciprocal": ("gate*up*sigmoid(gate)", lambda g: g * torch.reciprocal(1 + (-g).exp())),
    "silu by a power": ("gate*up*sigmoid(gate)", lambda g: g * (torch.exp(g.neg()) + 1) ** -1),
    "gelu": (GELU, lambda g: F.gelu(g)),
    "gelu, approximate='none'": (GELU, lambda g: F.gelu(g, approximate="none")),
    "gelu written out": (GELU, lambda g: g * 0.5 * (1 + torch.erf(g / math.sqrt(2)))),
    "gelu written out otherwise": (GELU, lambda g: 0.5 * g * (1.0 + torch.erf(g * 0.7071067811865476))),
    "gelu, approximate='tanh'": (GELU_TANH, lambda g: F.gelu(g, approximate="tanh")),
    "NewGELU": (GELU_TANH, lambda g: 0.5 * g * (1 + torch.tanh(ROOT * (g + 0.044715 * torch.pow(g, 3.0))))),
    "NewGELU of powers by products": (None, lambda g: g * 0.5 * (1 + (g * ROOT * (1 + 0.044715 * g * g)).tanh())),
    "relu": (RELU, lambda g: F.relu(g)),
    "relu in place": (RELU, lambda g: g.relu_()),
    "relu, clamped": ("up*Where(gate < 0, 0, gate)", lambda g: g.clamp(min=0)),
    "relu squared": ("up*Where(gate <= 0, 0, gate)**2", lambda g: F.relu(g).square()),
    "relu squared by a power": ("up*Where(gate <= 0, 0, gate)**2", lambda g: torch.relu(g) ** 2),
    "relu squared by a product": ("up*Where(gate <= 0, 0, gate)**2", lambda g: g.relu() * g.relu()),
    "sigmoid": ("up*sigmoid(gate)", lambda g: torch.sigmoid(g)),
    "sigmoid method": ("up*sigmoid(gate)", lambda g: g.sigmoid()),
    "tanh": ("up*tanh(gate)", lambda g: g.tanh()),
    "quick gelu": (QUICK, lambda g: g * torch.sigmoid(1.702 * g)),
    "quick gelu, otherwise": (QUICK, lambda g: torch.sigmoid(g * 1.702) * g),
    "identity": ("gate*up", lambda g: g),
    "relu6": ("up*Where(gate >= 6, 6, Where(gate <= 0, 0, gate))", lambda g: F.relu6(g)),
    "leaky relu": ("up*Where(gate > 0, gate, 0.01*gate)", lambda g: F.leaky_relu(g)),
    "silu in fp32": ("gate*up*sigmoid(gate)", lambda g: F.silu(g.float()).to(g.dtype)),
    "clamped silu": ("up*sigmoid(Where(gate > 2, 2, gate))*Where(gate > 2, 2, gate)", lambda g: F.silu(g.clamp(max=2))),
    "constants": ("3*gate*up*sigmoid(gate)/2", lambda g: 1.5 * F.silu(g)),
    "a constant tensor": ("2*gate*up*sigmoid(gate)", lambda g: F.silu(g) * torch.tensor(2.0)),
}
for _name, (_formula, _act) in ACTIVATIONS.items():
    spell(f"activation: {_name}", lambda x, w, v, f=_act: f(F.linear(x, w)) * F.linear(x, v), formula=_formula)
for _name in ("silu in place", "gelu", "gelu, approximate='tanh'", "silu in fp32", "relu squared"):
    _formula, _act = ACTIVATIONS[_name]
    spell(f"activation in bf16: {_name}", lambda x, w, v, f=_act: f(F.linear(x, w)) * F.linear(x, v),
          formula=_formula, dtype=torch.bfloat16)  # fmt: skip


def gpt_oss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return gpt_oss_of(F.linear(x, w, b))


def gpt_oss_of(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=7.0)
    up = up.clamp(min=-7.0, max=7.0)
    glu = gate * torch.sigmoid(gate * 1.702)
    return (up + 1) * glu


OSS = "(Where(Where(up < -7, -7, up) > 7, 7, Where(up < -7, -7, up)) + 1)*sigmoid(1.702*Where(gate > 7, 7, gate))*Where(gate > 7, 7, gate)"  # fmt: skip
spell("GPT-OSS", gpt_oss, X, PACKED, (24,), layout="gate even", formula=OSS)
spell("up + 1", lambda x, w, v: F.silu(F.linear(x, w)) * (F.linear(x, v) + 1), formula="gate*(up + 1)*sigmoid(gate)")
spell("1 - up", lambda x, w, v: F.silu(F.linear(x, w)) * (1 - F.linear(x, v)), formula="gate*(1 - up)*sigmoid(gate)")
spell("scaled after", lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v) * 0.25, formula="gate*up*sigmoid(gate)/4")
spell("divided after", lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v) / 4, formula="gate*up*sigmoid(gate)/4")
spell("up times gate times its sigmoid", lambda x, w, v: (lambda g: F.linear(x, v) * g * g.sigmoid())(F.linear(x, w)))
spell("clamped after", lambda x, w, v: (F.silu(F.linear(x, w)) * F.linear(x, v)).clamp(-1, 1), formula=None)
spell("activated after the product too", lambda x, w, v: torch.tanh(F.silu(F.linear(x, w)) * F.linear(x, v)))
spell("two activations", lambda x, w, v: torch.sigmoid(F.linear(x, w)) * torch.tanh(F.linear(x, v)), formula=None)
spell("product in fp32, cast back", lambda x, w, v: (F.silu(F.linear(x, w).float()) * F.linear(x, v).float()).to(x.dtype),
      dtype=torch.bfloat16)  # fmt: skip
spell("product stays in fp32", lambda x, w, v: F.silu(F.linear(x, w).float()) * F.linear(x, v), dtype=torch.float16)

# -- experts, layers, and what comes after -------------------------------------------------------------------------


def llama4(x: Tensor, w: Tensor) -> Tensor:
    gate, up = torch.bmm(x, w).chunk(2, dim=-1)
    return up * F.silu(gate)


spell("experts, packed", llama4, (3, 5, 8), (3, 8, 24), layout="gate first")
spell("experts", lambda x, w, v: F.silu(x @ w.mT) * (x @ v.mT), (3, 5, 8), (3, 12, 8), (3, 12, 8))
spell("experts, einsum", lambda x, w, v: F.silu(torch.einsum("etd,edf->etf", x, w)) * torch.einsum("etd,edf->etf", x, v),
      (3, 5, 8), (3, 8, 12), (3, 8, 12))  # fmt: skip
spell("experts with biases", lambda x, w, v, b, c: F.silu(torch.baddbmm(b[:, None], x, w)) * (torch.bmm(x, v) + c[:, None]),
      (3, 5, 8), (3, 8, 12), (3, 8, 12), (3, 12), (3, 12))  # fmt: skip
spell("experts with one bias", lambda x, w, v, b: F.silu(torch.bmm(x, w) + b) * torch.bmm(x, v),
      (3, 5, 8), (3, 8, 12), (3, 8, 12), (12,))  # fmt: skip


def picked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """transformers' batched_mm: a weight and a bias of its expert for each row."""
    expert = torch.tensor([0, 2, 1, 1, 0])
    return gpt_oss_of(torch.bmm(w[expert], x.unsqueeze(-1)).squeeze(-1) + b[expert])


spell("experts picked for each row", picked, (5, 8), (3, 24, 8), (3, 24), layout="gate even", formula=OSS)
spell("a linear after it", lambda x, w, v, d: F.linear(F.silu(F.linear(x, w)) * F.linear(x, v), d), X, W, W, DOWN)
spell("a linear with a bias after it", lambda x, w, v, d, e: F.linear(F.silu(F.linear(x, w)) * F.linear(x, v), d, e),
      X, W, W, DOWN, (6,))  # fmt: skip
spell("a product after it", lambda x, w, v, d: (F.silu(F.linear(x, w)) * F.linear(x, v)) @ d, X, W, W, (12, 6))
spell(
    "a residual after it", lambda x, w, v, d: x + F.linear(F.silu(F.linear(x, w)) * F.linear(x, v), d), X, W, W, (8, 12)
)
spell("a norm between", lambda x, w, v, d: F.linear(F.layer_norm(F.silu(F.linear(x, w)) * F.linear(x, v), (12,)), d),
      X, W, W, DOWN)  # fmt: skip
spell(
    "dropout of rate 0",
    lambda x, w, v, d: F.linear(F.dropout(F.silu(F.linear(x, w)) * F.linear(x, v), 0.0), d),
    X,
    W,
    W,
    DOWN,
)
spell("dropout, evaluated", lambda x, w, v: F.dropout(F.silu(F.linear(x, w)) * F.linear(x, v), 0.5, training=False))


def layers(x: Tensor, w: Tensor, v: Tensor, d: Tensor) -> Tensor:
    for _ in range(3):
        x = x + F.linear(F.silu(F.linear(x, w)) * F.linear(x, v), d)
    return x


spell("layers", layers, X, W, W, (8, 12), sites=3)


def mutated_after(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = F.silu(F.linear(x, w)) * F.linear(x, v)
    y = out * 2
    out.add_(1)
    return y, out


spell("the result is changed after", mutated_after)
