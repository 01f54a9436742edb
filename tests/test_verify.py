"""Every replaced site beside its original: what is wrong is found, what is right is not, and nothing changes."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import xfcompile
from xfcompile.checks import Check, Difference
from xfcompile.family import Candidate, Family, Route
from xfcompile.report import Report
from xfcompile.values import Value

families = importlib.import_module("xfcompile.families")


@dataclass(frozen=True)
class SwishSite:
    root: Value
    x: Value
    interior: tuple[Value, ...]


def found(anchor: Value, users: dict[Value, list[Value]]) -> list[SwishSite]:
    """x * sigmoid(x), with or without a dropout behind it."""
    x = anchor["self"]
    sites = []
    for product in (u for u in users.get(anchor, ()) if u.op == "mul" and {u["self"], u["other"]} == {x, anchor}):
        dropped = [u for u in users.get(product, ()) if u.op == "dropout"]
        sites += [SwishSite(root, x, (anchor, product)) for root in dropped or [product]]
    return sites


def swish_family(replacement: Callable[..., Any]) -> Family[Any, Any]:
    return Family(
        name="swish_toy",
        routes=("toy", "inductor"),
        anchors=lambda values: (v for v in values if v.op == "sigmoid"),
        match=found,
        at_node=lambda reading, site, node: Candidate(site=site, node=node, operands=(site.x,)),
        plan=lambda reading, candidate, setting: replace(candidate, route=Route("toy")),
        replace=lambda emitter, candidate: emitter.call(replacement, emitter.held(candidate.site.x)),
    )


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def wrong_backward(x: Tensor) -> Tensor:
    return WrongGradient.apply(x)  # type: ignore[no-untyped-call]


def wrong_forward(x: Tensor) -> Tensor:
    return F.silu(x) * 1.0001


def nan_somewhere(x: Tensor) -> Tensor:
    return torch.where(x == x.amax(), float("nan"), F.silu(x))


def no_gradient(x: Tensor) -> Tensor:
    return F.silu(x.detach())


def other_dtype(x: Tensor) -> Tensor:
    return F.silu(x).double()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """The toy family, with some replacement, is the only one."""

    def use(replacement: Callable[..., Any]) -> None:
        monkeypatch.setattr(families, "FAMILIES", (swish_family(replacement),))

    return use


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 8, -1) @ v


def qkv(grad: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, 2, 17, 64, generator=generator).to(dtype) for _ in range(3)]
    return [x.requires_grad_(grad) for x in made]


def verified(fn: Callable[..., Any], *args: Any) -> Check:
    """The one check of a program, which has to be ok."""
    report = xfcompile.verify(fn, *args)
    assert report.failures == []
    (check,) = report.checks
    assert check.ok, str(check)
    return check


def results(check: Check) -> list[str]:
    """The results that were compared; gradients by the number of the program's input."""
    return [d.what.replace("grad of l_args_", "grad ").removesuffix("_") for d in check.differences]


# -- what is right ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_compares_the_result(dtype: torch.dtype) -> None:
    check = verified(attention, *qkv(dtype=dtype))
    assert (check.family, check.route) == ("attention", "sdpa")
    assert str(check.source).startswith("test_verify.py:")
    (out,) = check.differences
    assert out.what == "out"
    assert 0 < out.error <= out.bound and 0 < out.eager < out.bound
    assert out.ratio == out.error / out.eager


def test_training_compares_gradients_of_what_needs_them() -> None:
    assert results(verified(attention, *qkv(grad=True))) == ["out", "grad 0", "grad 1", "grad 2"]
    q, k, v = qkv()
    assert results(verified(attention, q, k.requires_grad_(), v)) == ["out", "grad 1"]
    with torch.no_grad():
        assert results(verified(attention, *qkv(grad=True))) == ["out"]


