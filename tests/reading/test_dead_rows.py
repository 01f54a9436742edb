"""Rows that may see no key, against eager: NaN, the mean of the values, 0, or what is left of the scores in a dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equivalence import Outcome, check, rewriting, run
from torch import Tensor

from xfcompile.masking import as_rounded
from xfcompile.score import I, J, Rounded, S, Where

BATCH, HEADS, QUERIES, KEYS, D = 4, 2, 6, 8, 4
Program = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def keep(queries: int = QUERIES, keys: int = KEYS) -> Tensor:
    """[BATCH, 1, queries, keys]: some rows see nothing; the first keys are padding, and causal; nothing; everything."""
    kept = torch.ones(BATCH, 1, queries, keys, dtype=torch.bool)
    kept[0, 0, ::2] = False
    kept[0, 0, 1:2, 3:] = False
    kept[1, :, :, : keys // 2] = False
    kept[1] &= causal(queries, keys)
    kept[2] = False
    return kept


def causal(queries: int, keys: int) -> Tensor:
    """To the bottom right: of more queries than keys the first see nothing."""
    return torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries


def inputs(dtype: torch.dtype, queries: int = QUERIES, keys: int = KEYS) -> list[Tensor]:
    """The scores of the first head are near 0, those of the second go beyond 30 on either side."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, n, D, generator=generator) for n in (queries, keys, keys))
    q[:, 1] *= 16
    return [x.to(dtype) for x in (q, k, v)]


def added(kept: Tensor, fill: float, x: Tensor) -> Tensor:
    return torch.zeros(kept.shape, dtype=x.dtype).masked_fill(~kept, fill)


def bottom_right(q: Tensor, k: Tensor) -> Tensor:
    return causal(q.shape[2], k.shape[2])


REPLACED: dict[str, Program] = {
    "masked_fill": lambda q, k, v, m, f: (q @ k.mT * 0.5).masked_fill(~m, f).softmax(-1) @ v,
    "where": lambda q, k, v, m, f: torch.where(m, q @ k.mT * 0.5, f).softmax(-1) @ v,
    "masked_fill, softmax in fp32": lambda q, k, v, m, f: (
        (q @ k.mT * 0.5).masked_fill(~m, f).float().softmax(-1).to(q.dtype) @ v
    ),
    "nan_to_num": lambda q, k, v, m, f: (q @ k.mT * 0.5).masked_fill(~m, f).softmax(-1).nan_to_num() @ v,
    "bottom-right": lambda q, k, v, m, f: (q @ k.mT * 0.5).masked_fill(~bottom_right(q, k), f).softmax(-1) @ v,
    "isnan, filled": lambda q, k, v, m, f: (lambda w: w.masked_fill(torch.isnan(w), 0.0) @ v)(
        (q @ k.mT * 0.5).masked_fill(~m, f).softmax(-1)
    ),
    "not isnan, chosen": lambda q, k, v, m, f: (lambda w: torch.where(~w.isnan(), w, torch.zeros_like(w)) @ v)(
        (q @ k.mT * 0.5).masked_fill(~m, f).softmax(-1)
    ),
    "not itself": lambda q, k, v, m, f: (lambda w: torch.where(w != w, 0.0, w).to(q.dtype) @ v)(
        torch.softmax((q @ k.mT * 0.5).masked_fill(~m, f), -1, dtype=torch.float32)
    ),
}
NO_CLEARING: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN is 1": lambda w: torch.where(w.isnan(), 1.0, w),
    "what is no NaN is 0": lambda w: torch.where(w.isnan(), w, 0.0),
    "of other weights": lambda w: torch.where(w.roll(1, -1).isnan(), 0.0, w),
    "by itself alone": lambda w: w.masked_fill(w.isnan(), 0.0) + w * 0,
}
ADDED: dict[str, Program] = {
    "added": lambda q, k, v, m, f: (q @ k.mT * 0.5 + added(m, f, q)).softmax(-1) @ v,
    "1 - mask": lambda q, k, v, m, f: (
        (q @ k.mT * 0.5 + (1.0 - m.to(q.dtype)) * (f if math.isfinite(f) else torch.finfo(q.dtype).min)).softmax(-1) @ v
    ),
    "softmax in fp32": lambda q, k, v, m, f: (
        F.softmax(q @ k.mT * 0.5 + added(m, f, q), dim=-1, dtype=torch.float32).to(q.dtype) @ v
    ),
    "then fp32": lambda q, k, v, m, f: (q @ k.mT * 0.5 + added(m, f, q)).float().softmax(-1).to(q.dtype) @ v,
    "baddbmm": lambda q, k, v, m, f: (
        torch.baddbmm(
            added(m, f, q).expand(-1, HEADS, -1, -1).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.5
        ).softmax(-1)
        @ v.flatten(0, 1)
    ),
    "subtracted": lambda q, k, v, m, f: (q @ k.mT * 0.5 - added(m, -f, q)).softmax(-1) @ v,
    "added twice": lambda q, k, v, m, f: (q @ k.mT * 0.5 + added(m, f, q) + added(m, f, q)).softmax(-1) @ v,
    "padding and causal": lambda q, k, v, m, f: (
        (q @ k.mT * 0.5 + added(m, f, q) + added(bottom_right(q, k), f, q)).softmax(-1) @ v
    ),
    "padding added, causal filled": lambda q, k, v, m, f: (
        (q @ k.mT * 0.5 + added(m, f, q)).masked_fill(~bottom_right(q, k), f).softmax(-1) @ v
    ),
    "nan_to_num of 0.0": lambda q, k, v, m, f: torch.nan_to_num((q @ k.mT * 0.5 + added(m, f, q)).softmax(-1), 0.0) @ v,
    "a mask that is data": lambda q, k, v, m, f: (q @ k.mT * 0.5 + m).softmax(-1) @ v,
}
SPELLINGS = {**REPLACED, **ADDED}
FILLS = {torch.float32: ("inf", "min", -1e9), torch.bfloat16: ("min", -1e9, -1e4), torch.float16: ("min", -1e4)}


