"""Gated MLPs in training: what is saved, dropout, checkpoints, autocast, dynamic rows, and the routes."""

# ruff: noqa: E501 (graphs, a line a node)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import Outcome, tensors
from expecttest import TestCase
from gated_programs import DOWN, PACKED, ROUTES, W, X, check, rewriting
from test_golden import rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import xfcompile
from xfcompile.kernels import philox
from xfcompile.site import GatedMLPSite

L = F.linear


def swiglu(x: Tensor, w: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return L(F.silu(L(x, w)) * L(x, v), d)


def site(outcome: Outcome) -> tuple[bool, str | None, str | None]:
    (found,) = [s for s in outcome.sites if s.family == "gated_mlp"]
    return found.matched, found.route, found.reason


# -- routes --------------------------------------------------------------------------------------------------------


def test_on_cpus_the_usual_route_is_inductor() -> None:
    matched, route, reason = site(check(swiglu, *tensors(X, W, W, DOWN)))
    assert (matched, route) == (True, "inductor")
    assert reason is not None and reason.startswith("left to Inductor")


def test_cublas_takes_a_packed_weight() -> None:
    def packed(x: Tensor, w: Tensor) -> Tensor:
        gate, up = L(x, w).chunk(2, -1)
        return F.silu(gate) * up

    routes = {"gated_mlp": "cublas"}
    for grad in (False, True):
        outcome = check(packed, *tensors(X, PACKED, grad=grad), grad=grad, routes=routes)
        assert site(outcome) == (True, "cublas", "asked for")
        assert "packed" in rows(outcome)
    matched, route, reason = site(check(swiglu, *tensors(X, W, W, DOWN), routes=routes))
    assert (matched, route) == (True, "inductor")
    assert reason is not None and "a weight each" in reason


def test_what_has_no_kernel_is_left() -> None:
    _, route, reason = site(check(swiglu, *tensors(X, W, W, DOWN, dtype=torch.float64), routes=ROUTES))
    assert route == "inductor" and reason is not None and "float64" in reason


def test_the_family_can_be_switched_off() -> None:
    with xfcompile.collect() as report:
        torch.compile(swiglu, backend=xfcompile.xformers, options={"patterns": ["attention"]})(*tensors(X, W, W, DOWN))
    assert report.sites == []


# -- what is saved -------------------------------------------------------------------------------------------------


def saved(outcome: Outcome) -> list[tuple[int, ...]]:
    """The shapes of what the forward hands to the backward, but for its own inputs."""
    (forward,) = outcome.programs
    output = next(n for n in forward.graph.nodes if n.op == "output")
    return [tuple(x.meta["val"].shape) for x in output.args[0][1:] if x.op != "placeholder"]


def test_the_product_is_not_saved_but_made_again() -> None:
    outcome = check(swiglu, *tensors(X, W, W, DOWN, grad=True), grad=True, routes=ROUTES)
    assert "gated_mlp_down" in rows(outcome)
    inputs = {(10, 8), (12, 8), (6, 12)}  # views of x and of the weights
    assert [shape for shape in saved(outcome) if shape not in inputs] == [(10, 24)]


def test_without_a_linear_after_it_only_projections_are_saved() -> None:
    outcome = check(lambda x, w, v: F.silu(L(x, w)) * L(x, v), *tensors(X, W, W, grad=True), grad=True, routes=ROUTES)
    assert [shape for shape in saved(outcome) if shape not in {(10, 8), (12, 8)}] == [(10, 24)]


@pytest.mark.parametrize("packed", [False, True])
def test_with_recompute_only_inputs_are_saved(packed: bool) -> None:
    def program(x: Tensor, w: Tensor, d: Tensor) -> Tensor:
        gate, up = L(x, w).chunk(2, -1)
        return L(F.silu(gate) * up, d)

    routes = {"gated_mlp": "cublas_recompute" if packed else "triton_recompute"}
    fn, shapes = (program, (X, PACKED, DOWN)) if packed else (swiglu, (X, W, W, DOWN))
    outcome = check(fn, *tensors(*shapes, grad=True), grad=True, routes=routes)
    assert site(outcome) == (True, routes["gated_mlp"], "asked for")
    assert [shape for shape in saved(outcome) if shape not in {(10, 8), (12, 8), (24, 8), (6, 12)}] == []
    (forward,) = outcome.programs
    assert not [n for n in forward.graph.nodes if "mm." in str(n.target)], "projected once more, in the forward"


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), ()])
def test_frozen_inputs(needed: tuple[int, ...]) -> None:
    inputs = tensors(X, W, W, DOWN)
    for n in needed:
        inputs[n].requires_grad_()
    outcome = check(swiglu, *inputs, grad=True, routes=ROUTES)
    assert site(outcome)[1] == "triton"


# -- dropout -------------------------------------------------------------------------------------------------------