def test_errors_are_those_of_the_programs_dtype() -> None:
    """fp64 takes the place of every dtype that the program names: eager's error is that of its roundings."""

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).float() * torch.full((), 0.125, dtype=torch.float16)
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v

    fine, coarse = (verified(rounded, *qkv(dtype=d)).differences[0] for d in (torch.float32, torch.float16))
    assert fine.eager < 1e-6 < 1e-4 < coarse.eager < 1e-2


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(17)
    mask = torch.zeros(17, 17).masked_fill(i[:, None] < i, torch.finfo(torch.float32).min)
    scores = q @ k.mT
    scores *= 0.125
    scores += mask
    return scores.softmax(-1) @ v


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = torch.cat([q, k, v], -1).chunk(3, -1)
    return F.scaled_dot_product_attention(a, b, c, attn_mask=torch.ones(17, 17, dtype=torch.bool).tril())


def cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are written into a tensor of the user's, twice, before they are read."""
    k[:, :, 3:5] = q[:, :, 3:5]
    k.mul_(0.5)
    return attention(q, k, v) + k.sum()


def computed_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q * 2, k.relu(), v) + attention(q * 2, k.relu(), v)


def never_seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(17, 17)
    mask[3] = float("-inf")
    return (q @ k.mT + mask).softmax(-1) @ v


@pytest.mark.parametrize("program", [additive, packed, computed_twice, never_seen])
@pytest.mark.parametrize("grad", [False, True])
def test_whatever_the_program_does_before_it(program: Callable[..., Any], grad: bool) -> None:
    for check in xfcompile.verify(program, *qkv(grad)).checks:
        assert check.ok, str(check)
        assert len(check.differences) == (4 if grad else 1)


def test_operands_that_were_written_in_place_are_what_they_were_then() -> None:
    q, k, v = qkv()
    once = k.clone()
    cached(q, once, v)
    verified(cached, q, k, v)
    assert torch.equal(k, once), "the program was run on the user's own memory"


def test_a_site_inside_of_a_checkpoint_is_compared() -> None:
    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attention, q * 2, k, v, use_reentrant=False)

    assert len(results(verified(checkpointed, *qkv(grad=True)))) == 4


def test_a_checkpoint_around_the_program_counts_nothing_of_the_check() -> None:
    compiled = torch.compile(attention, backend=xfcompile.xformers, options={"verify": True, "strict": True})
    inputs = qkv(grad=True)
    with xfcompile.collect() as report:
        checkpoint(compiled, *inputs, use_reentrant=False).sum().backward()
    (check,) = report.checks
    assert check.ok and len(results(check)) == 4
    for x, y in zip(inputs, torch.autograd.grad(attention(*inputs).sum(), inputs), strict=True):
        torch.testing.assert_close(x.grad, y)


def test_autocast_is_part_of_the_original() -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v)

    check = verified(mixed, *qkv(grad=True))
    assert 1e-4 < check.differences[0].eager < 0.1


def test_a_module_that_is_one_node_is_compared() -> None:
    module = nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(2, 9, 64)
    assert len(results(verified(lambda x: module(x, x, x, need_weights=True)[0], x))) == 4  # q, k and v are projected


def test_exported_programs_are_compared_too() -> None:
    gm = torch.export.export(Normed().eval(), (torch.randn(3, 17, 64),)).module()
    verified(gm, torch.randn(3, 17, 64))


def test_every_graph_of_a_program_is_verified() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(x, k, v)

    assert len(xfcompile.verify(broken, *qkv()).checks) == 2


# -- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "replacement, what",
    [
        (wrong_forward, {"out", "grad 0"}),
        (wrong_backward, {"grad 0"}),
        (no_gradient, {"grad 0"}),
        (nan_somewhere, {"out", "grad 0"}),
        (other_dtype, {"out, torch.float64 [4, 5],"}),
    ],
)
def test_a_wrong_replacement_is_found(
    replacement: Callable[..., Any], what: set[str], toy: Callable[..., None]
) -> None:
    toy(replacement)
    x = torch.randn(4, 5, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="not what the program computes: swish_toy at test_verify.py:[0-9]+"):
        report = xfcompile.verify(swish, x)
    (check,) = report.checks
    assert check.wrong and not check.ok
    wrong = replace(check, differences=tuple(d for d in check.differences if not d.ok))
    assert set(results(wrong)) == what
    assert "1 wrong" in report.render(100)


