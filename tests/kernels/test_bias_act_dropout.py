"""Kernels of bias, activation and dropout against fp64: odd sizes, strides and dtypes, memory that must not be read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import sympy
import torch
from torch import Tensor

from xfcompile import activation
from xfcompile.activation import FUNCTIONS, KEEP, X, tensor, vector
from xfcompile.kernels import philox
from xfcompile.kernels.bias_act_dropout import (
    arguments,
    bias_act_dropout,
    calls,
    linear_act_dropout,
    reference,
    saves,
    text_of,
    tiles,
)
from xfcompile.kernels.bias_act_dropout.formula import parse
from xfcompile.kernels.bias_act_dropout.rows import rows_of
from xfcompile.measured import Fact

ACTS: dict[str, sympy.Expr] = {
    "identity": X,
    "relu": FUNCTIONS["relu"](X, {}),
    "relu squared": activation.relu(X) ** 2,
    "gelu": activation.gelu(X, "none"),
    "gelu by tanh": activation.gelu(X, "tanh"),
    "quick gelu": X * activation.Sigmoid(activation.real(1.702) * X),
    "silu": activation.silu(X),
    "tanh": sympy.tanh(X),
    "sigmoid": activation.Sigmoid(X),
    "leaky relu": activation.leaky_relu(X, 0.1),
    "elu": activation.elu(X),
    "selu": activation.selu(X),
    "hardswish": activation.hardswish(X),
    "hardsigmoid": activation.hardsigmoid(X),
    "mish": activation.mish(X),
    "softplus": activation.softplus(X, 1, 20),
    "relu6": activation.hardtanh(X, 0, 6),
}
# Eager's own, for its error.
EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": torch.relu,
    "relu squared": lambda h: torch.relu(h) ** 2,
    "gelu": torch.nn.functional.gelu,
    "gelu by tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky relu": lambda h: torch.nn.functional.leaky_relu(h, 0.1),
    "elu": torch.nn.functional.elu,
    "selu": torch.nn.functional.selu,
    "hardswish": torch.nn.functional.hardswish,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "mish": torch.nn.functional.mish,
    "softplus": torch.nn.functional.softplus,
    "relu6": torch.nn.functional.relu6,
}


@dataclass(frozen=True)
class Case:
    """Shapes [*lead, features], K features in; which operands there are; how tensors lie in memory."""

    act: str = "gelu"
    lead: tuple[int, ...] = (3, 7)
    features: int = 24
    k: int = 20
    bias: bool = True
    scale: bool = False
    residual: bool = False
    p: float = 0.0
    dtype: torch.dtype = torch.float32
    lay: str = "contiguous"

    @property
    def formula(self) -> sympy.Expr:
        value = ACTS[self.act] * (KEEP if self.p else 1) * (vector(0) if self.scale else 1)
        return value + tensor(0) if self.residual else value


def laid_out(x: Tensor, lay: str) -> Tensor:
    """The same numbers with other strides, in memory that is NaN where the tensor is not."""
    if lay == "contiguous":
        return x
    if lay == "transposed":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if lay == "columns":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if lay == "padded":
        memory = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype)
        memory[..., 2 : 2 + x.shape[-1]] = x
        return memory[..., 2 : 2 + x.shape[-1]]
    assert lay == "everyother"
    memory = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    memory[..., ::2] = x
    return memory[..., ::2]


@dataclass
class Operands:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    vectors: list[Tensor]
    tensors: list[Tensor]
    seed: Tensor
    dout: Tensor

    def leaves(self, product: bool) -> list[Tensor]:
        bias = [] if self.bias is None else [self.bias]
        return [self.x, *([self.weight] if product else []), *bias, *self.vectors, *self.tensors]


def operands(case: Case, product: bool, grad: bool = True) -> Operands:
    generator = torch.Generator().manual_seed(len(case.act) + case.features)

    def normal(*shape: int, lay: str = "contiguous", size: float = 1.0) -> Tensor:
        x = (torch.randn(shape, generator=generator) * size).to(case.dtype)
        return laid_out(x, lay).requires_grad_(grad)

    n = case.features
    return Operands(
        normal(*case.lead, case.k if product else n, lay=case.lay, size=1.0 if product else 3.0),
        normal(n, case.k, lay="columns" if case.lay == "columns" else "contiguous", size=0.5),
        normal(n) if case.bias else None,
        [normal(n)] if case.scale else [],
        [normal(*case.lead, n, lay=case.lay)] if case.residual else [],
        torch.tensor([1234567890123]),
        normal(*case.lead, n, lay=case.lay).detach(),
    )


def ours(case: Case, at: Operands, product: bool, stream: int = 3) -> Tensor:
    text = text_of(case.formula)
    more = (at.bias, at.vectors, at.tensors, at.seed if case.p else None, stream, text, case.p, case.dtype)
    if not product:
        return bias_act_dropout(at.x, *more, False)
    return linear_act_dropout(at.x, at.weight, *more, True)[0]


def eagers(case: Case, at: Operands, product: bool, dtype: torch.dtype, stream: int = 3) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in at.leaves(product)]
    rest = iter(leaves)
    h = next(rest)
    if product:
        h = torch.nn.functional.linear(h, next(rest), next(rest) if case.bias else None)
    elif case.bias:
        h = h + next(rest)
    y = EAGER[case.act](h)
    if case.p:
        keep = philox.linear_keep(at.seed, case.p, y.shape, stream)
        y = y * (keep.to(dtype) * philox.scale(case.p))
    if case.scale:
        y = y * next(rest)
    if case.residual:
        y = y + next(rest)
    return y, list(torch.autograd.grad(y, leaves, at.dout.to(dtype)))


def check(case: Case, product: bool) -> None:
    at = operands(case, product)
    out = ours(case, at, product)
    gradients = torch.autograd.grad(out, at.leaves(product), at.dout)
    exact, exact_gradients = eagers(case, at, product, torch.float64)
    eager, eager_gradients = eagers(case, at, product, case.dtype)
    assert out.is_contiguous() and out.dtype == case.dtype
    names = ["result", *(f"gradient {n}" for n in range(len(gradients)))]
    for name, mine, theirs, truth in zip(
        names, (out, *gradients), (eager, *eager_gradients), (exact, *exact_gradients), strict=True
    ):
        assert mine.shape == truth.shape and mine.dtype == case.dtype
        error, allowed = (float((x.double() - truth).abs().max()) for x in (mine, theirs))
        floor = 4 * torch.finfo(case.dtype).eps * float(truth.abs().max())
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, eager's {allowed:.3g}, floor {floor:.3g}"


CASES = {
    **{act: Case(act) for act in ACTS},
    "dropout": Case("gelu", p=0.3),
    "everything": Case("gelu by tanh", p=0.3, scale=True, residual=True),
    "bias-dropout-add": Case("identity", p=0.1, residual=True),
    "no bias": Case("silu", p=0.3, bias=False, scale=True),
    "features no multiple of 8": Case("gelu", features=21, p=0.3, scale=True, residual=True),
    "two features": Case("relu", features=2, p=0.5, residual=True),
    "features of several tiles": Case("gelu", features=77, p=0.3, residual=True, scale=True),
    "features of several even tiles": Case("gelu", features=72, k=65, p=0.3, residual=True),
    "one row": Case("gelu", lead=(1,), p=0.3, residual=True),
    "one row of several dimensions": Case("gelu", lead=(1, 1, 1), p=0.3, residual=True),
    "rows of one dimension": Case("gelu", lead=(19,), p=0.3, scale=True),
    "rows of three dimensions": Case("gelu", lead=(2, 3, 5), p=0.3, residual=True),
    "many rows": Case("gelu", lead=(600,), features=8, k=3, p=0.3, scale=True),
    "all dropped": Case("gelu", p=1.0, residual=True),
    **{
        f"{lay}, {len(lead)} leading": Case("gelu", lead=lead, p=0.3, residual=True, scale=True, lay=lay)
        for lay in ("transposed", "columns", "padded", "everyother")
        for lead in ((4, 5), (2, 3, 5))
    },
    "bf16": Case("gelu", p=0.3, residual=True, scale=True, dtype=torch.bfloat16),
    "bf16, gelu by tanh": Case("gelu by tanh", p=0.3, residual=True, dtype=torch.bfloat16),
    "bf16, silu": Case("silu", p=0.3, residual=True, dtype=torch.bfloat16),
    "fp16": Case("mish", p=0.3, residual=True, scale=True, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("product", [False, True], ids=["pointwise", "epilogue"])
@pytest.mark.parametrize("kernel", [True, False], ids=["triton", "reference"])
def test_results_and_gradients_err_no_more_than_eagers(
    name: str, product: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if kernel else "0")
    check(CASES[name], product)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("act", ACTS)
def test_far_from_zero_there_is_no_nan(act: str) -> None:
    """exp overflows on the way to a finite number, forward and backward; there is NaN where eager has it."""
    x = torch.tensor([-1e30, -1e4, -100.0, -20.0, -3.0, 0.0, 3.0, 20.0, 100.0, 1e4, 1e30, 6.0]).repeat(2, 1)
    x.requires_grad_()
    theirs = EAGER[act](x)
    (wanted,) = torch.autograd.grad(theirs.sum(), x)
    out = bias_act_dropout(x, None, [], [], None, 0, text_of(ACTS[act]), 0.0, torch.float32, False)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)  # gelu by tanh: 0 * inf
    nan = torch.tensor([[float("nan"), 1.0]])
    assert bias_act_dropout(
        nan, None, [], [], None, 0, text_of(ACTS[act]), 0.0, torch.float32, False
    ).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("kernel", [True, False], ids=["triton", "reference"])
def test_where_a_sigmoid_is_nearly_1_its_slope_keeps_its_digits(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - y, of a y that is rounded to 1, is no slope; an exponent of so much errs by as many ulp."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if kernel else "0")
    x = torch.linspace(5, 20, 96).view(6, 16).requires_grad_()
    out = bias_act_dropout(x, None, [], [], None, 0, text_of(activation.Sigmoid(X)), 0.0, torch.float32, False)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    exact = torch.sigmoid(x.detach().double()) * torch.sigmoid(-x.detach().double())
    assert ((gradient - exact).abs() / exact).max() <= 20 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("act", ["relu", "leaky relu", "elu", "selu", "hardswish", "hardsigmoid", "relu6"])
def test_beside_a_kink_there_is_eagers_gradient(act: str) -> None:
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0])
    x = torch.stack([torch.nextafter(kinks, kinks - 1), kinks, torch.nextafter(kinks, kinks + 1)]).requires_grad_()
    (wanted,) = torch.autograd.grad(EAGER[act](x).sum(), x)
    out = bias_act_dropout(x, None, [], [], None, 0, text_of(ACTS[act]), 0.0, torch.float32, False)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.usefixtures("interpreter")
def test_what_is_dropped_of_infinity_is_nan_as_in_eager() -> None:
    x = torch.full((4, 16), float("inf"))
    out = bias_act_dropout(x, None, [], [], torch.tensor([1]), 0, text_of(KEEP * X), 0.5, torch.float32, False)
    assert out.isnan().any() and out.isinf().any() and not out.isfinite().any()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("features", [24, 21])
@pytest.mark.parametrize("lay", ["contiguous", "transposed", "padded"])
def test_the_mask_is_that_of_an_elements_place_whatever_its_layout(features: int, lay: str) -> None:
    """The same in the pointwise kernel, after a product, and in the backward."""
    x = laid_out(torch.ones(4, 5, features), lay).requires_grad_()
    seed, text = torch.tensor([-77]), text_of(KEEP * X)
    expected = philox.linear_keep(seed, 0.25, x.shape, 9) / 0.75
    out = bias_act_dropout(x, None, [], [], seed, 9, text, 0.25, torch.float32, False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], expected)
    weight = torch.eye(features)
    product, _ = linear_act_dropout(x, weight, None, [], [], seed, 9, text, 0.25, torch.float32, True)
    torch.testing.assert_close(product, expected)


@pytest.mark.usefixtures("interpreter")
def test_places_of_more_than_32_bits_have_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seed, text = torch.randn(19, 72), torch.tensor([-77]), text_of(KEEP * X)
    few = bias_act_dropout(x, None, [], [], seed, 5, text, 0.3, torch.float32, False)
    monkeypatch.setattr(calls, "known", {})
    monkeypatch.setattr(arguments, "MANY", 0)
    assert torch.equal(few, bias_act_dropout(x, None, [], [], seed, 5, text, 0.3, torch.float32, False))
    assert torch.equal(few != 0, philox.linear_keep(seed, 0.3, (19, 72), 5))


@pytest.mark.usefixtures("interpreter")
def test_only_what_is_needed_is_computed() -> None:
    text = text_of(vector(0) * FUNCTIONS["gelu"](X, {"approximate": "none"}))
    op = torch.ops.xfcompile.bias_act_dropout_backward
    x, b, g = torch.randn(5, 16), torch.randn(16), torch.randn(16)
    dtypes = ["float32"] * 3
    for needed in ([True, False, False], [False, True, False], [False, False, True], [True, True, True], [False] * 3):
        results = op(x, x, b, [g], None, 0, text, 0.0, 0, needed, dtypes)
        shapes = [s for s, yes in zip(((5, 16), (16,), (16,)), needed, strict=True) if yes]
        assert [tuple(r.shape) for r in results] == shapes
        whole = op(x, x, b, [g], None, 0, text, 0.0, 0, [True] * 3, dtypes)
        for r, w in zip(results, (w for w, yes in zip(whole, needed, strict=True) if yes), strict=True):
            torch.testing.assert_close(r, w)


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_of_a_bias_that_x_has_already_the_gradient_is_wanted(
    act: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    case = Case(act, p=0.25, scale=True, residual=True)
    at = operands(case, False)
    assert at.bias is not None
    more = (at.vectors, at.tensors, at.seed, 3, text_of(case.formula), 0.25, torch.float32)
    found = []
    for x, summed in ((at.x, False), (at.x + at.bias.detach(), True)):
        out = bias_act_dropout(x, at.bias, *more, summed)
        found.append([out, *torch.autograd.grad(out, [at.x, at.bias, *at.vectors], at.dout)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_gradients_are_functions_of() -> None:
    """Where nothing but dropout happens to x, it need not be kept."""
    assert not saves(text_of(KEEP * X + tensor(0)), 0, 1, False)
    assert not saves(text_of(KEEP * X * vector(0) + tensor(0)), 1, 1, False)
    assert saves(text_of(KEEP * X * vector(0) + tensor(0)), 1, 1, True)
    assert saves(text_of(KEEP * activation.relu(X)), 0, 0, False)


def test_formulas_are_read_back() -> None:
    for case in CASES.values():
        formula = parse(text_of(case.formula), int(case.scale), int(case.residual))
        assert formula.value == activation.with_distributions(case.formula)
        assert formula.drops == bool(case.p)
    with pytest.raises(ValueError, match="no operand"):
        parse(text_of(X + vector(0)), 0, 0)
    with pytest.raises(ValueError, match="not added"):
        parse(text_of(X * tensor(0)), 0, 1)


def test_rows_are_grouped_without_copies() -> None:
    x = torch.empty(4, 5, 24)
    assert (rows_of(x).split, rows_of(x).count, rows_of(x).strides[0][1:]) == (False, 20, (24, 1))
    turned = torch.empty(5, 4, 24).transpose(0, 1)
    rows = rows_of(x, turned)
    assert rows.split and rows.inner == 5
    assert all(a is b for a, b in zip(rows.tensors, (x, turned), strict=True)), "copied"
    sliced = torch.empty(4, 5, 48)[..., :24]
    assert not rows_of(sliced).split and rows_of(sliced).tensors[0] is sliced
    hard = torch.empty(4, 3, 5, 24).permute(2, 0, 1, 3)
    harder = torch.empty(3, 4, 5, 24).permute(2, 1, 0, 3)
    taken = rows_of(hard, harder).tensors
    assert sum(a is b for a, b in zip(taken, (hard, harder), strict=True)) >= 1


def test_shapes_are_checked() -> None:
    x, text = torch.ones(3, 8), text_of(X)
    with pytest.raises(ValueError, match="vectors are"):
        bias_act_dropout(x, torch.ones(7), [], [], None, 0, text, 0.0, torch.float32, False)
    with pytest.raises(ValueError, match="tensors are"):
        bias_act_dropout(x, None, [], [torch.ones(1, 8)], None, 0, text_of(X + tensor(0)), 0.0, torch.float32, False)
    with pytest.raises(ValueError, match="vectors are"):
        bias_act_dropout(x, torch.ones(7), [], [], None, 0, text, 0.0, torch.float32, True)


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "x weight bias"])
def test_a_product_that_was_not_saved_is_made_again(needs: str) -> None:
    at = operands(Case("gelu", p=0.25), True, grad=False)
    more = ([], [], at.seed, 3, text_of(KEEP * ACTS["gelu"]), 0.25, torch.float32)
    found = []
    for save in (True, False):
        leaves = [
            x.detach().requires_grad_(name in needs.split())
            for name, x in zip(("x", "weight"), (at.x, at.weight), strict=True)
        ]
        bias = torch.ones(at.weight.shape[0], requires_grad="bias" in needs)
        out, product = linear_act_dropout(*leaves, bias, *more, save)
        assert (product.numel() == 0) != save
        found.append(torch.autograd.grad(out.sum(), [x for x in (*leaves, bias) if x.requires_grad]))
    for saved, again in zip(*found, strict=True):
        torch.testing.assert_close(again, saved)


def test_both_ways_to_allow_tf32_are_read(interpreter: None) -> None:
    """Of the two that PyTorch has the older one raises an error where the newer one was used."""
    products = torch.backends.cuda.matmul
    before, made = products.fp32_precision, []
    x, weight = (torch.randn(n, 16, generator=torch.Generator().manual_seed(0)) for n in (8, 24))
    try:
        for allowed in ("ieee", "tf32"):
            products.fp32_precision = allowed
            calls.known.clear()  # on a GPU calls are told apart by it
            made.append(linear_act_dropout(x, weight, None, [], [], None, 3, text_of(X), 0.0, x.dtype, False)[0])
    finally:
        products.fp32_precision = before
    torch.testing.assert_close(made[0], torch.nn.functional.linear(x, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made[1], made[0], rtol=1e-2, atol=1e-2)


def test_nothing_of_nothing() -> None:
    x = torch.ones(0, 8, requires_grad=True)
    b = torch.ones(8, requires_grad=True)
    out = bias_act_dropout(x, b, [], [], None, 0, text_of(X**2), 0.0, torch.float32, False)
    dx, db = torch.autograd.grad(out.sum(), [x, b])
    assert out.shape == dx.shape == (0, 8) and not db.any()


@pytest.mark.parametrize("save", [True, False])
def test_fakes_say_what_comes(save: bool) -> None:
    case = Case("gelu", p=0.3, scale=True, residual=True)
    at = operands(case, False, grad=False)
    text = text_of(case.formula)
    more = (at.bias, at.vectors, at.tensors, at.seed, 0, text, 0.3, torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(bias_act_dropout.default, (at.x, *more, False), test_utils=checks)
    at = operands(case, True, grad=False)
    more = (at.bias, at.vectors, at.tensors, at.seed, 0, text, 0.3, torch.bfloat16)
    torch.library.opcheck(linear_act_dropout.default, (at.x, at.weight, *more, save), test_utils=checks)
    backward = (
        at.dout,
        at.dout,
        at.bias,
        at.vectors,
        at.seed,
        0,
        text,
        0.3,
        1,
        [True, True, False],
        ["float32"] * 3,
    )
    torch.library.opcheck(torch.ops.xfcompile.bias_act_dropout_backward.default, backward)


def test_the_reference_is_the_formula() -> None:
    """By eye: bias, gelu, dropout, scale, residual."""
    case = Case("gelu", p=0.3, scale=True, residual=True)
    at = operands(case, False, grad=False)
    formula = parse(text_of(case.formula), 1, 1)
    out = reference.forward(formula, at.x, at.bias, at.vectors, at.tensors, at.seed, 3, 0.3, torch.float32)
    keep = philox.linear_keep(at.seed, 0.3, at.x.shape, 3) / 0.7
    assert at.bias is not None
    torch.testing.assert_close(out, at.tensors[0] + at.vectors[0] * keep * torch.nn.functional.gelu(at.x + at.bias))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["many rows", "everything", "features of several tiles", "transposed, 2 leading"])
@pytest.mark.parametrize("product", [False, True], ids=["pointwise", "epilogue"])
def test_few_programs_share_the_rows(name: str, product: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each then takes several steps, the last of them past the end."""
    monkeypatch.setattr(calls, "known", {})
    few = {kernel: Fact(replace(fact.value, programs=2)) for kernel, fact in tiles.POINTWISE.items()}
    monkeypatch.setattr(tiles, "POINTWISE", few)
    check(CASES[name], product)
