"""Gradients of attention, in Triton's interpreter, against fp64 and against autograd through the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Inputs, Sizes, error, inputs, named
from attention_cases import check as check_forward
from backward_cases import DIFFERENTIABLE, check, exact, floating, sizes_of_terms
from dropout_cases import check as check_dropout
from torch import Tensor

from xfcompile.kernels.attention import (
    FEW_TILES,
    backward_call,
    dead_rows,
    launch_blocks,
    lists_sizes,
    prepare,
    programs,
    reference,
    tiles,
)


def smaller(case: Case) -> Sizes:
    """Half as many heads: the interpreter takes its time."""
    return replace(case.sizes, heads=2, kv_heads=2)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_gradients_are_as_exact_as_eager(case: Case, interpreter: None) -> None:
    check(case, inputs(case, torch.float32, sizes=smaller(case)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["causal", "window", "documents", "padding_mean", "some_rows_leak", "some_rows_leak_capped", "some_rows_nan",
     "far_keys", "bias_hij", "bias_bj", "alibi", "soft_cap_causal", "sink_dead_rows", "t5"],
)  # fmt: skip
def test_gradients_in_half_precision(name: str, dtype: torch.dtype, interpreter: None) -> None:
    check(named(name), inputs(named(name), dtype, sizes=smaller(named(name))))


@pytest.mark.parametrize("layout", ["transposed", "poisoned", "key_major", "expanded"])
@pytest.mark.parametrize(
    "name", ["plain", "bottom_right", "window", "documents", "alibi", "bias_hij", "t5", "soft_cap"]
)
def test_any_strides_and_grouped_heads(name: str, layout: str, interpreter: None) -> None:
    z = Sizes(heads=4, kv_heads=2 if layout != "expanded" else 1, lq=50, lk=41, dq=17, dv=33)
    check(named(name), inputs(named(name), torch.float32, layout, z))


@pytest.mark.parametrize("name", ["documents", "padding_mean", "bias_bj"])
def test_gradients_by_lists_of_tiles(name: str, interpreter: None) -> None:
    """More tiles of keys than the kernel goes through without a list, and several blocks of queries."""
    case = named(name)
    sizes = Sizes(heads=1, kv_heads=1, lq=40, lk=32 * FEW_TILES + 22)
    x = inputs(case, torch.float32, sizes=sizes)
    assert programs.program(prepare(case.spec)).mask is not None
    check(case, x)


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("lengths", [(48, 80), (80, 48), (64, 64), (50, 80)])
@pytest.mark.parametrize("name", ["documents", "padding_mean", "padding_zero", "additive_padding", "t5"])
def test_tiles_of_a_list_that_end_beyond_the_last_row_or_key(
    name: str, lengths: tuple[int, int], rate: float, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are several of the kernel's, as on GPUs, of which the last ends where the rows do: another lies beyond."""
    own, listed = tiles.Tiles(16, 16, 4, 1), tiles.Tiles(32, 64, 4, 1)
    for module, sizes in ((launch_blocks, own), (backward_call, own), (lists_sizes, listed)):
        monkeypatch.setattr(module, "INTERPRETED", sizes)
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    case = named(name)
    x = inputs(case, torch.float32, sizes=Sizes(2, 1, 1, *lengths, 16, 16))
    check_forward(case, x)
    if rate:
        check_dropout(case, x, rate)
    else:
        check(case, x)


@pytest.mark.parametrize("name", ["padding_mean", "some_rows_leak", "some_rows_leak_and_slope"])
def test_rows_without_keys_among_many(name: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More marks than a program looks at together, and query heads that share keys."""
    monkeypatch.setattr(dead_rows, "CHUNK", 4)
    sizes = Sizes(heads=4, kv_heads=2, lq=75, lk=41, dq=17, dv=33)
    check(named(name), inputs(named(name), torch.float32, "poisoned", sizes))


class Through(torch.nn.Module):
    """The op as autograd sees it."""

    def __init__(self, case: Case, x: Inputs) -> None:
        super().__init__()
        self.key, self.x = prepare(case.spec), x

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> Tensor:
        x = self.x
        return torch.ops.xfcompile.attention(q, k, v, list(operands), x.ints, x.floats, self.key)[0]


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize(
    "name", ["causal", "bias_hij", "alibi", "t5", "sink", "documents", "concatenated", "padding_mean"]
)
def test_the_op_has_gradients(name: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = named(name)
    x = inputs(case, torch.float32)
    dout = torch.randn(x.q.shape[:3] + x.v.shape[3:], generator=torch.Generator().manual_seed(1))
    leaves = [y.detach().clone().requires_grad_(y.is_floating_point()) for y in (x.q, x.k, x.v, *x.operands)]
    Through(case, x)(*leaves).backward(dout)
    right = exact(case, x, dout, torch.float64)
    terms = sizes_of_terms(case, x, dout)
    found = [y.grad for y in leaves if y.is_floating_point()]
    for name, a, b in zip(["dq", "dk", "dv", *(f"t{n}" for n in floating(x))], found, right, strict=True):
        assert a is not None
        magnitude = max(b.abs().max().item(), terms.get(name, 0.0))
        assert error(a, b) <= 32 * torch.finfo(a.dtype).eps * magnitude, name


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_what_is_wanted(wanted: tuple[int, ...], interpreter: None) -> None:
    case = named("bias_bj")
    x = inputs(case, torch.float32)
    leaves = [y.detach().clone().requires_grad_(n in wanted) for n, y in enumerate((x.q, x.k, x.v, *x.operands))]
    dout = torch.randn(x.q.shape[:3] + x.v.shape[3:], generator=torch.Generator().manual_seed(1))
    Through(case, x)(*leaves).backward(dout)
    right = exact(case, x, dout, torch.float64)
    for n, (leaf, b) in enumerate(zip(leaves, right, strict=True)):
        assert (leaf.grad is not None) == (n in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), b, rtol=1e-4, atol=1e-5)


def test_one_tensor_for_keys_and_values(interpreter: None) -> None:
    case = named("causal")
    x = inputs(case, torch.float32)
    q, k = x.q.clone().requires_grad_(), x.k.clone().requires_grad_()
    Through(case, x)(q, k, k).sum().backward()
    again = [y.double().detach().requires_grad_() for y in (x.q, x.k)]
    reference.attention(case.spec, again[0], again[1], again[1], dtype=torch.float64)[0].sum().backward()
    for a, b in zip((q, k), again, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    case = named("causal")
    x = inputs(case, torch.float32)
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
    (dq,) = torch.autograd.grad(Through(case, x)(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("name", ["causal", "bias_hij", "alibi", "documents", "sink"])
def test_the_op_is_what_torch_expects(name: str) -> None:
    """Schema, fake tensors, autograd's registration, and AOTAutograd with static and with dynamic shapes."""
    case = named(name)
    x = inputs(case, torch.float32)
    tensors = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
    operands = [y.clone().requires_grad_(y.is_floating_point()) for y in x.operands]
    arguments = (*tensors, operands, x.ints, x.floats, prepare(case.spec))
    torch.library.opcheck(torch.ops.xfcompile.attention.default, arguments)
