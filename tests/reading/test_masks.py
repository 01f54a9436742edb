"""Masks are read to their source: what real models build from indices is recognised, and the dense mask is not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import Outcome, check, tensors

B, H, N, D = 2, 3, 9, 8
MIN = torch.finfo(torch.float32).min
QKV = ((B, H, N, D),) * 3


def where(keep: torch.Tensor) -> torch.Tensor:
    """A boolean mask as transformers adds it."""
    return torch.where(keep, torch.tensor(0.0), MIN)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    weights = F.softmax(q @ k.transpose(2, 3) * D**-0.5 + bias, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous()


def indices(queries: int = N, keys: int = N, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.arange(queries) + offset)[None, None, :, None], (torch.arange(keys) + 0)[None, None, None, :]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = indices()
    return eager(q, k, v, where((j <= i).expand(B, -1, N, N)))


def causal_from_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """transformers: `and`s beginning with a true 0-d tensor."""
    i, j = indices()
    keep = q.new_ones((), dtype=torch.bool)
    keep = keep & (j <= i).to(q.device)
    return eager(q, k, v, where(keep.expand(B, -1, N, N)))


def packed(position_ids: torch.Tensor) -> torch.Tensor:
    first = position_ids[:, :1] - 1
    return (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)


def packed_arange(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """K2: the packed-sequence term of transformers, of positions that are an arange."""
    segments = packed((torch.arange(N) + 0).unsqueeze(0))
    i, j = indices()
    b = torch.arange(B)[:, None, None, None]
    same = segments.expand(B, -1)[b, i] == segments.expand(B, -1)[b, j]
    keep = q.new_ones((), dtype=torch.bool) & (j <= i).to(q.device) & same.to(q.device)
    return eager(q, k, v, where(keep.expand(B, -1, N, N)))


def packed_arange_one_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    segments = packed(torch.arange(N).unsqueeze(0))
    i, j = indices()
    same = segments[0][i] == segments[0][j]
    return eager(q, k, v, where((j <= i) & same))


def packed_given(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    segments = packed(position_ids)
    i, j = indices()
    b = torch.arange(B)[:, None, None, None]
    return eager(q, k, v, where((j <= i) & (segments[b, i] == segments[b, j])))


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """K3: causal and the user's 2-D mask."""
    i, j = indices()
    b = torch.arange(B)[:, None, None, None]
    return eager(q, k, v, where((j <= i) & attention_mask.to(torch.bool)[b, j]))


def padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return eager(q, k, v, (1.0 - attention_mask[:, None, None, :].float()) * MIN)


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = indices()
    return eager(q, k, v, where((j > i - 4) & (j <= i)))


