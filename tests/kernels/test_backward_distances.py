"""Gradients by what depends on how far a key is from its query: added up along diagonals of scores."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from attention_cases import CAUSAL, FLOAT, SCALE, Case, Inputs, Sizes, inputs, normal
from backward_cases import check, distances
from torch import Tensor

from xfcompile.kernels.attention import launch_backward, prepare
from xfcompile.kernels.attention.backward_layout import Layout, Needs
from xfcompile.kernels.attention.backward_layout import prepare as prepare_backward
from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Operand, ScoreSpec


def layout(case: Case, x: Inputs) -> Layout:
    """What is found out of a backward with such tensors."""
    program = prepare_backward(prepare(case.spec), (0,))
    dout = x.q.new_empty((*x.q.shape[:3], x.v.shape[3]))
    return Layout(program, Needs(True, True, True, (0,)), x.q, x.k, x.v, dout, x.q[..., 0], x.operands)


SMALL = Sizes(batch=2, heads=2, kv_heads=2, lq=45, lk=70, dq=16, dv=16)


@pytest.mark.parametrize("lengths", [(45, 70), (70, 45), (64, 64), (1, 40), (33, 5), (3, 20), (65, 129)])
def test_any_lengths(lengths: tuple[int, int], interpreter: None) -> None:
    z = Sizes(1, 2, 1, *lengths, 16, 16)
    case = distances((sympy.S.Zero, H, sympy.S.Zero), z)
    x = inputs(case, torch.float32)
    assert layout(case, x).direct.keys() == {0}
    check(case, x)


@pytest.mark.parametrize("axes", [(), (H,), (B,), (B, H), (H, B), (sympy.S.Zero, H, sympy.S.Zero)], ids=str)
def test_any_axes_beside_distances(axes: tuple[sympy.Expr, ...], interpreter: None) -> None:
    case = distances(axes, SMALL, CAUSAL)
    x = inputs(case, torch.float32)
    assert layout(case, x).direct.keys() == {0}
    check(case, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, interpreter: None) -> None:
    case = distances((H,), SMALL, CAUSAL, dtype=dtype)
    check(case, inputs(case, dtype))


def test_a_bias_in_any_order_in_memory(interpreter: None) -> None:
    """Its gradient is laid out as it is; memory beside it stays as it was."""
    case = distances((H,), SMALL)
    x = inputs(case, torch.float32)
    x.operands[0] = x.operands[0].t().contiguous().t()
    assert layout(case, x).direct[0] == ([1, 2, 114], [0, 1, 2])
    check(case, x)


def shifted(n: int) -> Case:
    """Distances from another one on: of the first keys, or of the last, no score reads any."""
    load = Load(0, H, J - I + SMALL.lq - 1 + n)
    spec = ScoreSpec(SCALE + load, operands=(Operand(FLOAT, 2),))
    return Case("shifted", spec, lambda z: [normal(z.heads, z.lq + z.lk - 1 + n)], sizes=SMALL)


def twice() -> Case:
    """One bias that is read at two distances."""
    n = SMALL.lq + SMALL.lk - 1
    spec = ScoreSpec(SCALE + Load(0, H, J - I + SMALL.lq - 1) + Load(0, H, n - 1 - (J - I + SMALL.lq - 1)),
                     operands=(Operand(FLOAT, 2),))  # fmt: skip
    return Case("twice", spec, lambda z: [normal(z.heads, n)], sizes=SMALL)


@pytest.mark.parametrize(
    "case", [distances((H,), SMALL, extra=3), shifted(2), twice()], ids=["longer", "shifted", "twice"]
)
def test_what_is_not_read_once_each_is_put_where_it_belongs(case: Case, interpreter: None) -> None:
    x = inputs(case, torch.float32)
    assert not layout(case, x).direct
    check(case, x)


def test_the_sums_are_those_of_the_scores_gradients(interpreter: None) -> None:
    """Against the gradient by a dense bias, which has one for each score."""
    z = Sizes(2, 2, 2, 37, 52, 16, 16)
    case = distances((B, H), z)
    x = inputs(case, torch.float32)
    vector = x.operands[0]
    place = torch.arange(z.lk) - torch.arange(z.lq)[:, None] + z.lq - 1
    dense = vector[:, :, place].contiguous()
    spec = ScoreSpec(SCALE + Load(0, B, H, I, J), operands=(Operand(FLOAT, 4),))
    generator = torch.Generator().manual_seed(3)
    dout = torch.randn(2, 2, 37, 16, generator=generator)

    def gradient(spec: ScoreSpec, operand: Tensor) -> Tensor:
        key = prepare(spec)
        out, lse = torch.ops.xfcompile.attention(x.q, x.k, x.v, [operand], [], [], key)
        needs = Needs(False, False, False, (0,))
        return launch_backward.run(dout, x.q, x.k, x.v, out, lse, [operand], [], [], key, needs)[3][0]

    scores = gradient(spec, dense).double()
    right = torch.zeros(vector.shape, dtype=torch.float64)
    right.view(4, -1).index_add_(1, place.flatten(), scores.view(4, -1))
    found = gradient(case.spec, vector)
    assert (found - right).abs().max() <= 37 * torch.finfo(torch.float32).eps * scores.abs().max()
    assert math.isfinite(float(found.abs().max())) and float(found.abs().max()) > 0
