"""Lists of tiles: interpreted kernels against the element-by-element definition, and attention that walks them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sympy
import torch
from attention_cases import BOOL, CASES, FLOAT, SCALE, Case, Inputs, Sizes, call, check, inputs, named, normal, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import And, Eq, Ge, Ne, Or
from torch.utils._sympy.functions import FloorDiv, PythonMod

from xfcompile.kernels.attention import attention, attention_tiles, fallback, lists, lists_sizes, prepare, programs
from xfcompile.kernels.attention import reference as definition
from xfcompile.kernels.attention.arguments import mask_arguments
from xfcompile.kernels.attention.blocks import EVEN, HEADER, MASKED, SKIP, WHOLE, summary
from xfcompile.masks import band
from xfcompile.score import B, H, I, J, Load, Where
from xfcompile.site import Operand, ScoreSpec

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

LONG = Sizes(batch=2, heads=2, kv_heads=1, lq=150, lk=203)


def blocky(sizes: Sizes) -> list[torch.Tensor]:
    """A dense mask with tiles that keep everything, nothing, and some."""
    coarse = torch.randint(3, (sizes.batch, 1, sizes.lq // 32 + 1, sizes.lk // 32 + 1), generator=RANDOM)
    fine = coarse.repeat_interleave(32, 2).repeat_interleave(32, 3)[..., : sizes.lq, : sizes.lk]
    return [(fine == 2) | ((fine == 1) & (uniform(*fine.shape) > 0.5))]


def additive(sizes: Sizes) -> list[torch.Tensor]:
    mask = torch.zeros(sizes.batch, 1, sizes.lq, sizes.lk).masked_fill(~blocky(sizes)[0], -torch.inf)
    mask[..., :40, :40] = 0.5
    return [mask]


def nearby(sizes: Sizes) -> list[torch.Tensor]:
    """A bias of relative positions that does not vary far away, as T5's."""
    distance = torch.arange(sizes.lk + sizes.lq - 1) - (sizes.lq - 1)
    return [normal(sizes.heads, 41)[:, distance.clamp(-20, 20) + 20]]


def some_keys(sizes: Sizes) -> list[torch.Tensor]:
    bias = torch.zeros(sizes.batch, sizes.lk)
    bias[0, 130:] = -torch.inf
    bias[1, :70] = -torch.inf
    bias[1, 100] = 2.0
    return [bias]


def reals(sizes: Sizes) -> list[torch.Tensor]:
    """With NaN, which is neither above nor below anything."""
    x = torch.arange(sizes.lk).expand(sizes.batch, -1).float().clone()
    x[1, 40] = torch.nan
    return [x]


DATA = (Operand(torch.int64, 2), Operand(torch.int32, 1), Operand(BOOL, 2))