def window_both_ways(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = indices()
    return eager(q, k, v, where(((i - j).abs() <= 2) & (i >= 0)))


def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """K6: BERT and ViT under compile."""
    i, _ = indices()
    return eager(q, k, v, where((i >= 0).expand(B, -1, N, N)))


def chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = indices()
    return eager(q, k, v, where((j <= i) & (j // 3 == i // 3)))


def given(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """K8, K13: a mask from outside."""
    return eager(q, k, v, where(mask))


def given_bool_added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return eager(q, k, v, mask)


def triu_full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """K10: meta's Llama."""
    mask = torch.full((N, N), float("-inf"), device=q.device)
    mask = torch.triu(mask, diagonal=1)
    mask = torch.hstack([torch.zeros((N, 0)), mask]).type_as(q)
    return eager(q, k, v, mask)


def triu_ones(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k)
    scores = scores.masked_fill(torch.ones((N, N), dtype=torch.bool).triu(1), -MIN * -1)
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)


def fairseq(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.triu(torch.zeros([N, N]).float().fill_(float("-inf")).type_as(q), 1)
    return eager(q, k, v, mask.unsqueeze(0))


def tril_ones(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT
    return scores.masked_fill(torch.tril(torch.ones(1, 1, N, N)) == 0, float("-inf")).softmax(-1) @ v


def bottom_right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q = q[:, :, -4:]
    i, j = indices(4, N, N - 4)
    return eager(q, k, v, where(j <= i))


def prefix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = indices()
    return eager(q, k, v, where((j <= i) | (j < 4)))


def sdpa_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = indices()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i).expand(B, -1, N, N), scale=0.3, is_causal=False)


def sdpa_full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, _ = indices()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i >= 0).expand(B, -1, N, N))


def sdpa_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    segments = packed(torch.arange(N).unsqueeze(0)).expand(B, -1)
    i, j = indices()
    b = torch.arange(B)[:, None, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (segments[b, i] == segments[b, j]))


def tokens(*, seed: int = 0) -> torch.Tensor:
    return torch.tensor([[1] * N, [1] * (N - 3) + [0] * 3])


def squared(outcome: Outcome) -> list[str]:
    return outcome.squares(N, N)


PROVED: dict[str, tuple[Callable[..., Any], str]] = {
    "K1 causal": (causal, "causal"),
    "K1 causal, from true": (causal_from_one, "causal"),
    "K2 packed positions, arange": (packed_arange, "causal"),
    "K2 packed positions, one row": (packed_arange_one_row, "causal"),
    "K6 all of them": (full, "all true (dropped)"),
    "K9 tril == 0": (tril_ones, "causal"),
    "K10 full, triu": (triu_full, "causal"),
    "K10 ones, triu": (triu_ones, "causal"),
    "K10 fairseq": (fairseq, "causal"),
    "SDPA, causal": (sdpa_causal, "causal"),
    "SDPA, all of them": (sdpa_full, "all true (dropped)"),
    "SDPA, packed positions": (sdpa_packed, "causal"),
}


@pytest.mark.parametrize("name", list(PROVED))
def test_a_proved_mask_is_not_made(name: str) -> None:
    fn, words = PROVED[name]
    outcome = check(fn, *tensors(*QKV))
    assert [(s.matched, s.route, s.mask) for s in outcome.sites] == [(True, "sdpa", words)], outcome.sites
    assert squared(outcome) == []


@pytest.mark.parametrize("name", list(PROVED))
def test_a_proved_mask_is_not_made_in_training(name: str) -> None:
    fn, words = PROVED[name]
    outcome = check(fn, *tensors(*QKV, grad=True), grad=True)
    assert [(s.matched, s.route, s.mask) for s in outcome.sites] == [(True, "sdpa", words)], outcome.sites
    assert len(outcome.backwards) == 1
    assert squared(outcome) == []


@pytest.mark.parametrize("name", ["K1 causal", "K2 packed positions, arange", "K6 all of them", "SDPA, causal"])
def test_a_proved_mask_is_not_made_for_symbolic_sizes(name: str) -> None:
    programs: dict[str, tuple[Callable[..., Any], str]] = {
        "K1 causal": (dynamic_causal, "causal"),
        "K2 packed positions, arange": (dynamic_packed, "causal"),
        "K6 all of them": (dynamic_full, "all true (dropped)"),
        "SDPA, causal": (dynamic_sdpa, "causal"),
    }
    fn, words = programs[name]
    outcome = check(fn, *tensors(*QKV), dynamic=True)
    assert [(s.matched, s.route, s.mask) for s in outcome.sites] == [(True, "sdpa", words)], outcome.sites
    for gm in outcome.programs:
        assert not any(
            isinstance(v := n.meta.get("val"), torch.Tensor) and v.dtype == torch.bool and v.dim() >= 2
            for n in gm.graph.nodes
            if n.op == "call_function"
        )


def dynamic_indices(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = q.shape[2]
    return torch.arange(n)[None, None, :, None], torch.arange(n)[None, None, None, :]


def dynamic_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = dynamic_indices(q)
    return eager(q, k, v, where((j <= i).expand(q.shape[0], -1, q.shape[2], q.shape[2])))


def dynamic_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    segments = packed(torch.arange(q.shape[2]).unsqueeze(0)).expand(q.shape[0], -1)
    i, j = dynamic_indices(q)
    b = torch.arange(q.shape[0])[:, None, None, None]
    return eager(q, k, v, where((j <= i) & (segments[b, i] == segments[b, j])))


def dynamic_full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, _ = dynamic_indices(q)
    return eager(q, k, v, where((i >= 0).expand(q.shape[0], -1, q.shape[2], q.shape[2])))


def dynamic_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = dynamic_indices(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i)


MASK2D = tokens()
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 0, 1, 2, 3, 0, 1]])
DENSE = torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(1)) > 0.3

NAMED: dict[str, tuple[Callable[..., Any], str, tuple[torch.Tensor, ...]]] = {
    "K3 causal and padding": (padded, "causal & key padding", (MASK2D,)),
    "K3 causal and left padding": (padded, "causal & key padding", (MASK2D.flip(1),)),
    "padding, added": (padding, "key padding", (MASK2D == 1,)),
    "padding, added, a whole row": (padding, "key padding", ((MASK2D * torch.tensor([[1], [0]])) == 1,)),
    "padding, integers that may be anything": (padding, "none", (MASK2D,)),
    "K4 window": (window, "causal & window(4)", ()),
    "K5 window both ways": (window_both_ways, "window(±2)", ()),
    "K7 chunks": (chunks, "causal & chunks(3)", ()),
    "K8 given": (given, "dense mask", (DENSE,)),
    "K2 packed positions, given": (packed_given, "causal & documents", (POSITIONS,)),
    "bottom right": (bottom_right, "causal (bottom-right)", ()),
    "prefix": (prefix, "(causal | prefix(4))", ()),
}