def number(fill: float | str, dtype: torch.dtype) -> float:
    return -math.inf if fill == "inf" else torch.finfo(dtype).min if fill == "min" else float(fill)


def assert_as_eager(program: Program, x: list[Tensor], m: Tensor, f: float, route: str) -> Outcome:
    """The very rows of eager: NaN where it has NaN, and elsewhere nothing but roundings apart."""
    torch._dynamo.reset()
    outcome = Outcome()
    compiled = torch.compile(program, backend=rewriting(outcome, {"attention": route}), dynamic=False)
    ours, eager = compiled(*x, m, f), program(*x, m, f)
    assert ours.dtype == eager.dtype
    scale = max(1.0, x[2].abs().max().item())
    tolerance = 8 * torch.finfo(ours.dtype).eps * scale
    torch.testing.assert_close(ours, eager, rtol=0, atol=tolerance, equal_nan=True)
    assert [s.matched for s in outcome.sites] == [True], outcome.reasons
    return outcome


def as_eager(name: str, dtype: torch.dtype, route: str, *sizes: int, fills: tuple[float | str, ...] = ()) -> None:
    for fill in fills or FILLS[dtype]:
        f, x, m = number(fill, dtype), inputs(dtype, *sizes), keep(*sizes)
        if name == "a mask that is data":
            if route == "triton" and isinstance(fill, float) and dtype != torch.float16:
                continue  # the kernel adds in fp32, in another base, which does not leave of a score what eager does
            if dtype == torch.bfloat16:
                x[0][:, 1] /= 16  # beside -1e4 SDPA leaves nothing of scores, bf16 something of those beyond 32
            m = added(m, f, x[0])
        assert_as_eager(SPELLINGS[name], x, m, f, route)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROUTES = ["sdpa", "triton"]
QUICK = ("masked_fill", "added", "then fp32", "padding and causal", "subtracted")
SLOW = ("where", "masked_fill, softmax in fp32", "1 - mask", "softmax in fp32", "nan_to_num of 0.0")


