"""Sites drawn at random: the texts of both attention kernels for Hopper, run by torch, against fp64."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import hopper_in_torch
import pytest
import sympy
import torch
from attention_cases import FLOAT, LK, LQ, Case, N, Sizes, X, check, inputs, normal, uniform
from backward_cases import check as check_gradients
from hopper_cases import is_taken, usual
from sympy import Eq, Ne, Rational
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv, PythonMod

from xfcompile.kernels.attention import backward_layout, codegen, hopper_backward, prepare
from xfcompile.kernels.attention.gradient import why_not
from xfcompile.kernels.attention.hopper_variant import Variant, seen_of
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import Band, Operand, ScoreSpec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Made = Callable[[Sizes], Tensor]


class Draw:
    """A site, part by part."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.operands: list[Operand] = []
        self.made: list[Made] = []
        self.scalars: list[sympy.Symbol] = []
        self.ints: list[Callable[[Sizes], int]] = []
        self.floats: list[float] = []
        self.far = self.infinite = False

    def load(self, dtype: torch.dtype, made: Made, *at: sympy.Expr) -> sympy.Expr:
        self.operands.append(Operand(dtype, len(at)))
        self.made.append(made)
        return Load(len(self.operands) - 1, *at)

    def scalar(self, x: sympy.Symbol, value: Callable[[Sizes], int]) -> sympy.Symbol:
        if x not in self.scalars:
            self.scalars.append(x)
            self.ints.append(value)
        return x

    def real(self, x: sympy.Symbol, value: float) -> sympy.Symbol:
        self.floats.append(value)
        self.scalars.append(x)
        return x

    def score(self) -> sympy.Expr:
        scale = self.random.choice([Rational(1, 8), Rational(3, 10), Rational(1, 100), Rational(-1, 5)])
        score = S * scale
        cap = self.random.choice([None, None, 2, 30, 50, 60])
        if cap is not None:
            score = cap * sympy.tanh(score / cap)
        added = self.random.choice(
            ["nothing", "nothing", "slope", "place", "distance", "number", "keys", "far keys", "rows"]
        )
        if added in ("slope", "place", "distance"):
            # Of far distances two may be the same, and what decides between them is rounded off.
            size = self.random.choice([0.01, 1.0, 1.0, 10.0, *([1e7, 1e30] if added != "distance" else [])])
            self.far = size > 10
            sign = self.random.choice([-1, 1])
            factor = self.load(FLOAT, lambda z: sign * size * (1 + uniform(z.heads)), H)
            score += factor * {"slope": J - I, "place": J, "distance": sympy.Abs(I - J)}[added]
        elif added == "number":
            slope = self.random.choice([Rational(1, 10), sympy.Integer(-2), None])
            score += (self.real(X, -0.3) if slope is None else slope) * (J - I)
        elif added == "rows":
            score += self.load(FLOAT, lambda z: 3 * normal(z.heads, z.lq), H, I)
        elif added != "nothing":
            self.far = added == "far keys"
            self.infinite = not self.far
            least = torch.finfo(FLOAT).min if self.far else -torch.inf
            score += self.load(FLOAT, lambda z: normal(z.batch, z.lk).masked_fill(_gone(z), least), B, J)
        return score

    def keep(self) -> tuple[sympy.Basic, Band]:
        """What is kept, and a band that it lies in."""
        shift = self.random.choice([0, 0, -40, 17, 130])
        upper = {
            "all": None,
            "causal": I + 1 + shift,
            "bottom right": I + 1,
            "prefix": I + 1,
        }
        kind = self.random.choice(list(upper))
        high, keep = upper[kind], sympy.true
        if kind == "bottom right":
            high += self.scalar(LK, lambda z: z.lk) - self.scalar(LQ, lambda z: z.lq)
        if kind == "prefix":
            n = self.random.randrange(300)
            high = sympy.Max(high, self.scalar(N, lambda z: n))
            keep = sympy.Or(J <= I, J < N)
        elif high is not None:
            keep = high > J
        low, exact = None, True
        more = self.random.choice(["nothing", "nothing", "window", "padding", "buffer", "rows", "chunks", "modulo"])
        if more == "window":
            width = self.random.choice([20, 150, 300, 520])
            low, exact = I - width, self.random.random() < 0.7
            keep = sympy.And(keep, low <= J)
        if more == "padding":
            keep = sympy.And(keep, Ne(self.load(torch.bool, lambda z: ~_gone(z), B, J), 0))
        if more == "buffer":
            share = self.random.choice([0.02, 0.7])
            keep = sympy.And(keep, Ne(self.load(torch.bool, lambda z: uniform(z.lq, z.lk) < share, I, J), 0))
        if more == "rows":
            keep = sympy.And(keep, Ne(PythonMod(I, 3), 0))
        if more == "chunks":
            keep = sympy.And(keep, Eq(FloorDiv(I, 100), FloorDiv(J, 100)))
        if more == "modulo":
            keep = sympy.And(keep, Eq(PythonMod(I - J, 3), 0))
        exact = exact and more in ("nothing", "window")
        return keep, Band(low, high, exact)

    def case(self) -> Case:
        score = self.score()
        keep, band = self.keep()
        sink = self.load(FLOAT, lambda z: normal(z.heads), H) if self.random.random() < 0.2 else None
        # Rows of scores that are all -inf, some of which are masked besides, are the mean in kernels, and else NaN.
        dead = self.random.choice(["nan", "zero", "zero" if self.infinite else "mean"])
        spec = ScoreSpec(
            score, keep, dead, tuple(self.operands), tuple(self.scalars),
            sink=sink, band=band, far=self.far,
        )  # fmt: skip
        return Case(
            "drawn", spec, lambda z: [f(z) for f in self.made], lambda z: [f(z) for f in self.ints], tuple(self.floats)
        )

    def sizes(self, dim: int) -> Sizes:
        kv_heads, group = self.random.choice([(1, 1), (1, 2), (2, 1), (1, 3)])
        lq, lk = (self.random.choice([1, 63, 64, 127, 128, 200, 257, 384, 500]) for _ in "qk")
        return Sizes(self.random.choice([1, 2]), kv_heads * group, kv_heads, lq, lk, dim, dim)

    def variant(self, case: Case, dtype: torch.dtype, dim: int) -> Variant:
        """As usual, or another way to hand out work."""
        found = usual(case, dtype, dim)
        if self.random.random() < 0.5:
            return found
        way = self.random.choice(["", "persistent", "queued"])
        found = replace(found, persistent=way == "persistent", queued=way == "queued", turns=self.random.random() < 0.5)
        spec = codegen.canonical(case.spec)
        listed = seen_of(spec, codegen.pieces(spec)) in ("some", "lists")
        groups = 2 if listed else self.random.choice([2, 3])
        return replace(found, warpgroups=groups, stages=self.random.choice([2, 3, 4]))


