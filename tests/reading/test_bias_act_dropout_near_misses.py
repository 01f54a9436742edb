"""What must not be taken for a bias-act-dropout, or not for so large a one: programs that one guard less would match.

Here they are read and not run; what is written in place, and numbers, are `test_bias_act_dropout.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bias_programs import FAMILY, Bloom, Fn, as_text, found, given
from equivalence import check
from torch import Tensor

from xfcompile.patterns import pointwise
from xfcompile.site import BiasActDropoutSite

NEAR_MISSES: dict[str, tuple[str, Fn]] = {
    "alpha dropout": ("alpha dropout", lambda h, r, g: F.alpha_dropout(h, 0.25, True)),
    "feature alpha dropout": ("alpha dropout", lambda h, r, g: F.feature_alpha_dropout(h, 0.25, True)),
    "dropout1d": ("whole channels", lambda h, r, g: F.dropout1d(h, 0.25)),
    "dropout2d": ("whole channels", lambda h, r, g: F.dropout2d(h[None], 0.25)),
    "used elsewhere": ("used elsewhere", lambda h, r, g: F.gelu(h) + h.sum()),
    "two dropouts": ("two dropouts", lambda h, r, g: F.dropout(h, 0.25) + F.dropout(h.relu(), 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_says_why(name: str) -> None:
    reason, after = NEAR_MISSES[name]
    results = found(lambda x, w, b, r, g: after(F.linear(x, w, b), r, g), *given())
    assert len(results) == 1 and isinstance(results[0], str), results
    assert reason in results[0]


ONE = torch.tensor([2.0])
NUMBER = torch.tensor(2.0)
WHOLE = torch.arange(16)


class OfTwo(torch.autograd.Function):
    """A gradient for what it does not use."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.tanh(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (h,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(h) ** 2), grad * 3


