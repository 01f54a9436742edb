"""What must not be taken for a bias-act-dropout, or not for so large a one: programs that one guard less would match.

Here they are read and not run; what is written in place, and numbers, are `test_bias_act_dropout.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import check
from test_bias_act_dropout import FAMILY, Fn, as_text, found, given
from torch import Tensor

NEAR_MISSES: dict[str, tuple[str, Fn]] = {
    "alpha dropout": ("alpha dropout", lambda h, r, g: F.alpha_dropout(h, 0.25, True)),
    "feature alpha dropout": ("alpha dropout", lambda h, r, g: F.feature_alpha_dropout(h, 0.25, True)),
    "dropout1d": ("whole channels", lambda h, r, g: F.dropout1d(h, 0.25)),
    "dropout2d": ("whole channels", lambda h, r, g: F.dropout2d(h[None], 0.25)),
    "used elsewhere": ("used elsewhere", lambda h, r, g: F.gelu(h) + h.sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_says_why(name: str) -> None:
    reason, after = NEAR_MISSES[name]
    results = found(lambda x, w, b, r, g: after(F.linear(x, w, b), r, g), *given())
    assert len(results) == 1 and isinstance(results[0], str), results
    assert reason in results[0]


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
    "times booleans": lambda x, w, b, r, g: F.silu(F.linear(x, w, b) * torch.full((16,), True)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_made_of_what_is_no_site(name: str) -> None:
    assert found(NOTHING[name], *given()) == []


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
