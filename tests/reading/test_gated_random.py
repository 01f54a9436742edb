"""Random gated programs: whatever is matched of them gives eager's numbers, and what is plainly gated is matched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from equivalence import tensors
from gated_programs import ACTIVATIONS, BIASED, PRODUCTS, PROJECTIONS, ROUTES, B, W, X, check
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

QUIET = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # each example is a compilation: a failure is small enough as it is
)

AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "half": lambda y: y * 0.5,
    "minus one": lambda y: y - 1,
    "clamped": lambda y: y.clamp(-1, 2),
    "a linear": lambda y: F.linear(y, torch.ones(3, 12)),
    "viewed": lambda y: y.reshape(2, 5, 3, 4).transpose(1, 2),
}


@QUIET
@given(
    gate=st.sampled_from([*PROJECTIONS.values(), *BIASED.values()]),
    up=st.sampled_from([*PROJECTIONS.values(), *BIASED.values()]),
    act=st.sampled_from([f for _, f in ACTIVATIONS.values()]),
    product=st.sampled_from(list(PRODUCTS.values())),
    after=st.sampled_from(list(AFTER.values())),
    grad=st.booleans(),
)
def test_any_mixture_of_spellings_is_one_site(
    gate: Any, up: Any, act: Any, product: Any, after: Any, grad: bool
) -> None:
    def project(spelling: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return spelling(x, w, b) if spelling in BIASED.values() else spelling(x, w)

    def program(x: Tensor, w: Tensor, v: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return after(product(act(project(gate, x, w, b)), project(up, x, v, c)))

    outcome = check(program, *tensors(X, W, W, B, B, grad=grad), grad=grad, routes=ROUTES)
    sites = [s for s in outcome.sites if s.family == "gated_mlp"]
    assert [s.route for s in sites] == ["triton"], (sites, outcome.reasons)


SQUARE, SIDE = (4, 4, 4), (4, 4)
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "also none": lambda t: t,
    "transposed": lambda t: t.mT,
    "batch and rows": lambda t: t.transpose(0, 1),
    "rows as features": lambda t: t.permute(1, 2, 0),
    "rows reversed": lambda t: t.flip(1),
    "a row for all": lambda t: t[:, :1].expand(4, 4, 4),
    "a feature for all": lambda t: t[..., 1:2].expand(4, 4, 4),
    "a batch for all": lambda t: t[2][None].expand(4, 4, 4),
    "rolled": lambda t: t.roll(1, -1),
    "reshaped": lambda t: t.reshape(2, 8, 4).reshape(4, 4, 4),
    "reshaped otherwise": lambda t: t.reshape(4, 2, 2, 4).transpose(1, 2).reshape(4, 4, 4),
    "features reshaped": lambda t: t.reshape(4, 4, 2, 2).mT.reshape(4, 4, 4),
    "contiguous": lambda t: t.contiguous(),
}


@QUIET
@given(
    moves=st.lists(st.sampled_from(list(MOVES)), min_size=5, max_size=5),
    weights=st.sampled_from(["linear", "matmul", "experts", "packed", "every other"]),
    same=st.booleans(),
    grad=st.booleans(),
)
def test_moved_axes_are_never_taken_for_others(moves: list[str], weights: str, same: bool, grad: bool) -> None:
    """All axes are of one size: an axis taken for another is no shape error."""
    of_x, of_y, of_gate, of_up, of_product = (MOVES[m] for m in moves)
    if same:
        of_y, of_up = of_x, of_gate

    def program(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        if weights == "linear":
            gate, up = F.linear(of_x(x), w[0]), F.linear(of_y(x), v[0])
        elif weights == "matmul":
            gate, up = of_x(x) @ w[0], of_y(x) @ v[0].T
        elif weights == "experts":
            gate, up = of_x(x) @ w, of_y(x) @ v.mT
        else:
            both = F.linear(of_x(x), torch.cat([w[0], v[0]]))
            gate, up = both.chunk(2, -1) if weights == "packed" else (both[..., ::2], both[..., 1::2])
        return of_product(F.silu(of_gate(gate)) * of_up(up))

    check(program, *tensors(SQUARE, SQUARE, SQUARE, grad=grad), grad=grad, routes=ROUTES)