# Nothing of the kind: no word is lost over them.
NOTHING: dict[str, Fn] = {
    "a linear": lambda x, w, b, r, g: F.linear(x, w, b),
    "a linear and a residual": lambda x, w, b, r, g: F.linear(x, w, b) + r,
    "a linear, scaled": lambda x, w, b, r, g: F.linear(x, w, b) * 0.5 + 1,
    "a norm": lambda x, w, b, r, g: F.layer_norm(F.linear(x, w, b), (16,)),
    "a softmax": lambda x, w, b, r, g: F.linear(x, w, b).softmax(-1),
    "a gate": lambda x, w, b, r, g: F.silu(F.linear(x, w, b)) * r,
    "a gate of a sigmoid": lambda x, w, b, r, g: r * torch.sigmoid(F.linear(x, w, b)),
    "a norm, written out": lambda x, w, b, r, g: (lambda h: g * h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5))(
        F.linear(x, w, b)
    ),
    "a square": lambda x, w, b, r, g: F.linear(x, w, b).square() + F.linear(x, w, b) ** 3,
    "packed gates": lambda x, w, b, r, g: F.glu(F.linear(x, w, b)),
    "halves": lambda x, w, b, r, g: (lambda u, v: F.silu(u) * v)(*F.linear(x, w, b).chunk(2, -1)),
    "dropout of what is no projection": lambda x, w, b, r, g: F.dropout(r, 0.25) + r,
    "activation of what has no bias": lambda x, w, b, r, g: F.gelu(r),
    "soft-capped scores": lambda x, w, b, r, g: torch.tanh(r @ (r * 2)[0].mT),
    "a convolution": lambda x, w, b, r, g: F.gelu(F.conv1d(x.mT, w.view(16, 8, 1), b)),
    "one feature": lambda x, w, b, r, g: torch.sigmoid(F.linear(x, w[:1], b[:1])),
    "integers": lambda x, w, b, r, g: F.linear(x, w, b).round().long() + 1,
    "an outer product": lambda x, w, b, r, g: F.gelu(torch.einsum("bsk,nm->bskn", x, w)),
    "no sum": lambda x, w, b, r, g: F.gelu(torch.einsum("bk,nk->bnk", x[0], w)),
    "a bias times a number": lambda x, w, b, r, g: F.gelu(torch.add(r.sin(), b, alpha=2)),
    "a bias of nothing": lambda x, w, b, r, g: F.gelu(torch.zeros(5, 16) + b),
    "a number for a bias": lambda x, w, b, r, g: F.gelu(r.sin() + NUMBER),
    "a bias of one element": lambda x, w, b, r, g: F.gelu(r.sin() + ONE),
    "numbers alone": lambda x, w, b, r, g: F.gelu(r.sum() + NUMBER),
    "a vector's product": lambda x, w, b, r, g: F.gelu(torch.einsum("k,nk->n", x[0, 0], w)),
    "whole numbers for a bias": lambda x, w, b, r, g: F.gelu(r.sin() + WHOLE),
    "another view of a linear, and another bias": lambda x, w, b, r, g: F.linear(x, w).view(10, 16) + b,
    "nothing of it is dropped out": lambda x, w, b, r, g: F.dropout(F.linear(x, w, b) * 0 + 1, 0.25),
    "times a boolean": lambda x, w, b, r, g: F.silu(F.linear(x, w, b) * True),
    "times infinity": lambda x, w, b, r, g: F.silu(F.linear(x, w, b) * float("inf")),
    "rounded down": lambda x, w, b, r, g: F.silu(torch.div(F.linear(x, w, b), 0.5, rounding_mode="floor")),
    "an exponent": lambda x, w, b, r, g: F.silu(torch.pow(2.0, F.linear(x, w, b))),
    "a power of another tensor": lambda x, w, b, r, g: F.silu(torch.pow(F.linear(x, w, b), g)),
    "clamped by a vector": lambda x, w, b, r, g: F.silu(F.linear(x, w, b).clamp(min=g)),
    "on another device": lambda x, w, b, r, g: F.silu(F.linear(x, w, b).to("meta")),
    "in two orders, in the second dtype": lambda x, w, b, r, g: (lambda h: F.silu(h.transpose(0, 1)) + h[:1, :2])(
        F.linear(x.half(), w.half()).float()
    ),
    "a function of two tensors": lambda x, w, b, r, g: OfTwo.apply(F.linear(x, w, b), r),
    "a function of what is no projection any more": lambda x, w, b, r, g: Bloom.apply(F.linear(x, w, b) * 2),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_made_of_what_is_no_site(name: str) -> None:
    assert found(NOTHING[name], *given()) == []


