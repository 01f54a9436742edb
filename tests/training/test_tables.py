"""Biases that are rows of a learned table in 16 bits (Swin's relative positions): their gradients are added in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step import OPTIONS, check_on_average, numbers
from torch import Tensor, fx

import xfcompile

HEADS, SIDE = 2, 5
KEYS = SIDE * SIDE


def relative() -> Tensor:
    """[KEYS, KEYS]: of two places in a window, the row of a table that says how far they are apart."""
    places = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
    apart = places[:, :, None] - places[:, None, :] + SIDE - 1
    return apart[0] * (2 * SIDE - 1) + apart[1]


INDEX = relative()
ROWS = (2 * SIDE - 1) ** 2


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def swin(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    bias = table[INDEX.view(-1)].view(KEYS, KEYS, -1).permute(2, 0, 1).contiguous()
    return attended(q, k, v, bias[None])


def looked_up(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return attended(q, k, v, F.embedding(INDEX, table).permute(2, 0, 1)[None])


def by_head(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The table is [heads, rows]."""
    return attended(q, k, v, table.reshape(HEADS, ROWS)[:, INDEX][None])


def written_out(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    bias = table[INDEX].permute(2, 0, 1)
    return (q @ k.mT * 0.25 + bias.unsqueeze(0)).softmax(-1) @ v


def scaled(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Swin V2: the table is computed, and each number of the bias of one of its."""
    bias = (torch.tanh(table) * 2)[INDEX.view(-1)].view(KEYS, KEYS, HEADS).permute(2, 0, 1).contiguous()
    return attended(q, k, v, (16 * torch.sigmoid(bias)).unsqueeze(0))


def cast(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Computed with in fp32, and added in the dtype of the scores."""
    bias = 3 - table[INDEX].permute(2, 0, 1).float().clamp(-1.5, 1) / 2
    return (q @ k.mT * 0.25 + bias.to(q.dtype)).softmax(-1) @ v


TAKEN = [swin, looked_up, written_out, scaled, cast]


def padded(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A row of padding has no gradient."""
    return attended(q, k, v, F.embedding(INDEX, table, padding_idx=3).permute(2, 0, 1)[None])


def by_frequency(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    bias = F.embedding(INDEX, table, scale_grad_by_freq=True)
    return attended(q, k, v, bias.permute(2, 0, 1)[None])


def two_tables(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Of two numbers of the table, at places of their own."""
    bias = table[INDEX] * table[INDEX.mT]
    return attended(q, k, v, bias.permute(2, 0, 1)[None])


def chosen(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Rows that a mask chooses, as many as there are keys."""
    keep = torch.arange(ROWS, device=table.device) < KEYS
    return attended(q, k, v, table[keep].mT[None, :, None])


def changed(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """What the table holds by the time of the attention is not what was read."""
    held = table * 1.0
    bias = held[INDEX].permute(2, 0, 1)[None]
    held.mul_(3.0)
    return attended(q, k, v, bias) + held.sum()


LEFT = [padded, by_frequency, changed, chosen, two_tables]


def draw(dtype: torch.dtype, number: int = 0) -> list[Tensor]:
    made = [numbers(2, HEADS, KEYS, 16, seed=3 * number + n, grad=False) for n in range(3)]
    made.append(numbers(ROWS, HEADS, seed=number, grad=False))
    return [x.to(dtype).requires_grad_() for x in made]


def wide(program: Callable[..., Any], dtype: torch.dtype, training: bool = True) -> list[fx.Node]:
    """The reads of a table of another dtype than the program's, in the graph that it is rewritten to."""
    found: list[fx.Node] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        xfcompile.rewrite(gm, example_inputs, OPTIONS["kernel"])
        reads = [n for n in gm.graph.nodes if n.target is torch.ops.aten.index.Tensor]
        found.extend(n for n in reads if n.meta["example_value"].dtype != dtype)
        return gm

    torch._dynamo.reset()
    x = draw(dtype)
    with torch.set_grad_enabled(training):
        torch.compile(program, backend=backend, fullgraph=True)(*x)
    return found


@pytest.mark.parametrize("program", [*TAKEN, by_head, *LEFT], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_tables(program: Callable[..., Any], dtype: torch.dtype, interpreter: None) -> None:
    check_on_average(program, [draw(dtype, n) for n in range(3)], "kernel")


@pytest.mark.parametrize("program", TAKEN, ids=lambda f: f.__name__)
def test_tables_of_16_bits_are_read_in_fp32(program: Callable[..., Any], interpreter: None) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        (read,) = wide(program, dtype)
        assert read.meta["example_value"].dtype == torch.float32
    assert not wide(program, torch.float32)
    assert not wide(program, torch.bfloat16, training=False)


@pytest.mark.parametrize("program", LEFT, ids=lambda f: f.__name__)
def test_what_is_no_read_of_a_table_as_it_is_stays(program: Callable[..., Any], interpreter: None) -> None:
    assert not wide(program, torch.bfloat16)


def test_gradients_lose_nothing_in_a_sum_of_many(interpreter: None) -> None:
    """625 places read the same element: of a sum of as many in bf16, as eager has it on a CPU, little would be left."""
    x = draw(torch.bfloat16)

    def one_row(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attended(q, k, v, table[INDEX * 0].permute(2, 0, 1)[None] * torch.arange(KEYS).div(8).bfloat16())

    def by_table(program: Callable[..., Any], inputs: Sequence[Tensor]) -> Tensor:
        out = program(*inputs)
        return torch.autograd.grad(out.square().sum(), inputs[3])[0]

    exact = by_table(lambda q, k, v, t: attended(q, k, v, t[INDEX * 0].permute(2, 0, 1)[None] * torch.arange(KEYS) / 8),
                     [y.detach().double().requires_grad_() for y in x])  # fmt: skip
    torch._dynamo.reset()
    ours = by_table(torch.compile(one_row, backend=lambda gm, inputs: _rewritten(gm, inputs)), x)
    error = (ours.double() - exact)[0].abs() / exact[0].abs()
    assert error.max() < 0.05


def _rewritten(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    from torch._dynamo.backends.debugging import aot_eager

    xfcompile.rewrite(gm, inputs, OPTIONS["kernel"])
    return aot_eager(gm, list(inputs))
