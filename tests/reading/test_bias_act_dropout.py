"""One bias-act-dropout, however it is spelled; what must not be taken for one; and what came of it."""

# ruff: noqa: E501 (one line a program, so that the tables can be read as such)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bias_programs import FAMILY, Bloom, Fn, as_text, bloom, found, given
from equivalence import Outcome, check, rewriting, tensors
from expecttest import TestCase
from functorch.compile import make_boxed_func
from test_golden import rows as graph_rows
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from xfcompile import rewrite
from xfcompile.activation import KEEP, X, tensor, vector
from xfcompile.backend import xformers
from xfcompile.evaluate import Evaluator
from xfcompile.kernels import philox
from xfcompile.site import BiasActDropoutSite


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def newgelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))


def quick(h: Tensor) -> Tensor:
    return h * torch.sigmoid(1.702 * h)


# What it is, and its spellings.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[Callable[[Tensor], Tensor]]]] = {
    "relu": (F.relu, [F.relu, lambda h: h.relu(), torch.relu, lambda h: torch.clamp(h, min=0), lambda h: h.clamp_min(0), torch.nn.ReLU()]),
    "relu in place": (F.relu, [lambda h: F.relu(h, inplace=True) * 1, lambda h: h.relu_() * 1, torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Identity())][:2]),
    "relu6": (F.relu6, [F.relu6, lambda h: F.hardtanh(h, 0.0, 6.0)]),
    "relu squared": (lambda h: F.relu(h) ** 2, [lambda h: torch.square(F.relu(h)), lambda h: F.relu(h).pow(2), lambda h: F.relu(h) * F.relu(h)]),
    "gelu": (F.gelu, [F.gelu, lambda h: F.gelu(h, approximate="none"), torch.nn.GELU(), lambda h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))), lambda h: 0.5 * h * (1 + (h / math.sqrt(2)).erf())]),
    "gelu by tanh": (lambda h: F.gelu(h, approximate="tanh"), [newgelu, bloom, lambda h: F.gelu(h, approximate="tanh"), torch.nn.GELU("tanh"), lambda h: 0.5 * h * (1 + torch.tanh(0.7978845608028654 * h * (1 + 0.044715 * h.square())))]),
    "quick gelu": (quick, [quick, lambda h: torch.sigmoid(h * 1.702) * h, lambda h: h / (1 + torch.exp(-1.702 * h))]),
    "silu": (F.silu, [F.silu, lambda h: h * h.sigmoid(), torch.nn.SiLU(), lambda h: torch.mul(torch.sigmoid(h), h)]),
    "tanh": (torch.tanh, [torch.tanh, lambda h: h.tanh()]),
    "sigmoid": (torch.sigmoid, [torch.sigmoid, F.sigmoid, lambda h: 1 / (1 + torch.exp(-h)), lambda h: torch.reciprocal(1 + (-h).exp())]),
    "leaky relu": (lambda h: F.leaky_relu(h, 0.1), [lambda h: F.leaky_relu(h, 0.1), torch.nn.LeakyReLU(0.1)]),
    "elu": (lambda h: F.elu(h, 0.7), [lambda h: F.elu(h, 0.7)]),
    "selu": (F.selu, [F.selu]),
    "celu": (lambda h: F.celu(h, 1.5), [lambda h: F.celu(h, 1.5)]),
    "hardswish": (F.hardswish, [F.hardswish]),
    "hardsigmoid": (F.hardsigmoid, [F.hardsigmoid]),
    "mish": (F.mish, [F.mish, lambda h: h * torch.tanh(F.softplus(h))]),
    "softplus": (F.softplus, [F.softplus]),
}  # fmt: skip
SPELLED = [(name, k) for name, (_, spellings) in ACTIVATIONS.items() for k in range(len(spellings))]


@pytest.mark.parametrize("name, k", SPELLED)
def test_one_activation_however_it_is_spelled(name: str, k: int) -> None:
    meant, spellings = ACTIVATIONS[name]
    x, w, b, *_ = given()
    (site,) = found(lambda x, w, b: spellings[k](F.linear(x, w, b)), x, w, b)
    assert isinstance(site, BiasActDropoutSite), site
    assert site.bias is not None and site.product is not None and not site.vectors and not site.tensors
    h = torch.linspace(-9, 9, 721, dtype=torch.float64)
    value = Evaluator({X: h}, (), torch.float64, h.device)(site.formula)
    torch.testing.assert_close(value, meant(h), rtol=2e-8, atol=2e-8)  # 0.79788456 is what BLOOM has of sqrt(2 / pi)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_an_activation_has_eagers_numbers_and_gradients(name: str, route: str) -> None:
    _, spellings = ACTIVATIONS[name]
    x, w, b, *_ = given()
    outcome = check(
        lambda x, w, b: spellings[0](F.linear(x, w, b)),
        x * 2,
        w,
        b * 3,
        grad=True,
        routes={FAMILY: route},
        family=FAMILY,
    )
    assert [s.route for s in outcome.sites] == [route]


