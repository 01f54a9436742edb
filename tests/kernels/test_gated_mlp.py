"""The generated kernels of gated MLPs, interpreted, against fp64."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from gated_cases import FORMULAS, Case, assert_as_exact, call, check, gradients, inputs, key_of
from torch import Tensor

from xfcompile.activation import GATE, UP
from xfcompile.evaluate import Unsupported
from xfcompile.kernels import philox
from xfcompile.kernels.attention.repeat import Blank
from xfcompile.kernels.gated_mlp import (
    codegen,
    gated_mlp,
    gated_mlp_backward,
    gated_mlp_down,
    launch_triton,
    prepare,
    programs,
    reference,
    tiles,
)

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

LAYOUTS = ("separate", "gate first", "up first", "gate even", "up even")


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    for program in programs.known.values():
        program.calls.clear()


@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula(name: str) -> None:
    check(Case(name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["dual", "packed"])
def test_layouts_and_biases(layout: str, biased: bool, form: str) -> None:
    check(Case(layout=layout, biased=biased), form)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("form", ["dual", "packed"])
def test_half_precisions(dtype: torch.dtype, rows: int, form: str) -> None:
    check(Case("gelu tanh", rows=rows, dtype=dtype, biased=True, layout="gate first"), form)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 32, 33, 65])
@pytest.mark.parametrize(("features", "inner"), [(1, 1), (8, 32), (33, 31), (64, 97)])
def test_ragged_sizes(rows: int, features: int, inner: int) -> None:
    check(Case(rows=rows, features=features, inner=inner))


@pytest.mark.parametrize("memory", ["transposed", "poisoned"])
@pytest.mark.parametrize("rows", [1, 7, 37])
@pytest.mark.parametrize("layout", ["separate", "up first", "gate even"])
def test_any_strides(memory: str, rows: int, layout: str) -> None:
    check(Case(memory=memory, rows=rows, layout=layout))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 3, 37])
@pytest.mark.parametrize("layout", ["separate", "gate first", "up even"])
@pytest.mark.parametrize("form", ["dual", "packed"])
def test_experts(rows: int, layout: str, form: str) -> None:
    check(Case(rows=rows, layout=layout, experts=3, biased=True, memory="poisoned"), form)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_read_through_descriptors(monkeypatch: pytest.MonkeyPatch, layout: str, dtype: torch.dtype) -> None:
    used = []
    described = launch_triton._Described.__call__

    def noted(self: launch_triton._Described, *arguments: object) -> None:
        used.append(self)
        described(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(launch_triton._Described, "__call__", noted)
    check(Case(rows=70, features=45, inner=56, dtype=dtype, layout=layout, biased=True))  # type: ignore[arg-type]
    assert used


def test_descriptors_are_for_aligned_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_triton, "_Described", None)
    for about in (
        {"inner": 57},
        {"memory": "poisoned"},
        {"memory": "transposed"},
        {"dtype": torch.float32},
        {"experts": 2},
    ):
        check(Case(**{"rows": 40, "inner": 56, "dtype": torch.float16, **about}))  # type: ignore[arg-type]


# -- the backward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_of_every_formula(name: str) -> None:
    gradients(Case(name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision(layout: str, dtype: torch.dtype) -> None:
    gradients(Case("gelu", layout=layout, dtype=dtype))  # type: ignore[arg-type]


def test_gradients_of_strided_outputs_and_experts() -> None:
    gradients(Case(memory="transposed"))
    gradients(Case(experts=3, rows=5, memory="transposed"))


def test_gradients_at_kinks_are_those_of_torch() -> None:
    for name in ("relu", "relu6", "leaky relu", "clamped, quick gelu", "abs"):
        points = torch.tensor([[-1.0, 0.0, 1.0, 2.0, 6.0, -0.0, 7.0]])
        gate, up = points.repeat(7, 1), points.T.repeat(1, 7)
        grad, _ = gated_mlp_backward(torch.ones(7, 7), torch.cat([gate, up], -1), key_of(name), "separate", False)
        leaves = [t.clone().requires_grad_() for t in (gate, up)]
        truth = torch.autograd.grad(FORMULAS[name][1](*leaves).sum(), leaves)
        for mine, theirs in zip(reference.parts(grad, "separate"), truth, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu tanh", "sigmoid", "tanh", "clamped, quick gelu", "relu"])
def test_far_gates_are_finite_where_eager_is(name: str) -> None:
    far = torch.tensor([[-1e30, -1e4, -200.0, -90.0, -20.0, 20.0, 90.0, 200.0, 1e4]])
    gate, up = far.repeat(3, 1), torch.tensor([[1.0], [-3.0], [1e8]]).repeat(1, 9)
    saved = torch.cat([gate, up], -1)
    grad, product = gated_mlp_backward(torch.ones(3, 9), saved, key_of(name), "separate", True)
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    value = FORMULAS[name][1](*leaves)
    truth = (*torch.autograd.grad(value.sum(), leaves), value.detach())
    for mine, theirs in zip((*reference.parts(grad, "separate"), product), truth, strict=True):
        same = theirs.isfinite()
        torch.testing.assert_close(mine[same], theirs[same], rtol=2e-6, atol=2e-6)


def test_nan_stays() -> None:
    for name in FORMULAS:
        saved = torch.tensor([[torch.nan, 1.0]])
        assert gated_mlp_backward(torch.ones(1, 1), saved, key_of(name), "separate", True)[1].isnan().all(), name


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dual", "packed"])
@pytest.mark.parametrize(
    ("rows", "features", "experts"), [(37, 45, None), (37, 40, None), (1, 24, None), (5, 48, 2), (3, 7, 2)]
)
def test_dropout_keeps_what_philox_says(form: str, rows: int, features: int, experts: int | None) -> None:
    case, seed = Case(rows=rows, features=features, experts=experts), torch.tensor([2**40 + 3])
    kept, _ = call(case, form, seed=seed, p=0.25)
    whole, _ = call(case, form)
    mask = philox.linear_keep(seed, 0.25, whole.shape)
    torch.testing.assert_close(kept, torch.where(mask, whole * philox.scale(0.25), 0.0))


def test_tiles_narrower_than_a_group_of_random_numbers_drop_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case, seed = Case(rows=1, features=24), torch.tensor([2**40 + 3])
    monkeypatch.setattr(tiles, "INTERPRETED_FEW", replace(tiles.INTERPRETED_FEW, block_n=2))
    kept, _ = call(case, "dual", seed=seed, p=0.25)
    whole, _ = call(case, "dual")
    mask = philox.linear_keep(seed, 0.25, whole.shape)
    torch.testing.assert_close(kept, torch.where(mask, whole * philox.scale(0.25), 0.0))


def test_dropout_in_the_backward() -> None:
    gradients(Case(features=45), torch.tensor([5]), 0.5)
    gradients(Case(features=48), torch.tensor([5]), 0.1)
    gradients(Case(features=16, experts=2, rows=3), torch.tensor([5]), 0.1)


def test_all_may_be_dropped() -> None:
    assert (call(Case(), seed=torch.tensor([1]), p=1.0)[0] == 0).all()


# -- the op --------------------------------------------------------------------------------------------------------


def test_writes_all_of_the_outputs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def guarded(self: Blank) -> Tensor:
        memory = torch.full((math.prod(self.shape) + 2000,), torch.nan, dtype=self.dtype)
        made.append(memory)
        return memory.as_strided(self.shape, self.strides, 1000)

    monkeypatch.setattr(Blank, "__call__", guarded)
    for rows in (1, 5, 37):
        for form in ["dual"]:
            out, saved = call(Case(rows=rows, memory="poisoned"), form)
            assert not out.isnan().any()
            assert not saved.isnan().any()
    for memory in made:
        assert memory[:1000].isnan().all()
        assert memory[-1000:].isnan().all()


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_no_rows_and_no_features(rows: int) -> None:
    out, saved = call(Case(rows=rows, features=0 if rows == 4 else 3))
    assert out.shape == (rows, 0 if rows == 4 else 3)
    assert saved.shape == (rows, 2 * out.shape[1])


def test_the_source_is_a_file_with_its_formula() -> None:
    program = programs.program(key_of("clamped, quick gelu"))
    assert codegen.parse(repr_of(program.source)) == program.formula
    assert "gated_forward" in program.source


def repr_of(source: str) -> str:
    scope: dict[str, str] = {}
    exec(next(line for line in source.splitlines() if line.startswith("FORMULA = ")), scope)
    return scope["FORMULA"]


def test_another_process_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    key = prepare(GATE * UP + 3 * GATE)
    code = (
        "import torch; from xfcompile.kernels.gated_mlp import gated_mlp; x = torch.ones(1, 1);"
        f"print(gated_mlp(x, x, x, None, None, '{key}', 'separate', 'dual', False, torch.float32)[0].item())"
    )
    env = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) == 4.0


def test_what_has_no_form_is_said() -> None:
    with pytest.raises(Unsupported, match="loggamma"):
        prepare(sympy.loggamma(GATE) * UP)


def test_errors_say_what_was_found() -> None:
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    rest = (key_of("silu"), "separate", "dual", False, torch.float32)
    with pytest.raises(ValueError, match="two weights"):
        gated_mlp(x, w, None, None, None, *rest)
    with pytest.raises(ValueError, match="do not go together"):
        gated_mlp(x, w.T, w.T, None, None, *rest)
    with pytest.raises(ValueError, match="one dtype"):
        gated_mlp(x, w.double(), w.double(), None, None, *rest)
    with pytest.raises(ValueError, match="biases"):
        gated_mlp(x, w, w, w, None, *rest)
    with pytest.raises(ValueError, match="seed"):
        gated_mlp(x, w, w, None, None, *rest, None, 0.5)


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("layout", ["separate", "up first", "gate even"])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("down", [True, False])
def test_autograd(monkeypatch: pytest.MonkeyPatch, interpreted: bool, layout: str, save: bool, down: bool) -> None:
    """Gradients of everything, against autograd in fp64 and in fp32."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    case = Case("gelu", rows=9, biased=True, layout=layout)  # type: ignore[arg-type]
    given = inputs(case)
    second = [torch.randn(6, case.features), torch.randn(6)]
    flat = [given.x, *given.weights, *given.biases, *(second if down else [])]

    def leaves(dtype: torch.dtype) -> list[Tensor | None]:
        return [None if t is None else t.to(dtype).detach().requires_grad_() for t in flat]

    def plain(x: Tensor, w: Tensor, u: Tensor | None, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        gate, up = reference.project(x, (w, u), (a, b), case.layout, x.dtype)
        y = FORMULAS[case.name][1](gate, up)
        return torch.nn.functional.linear(y, *rest) if down else y

    def ours(*given: Tensor | None) -> Tensor:
        op = gated_mlp_down if down else gated_mlp
        return op(*given, case.key, case.layout, "dual", save, torch.float32)[0]

    found = []
    for fn, dtype in ((ours, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        mine = leaves(dtype)
        value = fn(*mine)  # type: ignore[arg-type]
        real = [t for t in mine if t is not None]
        weights = torch.linspace(-1, 1, value.numel()).reshape(value.shape).to(dtype)
        found.append([value.detach(), *torch.autograd.grad(value, real, weights)])
    for mine, theirs, truth in zip(*found, strict=True):
        assert_as_exact(mine, theirs, truth)


def test_frozen_inputs_cost_no_work() -> None:
    """Only what is asked for is multiplied."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.overloadpacket._qualified_op_name.split("::")[1])
            return func(*args, **(kwargs or {}))

    given = inputs(Case(rows=3))
    about = (key_of("silu"), "separate", "dual", True, torch.float32)
    down = torch.randn(6, 45)
    for needed, products, passes in (
        ((0,), 3, 1), ((1,), 2, 1), ((0, 1, 2), 4, 1), ((5,), 1, 1), ((6,), 0, 0), ((0, 1, 2, 5), 5, 1),
    ):  # fmt: skip
        tensors = [given.x, *given.weights, None, None, down, torch.zeros(6)]
        tensors = [t if t is None else t.clone().requires_grad_(n in needed) for n, t in enumerate(tensors)]
        value = gated_mlp_down(*tensors, *about)[0]
        seen: list[str] = []
        with Products():
            value.sum().backward()
        found = [sum(name in ("mm", "addmm") for name in seen), sum(name == "gated_mlp_backward" for name in seen)]
        assert found == [products, passes], (needed, seen)


def test_weight_gradients_lie_as_the_weights() -> None:
    for memory in ("usual", "transposed"):
        given = inputs(Case(rows=3, memory=memory))
        leaves = [t.detach().requires_grad_() for t in given.weights if t is not None]
        out = gated_mlp(given.x, *leaves, None, None, key_of("silu"), "separate", "dual", True, torch.float32)[0]
        for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
            assert gradient.stride() == leaf.stride()


def test_two_weights_have_their_gradients_of_one_product_and_keep_them_without_a_copy() -> None:
    given = inputs(Case(rows=3))
    leaves = [t.detach().requires_grad_() for t in given.weights if t is not None]
    out = gated_mlp(given.x, *leaves, None, None, key_of("silu"), "separate", "dual", True, torch.float32)[0]
    out.sum().backward()
    gate, up = (leaf.grad for leaf in leaves)
    assert gate is not None and up is not None
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    assert gate.is_contiguous() and up.is_contiguous()
    assert up.data_ptr() == gate.data_ptr() + gate.numel() * gate.element_size()


def test_nothing_is_saved_but_inputs_and_projections() -> None:
    given = inputs(Case(rows=3))
    kept: list[Tensor] = []
    x = given.x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, saved = gated_mlp(x, *given.weights, None, None, key_of("silu"), "separate", "dual", True, torch.float32)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *given.weights, saved)}
    assert out.data_ptr() not in {t.data_ptr() for t in kept}
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_mlp(x, *given.weights, None, None, key_of("silu"), "separate", "dual", False, torch.float32)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *given.weights)}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "squares"])
@pytest.mark.parametrize("down", [False, True])
def test_a_second_derivative_is_refused(down: bool, loss: Callable[[Tensor], Tensor], saved: bool) -> None:
    """Of a sum too, whose gradient by the result depends on nothing."""
    given = inputs(Case(rows=3))
    x = given.x.clone().requires_grad_()
    more = (torch.randn(6, given.weights[0].shape[0]), None) if down else ()
    about = (*given.weights, None, None, *more, key_of("silu"), "separate", "dual", saved, torch.float32)
    out = (gated_mlp_down if down else gated_mlp)(x, *about)[0]
    (first,) = torch.autograd.grad(loss(out), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("name", ["gated_mlp", "gated_mlp_down"])
def test_opcheck(name: str) -> None:
    given = inputs(Case(rows=3, biased=True))
    tensors = [t.clone().requires_grad_() for t in (given.x, *given.weights, *given.biases)]  # type: ignore[union-attr]
    more = [torch.randn(6, 45, requires_grad=True), None] if name == "gated_mlp_down" else []
    arguments = (*tensors, *more, key_of("silu"), "separate", "dual", True, torch.float32)
    torch.library.opcheck(getattr(torch.ops.xfcompile, name).default, arguments)