def unless_quick(name: str, dtype: torch.dtype) -> object:
    quick = name not in SLOW if dtype == torch.float32 else name in QUICK if dtype == torch.float16 else name == "added"
    return pytest.param(name, dtype, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name, dtype", [unless_quick(n, d) for n in SPELLINGS for d in FILLS])
def test_rows_without_keys_are_eagers(name: str, dtype: torch.dtype, route: str) -> None:
    as_eager(name, dtype, route)


@pytest.mark.parametrize("name, dtype", [unless_quick(n, d) for n in SPELLINGS for d in FILLS])
def test_of_many_queries_rows_without_keys_are_eagers(name: str, dtype: torch.dtype) -> None:
    """What fp16's least number leaves of them is computed once more, where all others skip what is masked."""
    as_eager(name, dtype, "triton", 40, 44)


@pytest.mark.parametrize("dtype", FILLS, ids=str)
def test_what_the_least_number_masks_is_skipped(dtype: torch.dtype) -> None:
    """Keys that no row of a tile may see may hold anything, also in fp16, where something is left of their scores."""
    n = 160
    x, padding = inputs(dtype, n, n), torch.arange(n) < torch.tensor([n, n - 3, 2, n])[:, None]
    x[2][:, :, 128:] = torch.nan
    f = number("min", dtype)

    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
        kept = m[:, None, None, :] & bottom_right(q, k)
        return (q @ k.mT * 0.5 + added(kept, f, q)).softmax(-1) @ v

    outcome = Outcome()
    compiled = torch.compile(program, backend=rewriting(outcome, {"attention": "triton"}), dynamic=False)
    assert compiled(*x, padding, f)[:, :, :128].isfinite().all()
    assert [site.mask for site in outcome.sites] == ["causal & key padding"]


@pytest.mark.parametrize("name", NO_CLEARING)
def test_what_does_more_or_less_than_clear_nan_is_left(name: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
        return NO_CLEARING[name]((q @ k.mT * 0.5).masked_fill(~m, f).softmax(-1)) @ v

    torch._dynamo.reset()
    x, m = inputs(torch.float32), keep()
    outcome = Outcome()
    compiled = torch.compile(program, backend=rewriting(outcome, {"attention": "triton"}), dynamic=False)
    torch.testing.assert_close(compiled(*x, m, -math.inf), program(*x, m, -math.inf), equal_nan=True)
    assert [site.matched for site in outcome.sites] == [False]


def lacks(q: Tensor, k: Tensor) -> Tensor:
    """The last two keys are masked, and all of which the query is no even one."""
    return (torch.arange(k.shape[2]) > k.shape[2] - 3) | (torch.arange(q.shape[2])[:, None] % 2 == 1)


MADE: dict[str, Callable[[Tensor, Tensor, float, Tensor], Tensor]] = {
    "the sum of two, held": lambda a, b, f, q: torch.clamp(added(~a, f, q) + added(~b, f, q), min=f),
    "the lesser of two": lambda a, b, f, q: torch.minimum(added(~a, f, q), added(~b, f, q)),
    "1 less a product": lambda a, b, f, q: (1 - (1 - a.to(q.dtype)) * (1 - b.to(q.dtype))) * f,
    "two counted": lambda a, b, f, q: ((a.int() + b.int()) > 0).to(q.dtype) * f,
    "two shares": lambda a, b, f, q: (a.to(q.dtype) + b.to(q.dtype)) * (f / 2),
    "one in the other": lambda a, b, f, q: torch.where(a, f, torch.where(b, f, 0.0)).to(q.dtype),
    "of two numbers": lambda a, b, f, q: torch.where(a, f, torch.where(b, f * 0.75, 0.0)).to(q.dtype),
    "in two parts": lambda a, b, f, q: torch.cat(
        [added(~a[:, :4], f, q), added(torch.zeros(a.shape[0], 4, dtype=torch.bool), f, q)], -1
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MADE)
def test_masks_that_are_made_of_masks(name: str, dtype: torch.dtype, route: str) -> None:
    """Rows 1, 3 and 5 see nothing, and the others do."""

    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
        mask = MADE[name](~bottom_right(q, k), lacks(q, k), f, q)
        return (q @ k.mT * 0.5 + mask).softmax(-1) @ v

    assert_as_eager(program, inputs(dtype), keep(), number("min", torch.float16), route)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("queries, keys", [(1, 8), (8, 6)])
@pytest.mark.parametrize("name", ["bottom-right", "padding and causal"])
def test_one_row_of_a_step_and_more_queries_than_keys(name: str, queries: int, keys: int, route: str) -> None:
    as_eager(name, torch.float32, route, queries, keys, fills=("inf", "min"))
    as_eager(name, torch.float16, route, queries, keys, fills=("min",))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fill", [-100.0, -1e4])
def test_small_numbers_that_absorb_nothing(fill: float, route: str) -> None:
    """They are arithmetic: a row of them has the softmax of its scores, which is compared in fp64."""
    x, m = inputs(torch.float32), keep()
    for program in (ADDED["added"], ADDED["padding and causal"]):
        check(lambda q, k, v, m, program=program: program(q, k, v, m, fill), *x, m, routes={"attention": route})


def test_half_of_the_keys_share_the_weight_where_the_least_half_overflows() -> None:
    """-65504 - 16 is -inf in fp16, and -65504 - 15 is -65504: what the program computes, and the kernel after it."""
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[-20.0], [-15.0], [-30.0], [3.0], [14.0], [-16.0]]]])
    v = torch.eye(6)[None, None]
    x = [y.half() for y in (q, k, v)]
    for route in ROUTES:
        outcome = assert_as_eager(
            lambda q, k, v, m, f: (q @ k.mT + added(m, f, q)).softmax(-1) @ v,
            x, torch.zeros(1, 1, 1, 6, dtype=torch.bool), torch.finfo(torch.float16).min, route,
        )  # fmt: skip
        assert outcome.sites[0].route == ("triton" if route == "triton" else "inductor")
    weights = (q.half() @ k.half().mT + torch.finfo(torch.float16).min).softmax(-1)
    assert weights.flatten().tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3, 0], abs=1e-3)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sdpa_gives_0_under_a_boolean_mask(dtype: torch.dtype, route: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m)

    x, m = inputs(dtype), keep()
    assert_as_eager(program, x, m, 0.0, route)
    for queries, keys in ((1, 8), (8, 6)):
        assert_as_eager(program, inputs(dtype, queries, keys), keep(queries, keys), 0.0, route)
    assert (program(*x, m, 0.0)[2] == 0).all(), "which is what both were compared with"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fill", ["min", -1e9])
