"""The generated attention kernel, interpreted, against the fp64 definition."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from attention_cases import (
    CASES,
    FAR_ROWS,
    Case,
    Inputs,
    Sizes,
    call,
    check,
    error,
    exact_scores,
    inputs,
    named,
    normal,
)

from xfcompile.evaluate import Unsupported
from xfcompile.kernels.attention import attention, cache, codegen, launch, launch_decode, prepare, reference, tiles
from xfcompile.kernels.attention.exactness import precision
from xfcompile.kernels.attention.repeat import Blank
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import Band, Operand, ScoreSpec

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

BF16_SLACK = 2.0  # the interpreter truncates where hardware rounds to nearest


def slack(dtype: torch.dtype) -> float:
    return BF16_SLACK if dtype == torch.bfloat16 else 1.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_is_as_exact_as_eager(case: Case) -> None:
    check(case, inputs(case, torch.float32))


@pytest.mark.parametrize("lk", [70, 300], ids=["blocks", "decoding"])
@pytest.mark.parametrize("case", FAR_ROWS, ids=lambda case: case.name)
def test_scores_that_are_far_from_0_are_not_rounded(case: Case, lk: int) -> None:
    x = exact_scores(case, Sizes(heads=2, kv_heads=2, lq=4, lk=lk))
    assert launch_decode.wanted(case.spec, x.q, x.k) == (lk == 300)
    exact = reference.attention(case.spec, x.q, x.k, x.v, x.operands, dtype=torch.float64)[0]
    assert error(call(case.spec, x)[0], exact) <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("lk", [70, 300], ids=["blocks", "decoding"])
@pytest.mark.parametrize("name", ["plain", "bottom_right"])
def test_in_fp32_the_maximum_is_off_before_anything_is_rounded(name: str, lk: int) -> None:
    """Scores of thousands, whose products with log2(e) would be rounded to more than they are themselves."""
    case = named(name)
    x = exact_scores(case, Sizes(heads=2, kv_heads=2, lq=4, lk=lk))
    x = replace(x, q=x.q + 30, k=x.k + 30)
    exact, single = (
        reference.attention(case.spec, x.q, x.k, x.v, [], x.ints, x.floats, dtype)[0]
        for dtype in (torch.float64, torch.float32)
    )
    assert error(call(case.spec, x)[0], exact) <= 1.1 * error(single, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "bias_hij", "soft_cap", "padding_mean", "sink"])
def test_half_precisions(name: str, dtype: torch.dtype) -> None:
    case = named(name)
    check(case, inputs(case, dtype), slack(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_half_precisions_everywhere(case: Case, dtype: torch.dtype) -> None:
    check(case, inputs(case, dtype), slack(dtype))


@pytest.mark.parametrize("layout", ["transposed", "poisoned", "key_major", "expanded"])
def test_any_strides(layout: str) -> None:
    case = named("causal")
    check(case, inputs(case, torch.float32, layout))


def test_packed_projection() -> None:
    packed = normal(2, 45, 3, 4, 24)  # [B, L, (q, k, v), H, D]
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    check(named("causal"), Inputs(q, k, v, [], [], []))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads: int) -> None:
    case = named("alibi")
    check(case, inputs(case, torch.float32, sizes=Sizes(kv_heads=kv_heads)))


@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (1, 70), (33, 1), (32, 64), (64, 32), (31, 33)])
@pytest.mark.parametrize("name", ["plain", "bottom_right", "window", "padding_mean"])
def test_ragged_lengths(name: str, lq: int, lk: int) -> None:
    case = named(name)
    check(case, inputs(case, torch.float32, sizes=Sizes(batch=2, heads=2, kv_heads=1, lq=lq, lk=lk)))


@pytest.mark.parametrize(("dq", "dv"), [(1, 1), (3, 17), (16, 16), (40, 24), (24, 40), (80, 80), (96, 128), (256, 200)])
def test_head_dims(dq: int, dv: int) -> None:
    case = named("causal")
    check(case, inputs(case, torch.float32, "poisoned", Sizes(heads=2, kv_heads=2, lq=35, lk=35, dq=dq, dv=dv)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transposed", "poisoned", "key_major", "expanded"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_strides_everywhere(case: Case, layout: str) -> None:
    check(case, inputs(case, torch.float16, layout))


@pytest.fixture
def fp32_products() -> Iterator[Callable[[str], None]]:
    """Sets what matrix products may round fp32 to."""
    before = torch.backends.cuda.matmul.fp32_precision

    def allow(precision: str) -> None:
        torch.backends.cuda.matmul.fp32_precision = precision

    yield allow
    allow(before)


@pytest.mark.parametrize("lk", [40, 400], ids=["blocks", "decoding"])
def test_the_setting_of_fp32_products_is_asked_at_every_call(
    lk: int, fp32_products: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs(named("plain"), torch.float32, sizes=Sizes(heads=1, kv_heads=1, lq=2, lk=lk))
    found: list[str] = []
    called = launch.call_of

    def recording(*args: Any) -> Any:
        found.append(precision(args[1].dtype))
        return called(*args)

    monkeypatch.setattr(launch, "call_of", recording)
    for setting in ("ieee", "tf32", "ieee"):
        fp32_products(setting)
        call(named("plain").spec, x)
    assert found == ["ieee", "tf32"], "and what was made for a setting is remembered"
    half = replace(x, q=x.q.half(), k=x.k.half(), v=x.v.half())
    for setting in ("ieee", "tf32"):
        fp32_products(setting)
        call(named("plain").spec, half)
    assert found[2:] == ["ieee"], "halves do not depend on it"


def test_writes_all_of_the_output_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def guarded(self: Blank) -> torch.Tensor:
        memory = torch.full((math.prod(self.shape) + 2000,), math.nan)
        made.append(memory)
        return memory.as_strided(self.shape, self.strides, 1000)

    monkeypatch.setattr(Blank, "__call__", guarded)
    out, lse = call(named("causal").spec, inputs(named("causal"), torch.float32, "poisoned"))
    assert not out.isnan().any()
    assert not lse.isnan().any()
    for memory in made:
        assert memory[:1000].isnan().all()
        assert memory[-1000:].isnan().all()


@pytest.mark.parametrize("dead", ["nan", "mean", "zero"])
def test_no_keys_sum_to_zero(dead: str) -> None:
    spec = ScoreSpec(S, keep=J <= I, dead=dead)  # type: ignore[arg-type]
    out, lse = call(spec, inputs(named("plain"), torch.float32, sizes=Sizes(lk=0)))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("sizes", [Sizes(batch=0), Sizes(lq=0)])
def test_empty_outputs(sizes: Sizes) -> None:
    out, lse = call(ScoreSpec(S), inputs(named("plain"), torch.float32, sizes=sizes))
    assert out.shape == (sizes.batch, sizes.heads, sizes.lq, sizes.dv)
    assert lse.numel() == 0


@pytest.mark.parametrize("name", [
    "documents", "documents_of_bytes", "chunks", "padding_zero", "neighbourhood", "near_in_documents",
])  # fmt: skip
def test_keys_out_of_reach_are_not_read(name: str) -> None:
    """Values that no row of a block may see are NaN here, which a weight of 0 would not hide."""
    case = named(name)
    x = inputs(case, torch.float32, sizes=Sizes(lq=160, lk=160))
    shape = (2, 1, 160, 160)
    scope = {B: torch.arange(2).view(2, 1, 1, 1), H: torch.zeros(1, 1, 1, 1), I: torch.arange(160).view(1, 1, 160, 1)}
    scope[J] = torch.arange(160).view(1, 1, 1, 160)
    if name == "padding_zero":  # of the first sequence, the first and last thirds
        x.operands[0][0] = (torch.arange(160) // 53) == 1
    keep = reference.Evaluator(scope, x.operands, torch.float64, torch.device("cpu"))(case.spec.keep)
    assert isinstance(keep, torch.Tensor)
    keep = keep.expand(shape)[:, 0]
    block = tiles.INTERPRETED.block_n
    first_rows = keep[:, :block].any(1)  # keys that the first block may see
    last = first_rows.nonzero()[:, 1].max() if name != "padding_zero" else 2 * 53
    x.v[0, :, (last // block + 1) * block :] = math.nan
    out, _ = call(case.spec, x)
    assert not out[0, :, :block].isnan().any()


def test_no_keys_but_a_sink() -> None:
    case = named("sink")
    x = inputs(case, torch.float32, sizes=Sizes(lk=0))
    out, lse = call(case.spec, x)
    assert (out == 0).all()
    torch.testing.assert_close(lse, x.operands[0][None, :, None].expand_as(lse))


def test_nan_of_an_input_reaches_its_rows_only() -> None:
    x = inputs(named("soft_cap"), torch.float32)
    x.q[0, 1, 7, 3] = math.nan
    out, _ = call(named("soft_cap").spec, x)
    rows = out.isnan().any(-1)
    assert rows[0, 1, 7]
    assert rows.sum() == 1


def test_soft_cap_near_zero_is_as_exact_as_tanh() -> None:
    """1 - 2/(1 + exp(2x)) would be off by 1e-7 there, which a cap of 1000 makes visible."""
    case = Case("large cap", ScoreSpec(1000 * sympy.tanh(S / 1000)))
    check(case, inputs(case, torch.float32))


def test_output_is_laid_out_for_the_next_projection() -> None:
    x = inputs(named("plain"), torch.float32)
    out, lse = call(ScoreSpec(S), x)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "lq", "lk"), [("causal", 70, 70), ("padding_mean", 40, 200), ("padding_mean", 2, 300)]
)
def test_output_is_laid_out_as_its_dimensions_are_where_that_is_asked(name: str, lq: int, lk: int) -> None:
    """By the kernel for blocks of queries, along lists, and in decoding."""
    x = inputs(named(name), torch.float32, sizes=Sizes(lq=lq, lk=lk))
    key = prepare(named(name).spec)
    with torch.no_grad():
        usual, ours = (
            attention(x.q, x.k, x.v, x.operands, [], [], key, heads_first=heads_first)[0]
            for heads_first in (False, True)
        )
    assert usual.transpose(1, 2).is_contiguous()
    assert ours.is_contiguous()
    assert torch.equal(usual, ours)


def test_reference_runs_on_a_cpu_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("causal")
    x = inputs(case, torch.float32)
    interpreted, _ = call(case.spec, x)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(launch, "run", None)
    plain, _ = call(case.spec, x)
    torch.testing.assert_close(interpreted, plain)
    assert plain.stride() == interpreted.stride()


# Compiled code calls the op


def test_op_registration() -> None:
    x = inputs(named("documents"), torch.float32, "transposed", Sizes(lq=5, lk=6))
    key = prepare(named("documents").spec)
    arguments = (x.q, x.k, x.v, x.operands, x.ints, x.floats, key)
    utils = ("test_schema", "test_faketensor")
    with torch.no_grad():
        torch.library.opcheck(torch.ops.xfcompile.attention.default, arguments, test_utils=utils)


@pytest.mark.parametrize("layout", [pytest.param("transposed", marks=pytest.mark.slow), "expanded"])
def test_inductor_passes_strides_symbols_and_floats(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("scale_at_run_time")
    key = prepare(case.spec)
    seen: list[tuple[tuple[int, ...], ...]] = []
    run = launch.run

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object, **more: object) -> object:
        seen.append((q.stride(), k.stride(), v.stride()))
        return run(q, k, v, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "run", spy)

    @torch.compile(dynamic=True)
    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: float) -> torch.Tensor:
        return attention(q, k, v, [], [k.shape[2]], [x * 2], key)[0] * 2

    for lk in (9, 12):
        x = inputs(case, torch.float32, layout, Sizes(batch=2, heads=2, kv_heads=2, lq=5, lk=lk, dq=8, dv=8))
        with torch.no_grad():
            out = program(x.q, x.k, x.v, 1.5)
        assert seen[-1] == (x.q.stride(), x.k.stride(), x.v.stride())
        exact, _ = reference.attention(case.spec, x.q, x.k, x.v, [], [lk], [3.0])
        torch.testing.assert_close(out, exact * 2)


def test_symbolic_sizes_in_the_fake() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    key = prepare(named("plain").spec)
    x = inputs(named("plain"), torch.float32)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode, torch.no_grad():
        q, k, v = (mode.from_tensor(t, static_shapes=False) for t in (x.q, x.k, x.v))
        out, lse = attention(q, k, v, [], [], [], key)
    assert tuple(out.shape) == x.q.shape
    assert tuple(lse.shape) == x.q.shape[:3]
    assert tuple(out.stride()) == call(named("plain").spec, x)[0].stride()


# Errors


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 5, 8), (2, 4, 6, 9), (2, 4, 6, 8)), "head dim disagree"),
        (((2, 4, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8)), "multiple of key heads"),
        (((2, 4, 5, 8), (1, 4, 6, 8), (1, 4, 6, 8)), "batch, key length"),
        (((4, 5, 8), (4, 6, 8), (4, 6, 8)), r"must be \[batch, heads"),
    ],
)
def test_shapes_that_disagree(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(s) for s in shapes), [], [], [], prepare(ScoreSpec(S)))


def test_operands_that_the_kernel_was_not_made_for() -> None:
    x = inputs(named("plain"), torch.float32)
    with pytest.raises(ValueError, match="loads from operands"):
        attention(x.q, x.k, x.v, [torch.zeros(4, dtype=torch.int64)], [], [], prepare(named("alibi").spec))


def test_unknown_kernel() -> None:
    x = inputs(named("plain"), torch.float32)
    with pytest.raises(RuntimeError, match="no kernel 'nonsense' was prepared"):
        attention(x.q, x.k, x.v, [], [], [], "nonsense")


def test_a_function_without_triton_form() -> None:
    with pytest.raises(Unsupported, match="besselj"):
        prepare(ScoreSpec(sympy.besselj(1, S)))


# Generated source


def test_names_of_scalars_do_not_matter() -> None:
    def spec(name: str) -> ScoreSpec:
        n = sympy.Symbol(name, integer=True, positive=True)
        return ScoreSpec(S / 8, keep=n > J, scalars=(n,), band=Band(None, n, True))

    assert prepare(spec("s77")) == prepare(spec("u0"))


def test_causal_has_no_mask_in_the_middle() -> None:
    source = codegen.generate(codegen.canonical(named("causal").spec))
    kernel = source[source.index("def attention_forward") : source.index("def decode_split")]
    assert kernel.count("UPCAST, UNIT, False, False)") == 1
    assert kernel.count("UPCAST, UNIT, True, True)") == 1


def test_loads_are_as_small_as_their_indices() -> None:
    spec = ScoreSpec(S + Load(0, H) + Load(1, B, J), operands=(Operand(torch.float32, 1), Operand(torch.float32, 2)))
    source = codegen.generate(codegen.canonical(spec))
    score = source[source.index("def score") : source.index("def tile")]
    assert score.count("tl.load") == 1
    assert "tl.cast(i" not in score
    assert "row0 = tl.load(t0_ptr" in source


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_spec_is_read_back_from_the_source(case: Case) -> None:
    spec = codegen.canonical(case.spec)
    scope: dict[str, object] = {}
    source = codegen.generate(spec)
    exec(source[source.index("SPEC =") : source.index("@triton.jit")], scope)
    assert cache.parse(scope["SPEC"]) == spec  # type: ignore[arg-type]


def test_another_process_runs_a_stored_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    spec = ScoreSpec(S * sympy.Rational(17, 100), keep=J <= I, band=Band(None, I + 1, True))
    key = cache.key_of(codegen.generate(codegen.canonical(spec)))
    cache.store(codegen.generate(codegen.canonical(spec)))
    program = (
        "import torch; from xfcompile.kernels.attention import attention\n"
        f"x = torch.arange(40.).view(1, 1, 10, 4) / 40; print(attention(x, x, x, [], [], [], {key!r})[0].sum().item())"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    printed = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    x = torch.arange(40.0).view(1, 1, 10, 4) / 40
    assert float(printed.stdout) == pytest.approx(reference.attention(spec, x, x, x)[0].sum().item(), rel=1e-5)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    assert cache.store("# text\n").read_text() == "# text\n"


def test_a_damaged_cache_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    path = cache.store("# text\n")
    path.write_text("# tex")
    assert cache.find(cache.key_of("# text\n")) is None
    assert cache.store("# text\n") == path
    assert path.read_text() == "# text\n"


def test_reference_is_torch_attention() -> None:
    x = inputs(named("plain"), torch.float64)
    spec = ScoreSpec(S / sympy.sqrt(24), keep=J <= I)
    ours, _ = reference.attention(spec, x.q, x.k, x.v, dtype=torch.float64)
    theirs = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)
    assert error(ours, theirs) < 1e-14