def _gone(z: Sizes) -> Tensor:
    """Keys that are padding, at the start or the end; of a sequence perhaps all."""
    ends = (uniform(z.batch, 1) * 1.3 * z.lk).round()
    place = torch.arange(z.lk)
    return place < ends if z.lk % 2 else place >= ends


@pytest.mark.parametrize("seed", range(400))
def test_results(seed: int, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(seed)
    case = draw.case()
    dim = draw.random.choice([64, 64, 128, 40, 72])
    dtype = draw.random.choice([torch.bfloat16, torch.float16])
    if not is_taken(case, dtype, dim):
        pytest.skip("another kernel's")
    width = 64 if dim <= 64 else 128
    variant, programs = draw.variant(case, dtype, width), draw.random.choice([1, 3, 5])
    sizes = draw.sizes(dim)
    print(case.spec, sizes, variant, dtype)

    def run(spec: ScoreSpec, x: object) -> tuple[Tensor, Tensor]:
        return hopper_in_torch.attention(spec, x, variant, programs, heads_first=seed % 2 == 0, seed=seed)

    monkeypatch.setattr("attention_cases.call", run)
    check(case, inputs(case, dtype, "transposed", sizes), lse=not case.spec.far)


@pytest.mark.parametrize("seed", range(200))
def test_gradients(seed: int, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(seed)
    case = draw.case()
    dim = draw.random.choice([64, 64, 128, 40, 72])
    monkeypatch.setattr(hopper_backward, "NARROW", {64: 0, 128: 0})
    if why_not(case.spec) is not None:
        pytest.skip("it has no gradients")
    made = backward_layout.prepare(prepare(case.spec), ())
    if hopper_backward.why_not(made.spec, made.made.gradients, torch.float16, dim, dim) is not None:
        pytest.skip("another kernel's")
    sizes = draw.sizes(dim)
    print(case.spec, sizes)
    ran = hopper_in_torch.backward(monkeypatch)
    monkeypatch.setattr("backward_cases.floating", lambda x: [])
    check_gradients(case, inputs(case, torch.float16, "transposed", sizes), least=0.1)
    assert ran == ["prepare_rows", "attention_backward", "finish_dq"]