def test_sdpa_under_a_float_mask(fill: float | str, route: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added(m, f, q))

    f = number(fill, torch.float32)
    assert_as_eager(program, inputs(torch.float32), keep(), f, route)


def test_a_number_that_absorbs_in_bf16_does_not_keep_tiles_from_being_skipped() -> None:
    outcome = assert_as_eager(ADDED["padding and causal"], inputs(torch.bfloat16), keep(), -1e4, "triton")
    assert outcome.sites[0].mask == "none"  # what is left of the scores matters
    alone = assert_as_eager(ADDED["added"], inputs(torch.bfloat16), keep(), -1e9, "sdpa")
    assert (alone.sites[0].mask, alone.sites[0].route) == ("dense mask", "sdpa")


def test_a_causal_mask_of_halves_is_read_before_a_softmax_of_floats() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = added(causal(KEYS, KEYS), torch.finfo(q.dtype).min, q)
        return (q @ k.mT + mask).float().softmax(-1).to(q.dtype) @ v

    outcome = check(program, *inputs(torch.float16, KEYS, KEYS))
    assert [(s.route, s.mask) for s in outcome.sites] == [("sdpa", "causal")]


def test_what_is_added_twice_is_rounded_twice() -> None:
    mask = Where(J <= I, 0, -10000)
    once, twice = (as_rounded(S / 2 + n * mask, torch.float16, lambda load: False) for n in (1, 2))
    assert once == Where(J <= I, S / 2, Rounded(Rounded(S / 2, 11) - 10000, 11))
    assert twice == Where(J <= I, once, Rounded(Rounded(once, 11) - 10000, 11))
    assert as_rounded(S + Where(J <= I, 0, -100), torch.float16, lambda load: False) == S + Where(J <= I, 0, -100)