# The spellings of a linear and its bias: x, w [N, K], b.
LINEARS: dict[str, Fn] = {
    "F.linear": lambda x, w, b: F.linear(x, w, b),
    "F.linear, bias added": lambda x, w, b: F.linear(x, w) + b,
    "bias first": lambda x, w, b: b + F.linear(x, w),
    "bias of three dimensions": lambda x, w, b: F.linear(x, w) + b.view(1, 1, -1),
    "bias expanded": lambda x, w, b: F.linear(x, w) + b.expand(2, 5, 16),
    "bias added in place": lambda x, w, b: F.linear(x, w).add_(b),
    "torch.add": lambda x, w, b: torch.add(F.linear(x, w), b),
    "matmul with T": lambda x, w, b: x @ w.T + b,
    "matmul with t": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "matmul with transpose": lambda x, w, b: x.matmul(w.transpose(0, 1)) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.view(-1, 8), w.t()).view(2, 5, 16),
    "addmm, method": lambda x, w, b: b.addmm(x.reshape(10, 8), w.mT).reshape(2, 5, 16),
    "einsum": lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w) + b,
    "einsum, weight first": lambda x, w, b: torch.einsum("nk,bsk->bsn", w, x) + b,
    "einsum with ellipsis": lambda x, w, b: torch.einsum("...k,nk->...n", x, w) + b,
    "mm": lambda x, w, b: (torch.mm(x.flatten(0, 1), w.t()) + b).unflatten(0, (2, 5)),
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_one_linear_however_it_is_spelled(name: str, route: str) -> None:
    x, w, b, *_ = given()

    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.silu(LINEARS[name](x, w, b))

    (site,) = found(program, x, w, b)
    assert isinstance(site, BiasActDropoutSite), site
    assert site.bias is not None and site.product is not None and not site.vectors and not site.tensors
    assert str(site.formula) == "x*sigmoid(x)"
    outcome = check(program, x, w, b, grad=True, routes={FAMILY: route}, family=FAMILY)
    assert [s.route for s in outcome.sites] == [route]