def vectors(sizes: Sizes) -> list[torch.Tensor]:
    """Documents of different lengths, a length, and tokens of which runs are padding."""
    n = max(sizes.lq, sizes.lk)
    documents = torch.stack([torch.arange(n) // 20, torch.arange(n) // 33])
    return [documents, torch.tensor([50, 90], dtype=torch.int32), (torch.arange(n) // 35 % 2 == 1).expand(2, n).clone()]


RANDOM = torch.Generator().manual_seed(1)
N = LONG.lq - 1
MORE = [
    Case("dense", ScoreSpec(SCALE, Ne(Load(0, B, 0, I, J), 0), "mean", (Operand(BOOL, 4),)), blocky),
    Case(
        "dense_causal",
        ScoreSpec(SCALE, And(J <= I, Ne(Load(0, B, 0, I, J), 0)), "zero", (Operand(BOOL, 4),)),
        blocky,
    ),
    Case("additive_dense", ScoreSpec(SCALE + Load(0, B, 0, I, J), operands=(Operand(FLOAT, 4),)), additive),
    Case("relative", ScoreSpec(SCALE + Load(0, H, J - I + N), operands=(Operand(FLOAT, 2),)), nearby),
    Case(
        "relative_far",
        ScoreSpec(SCALE + Load(0, H, J - I + N), J <= I + 50, "nan", operands=(Operand(FLOAT, 2),), far=True),
        nearby,
    ),
    Case(
        "capped_relative",
        ScoreSpec(2 * sympy.tanh(SCALE / 2) + Load(0, H, J - I + N), operands=(Operand(FLOAT, 2),)),
        nearby,
    ),
    Case("keys", ScoreSpec(SCALE + Load(0, B, J), operands=(Operand(FLOAT, 2),), far=True), some_keys),
    Case(
        "keys_halved",
        ScoreSpec(SCALE - Load(0, B, J) / 2, operands=(Operand(FLOAT, 2),)),
        lambda z: [normal(z.batch, z.lk)],
    ),
    Case("after", ScoreSpec(SCALE, Ge(Load(0, B, J), 35), "zero", operands=(Operand(FLOAT, 2),)), reals),
    Case(
        "window_or_first",
        ScoreSpec(SCALE, Or(J < 4, And(J <= I, J > I - 30))),
    ),
    Case("two_strips", ScoreSpec(SCALE, Or(And(J >= 40, J < 70), And(J >= 140, J < 150)))),
    *(
        Case(name, ScoreSpec(SCALE, keep, "zero", DATA), lambda z: vectors(z))
        for name, keep in (
            ("prefix_of_each_batch", Or(J <= I, Load(1, B) > J)),
            ("causal_up_to_a_length", And(J <= I, Load(1, B) > J)),
            ("queries_up_to_a_length", And(Load(1, B) > I, Ne(Load(2, B, J), 0))),
        )
    ),
    Case(
        "some_documents",
        ScoreSpec(SCALE, Eq(Load(0, B, I), Load(0, B, J)), "zero", operands=(Operand(torch.int64, 2),)),
        lambda z: [torch.randint(3, (z.batch, max(z.lq, z.lk) // 40 + 1), generator=RANDOM).repeat_interleave(40, 1)],
    ),
]  # fmt: skip
LISTED = [case for case in [*CASES, *MORE] if summary(case.spec) is not None]
EXACT = {
    "documents", "documents_of_bytes", "padding_zero", "dense", "additive_dense", "relative", "keys", "window_or_first",
    "two_strips", "chunks", "dilated", "additive_padding",
    "prefix_of_each_batch", "causal_up_to_a_length", "queries_up_to_a_length",
}  # fmt: skip


def made_of(case: Case, x: Inputs, block_m: int, block_n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The lists that the kernels make, and those of the definition."""
    key = prepare(case.spec)
    found = mask_arguments(key, x.operands, x.ints, x.floats)
    shape = (*x.q.shape[:3], x.k.shape[2])
    arguments = (x.q, *found, shape, block_m, block_n, programs.mask_of(key))
    return lists.run(*arguments), lists.tightest(*arguments)


def verdicts(lists_: torch.Tensor) -> torch.Tensor:
    """Back from lists [..., 3 + tiles] to verdicts [..., tiles]; each tile is listed once."""
    tiles = lists_.shape[-1] - HEADER
    found = torch.full((*lists_.shape[:-1], tiles), SKIP)
    for row, verdict in zip(lists_.reshape(-1, tiles + HEADER).tolist(), found.view(-1, tiles), strict=True):
        evens, wholes, masked = row[:HEADER]
        listed = row[HEADER : HEADER + wholes] + row[HEADER + tiles - masked :]
        assert len(set(listed)) == len(listed)
        for n, tile in enumerate(listed):
            verdict[tile] = EVEN if n < evens else WHOLE if n < wholes else MASKED
    return found


@pytest.mark.parametrize(("block_m", "block_n"), [(32, 64), pytest.param(64, 16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.name)
def test_lists_leave_out_and_unmask_nothing_that_they_should_not(case: Case, block_m: int, block_n: int) -> None:
    ours, exact = (verdicts(x) for x in made_of(case, inputs(case, FLOAT, sizes=LONG), block_m, block_n))
    assert ours.shape == exact.shape
    assert not ((ours == SKIP) & (exact != SKIP)).any(), "a tile is skipped that has something to keep"
    assert not ((ours >= WHOLE) & (exact < WHOLE)).any(), "a tile runs unmasked that has something to drop"
    assert not ((ours == EVEN) & (exact != EVEN)).any(), "a tile is taken to be even that is not"
    if case.name in EXACT:
        assert torch.equal(ours, exact)


DOCUMENT_I, DOCUMENT_J, LENGTH, TOKEN = Load(0, B, I), Load(0, B, J), Load(1, B), Load(2, B, J)


def integers(depth: int = 2) -> st.SearchStrategy[sympy.Expr]:
    leaf = st.sampled_from([I, J, I - J, I + J, 2 * I - J, DOCUMENT_I, DOCUMENT_J, LENGTH])
    leaf |= st.integers(-9, 60).map(sympy.Integer)
    if depth == 0:
        return leaf
    inner, divisor = integers(depth - 1), st.integers(1, 40).map(sympy.Integer)
    return st.one_of(
        leaf,
        st.builds(FloorDiv, inner, divisor),
        st.builds(PythonMod, inner, divisor),
        st.builds(sympy.Abs, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(sympy.Min, inner, inner),
        st.builds(sympy.Max, inner, inner),
        st.builds(lambda c, a, b: Where(sympy.Le(c, 20), a, b), inner, inner, inner),
    )


def predicates(depth: int = 2) -> st.SearchStrategy[sympy.Basic]:
    relations = st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne])
    leaf = st.builds(lambda f, a, b: f(a, b), relations, integers(), integers()) | st.just(Ne(TOKEN, 0))
    if depth == 0:
        return leaf
    inner = predicates(depth - 1)
    pair = st.builds(And, inner, inner) | st.builds(Or, inner, inner) | st.builds(sympy.Xor, inner, inner)
    return leaf | pair | inner.map(sympy.Not)


MANY_TILES = Sizes(batch=2, heads=1, kv_heads=1, lq=77, lk=120, dq=8, dv=8)


def test_lists_of_random_masks_are_sound_and_attention_by_them_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """With closed bounds where a mask has them, as a site has it."""
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    said: list[str] = []

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(predicates())
    def each(keep: sympy.Basic) -> None:
        if keep in (sympy.true, sympy.false):
            return
        case = Case("random", ScoreSpec(SCALE, keep, "zero", DATA, band=band(keep)), vectors)
        x = inputs(case, FLOAT, sizes=MANY_TILES)
        if summary(case.spec) is not None:
            ours, exact = (verdicts(y) for y in made_of(case, x, 16, 16))
            assert not ((ours == SKIP) & (exact != SKIP)).any(), "a tile is skipped that has something to keep"
            assert not ((ours >= WHOLE) & (exact < WHOLE)).any(), "a tile runs unmasked that has something to drop"
            said.append("nothing" if bool((ours == MASKED).all()) else "something")
        out, lse = call(case.spec, x)
        right, right_lse = definition.attention(case.spec, x.q, x.k, x.v, x.operands, [], [], torch.float64)
        torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=1e-5)

    each()
    assert said.count("something") > 5


@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.name)
def test_attention_by_lists_is_as_exact_as_eager(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    sizes = LONG if case in MORE else None
    check(case, inputs(case, FLOAT, sizes=sizes))


@pytest.mark.parametrize("name", ["dense", "relative_far", "keys", "some_documents", "left_padding_added"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precisions(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in LISTED if case.name == name)
    check(case, inputs(case, dtype, sizes=LONG), 2.0 if dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize("name", ["dense", "relative", "keys"])
def test_one_list_for_many_attentions(name: str) -> None:
    """Also where the kernel's own tiles are smaller than those that are listed."""
    case = next(case for case in MORE if case.name == name)
    x = inputs(case, FLOAT, sizes=LONG)
    key = prepare(case.spec)
    found = mask_arguments(key, x.operands, x.ints, x.floats)
    made = attention_tiles(x.q, *found, [*x.q.shape[:3], x.k.shape[2]], 64, 64, programs.mask_of(key))
    with torch.no_grad():
        ours = attention(x.q, x.k, x.v, x.operands, x.ints, x.floats, key, made, 64, 64)[0]
    torch.testing.assert_close(ours, call(case.spec, x)[0], equal_nan=True)


def test_a_list_says_what_is_read() -> None:
    """Values in tiles that no list names are NaN here, which a weight of 0 would not hide."""
    case = next(case for case in MORE if case.name == "two_strips")
    x = inputs(case, FLOAT, sizes=LONG)
    x.v[:, :, 96:128] = x.v[:, :, 160:] = x.k[:, :, :32] = torch.nan
    assert not call(case.spec, x)[0].isnan().any()


def test_masks_of_layers_with_scores_of_their_own_are_one() -> None:
    keep = Ne(Load(1, B, 0, I, J), 0)
    operands = (Operand(FLOAT, 1), Operand(BOOL, 4))
    scores = [SCALE, 2 * sympy.tanh(SCALE), SCALE + Load(0, H) * (J - I)]
    masks = [programs.program(prepare(ScoreSpec(score, keep, operands=operands))).mask for score in scores]
    assert len(set(masks)) == 1
    assert masks[0] is not None


@pytest.mark.parametrize(
    ("spec", "listed"),
    [
        (ScoreSpec(SCALE), False),
        (named("causal").spec, False),
        (named("window").spec, False),
        (named("bias_hij").spec, False),  # a bias of each head: its tiles are not looked at twice
        (named("alibi").spec, False),
        (named("bias_bij").spec, True),
        (named("additive_padding").spec, True),
        (named("documents").spec, True),
        (named("dilated").spec, True),
    ],
)
def test_what_closed_bounds_say_needs_no_list(spec: ScoreSpec, listed: bool) -> None:
    assert (summary(spec) is not None) == listed


def test_op_registration() -> None:
    case = named("documents")
    x = inputs(case, FLOAT)
    prepared = programs.program(prepare(case.spec))
    arguments = (x.q, x.operands, [], [], [2, 4, 45, 70], 32, 32, prepared.mask)
    torch.library.opcheck(
        torch.ops.xfcompile.attention_tiles.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        (lambda t: t[..., 1:], (32, 32), "contiguous int32 of"),
        (lambda t: t.long(), (32, 32), "contiguous int32 of"),
        (lambda t: t, (64, 32), "contiguous int32 of"),
        (lambda t: t, (0, 0), "by their sizes"),
    ],
)
def test_lists_of_something_else(change: Change, sizes: tuple[int, int], message: str) -> None:
    case = named("documents")
    x = inputs(case, FLOAT)
    made, _ = made_of(case, x, 32, 32)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        attention(x.q, x.k, x.v, x.operands, [], [], prepare(case.spec), change(made), *sizes)


def test_lists_for_a_kernel_that_takes_none() -> None:
    x = inputs(named("causal"), FLOAT)
    with pytest.raises(ValueError, match="takes no lists"), torch.no_grad():
        attention(x.q, x.k, x.v, [], [], [], prepare(named("causal").spec), torch.zeros(1, dtype=torch.int32), 32, 32)


def test_a_kernel_that_does_not_run_is_replaced_once() -> None:
    calls: list[str] = []

    def broken(x: int) -> None:
        calls.append("broken")
        raise RuntimeError("too little shared memory")

    def other() -> Callable[[int], None]:
        return lambda x: calls.append(f"other {x}")

    launch_it = fallback.FirstThatRuns(broken, other)
    launch_it(1)
    launch_it(2)
    assert calls == ["broken", "other 1", "other 2"]


def test_a_kernel_that_has_run_may_fail() -> None:
    runs = iter([None, RuntimeError("an error of the device")])

    def sometimes() -> None:
        if (error := next(runs)) is not None:
            raise error

    launch_it = fallback.FirstThatRuns(sometimes, lambda: pytest.fail("it has run before"))
    launch_it()
    with pytest.raises(RuntimeError, match="of the device"):
        launch_it()


def test_the_text_is_the_same_in_every_process() -> None:
    """It is what kernels are found again by: nothing of it may go by an order that a process draws."""
    program = (
        "from attention_cases import named; from xfcompile.kernels.attention import blocks, codegen\n"
        "for name in ('documents', 'near_in_documents', 'negative_indices'):\n"
        "    found = blocks.summary(codegen.canonical(named(name).spec))\n"
        "    print(blocks.generate(found.mask))"
    )
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    made = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": folders},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("0", "2")
    ]  # fmt: skip
    assert made[0] == made[1] and "def tile_verdicts" in made[0]