def test_a_right_one_of_the_same_kind_is_not(toy: Callable[..., None]) -> None:
    toy(F.silu)
    assert len(verified(swish, torch.randn(4, 5, requires_grad=True)).differences) == 2


def test_strict_raises_before_the_program_runs(toy: Callable[..., None]) -> None:
    toy(wrong_forward)
    compiled = torch.compile(swish, backend=xfcompile.xformers, options={"verify": True, "strict": True})
    with pytest.raises(xfcompile.VerificationError, match=r"swish_toy at test_verify.py:[0-9]+: out: error .* ratio"):
        compiled(torch.randn(4, 5))


def test_what_is_not_a_number_in_the_program_is_so_in_the_replacement(toy: Callable[..., None]) -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    toy(F.silu)
    verified(swish, x[:3])
    toy(lambda x: torch.nan_to_num(F.silu(x)))
    with pytest.warns(RuntimeWarning, match="error inf"):
        report = xfcompile.verify(swish, x)
    assert report.checks[0].wrong


# -- what is not compared -----------------------------------------------------------------------------------------


def dropped(x: Tensor, p: float) -> Tensor:
    return F.dropout(x * x.sigmoid(), p)


def test_dropout_is_compared_only_where_it_drops_nothing(toy: Callable[..., None]) -> None:
    toy(F.silu)
    (check,) = xfcompile.verify(lambda x: dropped(x, 0.5), torch.randn(4, 5)).checks
    assert (check.reason, check.ok, check.wrong) == ("random", False, False)
    assert "not compared: random" in str(check)
    verified(lambda x: dropped(x, 0.0), torch.randn(4, 5))


def test_an_original_that_cannot_be_taken_out_is_not_compared(
    toy: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xfcompile import verification

    evaluate = verification._evaluate

    def spoilt(part: Any, operands: Any, *rest: Any) -> Any:
        return evaluate(part, [x + 1 if isinstance(x, Tensor) else x for x in operands], *rest)

    monkeypatch.setattr(verification, "_evaluate", spoilt)
    toy(F.silu)
    (check,) = xfcompile.verify(swish, torch.randn(4, 5)).checks
    assert check.reason == "outside of its program the original computes something else"


def test_an_error_of_the_check_is_no_error_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from xfcompile import verification

    monkeypatch.setattr(verification, "_compared", lambda *args: 1 / 0)
    with pytest.warns(RuntimeWarning, match="verifying a graph: ZeroDivisionError"):
        report = xfcompile.verify(attention, *qkv())
    assert report.checks == [] and len(report.failures) == 1
    compiled = torch.compile(attention, backend=xfcompile.xformers, options={"verify": True, "strict": True})
    with pytest.raises(ZeroDivisionError):
        compiled(*qkv())


# -- the option, and what it leaves alone ----------------------------------------------------------------------------


def run_with(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Report]:
    with xfcompile.collect() as report:
        out = torch.compile(fn, backend=xfcompile.xformers, options=options)(*args)
    return out, report


def test_the_option_changes_no_result_and_no_random_state() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(attention(F.dropout(q), k, v)) + torch.rand(64)

    outs, states, grads = [], [], []
    for options in ({}, {"verify": True}):
        torch._dynamo.reset()
        torch.manual_seed(3)
        x = qkv(grad=True)
        out, report = run_with(program, *x, **options)
        out.sum().backward()
        outs.append(out)
        states.append(torch.get_rng_state())
        grads.append([y.grad for y in x])
    assert [c.ok for c in report.checks] == [True]
    assert torch.equal(*outs) and torch.equal(*states)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(17)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(17, 64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.mean(0))
        return attention(x, self.norm(x), x)


def test_statistics_and_buffers_are_updated_once() -> None:
    x = torch.randn(3, 17, 64)
    expected, module = Normed(), Normed()
    expected(x)
    run_with(module, x, verify=True)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer)
    assert all(p.grad is None for p in module.parameters())