@pytest.mark.parametrize("name", list(NAMED))
def test_a_mask_goes_by_its_name(name: str) -> None:
    fn, words, inputs = NAMED[name]
    outcome = check(fn, *tensors(*QKV), *inputs)
    assert [(s.matched, s.mask) for s in outcome.sites] == [(True, words)], outcome.sites


def test_positions_of_a_user_do_not_fold() -> None:
    """The packed-sequence term is true of an arange only."""
    outcome = check(packed_given, *tensors(*QKV), POSITIONS)
    assert "documents" in str(outcome.sites[0].mask)
    folded = check(packed_given, *tensors(*QKV), torch.arange(N).expand(B, N))
    assert "documents" in str(folded.sites[0].mask)


def test_a_bool_mask_that_is_added_is_no_mask() -> None:
    outcome = check(given_bool_added, *tensors(*QKV), DENSE)
    assert outcome.sites[0].matched and outcome.sites[0].mask == "none"


def test_two_layers_share_a_proved_mask() -> None:
    def two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = indices()
        bias = where((j <= i).expand(B, -1, N, N))
        x = eager(q, k, v, bias).transpose(1, 2)
        return eager(x, k, v, bias)

    outcome = check(two, *tensors(*QKV))
    assert [s.mask for s in outcome.sites] == ["causal", "causal"]
    assert squared(outcome) == []


def test_a_mask_that_something_else_needs_is_kept() -> None:
    def shown(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        i, j = indices()
        keep = (j <= i).expand(B, -1, N, N)
        return eager(q, k, v, where(keep)), keep.sum()

    outcome = check(shown, *tensors(*QKV))
    assert [(s.route, s.mask) for s in outcome.sites] == [("sdpa", "causal")]


def test_a_buffer_is_data() -> None:
    """K9: a causal buffer may hold anything by the time that the program runs."""

    class Buffered(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.tril(torch.ones(12, 12)).view(1, 1, 12, 12))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = (q @ k.transpose(-2, -1)).masked_fill(self.bias[:, :, :N, :N] == 0, float("-inf"))
            return scores.softmax(-1) @ v

    outcome = check(Buffered(), *tensors(*QKV))
    assert [(s.matched, s.mask) for s in outcome.sites] == [(True, "dense mask")]


def test_alibi_of_a_padded_batch() -> None:
    """K11, BLOOM: distances are counted by cumsum over the user's mask."""

    def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        slopes = torch.pow(torch.tensor(0.5), torch.arange(1, 1 + H))
        positions = ((mask.cumsum(dim=-1) - 1) * mask)[:, None, :]
        bias = (slopes[..., None] * positions).reshape(B * H, 1, N)
        scores = bias.baddbmm(q.reshape(B * H, N, D), k.reshape(B * H, N, D).mT, beta=1.0, alpha=D**-0.5)
        i, j = indices()
        weights = (scores.view(B, H, N, -1) + where(j <= i)).softmax(-1)
        return torch.bmm(weights.view(B * H, N, -1), v.reshape(B * H, N, D)).view(B, H, N, D)

    outcome = check(alibi, *tensors(*QKV), MASK2D)
    assert [(s.matched, s.route, s.mask) for s in outcome.sites] == [(True, "sdpa", "causal")], outcome.sites


def test_a_relative_bias_of_t5() -> None:
    """K12: a table of buckets by distance, and a mask beside."""

    def t5(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        distance = torch.arange(N)[None, :] - torch.arange(N)[:, None]
        buckets = (distance > 0).to(torch.long) * 8
        distance = distance.abs()
        large = 4 + (torch.log(distance.float() / 4) / 1.5 * 4).to(torch.long)
        large = torch.min(large, torch.full_like(large, 7))
        buckets += torch.where(distance < 4, distance, large)
        bias = F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)
        i, j = indices()
        return (q @ k.transpose(3, 2) + bias + where(j <= i)).float().softmax(-1).type_as(q) @ v

    outcome = check(t5, *tensors(*QKV, (16, H)))
    assert [(s.matched, s.route, s.mask) for s in outcome.sites] == [(True, "sdpa", "causal")], outcome.sites


def upto(last: torch.Tensor, keys: int) -> torch.Tensor:
    return torch.arange(keys) <= last[:, None]


SLICED: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "the last positions": (lambda n, m, p: upto(torch.arange(m)[-n:], m), True),
    "the last positions, to the last": (lambda n, m, p: upto(torch.arange(m)[-n:m], m), True),
    "the last positions, from a number on": (lambda n, m, p: upto(torch.arange(m)[m - n :], m), True),
    "the last positions, by their number": (lambda n, m, p: upto(torch.arange(m).narrow(0, -n, n), m), True),
    "rows of a larger mask": (
        lambda n, m, p: torch.ones(64, 64, dtype=torch.bool).tril()[m - n : m, :m],
        True,
    ),
    "the last rows": (lambda n, m, p: torch.ones(m, m, dtype=torch.bool).tril()[-n:], True),
    "more than there are": (lambda n, m, p: upto(torch.arange(m)[-2 * n :][:n], m), True),
    "all but the last": (lambda n, m, p: upto(torch.arange(m)[-n - 1 : -1], m), True),
    "every second": (lambda n, m, p: upto(torch.arange(2 * m)[-2 * n :: 2], m), True),
    "from so far from behind": (lambda n, m, p: upto(torch.arange(m - p)[p:].flip(0)[:1].expand(n) - 2, m), True),
    "one from behind": (lambda n, m, p: upto(torch.arange(m)[-n, None].expand(n), m), True),
    "some from behind": (lambda n, m, p: upto(torch.arange(m)[-3:][:1].expand(n), m), True),
    "the one where a number says": (lambda n, m, p: upto(torch.arange(m).select(0, p)[None].expand(n), m), False),
    "two from where a number says": (lambda n, m, p: upto(torch.arange(m).narrow(0, p, 2)[:1].expand(n), m), False),
}
"""Masks of n queries, m keys, and p, a negative number that is not known; and whether their positions are read."""