def far_biases(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """So large that it matters whether they are added to a mask's number or after it."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 15).to(dtype)


BIASED: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "one tensor that chooses": lambda s, b, m, f: s + torch.where(m, b, f),
    "one tensor that adds": lambda s, b, m, f: s + (b + added(m, f, s)),
    "the bias first": lambda s, b, m, f: s + b + added(m, f, s),
    "the mask first": lambda s, b, m, f: s + added(m, f, s) + b,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BIASED)
def test_what_rounding_leaves_of_biases_too(name: str, dtype: torch.dtype, route: str) -> None:
    """Of rows without keys, in the order in which the program adds."""
    x, m = inputs(dtype), keep()
    dead = ~m.any(-1).expand(BATCH, HEADS, QUERIES)
    for fill in FILLS[dtype]:
        for shape in ((HEADS, QUERIES, KEYS), (KEYS,)):
            f = number(fill, dtype)

            def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor, f: float = f) -> Tensor:
                return BIASED[name](q @ k.mT * 0.5, b, m, f).softmax(-1) @ v

            torch._dynamo.reset()
            outcome, b = Outcome(), far_biases(shape, dtype)
            compiled = torch.compile(program, backend=rewriting(outcome, {"attention": route}), dynamic=False)
            ours, eager = compiled(*x, m, b)[dead], program(*x, m, b)[dead]
            torch.testing.assert_close(
                ours, eager, rtol=0, atol=8 * torch.finfo(dtype).eps * x[2].abs().max().item(), equal_nan=True
            )
            assert [s.matched for s in outcome.sites] == [True], outcome.reasons


def test_masks_and_biases_in_more_than_one_order_are_declined() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor) -> Tensor:
        f = torch.finfo(q.dtype).min
        return (q @ k.mT + b + added(m, f, q) + b.flip(-1)).softmax(-1) @ v

    x, m = inputs(torch.float16), keep()
    outcome = check(program, *x, m, far_biases((KEYS,), torch.float16))
    assert "more than one order" in outcome.reasons
    near = check(program, *x, torch.ones_like(m).tril(), far_biases((KEYS,), torch.float16))
    assert "more than one order" in near.reasons, "a mask that is data may leave nothing"


def test_a_mask_and_then_a_bias_that_may_mask_too_are_not_sdpas() -> None:
    """Where the bias masks what the mask keeps, what is left of a row depends on which is added first."""

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        later = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(3)
        return ((q @ k.mT).masked_fill(later, -1e9) + b).softmax(-1) @ v

    outcome = check(program, *inputs(torch.float32), far_biases((KEYS,), torch.float32))
    (site,) = outcome.sites
    assert site.route == "inductor"
    assert "in another order" in (site.reason or "")
    kernel = check(program, *inputs(torch.float32), far_biases((KEYS,), torch.float32), routes={"attention": "triton"})
    assert [s.matched for s in kernel.sites] == [True], kernel.reasons


@pytest.mark.parametrize("number", [-1e9, -1e4, "min"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_of_rows_whose_mask_chooses_between_a_bias_and_a_number(
    route: str, dtype: torch.dtype, number: float | str
) -> None:
    """All that the loss sees are rows without keys."""
    fill = torch.finfo(dtype).min if number == "min" else float(number)
    if dtype == torch.float16 and fill < torch.finfo(dtype).min:
        return
    m = keep()
    dead = (~m.any(-1, keepdim=True)).to(dtype)

    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + torch.where(m, b, fill)).softmax(-1) @ v * dead

    for shape in ((HEADS, QUERIES, KEYS), (KEYS,)):
        leaves = [y.requires_grad_() for y in (*inputs(dtype), far_biases(shape, dtype))]
        outcome = Outcome()
        torch._dynamo.reset()
        compiled = torch.compile(program, backend=rewriting(outcome, {"attention": route}), dynamic=False)
        given = [*leaves[:3], m, leaves[3]]
        (_, ours), (_, eager) = (
            run(program, given, grad=True, double=False, called=called) for called in (compiled, None)
        )
        assert eager[0].abs().max() > 1e-3, "rows without keys send something"
        for mine, theirs in zip(ours, eager, strict=True):
            scale = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(mine, theirs, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)
        assert [s.matched for s in outcome.sites] == [True], outcome.reasons