# What comes after: h is a linear's result with its bias.
AFTER: dict[str, tuple[str, Fn]] = {
    "residual": ("keep*x + r0", lambda h, r, g: F.dropout(h, 0.25) + r),
    "residual first": ("keep*x + r0", lambda h, r, g: r + F.dropout(h, 0.25)),
    "torch.dropout": ("keep*x + r0", lambda h, r, g: r + torch.dropout(h, 0.25, True)),
    "keywords": ("keep*x + r0", lambda h, r, g: F.dropout(h, p=0.25, training=True) + r),
    "module": ("keep*x + r0", lambda h, r, g: torch.nn.Dropout(0.25)(h) + r),
    "native": ("keep*x + r0", lambda h, r, g: torch.native_dropout(h, 0.25, True)[0] + r),
    "dropout in place": ("keep*x + r0", lambda h, r, g: F.dropout(h, 0.25, True, True) + r),
    "torch.add": ("keep*x + r0", lambda h, r, g: torch.add(F.dropout(h, 0.25), r)),
    "residual times a number": ("keep*x + 0.5*r0", lambda h, r, g: torch.add(F.dropout(h, 0.25), r, alpha=0.5)),
    "difference": ("keep*x - r0", lambda h, r, g: F.dropout(h, 0.25) - r),
    "layer scale": ("keep*v0*x + r0", lambda h, r, g: r + g * F.dropout(h, 0.25)),
    "layer scale before": ("keep*v0*x + r0", lambda h, r, g: r + F.dropout(h * g, 0.25)),
    "rescaled": ("0.5*keep*x + 0.5*r0", lambda h, r, g: (F.dropout(h, 0.25) + r) / 2.0),
    "two residuals": ("keep*x + r0 + r1", lambda h, r, g: F.dropout(h, 0.25) + r + r.cos()),
    "broadcast residual": ("keep*x + r0", lambda h, r, g: F.dropout(h, 0.25) + r[:1]),
    "activated": ("keep*Where(x <= 0, 0, x)", lambda h, r, g: F.dropout(F.relu(h), 0.25)),
    "activated in place": ("keep*Where(x <= 0, 0, x)", lambda h, r, g: F.dropout(F.relu(h, inplace=True), 0.25)),
    "activated and all": ("keep*v0*Where(x <= 0, 0, x) + r0", lambda h, r, g: r + g * F.dropout(F.relu(h), 0.25)),
    "another view": ("keep*x + r0", lambda h, r, g: (F.dropout(h.view(10, 16), 0.25) + r.view(10, 16)).view(2, 5, 16)),
    "all is dropped": ("keep*x + r0", lambda h, r, g: F.dropout(h, 1.0) + r),
    "dropout alone": ("keep*x", lambda h, r, g: F.dropout(h, 0.25)),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_one_dropout_and_residual_however_they_are_spelled(name: str) -> None:
    expected, after = AFTER[name]
    (site,) = found(lambda x, w, b, r, g: after(F.linear(x, w, b), r, g), *given())
    assert isinstance(site, BiasActDropoutSite), site
    simple = site.formula.subs({tensor(0): 3, tensor(1): 5, vector(0): 7, KEEP: 2, X: -11})
    scope = {"keep": 2, "x": -11, "r0": 3, "r1": 5, "v0": 7, "Where": lambda c, a, b: a if c else b}
    assert float(simple) == eval(expected, scope), site.formula
    assert site.bias is not None and site.dropout == (1.0 if name == "all is dropped" else 0.25)


def kept(p: float, shape: Sequence[int], stream: int = 0) -> Tensor:
    """What the next seed keeps, times what it is multiplied by."""
    state = torch.get_rng_state()
    seed = torch.randint(2**63 - 1, (1,))
    torch.set_rng_state(state)
    return philox.linear_keep(seed, p, shape, stream) * philox.scale(p)


@pytest.mark.parametrize("name", [n for n in AFTER if n != "all is dropped"])
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_with_dropout_results_and_gradients_are_those_of_one_mask(name: str, route: str) -> None:
    """The program is run eagerly with that very mask in dropout's place: backward and forward have the same."""
    _, after = AFTER[name]
    inputs = given()
    outcome = Outcome()

    def program(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
        return after(F.linear(x, w, b), r, g)

    compiled = torch.compile(program, backend=rewriting(outcome, {FAMILY: route}, family=FAMILY))
    torch.manual_seed(11)
    mask = kept(0.25, (2, 5, 16))
    out = compiled(*inputs)
    assert [s.route for s in outcome.sites] == [route], outcome.sites
    weights = torch.linspace(0.5, 1.5, out.numel()).view_as(out)
    gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)

    def masked(h: Tensor, *_: Any, **__: Any) -> Tensor:
        return h * mask.view(h.shape).to(h)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", masked)
        patch.setattr(torch, "dropout", masked)
        patch.setattr(torch, "native_dropout", lambda h, *_: (masked(h), None))
        double = [x.detach().double().requires_grad_() for x in inputs]
        exact = program(*double)
        wanted = torch.autograd.grad((exact * weights).sum(), double, allow_unused=True)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=2e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


# Larger than it is: the part that is a site is taken, and gives eager's numbers.
PARTS: dict[str, tuple[str, Fn]] = {
    "activation after a residual": ("keep*x", lambda h, r, g: F.relu(F.dropout(h, 0.0 + 0.25, False) * 1 + r)),
    "the residual is activated": ("r0 + x*sigmoid(x)", lambda h, r, g: F.relu(F.silu(h) + r)),
    "scaled after a residual": ("r0 + x*sigmoid(x)", lambda h, r, g: (F.silu(h) + r) * g),
    "a norm after": ("r0 + x*sigmoid(x)", lambda h, r, g: F.layer_norm(F.silu(h) + r, (16,))),
    "added to two": ("x*sigmoid(x)", lambda h, r, g: (lambda a: (a + r) * (a - r))(F.silu(h))),
    "broadcast": ("x*sigmoid(x)", lambda h, r, g: F.silu(h)[None] + torch.ones(3, 1, 1, 1)),
    "integers": ("x*sigmoid(x)", lambda h, r, g: F.silu(h) + torch.arange(16)),
    "transposed": ("x*sigmoid(x)", lambda h, r, g: F.silu(h).mT + r.mT),
    "alpha dropout after": ("x*sigmoid(x)", lambda h, r, g: F.alpha_dropout(F.silu(h), 0.5, False) * r.sum(-1).argmax()),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in PARTS if n != "activation after a residual"])
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_the_part_that_is_a_site_is_taken(name: str, route: str) -> None:
    expected, after = PARTS[name]

    def program(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
        return after(F.linear(x, w, b), r, g)

    (site,) = found(program, *given())
    assert isinstance(site, BiasActDropoutSite) and as_text(site) == expected
    outcome = check(program, *given(), grad=True, routes={FAMILY: route}, family=FAMILY)
    assert [s.route for s in outcome.sites] == [route]


TWO: dict[str, Fn] = {
    "two activations": lambda h, k, r: F.silu(h) + F.silu(k),
    "two dropouts and a residual": lambda h, k, r: F.dropout(h, 0.0, True) + F.dropout(F.gelu(k), 0.0, True) + r,
    "three": lambda h, k, r: F.silu(h) + F.silu(k) + F.gelu(h + 1),
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_of_two_sites_with_one_result_one_is_taken(name: str, route: str) -> None:
    """As of a GPT-NeoX, which adds what its attention and its MLP drop out. Each has the other for its residual."""

    def program(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
        return TWO[name](F.linear(x, w, b), F.linear(x, w.flip(0), g), r)

    outcome = check(program, *given(), grad=True, routes={FAMILY: route}, family=FAMILY)
    assert [s.route for s in outcome.sites].count(route) == 1, [(s.route, s.reason) for s in outcome.sites]
    others = {s.reason for s in outcome.sites if s.route != route}
    assert others <= {"another site with the same result is replaced"}


MOVED: dict[str, tuple[int, Fn]] = {
    "rows moved": (1, lambda h, r, g: F.silu(h.transpose(0, 1)) * g + r.transpose(0, 1)),
    "rows moved, another view": (1, lambda h, r, g: F.silu(h.view(10, 16).view(2, 5, 16).transpose(0, 1)) + r.transpose(0, 1)),
    "moved twice": (1, lambda h, r, g: F.silu(h.transpose(0, 1)).transpose(0, 1) + r),
    "moved after": (1, lambda h, r, g: F.silu(h).transpose(0, 1) + r.transpose(0, 1)),
    "seen in two orders": (0, lambda h, r, g: F.silu(h)[:, :2] + h.transpose(0, 1)[:2, :2].transpose(0, 1)),
    "columns moved": (0, lambda h, r, g: F.silu(h.mT) + r.mT),
    "inside a call": (1, lambda h, r, g: r + g * F.silu(F.multi_head_attention_forward(
        h, h, h, 16, 2, torch.ones(48, 16) * g[None] / 9, g.repeat(3), None, None, False, 0.0, torch.eye(16) * g, g, need_weights=False)[0])),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_rows_in_another_order(name: str, route: str) -> None:
    sites, after = MOVED[name]

    def program(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
        return after(F.linear(x, w, b), r, g)

    outcome = check(program, *given(), grad=True, routes={FAMILY: route}, family=FAMILY)
    assert len([s for s in outcome.sites if s.matched]) == sites, outcome.sites


@pytest.mark.parametrize("rows", [(9,), (3, 3)])
def test_rows_seen_in_two_orders_of_equal_sizes_are_not_confused(rows: tuple[int, ...]) -> None:
    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = F.linear(x, w, b).view(3, 3, 16)
        return F.silu(h.transpose(0, 1)) + h

    x, w, b = tensors((*rows, 8), (16, 8), (16,))
    assert found(program, x, w, b) == []
    check(program, x, w, b, routes={FAMILY: "triton"}, family=FAMILY)


class Straight(torch.autograd.Function):
    """A gradient that is not the derivative: quantisation's."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.tanh(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Squared(torch.autograd.Function):
    """A backward that is not linear in what comes in."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.sigmoid(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        s = torch.sigmoid(h)
        return grad * grad * s * (1 - s)


@pytest.mark.parametrize("route", ["triton", "epilogue"])
@pytest.mark.parametrize("function, matched", [(Bloom, True), (Straight, False), (Squared, False)])
def test_an_autograd_function_whose_backward_is_the_derivative(function: Any, matched: bool, route: str) -> None:
    def program(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return r + function.apply(F.linear(x, w, b))

    outcome = check(program, *given()[:4], grad=True, routes={FAMILY: route}, family=FAMILY)
    assert [(s.matched, s.route) for s in outcome.sites] == [(matched, route if matched else None)], outcome.sites
    assert matched or "not the derivative" in outcome.reasons


def with_backward(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A function of h, and its gradient by h of one by the result."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.save_for_backward(h)
            return forward(h)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (h,) = ctx.saved_tensors
            return backward(h, grad)

    return Function.apply


def slope(h: Tensor) -> Tensor:
    return 1 - torch.tanh(h) ** 2


# What the backward does to a gradient of 0.7, or at an h of less than 9, is the derivative of the forward.
OTHER_BACKWARDS: dict[str, Any] = {
    "a gradient that is clipped": with_backward(torch.tanh, lambda h, grad: (grad * slope(h)).clamp(-1, 1)),
    "a gradient that is bounded below": with_backward(torch.tanh, lambda h, grad: grad.clamp_min(-1) * slope(h)),
    "positive gradients": with_backward(torch.tanh, lambda h, grad: F.relu(grad) * slope(h)),
    "sizes of gradients": with_backward(torch.tanh, lambda h, grad: grad.abs() * slope(h)),
    "a number is added": with_backward(torch.tanh, lambda h, grad: grad * slope(h) + 1e-3),
    "straight through a clamp": with_backward(lambda h: h.clamp(-10, 10), lambda h, grad: grad),
    "straight through a far clamp": with_backward(lambda h: h.clamp(max=1e5), lambda h, grad: grad),
    "a little function": with_backward(lambda h: torch.tanh(h) * 1e-7, lambda h, grad: grad * slope(h) * 2e-7),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_BACKWARDS)
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_an_autograd_function_whose_backward_is_another_far_away(name: str, route: str) -> None:
    def program(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return r - 3 * OTHER_BACKWARDS[name](F.linear(5 * x, w, b))

    outcome = check(program, *given()[:4], grad=True, routes={FAMILY: route}, family=FAMILY)
    assert not outcome.matched
    assert all("not the derivative" in str(site.reason) for site in outcome.sites)


@pytest.mark.parametrize("route", ["triton", "epilogue"])
@pytest.mark.parametrize("used", [lambda y: y, lambda y: (y * 2, y.mT), lambda y: y.mul(2).add_(1)])
def test_an_autograd_function_that_is_the_root(used: Any, route: str) -> None:
    """Its result is taken out of a tuple."""

    def program(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return used(Bloom.apply(F.linear(x, w, b)))

    outcome = check(program, *given()[:3], grad=True, routes={FAMILY: route}, family=FAMILY)
    assert [(s.matched, s.route) for s in outcome.sites] == [(True, route)], outcome.sites


class Two(torch.autograd.Function):
    """Of two results, one of which may be all that is wanted."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h)
        ctx.both = both
        return torch.tanh(h), 2 * h

    @staticmethod
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        return grad * slope(h) + (2 * other if ctx.both else 0), None


@pytest.mark.parametrize("read", [False, True], ids=["its gradient is not read", "its gradient is read"])
@pytest.mark.parametrize("taken", [False, True], ids=["not taken", "taken"])
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_a_second_result_of_an_autograd_function(route: str, taken: bool, read: bool) -> None:
    def program(x: Tensor, w: Tensor, b: Tensor) -> Any:
        first, second = Two.apply(F.linear(x, w, b), read)  # type: ignore[no-untyped-call]
        return (first, second) if taken else first + 1

    outcome = check(program, *given()[:3], grad=True, routes={FAMILY: route}, family=FAMILY)
    assert bool(outcome.matched) == (not taken and not read), outcome.sites


def test_a_result_of_an_autograd_function_that_is_written_to() -> None:
    def program(x: Tensor, w: Tensor, b: Tensor) -> Any:
        y = Bloom.apply(F.linear(x, w, b))
        y.add_(1)
        return y

    check(program, *given()[:3], grad=True, routes={FAMILY: "triton"}, family=FAMILY)


def test_an_activation_after_a_residual_is_no_site() -> None:
    _, after = PARTS["activation after a residual"]
    assert found(lambda x, w, b, r, g: after(F.linear(x, w, b), r, g), *given()) == []


def changed_between(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    a = F.silu(h)
    x.add_(1)
    return a * 2


def weight_changed_between(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    a = F.silu(h)
    w.mul_(2)
    return a * 2


def activated_after_a_write(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    h[:, 0] = 0
    return F.silu(h)


def residual_changed(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    y = r + F.silu(F.linear(x, w, b))
    r.zero_()
    return y


def residual_changed_before(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    a = F.silu(F.linear(x, w, b))
    r.mul_(3)
    return a + r


def written_later(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    y = r + F.silu(F.linear(x, w, b))
    z = y.exp()
    y.mul_(2)
    return y + z


def kept_before(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, w, b)
    return F.silu(h), h


def relu_in_place_seen(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    F.relu(h, inplace=True)
    return h @ h.mT


def relu_in_place_then_linear(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w, b), inplace=True), w.mT)


def added_in_place(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    h = r * 2
    h += F.silu(F.linear(x, w, b))
    return h.exp()


def two_uses_of_a_product(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    p = F.linear(x, w)
    return F.silu(p + b) * p


MUTATED = {
    f.__name__: f
    for f in (
        changed_between, weight_changed_between, activated_after_a_write, residual_changed, residual_changed_before,
        written_later, kept_before, relu_in_place_seen, relu_in_place_then_linear, added_in_place, two_uses_of_a_product,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATED)
@pytest.mark.parametrize("route", ["triton", "epilogue"])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_written_in_place_is_seen(name: str, route: str, grad: bool) -> None:
    """Whatever is made of these, results are eager's, and inputs are left as eager leaves them."""
    writes_inputs = name in ("changed_between", "weight_changed_between", "residual_changed", "residual_changed_before")
    if grad and writes_inputs:
        pytest.skip("leaves that need gradients are not written to")
    check(MUTATED[name], *given(grad), grad=grad, routes={FAMILY: route}, family=FAMILY)


def relu_in_place_of_two(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    a = F.relu(F.linear(x, w, b), inplace=True)
    c = F.dropout(F.linear(a, w.mT, w.sum(0)), 0.0).relu_()
    return F.linear(c, w) + a


def relu_in_place_of_a_view(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    a = h.view(-1, 16)
    a = F.relu(a, inplace=True)
    return a.sin()


def relu_in_place_of_a_view_seen(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, w, b)
    a = h.view(-1, 16)
    F.relu(a, inplace=True)
    return a.sin(), h.cos()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("route", ["triton", "epilogue"])
@pytest.mark.parametrize(
    "program, sites",
    [
        (relu_in_place_then_linear, 1),
        (relu_in_place_of_two, 2),
        (relu_in_place_of_a_view, 1),
        (relu_in_place_of_a_view_seen, 0),
        (relu_in_place_seen, 0),
    ],
)
def test_an_activation_in_place_of_what_nothing_else_sees(program: Fn, sites: int, route: str, grad: bool) -> None:
    outcome = check(program, *given(grad), grad=grad, routes={FAMILY: route}, family=FAMILY)
    assert [s.route for s in outcome.sites if s.matched] == [route] * sites


def test_eval_leaves_bias_and_activation() -> None:
    mlp = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 8), torch.nn.Dropout(0.5)
    )
    x = given()[0]
    (site,) = found(mlp.eval(), x)
    assert isinstance(site, BiasActDropoutSite) and site.dropout == 0
    first, second = found(mlp.train(), x)
    assert isinstance(first, BiasActDropoutSite) and isinstance(second, BiasActDropoutSite)
    assert (first.dropout, as_text(second), second.dropout) == (0.5, "keep*x", 0.5)


class Block(torch.nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.gelu(self.up(self.norm(x))), self.p, self.training)
        return x + F.dropout(self.down(h), self.p, self.training)


class Checkpointed(torch.nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(p), Block(p)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("backend", ["aot", "inductor"])
@pytest.mark.parametrize("kind", [Block, Checkpointed])
def test_backward_and_a_checkpoints_recomputation_see_the_masks_of_the_forward(kind: Any, backend: str) -> None:
    """A loss that is linear in the input's perturbation says so: f(x + d) - f(x) = f'(x) d for the same seed."""
    torch.manual_seed(3)
    model = kind(0.25).double().float().train()
    outcome = Outcome()
    if backend == "aot":
        compiled = torch.compile(model, backend=rewriting(outcome, {FAMILY: "triton"}, family=FAMILY))
    else:
        compiled = torch.compile(
            model, backend="xformers", options={"routes": {FAMILY: "triton"}, "patterns": [FAMILY]}
        )
    x = torch.randn(3, 7, 16, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return compiled(x)

    out = run(x)
    again = run(x)
    assert torch.equal(out, again), "the same seed gives other numbers"
    torch.manual_seed(6)
    assert not torch.equal(out, compiled(x)), "another seed gives the same numbers"
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    step = torch.randn_like(x) * 2e-3
    change = ((run(x + step) - run(x - step)) * weights).double().sum() / 2
    slope = (gradient * step).double().sum()
    assert abs(change - slope) < 2e-3 * (gradient.norm() * step.norm()), (change, slope)
    if backend == "aot":
        assert [s.route for s in outcome.sites] == ["triton"] * (2 if kind is Block else 4)


def test_no_mask_is_kept() -> None:
    """Of what the forward keeps for the backward nothing is a mask: no bool, no byte a number."""
    model, outcome = Block(0.25).train(), Outcome()
    compiled = torch.compile(model, backend=rewriting(outcome, {FAMILY: "triton"}, family=FAMILY))
    compiled(torch.randn(3, 7, 16, requires_grad=True)).sum().backward()
    (forward,) = outcome.programs
    (output,) = [n for n in forward.graph.nodes if n.op == "output"]
    saved = [n.meta["val"] for n in output.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    assert saved and all(x.dtype in (torch.float32, torch.int64) for x in saved)
    assert [tuple(x.shape) for x in saved if x.dtype == torch.int64] == [(1,)], "one seed for a graph"


def test_frozen_inputs_cost_no_work() -> None:
    x, w, b, *_ = given(grad=False)
    x.requires_grad_()
    outcome = Outcome()
    backward: list[torch.fx.GraphModule] = []

    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.gelu(F.linear(x, w, b))

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
        outcome.sites += rewrite(gm, examples, {"routes": {FAMILY: "epilogue"}, "strict": True}).sites
        keep = lambda gm, _: (backward.append(gm), make_boxed_func(gm.forward))[1]  # noqa: E731
        return aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward), bw_compiler=keep)(gm, examples)

    torch.compile(program, backend=backend)(x, w, b).sum().backward()
    (gm,) = backward
    products = [n for n in gm.graph.nodes if "mm" in str(n.target)]
    assert len(products) == 1, "the weight's gradient is computed"
    (call,) = [n for n in gm.graph.nodes if "bias_act_dropout_backward" in str(n.target)]
    assert list(call.args[9]) == [True, False]


@pytest.mark.parametrize("route", ["triton", "epilogue", "epilogue, no bias", "epilogue, made again"])
def test_a_gradient_of_a_gradient_is_refused_in_words(route: str) -> None:
    from xfcompile.kernels.bias_act_dropout import bias_act_dropout, linear_act_dropout, text_of

    formula = text_of(X**2)
    x, w, b, *_ = given()
    if route == "triton":
        out = bias_act_dropout(x, None, [], [], None, 0, formula, 0.0, torch.float32, False)
    else:
        bias, save = None if "no bias" in route else b, "again" not in route
        out, _ = linear_act_dropout(x, w, bias, [], [], None, 0, formula, 0.0, torch.float32, save)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("needs", ["x", "weight", "x weight", "x bias", "weight bias", "x weight bias"])
def test_a_gradient_of_any_gradient_is_refused(needs: str, save: bool) -> None:
    """By each tensor, whichever of them need gradients, and so are kept."""
    from xfcompile.kernels.bias_act_dropout import linear_act_dropout, text_of

    x, w, b = (
        t.detach().requires_grad_(name in needs) for name, t in zip(("x", "weight", "bias"), given()[:3], strict=True)
    )
    leaves = [t for t in (x, w, b) if t.requires_grad]
    out, _ = linear_act_dropout(x, w, b, [], [], None, 0, text_of(X**3), 0.0, torch.float32, save)

    def second(one: Tensor, other: Tensor) -> None:
        (first,) = torch.autograd.grad(out.sum(), one, create_graph=True)
        torch.autograd.grad(first.sum(), other)

    for one in leaves:
        for other in leaves:
            with pytest.raises(NotImplementedError, match="no second derivative"):
                second(one, other)


@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_under_autocast(route: str) -> None:
    def program(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return r + g * F.gelu(F.linear(x, w, b))

    outcome = check(program, *given(), grad=True, routes={FAMILY: route}, family=FAMILY, computed=torch.bfloat16)
    assert [s.route for s in outcome.sites] == [route]


@pytest.mark.parametrize(
    "linear", [F.linear, lambda x, w, b: x @ w.T + b, lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w) + b]
)
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_under_autocast_products_are_of_its_dtype(linear: Fn, route: str) -> None:
    """Which casts what a product of torch's own is given, and nothing that one of ours is."""

    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.gelu(linear(x, w, b))

    outcome = check(program, *given()[:3], grad=True, routes={FAMILY: route}, family=FAMILY, computed=torch.bfloat16)
    assert [s.route for s in outcome.sites] == [route]
    nodes = [n for gm in outcome.programs for n in gm.graph.nodes]
    products = [n for n in nodes if any(name in str(n.target) for name in ("linear_act_dropout", "mm"))]
    factors = [
        x.meta["val"].dtype for n in products for x in n.args if isinstance(x, torch.fx.Node) and x.meta["val"].ndim > 1
    ]
    assert factors and set(factors) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_in_half_precision(dtype: torch.dtype, route: str) -> None:
    inputs = given(dtype=dtype)
    outcome = check(
        lambda x, w, b, r, g: r + g * newgelu(F.linear(x, w, b)),
        *inputs,
        grad=True,
        routes={FAMILY: route},
        family=FAMILY,
    )
    assert [s.route for s in outcome.sites] == [route]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["triton", "epilogue"])
@pytest.mark.parametrize("transposed", [False, True])
def test_slopes_jump_where_the_sum_changes_its_sign(transposed: bool, route: str, dtype: torch.dtype) -> None:
    """Of products that nearly cancel their biases: a product that is rounded before its bias is added has another side
    for many."""
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(n, 32, generator=generator).to(dtype) for n in (1, 24))
    b = -(x.double() @ w.double().t()).to(dtype)[0]
    x = x.repeat(16, 1)
    x[:, -1] += torch.randn(16, generator=generator).to(dtype) * torch.finfo(dtype).eps * 4
    total = x.double() @ w.double().t() + b.double()
    rounded = ((x.double() @ w.double().t()).to(dtype).double() + b.double()) > 0
    assert ((total > 0) != rounded).sum() > 10 and total.abs().min() > 1e-5

    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(torch.addmm(b, x, w) if transposed else F.linear(x, w, b))

    leaves = [t.requires_grad_() for t in (x, w.t().contiguous() if transposed else w, b)]
    outcome = check(program, *leaves, grad=True, routes={FAMILY: route}, family=FAMILY)
    assert [s.route for s in outcome.sites] == [route]
    torch._dynamo.reset()
    compiled = torch.compile(program, backend=xformers, options={"routes": {FAMILY: route}, "strict": True})
    (slopes,) = torch.autograd.grad(compiled(*leaves).sum(), b)
    assert torch.equal(slopes, (total > 0).sum(0).to(dtype))


@pytest.mark.parametrize("route", ["triton", "epilogue"])
def test_rows_may_be_any_number(route: str) -> None:
    """One graph for all of them."""
    model, outcome = Block(0.0).train(), Outcome()
    compiled = torch.compile(model, backend=rewriting(outcome, {FAMILY: route}, family=FAMILY), dynamic=True)
    for batch, length in ((3, 7), (2, 9), (5, 4)):
        x = torch.randn(batch, length, 16, requires_grad=True)
        out, exact = compiled(x), model(x)
        torch.testing.assert_close(out, exact)
        ours, eagers = (torch.autograd.grad(y.square().sum(), [x, *model.parameters()]) for y in (out, exact))
        torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-4)
    assert [s.route for s in outcome.sites] == [route], "the down projection has neither activation nor dropout here"


def test_fp64_is_left() -> None:
    outcome = check(
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        *given(dtype=torch.float64)[:3],
        routes={FAMILY: "triton"},
        family=FAMILY,
    )
    assert [s.route for s in outcome.sites] == ["inductor"]
    assert "float64" in str(outcome.sites[0].reason)


@pytest.mark.parametrize("p", [1e-4, 0.9999])
def test_a_probability_that_is_finer_than_our_numbers_is_left(p: float) -> None:
    outcome = Outcome()

    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.dropout(F.linear(x, w, b), p)

    torch.compile(program, backend=rewriting(outcome, {FAMILY: "triton"}, family=FAMILY))(*given()[:3])
    assert [(s.matched, s.route) for s in outcome.sites] == [(True, "inductor")]
    assert "16 bits" in str(outcome.sites[0].reason)


def test_on_a_cpu_without_the_interpreter_all_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    for routes in ({}, {FAMILY: "triton"}):
        outcome = check(lambda x, w, b: F.gelu(F.linear(x, w, b)), *given()[:3], routes=routes, family=FAMILY)
        assert [(s.matched, s.route) for s in outcome.sites] == [(True, "inductor")]
        assert outcome.sites[0].reason


class Golden(TestCase):
    def test_a_block(self) -> None:
        outcome = Outcome()
        torch.manual_seed(0)
        compiled = torch.compile(Block(0.25).train(), backend=rewriting(outcome, {FAMILY: "epilogue"}, family=FAMILY))
        compiled(torch.randn(3, 7, 16, requires_grad=True))
        self.assertExpectedInline(
            graph_rows(outcome),
            """\
l_self_modules_norm_parameters_weight_
l_self_modules_norm_parameters_bias_
l_x_
l_self_modules_up_parameters_weight_
l_self_modules_up_parameters_bias_
l_self_modules_down_parameters_weight_
l_self_modules_down_parameters_bias_
layer_norm = layer_norm(l_x_, (16,), l_self_modules_norm_parameters_weight_, l_self_modules_norm_parameters_bias_, 1e-05)
randint = randint(9223372036854775807, (1,), dtype=torch.int64, device=cpu)
linear_act_dropout_default = linear_act_dropout.default(layer_norm, l_self_modules_up_parameters_weight_, l_self_modules_up_parameters_bias_, [], [], randint, 0, Mul(Rational(1, 2), Symbol('keep', real=True), Symbol('x', real=True), Add(erf(Mul(Float('0.70710678118654757274', precision=60), Symbol('x', real=True))), Integer(1))), 0.25, torch.float32, True)
getitem = getitem(linear_act_dropout_default, 0)
linear_act_dropout_default_1 = linear_act_dropout.default(getitem, l_self_modules_down_parameters_weight_, l_self_modules_down_parameters_bias_, [], [l_x_], randint, 1, Add(Mul(Symbol('keep', real=True), Symbol('x', real=True)), Symbol('r0', real=True)), 0.25, torch.float32, False)
getitem_1 = getitem(linear_act_dropout_default_1, 0)
contiguous = contiguous(getitem_1)
return (contiguous,)""",
        )