# Larger than it is: the site ends before what is no function of one element, or not one that is known.
ENDS: dict[str, tuple[str, Fn]] = {
    "integers": ("9*x*sigmoid(9*x)", lambda h, r, g: F.silu(h * 9).long() * 2),
    "whole numbers are added": ("x*sigmoid(x)", lambda h, r, g: F.silu(h) + torch.arange(16)),
    "complex numbers are added": ("x*sigmoid(x)", lambda h, r, g: F.silu(h) + torch.complex(r, r)),
    "broadcast": ("x*sigmoid(x)", lambda h, r, g: F.silu(h)[None] + torch.ones(3, 1, 1, 1)),
    "moved to another device": ("x*sigmoid(x)", lambda h, r, g: F.silu(h).to("meta") * 2),
    "a residual is dropped out": ("r0 + x*sigmoid(x)", lambda h, r, g: F.dropout(F.silu(h) + r, 0.25)),
    "booleans are ones": ("x*sigmoid(x) + 1", lambda h, r, g: F.silu(h) + torch.full((16,), True)),
    "dropped out twice": ("keep*x", lambda h, r, g: F.dropout(F.dropout(h, 0.25), 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_site_ends_before_what_is_no_part_of_it(name: str) -> None:
    expected, after = ENDS[name]
    (site,) = found(lambda x, w, b, r, g: after(F.linear(x, w, b), r, g), *given())
    assert isinstance(site, BiasActDropoutSite) and as_text(site) == expected


def test_a_site_ends_before_a_number_of_another_device() -> None:
    """Which torch computes with, and no kernel can load."""
    x, w = (t.to("meta") for t in given(grad=False)[:2])
    (site,) = found(lambda x, w, n: F.silu(F.linear(x, w)) * n, x, w, NUMBER)
    assert isinstance(site, BiasActDropoutSite) and as_text(site) == "x*sigmoid(x)" and not site.vectors


def test_a_formula_ends_before_it_is_too_long() -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        h = F.linear(x, w)
        for _ in range(9):
            h = F.silu(h)
        return h

    (site,) = found(program, *given()[:2])
    assert isinstance(site, BiasActDropoutSite)
    assert pointwise.LONGEST / 3 < site.formula.count_ops(visual=False) <= pointwise.LONGEST


def test_a_bias_may_be_added_to_another_view_of_what_is_no_projection() -> None:
    _, _, b, r, _ = given()
    (site,) = found(lambda r, b: F.gelu(r.sin().view(10, 16) + b), r, b)
    assert isinstance(site, BiasActDropoutSite) and site.bias is not None and site.x is not None
    assert (site.x.op, site.x.shape) == ("reshape", (10, 16))


def scaled(constant: Callable[[], Tensor]) -> Any:
    """tanh times a constant, as a function with a backward of its own."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.save_for_backward(h)
            return torch.tanh(h) * constant()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (h,) = ctx.saved_tensors
            return grad * (1 - torch.tanh(h) ** 2) * constant()

    return Scaled.apply


# A constant, and whether a function that is scaled by it is read.
CONSTANTS: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "one for each channel": (lambda: torch.full((16,), 2.0), True),
    "a number": (lambda: torch.tensor(2.0), True),
    "a number of another dtype": (lambda: torch.full((), 2.0, dtype=torch.float64).to(torch.float32), False),
    "a whole number": (lambda: torch.full((), 2).to(torch.float32), False),
    "without its axis": (lambda: torch.full((1,), 2.0).reshape(()), False),
    "rows in another order": (lambda: torch.full((5, 2, 16), 2.0).transpose(0, 1), False),
    "a random one": (lambda: torch.randn(()), False),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_an_autograd_function_may_be_scaled_by_a_constant(name: str) -> None:
    constant, read = CONSTANTS[name]
    fn = scaled(constant)
    assert [
        as_text(s) for s in found(lambda x, w, b: fn(F.linear(x, w, b)), *given()[:3]) if not isinstance(s, str)
    ] == ["2*tanh(x)"] * read


class WithLength(torch.nn.Module):
    """A linear and what is done to its result, which may know how many rows there are."""

    def __init__(self, after: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 16)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x), x.shape[1])


LENGTHS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a factor": lambda h, n: F.silu(h * n),
    "a factor of what is added": lambda h, n: torch.add(F.silu(h), h.detach(), alpha=n),
    "a tensor of factors": lambda h, n: F.silu(h * torch.full((16,), n)),
    "a bound": lambda h, n: F.silu(h.clamp(max=n)),
    "another bound": lambda h, n: F.hardtanh(h, 0, n),
    "a slope": lambda h, n: F.leaky_relu(h, 1 / n),
    "a scale": lambda h, n: F.elu(h, 1 / n),
    "a sharpness": lambda h, n: F.softplus(h, n),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_length_that_changes_is_no_number_of_a_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcome = check(WithLength(LENGTHS[name]), given()[0], dynamic=True, routes={FAMILY: "triton"}, family=FAMILY)
    assert not outcome.matched


def test_eagers_own_numbers_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with torch._inductor.config.patch(fallback_random=True):
        outcome = check(
            lambda x, w, b: F.dropout(F.gelu(F.linear(x, w, b)), 0.25),
            *given()[:3],
            routes={FAMILY: "triton"},
            family=FAMILY,
        )
    assert [s.route for s in outcome.sites] == ["inductor"]
    assert "fallback_random" in str(outcome.sites[0].reason)


@pytest.mark.parametrize(
    "fn", [lambda x, w, b, r, g: F.gelu(F.linear(x, w, b)), lambda x, w, b, r, g: F.gelu(r.sin() + b)]
)
def test_features_of_which_nobody_knows_how_many_there_are_make_no_site(
    fn: Fn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcome = check(fn, *given(), dynamic=True, routes={FAMILY: "triton"}, family=FAMILY)
    assert not outcome.matched