def test_only_the_first_run_of_each_compilation_is_verified() -> None:
    compiled = torch.compile(attention, backend=xfcompile.xformers, options={"verify": True}, dynamic=True)
    counts = []
    for length in (17, 17, 12, 9):
        with xfcompile.collect() as report:
            compiled(*[x[:, :, :length] for x in qkv()])
        assert len(report.checks) == report.graphs
        assert all(c.ok for c in report.checks)
        counts.append(report.graphs)
    assert counts[0] == 1 and counts[1] == counts[3] == 0


def test_lengths_that_are_symbols_are_numbers_in_a_check() -> None:
    def masked(x: Tensor) -> Tensor:
        n = x.shape[1]
        keep = torch.arange(n)[:, None] >= torch.arange(n)
        return (x @ x.mT / n).masked_fill(~keep, float("-inf")).softmax(-1) @ (x + 1)

    with xfcompile.collect() as report:
        compiled = torch.compile(masked, backend=xfcompile.xformers, options={"verify": True}, dynamic=True)
        compiled(torch.randn(2, 13, 16, requires_grad=True)).sum().backward()
    assert [c.ok for c in report.checks] == [True]
    assert len(report.checks[0].differences) > 1


def test_without_the_option_nothing_is_verified() -> None:
    assert run_with(attention, *qkv())[1].checks == []
    with pytest.raises(ValueError, match=r"xfcompile\.verify\(gm, \*inputs\)"):
        xfcompile.rewrite(fx.symbolic_trace(attention), qkv(), {"verify": True})
    with pytest.raises(BackendCompilerFailed, match="'verify' must be True or False, not 1"):
        run_with(attention, *qkv(), verify=1)


def test_the_kernel_itself_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (20 * torch.tanh(q @ k.mT / 160)).softmax(-1) @ v

    for grad in (False, True):
        torch._dynamo.reset()
        _, report = run_with(capped, *qkv(grad), verify=True, strict=True, routes={"attention": "triton"})
        (check,) = report.checks
        assert check.ok and check.route == "triton", str(check)
        assert len(check.differences) == (4 if grad else 1)


# -- what is said ---------------------------------------------------------------------------------------------------


def test_differences_are_in_units_of_eagers_own() -> None:
    assert Difference("out", 2.0, 1.0, 3.0).ratio == 2.0
    assert Difference("out", 0.0, 0.0, 0.0).ratio == 1.0
    assert Difference("out", 1.0, 0.0, 2.0).ratio == float("inf")
    assert Difference("out", 1.0, 0.0, 2.0).ok and not Difference("out", 2.1, 0.0, 2.0).ok


@pytest.mark.parametrize("width", [60, 100])
def test_the_report_shows_them(width: int) -> None:
    good, bad = Difference("out", 1e-6, 1e-6, 2e-6), Difference("grad of q", 1.0, 1e-6, 2e-6)
    checks = [
        Check("attention", "sdpa", "a.py:1", "layers.0", (good,)),
        Check("attention", "sdpa", "a.py:2", None, (good, bad)),
        Check("attention", "sdpa", "a.py:3", reason="random"),
    ]
    text = Report(checks=checks).render(width)
    assert max(map(len, text.splitlines())) <= width
    assert "2 sites verified, 1 not compared, 1 wrong" in text
    assert "not compared: random" in Report(checks=checks).render(100)
    assert [check["family"] for check in Report(checks=checks).to_dict()["checks"]] == ["attention"] * 3


def test_a_check_that_is_right_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        verified(attention, *qkv())
