"""Biases of relative positions become vectors: what must, what must not, and that no number changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import Outcome, check, tensors
from torch import Tensor

from xfcompile import plan
from xfcompile.backend import xformers
from xfcompile.diagonal import _Diagonal
from xfcompile.families import attention
from xfcompile.score import I
from xfcompile.trace import Meta
from xfcompile.values import Value, Values

HEADS, BUCKETS = 3, 32


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def bucket(position: Tensor) -> Tensor:
    """T5's: exact near, logarithmic far. Its borders lie on integers, so that one rounding more is another bucket."""
    n = position.abs()
    large = 8 + (torch.log(n.clamp(min=1).float() / 8) / math.log(16) * 8).to(torch.int64)
    return torch.where(position > 0, 16, 0) + torch.where(n < 8, n, torch.min(large, torch.full_like(large, 15)))


def distances(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(k.shape[-2])[None, :] - torch.arange(q.shape[-2])[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).softmax(-1) @ v


def gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return attend(q, k, v, table[bucket(distances(q, k))].permute(2, 0, 1))


def embedded(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return attend(q, k, v, F.embedding(bucket(distances(q, k)), table).permute(2, 0, 1).unsqueeze(0))


def masked(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    position = distances(q, k)
    bias = F.embedding(bucket(position), table).permute(2, 0, 1)[None]
    return attend(q, k, v, bias + torch.where(position > 0, torch.finfo(q.dtype).min, 0.0))


def clamped(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return attend(q, k, v, table.T[:, distances(q, k).clamp(-12, 12) + 12])


def of_queries_only(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The other sign, a shifted beginning, and a scale after the gather."""
    position = torch.arange(q.shape[-2])[:, None] + 3 - torch.arange(k.shape[-2])
    return attend(q, k, v, 0.5 * table[position.abs().clamp(max=20)].permute(2, 0, 1))


def computed(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Without a table: a number of each head times the logarithm of a distance."""
    far = torch.log1p(distances(q, k).abs().to(q.dtype))
    return attend(q, k, v, -table[0][:, None, None].abs() * far)


VECTORS: list[Callable[..., Tensor]] = [gathered, embedded, masked, clamped, of_queries_only, computed]


def grid(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Distances on a grid of 8 columns: j - i does not tell them."""
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    position = (i // 8 - j // 8).abs() + (i % 8 - j % 8).abs()
    return attend(q, k, v, table[position.clamp(max=31)].permute(2, 0, 1))


def sums(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    position = torch.arange(q.shape[-2])[:, None] + torch.arange(k.shape[-2])
    return attend(q, k, v, table[position % 32].permute(2, 0, 1))


def twice_as_far(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    position = 2 * torch.arange(k.shape[-2])[None, :] - torch.arange(q.shape[-2])[:, None]
    return attend(q, k, v, table[position.abs() % 32].permute(2, 0, 1))


def given(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Positions that are data."""
    position = torch.arange(k.shape[-2]) * table[0, 0].abs().ceil().long()
    return attend(q, k, v, table[(position[None, :] - position[: q.shape[-2], None]).abs() % 32].permute(2, 0, 1))


def rewritten(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A bias of distances, but for one element that is written into it."""
    bias = table[bucket(distances(q, k))].permute(2, 0, 1).contiguous()
    bias[:, 5, 7] = 9.0
    return attend(q, k, v, bias)


def embedded_grid(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    return attend(q, k, v, F.embedding((i // 8 - j // 8).abs(), table).permute(2, 0, 1))


def in_two_tables(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A row and a column of each head's table: two indices with another between them, whose results come first."""
    near = distances(q, k).clamp(-12, 12) + 12
    heads = torch.stack([table, table.flip(0), table * 2])  # [heads, 32, 3]
    return attend(q, k, v, heads.transpose(0, 1)[near, :, distances(q, k).clamp(-1, 1) + 1].permute(2, 0, 1))


def by_half(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    bias = table[bucket(distances(q, k))]
    return attend(q, k, v, torch.add(bias, table[distances(q, k).abs() % 32], alpha=0.5).permute(2, 0, 1))


def rewritten_after(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The table holds other numbers by now."""
    table = table * 1
    bias = table[bucket(distances(q, k))].permute(2, 0, 1)
    table.zero_()
    return attend(q, k, v, bias + table[0, 0])


DENSE: list[Callable[..., Tensor]] = [
    grid, sums, twice_as_far, given, rewritten, embedded_grid, in_two_tables, by_half, rewritten_after,
]  # fmt: skip


def run(program: Callable[..., Tensor], queries: int, keys: int, **how: Any) -> Outcome:
    q, k, v = tensors((2, HEADS, queries, 16), (2, HEADS, keys, 16), (2, HEADS, keys, 16))
    (table,) = tensors((BUCKETS, HEADS), seed=1)
    with torch.no_grad():
        outcome = check(program, q, k, v, table, routes={"attention": "triton"}, **how)
    assert [site.route for site in outcome.sites] == ["triton"], outcome.sites
    return outcome


@pytest.mark.parametrize(("queries", "keys"), [(150, 150), (70, 170)])
@pytest.mark.parametrize("program", VECTORS, ids=lambda f: f.__name__)
def test_a_bias_of_distances_is_a_vector(program: Callable[..., Tensor], queries: int, keys: int) -> None:
    assert run(program, queries, keys).squares(queries, keys) == []


@pytest.mark.parametrize("program", [embedded, masked], ids=lambda f: f.__name__)
def test_lengths_that_are_symbols(program: Callable[..., Tensor]) -> None:
    def projected(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], HEADS, 16).transpose(1, 2) for t in (x, y, y.flip(0)))
        return program(q, k, v, table)

    x, y, table = tensors((2, 70, HEADS * 16), (2, 170, HEADS * 16), (BUCKETS, HEADS))
    with torch.no_grad():
        outcome = check(projected, x, y, table, routes={"attention": "triton"}, dynamic=True)
    assert [site.route for site in outcome.sites] == ["triton"], outcome.sites
    (gm,) = outcome.programs
    (gather,) = (n for n in gm.graph.nodes if "embedding" in str(n.target) or "aten.index" in str(n.target))
    assert len(gather.meta["val"].shape[-1].node.expr.free_symbols) == 2, "queries + keys - 1"


@pytest.mark.parametrize("program", DENSE, ids=lambda f: f.__name__)
def test_other_biases_stay_as_they_are(program: Callable[..., Tensor]) -> None:
    assert run(program, 50, 60).squares(50, 60)


class Known(_Diagonal):
    """Knows how to compute anything but an indexed tensor."""

    def __init__(self) -> None:
        pass

    def plan(self, value: Value, index: Any) -> Any:
        return lambda: None

    def _gather(self, table: Value, index: list[Any]) -> Any:
        return lambda: None


@pytest.mark.parametrize("dtypes, planned", [([torch.int64], True), ([torch.bool], False), ([], False)])
def test_only_whole_numbers_index_a_table_of_distances(dtypes: list[torch.dtype], planned: bool) -> None:
    values = Values()
    table, rows = (
        Meta((8,), (1,), dtype, torch.device("cpu")) for dtype in (torch.float32, *(dtypes or [torch.int64]))
    )
    indices = (values.leaf(rows),) if dtypes else (None,)
    value = values.intern("index", {"self": values.leaf(table), "indices": indices}, table)
    assert (Known()._indexed(value, (I,)) is not None) == planned


def test_one_query_has_as_many_distances_as_keys() -> None:
    outcome = run(embedded, 1, 20)
    assert not any("aten.index" in str(n.target) for n in outcome.programs[0].graph.nodes)


def test_layers_share_one_vector() -> None:
    def two(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table[bucket(distances(q, k))].permute(2, 0, 1)
        return attend(attend(q, k, v, bias), k, v, bias)

    q, k, v = tensors((2, HEADS, 150, 16), (2, HEADS, 150, 16), (2, HEADS, 150, 16))
    (table,) = tensors((BUCKETS, HEADS), seed=1)
    with torch.no_grad():
        outcome = check(two, q, k, v, table, routes={"attention": "triton"})
    (gm,) = outcome.programs
    names = [str(n.target) for n in gm.graph.nodes]
    assert sum("aten.index" in name for name in names) == 1
    assert sum("attention_tiles" in name for name in names) == 1
    assert sum("xfcompile.attention." in name for name in names) == 2


def windows(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Swin's: of rows and columns of a window apart."""
    at = torch.arange(16)
    row, column = at // 4, at % 4
    place = (row[:, None] - row + 3) * 7 + column[:, None] - column + 3
    return attend(q, k, v, table[place.view(-1)].view(16, 16, -1).permute(2, 0, 1))


def learned(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return attend(q, k, v, table)


@pytest.mark.parametrize(
    ("fn", "shape", "distances"),
    [
        (embedded, (BUCKETS, HEADS), True), (gathered, (BUCKETS, HEADS), True), (masked, (BUCKETS, HEADS), True),
        (windows, (49, HEADS), False), (learned, (HEADS, 16, 16), False), (learned, (HEADS, 1, 16), False),
    ],
)  # fmt: skip
def test_what_is_learned_of_distances_alone_is_told_apart(
    fn: Callable[..., Tensor], shape: tuple[int, ...], distances: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []

    def choose(*site: Any, **about: Any) -> Any:
        told.append(about["distances"])
        return plan.choose(*site, **about)

    monkeypatch.setattr(attention, "choose", choose)
    table = torch.randn(shape, requires_grad=True)
    q, k, v = (torch.randn(2, HEADS, 16, 8, requires_grad=True) for _ in range(3))
    torch.compile(fn, backend=xformers)(q, k, v, table).sum().backward()
    assert told == [distances]