@pytest.mark.parametrize("name", SLICED)
def test_positions_of_symbolic_sizes_are_counted_from_where_the_program_does(name: str) -> None:
    keep, read = SLICED[name]

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept = keep(q.shape[2], k.shape[2], k.shape[0] - 5) | (torch.arange(k.shape[2]) < 2)
        return (q @ k.mT).masked_fill(~kept, -1e30).softmax(-1) @ v

    outcome = check(program, *tensors((2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)), dynamic=True)
    assert [("data" not in str(site.mask)) for site in outcome.matched] == [read], outcome.sites


def tril(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.uint8).tril()


WRAPS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], int]] = {
    "a difference": (lambda i, j: i.to(torch.uint8) - j.to(torch.uint8) < 200, 8),
    "a product": (lambda i, j: (i.to(torch.int8) * 30) >= (j.to(torch.int8) * 30), 8),
    "a position": (lambda i, j: j.to(torch.int8) <= i.to(torch.int8), 300),
    "a triangle less one": (lambda i, j: tril(8) - 1 <= 0, 8),
    "a triangle, negative": (lambda i, j: -tril(8) <= 0, 8),
    "nothing less one": (lambda i, j: torch.zeros(8, 8, dtype=torch.uint8) - 1 > i, 8),
}


@pytest.mark.parametrize("name", WRAPS)
def test_whole_numbers_of_few_bits_wrap_around(name: str) -> None:
    keep, n = WRAPS[name]

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i = torch.arange(n)
        return (q @ k.mT).masked_fill(~keep(i[:, None], i), -1e30).softmax(-1) @ v

    outcome = check(program, *tensors(*[(1, 1, n, 8)] * 3), family="attention")
    assert [site.matched for site in outcome.sites] == [True]


def test_positions_that_few_bits_hold_are_read() -> None:
    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i = torch.arange(8).to(torch.uint8)
        return (q @ k.mT).masked_fill((1 - tril(8)).bool() | (i + 2 < i[:, None]), -1e30).softmax(-1) @ v

    outcome = check(program, *tensors(*[(1, 1, 8, 8)] * 3), family="attention")
    assert [site.mask for site in outcome.sites] == ["causal & window(3)"]


EQUALS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "equal to -inf": lambda m: m == float("-inf"),
    "equal to inf": lambda m: m == float("inf"),
    "what inf is equal to": lambda m: torch.full((), float("inf")) == m,
    "not equal to -inf": lambda m: ~(m != float("-inf")),
    "not equal to itself": lambda m: m != m,
    "infinite": torch.isinf,
    "less than nothing": torch.isneginf,
    "no number": torch.isnan,
    "not finite": lambda m: ~torch.isfinite(m),
    "equal to a choice": lambda m: m == torch.where(torch.arange(6) < 3, float("-inf"), 0.0),
}


@pytest.mark.parametrize("name, route", [*((name, None) for name in EQUALS), ("equal to -inf", "triton")])
def test_what_a_tensor_holds_may_be_infinite_or_nan(
    name: str, route: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if route is not None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).masked_fill(EQUALS[name](m), -1e30).softmax(-1) @ v

    m = torch.zeros(6, 6)
    for n, x in enumerate((float("-inf"), float("inf"), float("nan"), -1.0)):
        m.diagonal(n - 2).fill_(x)
    routes = None if route is None else {"attention": route}
    outcome = check(program, *tensors(*[(2, 3, 6, 8)] * 3), m, routes=routes, family="attention")
    assert [site.matched for site in outcome.sites] == [True]
