"""Bias, activation and dropout: the two halves of a GPT's MLP, the MLP, and the block around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfcompile.bench import columns as c
from xfcompile.bench.job import Benchmark, Call, Check, Place, Row, Scale, Skip, Work

FAMILY = "bias-act-dropout"
INFER, TRAIN = "inference", "training step"
SIZES = {
    "gpu": ((16384, 1024, 4096), (16384, 768, 3072), (16384, 4096, 16384)),
    "cpu": ((1024, 768, 3072),),
    "quick": ((64, 32, 128),),
}
"""Rows, features in and out."""
P = 0.1
HEAD = 64
LENGTH = 1024


class Up(nn.Module):
    """dropout(gelu(linear))."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return F.dropout(F.gelu(self.linear(x)), P, self.training)


class Down(nn.Module):
    """residual + dropout(linear)."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, k)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(self.linear(x), P, self.training)


class MLP(nn.Module):
    """Layer norm, both, and the residual: GPT-2's."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(k), Up(k, n), Down(k, n)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x), x), x)


class Block(nn.Module):
    """GPT-2's block: attention by SDPA and the MLP."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.heads = max(k // HEAD, 1)
        self.norm, self.qkv, self.out, self.mlp = nn.LayerNorm(k), nn.Linear(k, 3 * k), nn.Linear(k, k), MLP(k, n)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        rows = x.view(-1, min(LENGTH, x.shape[0]), x.shape[1])
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(rows)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        rows = rows + F.dropout(self.out(y), P, self.training)
        return self.mlp(rows.view_as(x), x)


PROGRAMS: dict[str, Callable[[int, int], nn.Module]] = {"up": Up, "down": Down, "mlp": MLP, "block": Block}


def rows(scale: Scale) -> list[Row]:
    return [
        Row(name, mode, (("M", m), ("K", k), ("N", n)))
        for m, k, n in SIZES[scale]
        for mode in (TRAIN, INFER)
        for name in PROGRAMS
    ]


def prepare(row: Row, place: Place) -> Work:
    m, k, n = row.size("M"), row.size("K"), row.size("N")
    train = row.mode == TRAIN
    model = PROGRAMS[row.name](k, n).to(place.device, place.dtype).train(train)
    x = torch.randn(m, n if row.name == "down" else k, device=place.device, dtype=place.dtype, requires_grad=train)
    residual = torch.randn(m, k, device=place.device, dtype=place.dtype, requires_grad=train)
    dout = torch.randn(m, n if row.name == "up" else k, device=place.device, dtype=place.dtype)

    def clear() -> None:
        x.grad = residual.grad = None
        model.zero_grad(set_to_none=True)

    def step(fn: Callable[..., Tensor]) -> Call:
        if not train:
            return lambda: fn(x, residual)

        def run() -> None:
            clear()
            fn(x, residual).backward(dout)

        return run

    def way(column: str) -> Call:
        if column == c.FLOOR:
            return _floor(model, m, x.detach(), train)
        return step(c.compiled(model, column, FAMILY))

    def exact() -> Sequence[Tensor]:
        wide = PROGRAMS[row.name](k, n).to(place.device, torch.double).eval()
        wide.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
        return [wide(x.double(), residual.double())]

    def seen(outcome: Any) -> Sequence[Tensor]:
        return [outcome]

    check = Check(exact, lambda: [model(x, residual)], seen)
    return Work(
        way,
        "it draws random numbers, each column its own" if train else check,
        grad=train,
        clear=clear,
        unchecked={c.FLOOR: "computes nothing but products"},
    )


def _floor(model: nn.Module, m: int, x: Tensor, train: bool) -> Call:
    """The products of the linears alone: y, and in training dx and dw."""
    if isinstance(model, Block):
        raise Skip("attention is in it too")
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    given = [(torch.randn(m, w.shape[1]).to(x), w, torch.randn(m, w.shape[0]).to(x)) for w in weights]

    def run() -> None:
        with torch.no_grad():
            for a, w, dout in given:
                torch.mm(a, w.t())
                if train:
                    torch.mm(dout, w)
                    torch.mm(dout.t(), a)

    return run


BENCHMARK = Benchmark(
    "bias-act-dropout",
    "bias, activation and dropout",
    (c.EAGER, c.INDUCTOR, c.MAX, c.FLOOR, c.XFORMERS, c.XFORMERS_MAX, "xformers-triton", "xformers-epilogue"),
    rows,
    prepare,
)