def dropped(x: Tensor, w: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return L(F.dropout(F.silu(L(x, w)) * L(x, v), 0.25), d)


def run(fn: Callable[..., Any], inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    out = fn(*mine)
    return [out.detach(), *torch.autograd.grad(out, mine, torch.ones_like(out))]


def test_dropout_joins_the_kernel_and_its_gradient_has_the_same_mask() -> None:
    outcome = Outcome()
    inputs = tensors((3, 50, 8), (40, 8), (40, 8), (40, 40))
    inputs[3] = torch.eye(40)
    compiled = torch.compile(dropped, backend=rewriting(outcome, ROUTES))
    first = run(compiled, inputs)
    assert site(outcome) == (True, "triton", "asked for")
    text = rows(outcome)
    assert "randint" in text and "dropout" not in text.replace("gated_mlp", "")
    kept = first[0] != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.02
    # The product of what is kept, and its gradients, by autograd with that very mask.
    x, w, v, d = (t.clone().requires_grad_() for t in inputs)
    exact = L(torch.where(kept, F.silu(L(x, w)) * L(x, v) * philox.scale(0.25), 0.0), d)
    truth = [exact.detach(), *torch.autograd.grad(exact, (x, w, v, d), torch.ones_like(exact))]
    for mine, theirs in zip(first, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    again, other = run(compiled, inputs), run(compiled, inputs, seed=1)
    assert torch.equal(again[0], first[0])
    assert not torch.equal(other[0] != 0, kept)


def test_two_calls_drop_out_differently() -> None:
    def twice(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(F.silu(L(x, w)) * L(x, v)), F.dropout(F.silu(L(x + 0.5, w)) * L(x + 0.5, v))

    outcome = Outcome()
    first, second = torch.compile(twice, backend=rewriting(outcome, ROUTES))(*tensors((3, 50, 8), (40, 8), (40, 8)))
    assert [s.route for s in outcome.sites] == ["triton"] * 2
    assert not torch.equal(first == 0, second == 0)


def test_small_rates_are_left_to_inductor() -> None:
    outcome = check(lambda x, w, v: F.dropout(F.silu(L(x, w)) * L(x, v), 1e-7), *tensors(X, W, W), routes=ROUTES)
    assert site(outcome)[1] == "inductor"


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_checkpoints_recompute_with_the_same_mask(rate: float) -> None:
    def layer(x: Tensor, w: Tensor, v: Tensor, d: Tensor) -> Tensor:
        return torch.tanh(L(F.dropout(F.silu(L(x, w)) * L(x, v), rate, rate > 0), d))

    def program(*inputs: Tensor) -> Tensor:
        return checkpoint(layer, *inputs, use_reentrant=False)

    inputs = [*tensors((3, 50, 8), (40, 8), (40, 8)), torch.eye(40)]
    outcome = Outcome()
    compiled = torch.compile(program, backend=rewriting(outcome, ROUTES))
    ours = run(compiled, inputs)
    assert site(outcome) == (True, "triton", "asked for")
    kept = ours[0] != 0
    x, w, v, d = (t.clone().requires_grad_() for t in inputs)
    scale = philox.scale(rate)
    exact = torch.tanh(L(torch.where(kept, F.silu(L(x, w)) * L(x, v) * scale, 0.0), d))
    truth = [exact.detach(), *torch.autograd.grad(exact, (x, w, v, d), torch.ones_like(exact))]
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# -- autocast, dynamic rows, other programs ------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast(inside: bool, grad: bool) -> None:
    """Against the same program in fp32: both err by bf16's rounding, and ours no more than eager's."""

    def under(x: Tensor, *rest: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return swiglu(x, *rest)

    inputs = tensors((2, 5, 64), (48, 64), (48, 64), (32, 48))
    outcome = Outcome()
    compiled = torch.compile(under if inside else swiglu, backend=rewriting(outcome, ROUTES))

    def outside(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return compiled(*given)

    def results(fn: Callable[..., Tensor]) -> list[Tensor]:
        if grad:
            return run(fn, inputs)
        with torch.no_grad():
            return [fn(*inputs)]

    ours, theirs = results(compiled if inside else outside), results(under)
    truth = results(lambda *given: swiglu(*given).double())
    assert site(outcome) == (True, "triton", "asked for")
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        mine, eagers = ((t.double() - c.double()).abs().max().item() for t in (a, b))
        assert mine <= 1.5 * eagers + 2**-9 * c.abs().max().item()


def test_other_numbers_of_rows_are_not_compiled_anew() -> None:
    outcome = Outcome()
    compiled = torch.compile(swiglu, backend=rewriting(outcome, ROUTES), dynamic=None)
    for n in (5, 7, 9, 11):
        inputs = tensors((2, n, 8), W, W, DOWN, grad=True)
        for mine, theirs in zip(run(compiled, inputs), run(swiglu, inputs), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert len(outcome.graphs) == 2
    assert all(s.route == "triton" for s in outcome.sites)


class Clamped(nn.Module):
    """Numbers of a module are symbols where all is dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.limit, self.alpha = 1.5, 1.702
        self.both = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


@pytest.mark.parametrize("dynamic", [False, True])
def test_numbers_that_are_known_at_run_time_only(dynamic: bool) -> None:
    torch.manual_seed(0)
    matched, _, reason = site(check(Clamped(), *tensors((2, 3, 16)), dynamic=dynamic, routes=ROUTES))
    assert matched != dynamic
    assert not dynamic or (reason is not None and "at compile time" in reason)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("grad", [False, True])
def test_a_block_of_llama(grad: bool) -> None:
    torch.manual_seed(0)
    outcome = check(Block(), *tensors((2, 3, 16), grad=grad), grad=grad, routes=ROUTES)
    assert site(outcome) == (True, "triton", "asked for")


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_by_inductor(grad: bool) -> None:
    torch.manual_seed(0)
    block = Block()
    inputs = tensors((2, 3, 16))
    with xfcompile.collect() as report:
        compiled = torch.compile(block, backend=xfcompile.xformers, options={"routes": ROUTES, "strict": True})
        if grad:
            for mine, theirs in zip(run(compiled, inputs), run(block, inputs), strict=True):
                torch.testing.assert_close(mine, theirs)
        else:
            with torch.no_grad():
                torch.testing.assert_close(compiled(*inputs), block(*inputs))
    assert [s.route for s in report.sites if s.family == "gated_mlp"] == ["triton"]
    assert not report.failures


def test_interpreted_kernels_in_a_compiled_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for grad in (False, True):
        outcome = check(swiglu, *tensors(X, W, W, DOWN, grad=grad), grad=grad, routes=ROUTES)
        assert site(outcome)[1] == "triton"


def test_sites_are_the_same_however_the_parts_are_spelled() -> None:
    """Equal in all but the values that they speak of."""
    from xfcompile.patterns import gated_mlp
    from xfcompile.read import Reading

    found: list[GatedMLPSite] = []

    def backend(gm: Any, inputs: Any) -> Any:
        values = list(Reading(gm, inputs).steps)
        users: dict[Any, list[Any]] = {}
        for value in values:
            for source in value.inputs():
                users.setdefault(source, []).append(value)
        found.extend(s for a in gated_mlp.anchors(values) for s in gated_mlp.match(a, users))
        return gm

    for fn in (
        swiglu,
        lambda x, w, v, d: ((x @ v.T) * (lambda g: g * g.sigmoid())(torch.einsum("bsd,fd->bsf", x, w))) @ d.T,
    ):
        torch._dynamo.reset()
        torch.compile(fn, backend=backend)(*tensors(X, W, W, DOWN))
    first, second = found
    for name in ("formula", "x_order", "layout", "experts", "rows", "features", "inner", "dtype", "dropout"):
        assert getattr(first, name) == getattr(second, name), name
    assert [w.order for w in first.weights] == [w.order for w in second.weights]
    assert first.down is not None and second.down is not None and first.down.weight.order == second.down.weight.order


# -- golden graphs -------------------------------------------------------------------------------------------------


class Golden(TestCase):
    def graph(self, fn: Callable[..., Any], inputs: list[Tensor], **about: Any) -> str:
        import re

        return re.sub(r"[0-9a-f]{32}", "KERNEL", rows(check(fn, *inputs, routes=ROUTES, **about)))

    def test_llama_in_inference(self) -> None:
        self.assertExpectedInline(
            self.graph(swiglu, tensors(X, W, W, DOWN)),
            """\
l_x_
l_w_
l_v_
l_d_
reshape = reshape(l_x_, -1, 8)
gated_mlp_default = gated_mlp.default(reshape, l_w_, l_v_, None, None, KERNEL, separate, dual, False, torch.float32)
getitem = getitem(gated_mlp_default, 0)
view = view(getitem, 2, 5, 12)
linear_2 = linear(view, l_d_)
return (linear_2,)""",
        )

    def test_llama_in_training(self) -> None:
        self.assertExpectedInline(
            self.graph(swiglu, tensors(X, W, W, DOWN, grad=True), grad=True),
            """\
l_x_
l_w_
l_v_
l_d_
reshape = reshape(l_x_, -1, 8)
gated_mlp_down_default = gated_mlp_down.default(reshape, l_w_, l_v_, None, None, l_d_, None, KERNEL, separate, dual, True, torch.float32)
getitem = getitem(gated_mlp_down_default, 0)
view = view(getitem, 2, 5, 6)
contiguous = contiguous(view)
return (contiguous,)""",
        )

    def test_phi_packed_with_a_bias(self) -> None:
        def phi(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            gate, up = L(x, w, b).chunk(2, dim=-1)
            return up * F.silu(gate)

        self.assertExpectedInline(
            self.graph(phi, tensors(X, PACKED, (24,))),
            """\
l_x_
l_w_
l_b_
reshape = reshape(l_x_, -1, 8)
getitem_2 = getitem(l_b_, (Ellipsis, slice(0, 12, 1)))
getitem_3 = getitem(l_b_, (Ellipsis, slice(12, 24, 1)))
gated_mlp_default = gated_mlp.default(reshape, l_w_, None, getitem_2, getitem_3, KERNEL, gate first, dual, False, torch.float32)
getitem_4 = getitem(gated_mlp_default, 0)
view = view(getitem_4, 2, 5, 12)
contiguous = contiguous(view)
return (contiguous,)""",
        )
