"""Nothing of a program but its mathematics reaches the text of a kernel: no name, no string, no odd constant."""

from __future__ import annotations

import ast
import builtins
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import xfcompile
from xfcompile.activation import GATE, UP, Sigmoid, X
from xfcompile.evaluate import Unsupported
from xfcompile.kernels.attention import cache, lists, prepare, programs
from xfcompile.kernels.bias_act_dropout import formula as bias_formula
from xfcompile.kernels.bias_act_dropout import programs as bias_programs
from xfcompile.kernels.bias_act_dropout.template import module as bias_module
from xfcompile.kernels.gated_mlp import codegen as gated_codegen
from xfcompile.kernels.gated_mlp import programs as gated_programs
from xfcompile.score import B, I, J, Load, S, Where
from xfcompile.site import MaskSpec, Operand, ScoreSpec
from xfcompile.written import formula_of

ROUTES = {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": "epilogue"}

EVIL = [
    '"""\nimport os\n"""', "x'); raise SystemExit(1) #", "__import__('os')", "tl", "lambda", "a\\", "x\x00y", "é",
    "a b", "{0}", "%s", "\n", "'" * 3, "n0", "s", "\u2028raise SystemExit", "x: int = 1", "if",
]  # fmt: skip
names = st.one_of(st.sampled_from(EVIL), st.text(min_size=1, max_size=30))

quick = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
slower = settings(quick, max_examples=4)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    for module, name in ((programs, "known"), (lists, "_programs"), (gated_programs, "known")):
        monkeypatch.setattr(module, name, {})  # what an earlier test has stored elsewhere
    for cached in (programs._module, lists._kernels, gated_programs._module, bias_programs._module):
        cached.cache_clear()


def harmless(source: str) -> None:
    """A text is a module of a docstring, imports of Triton, constants and functions, and uses no name that it lacks."""
    tree = ast.parse(source)
    bound = {*dir(builtins), "tl", "triton"} - {"exec", "eval", "compile", "__import__", "open", "getattr", "setattr"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            bound |= {node.name, *(a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg))}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    for statement in tree.body:
        kinds = (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
        assert isinstance(statement, kinds), ast.unparse(statement)
        if isinstance(statement, ast.Expr):
            assert isinstance(statement.value, ast.Constant), ast.unparse(statement)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            modules = [a.name for a in statement.names] if isinstance(statement, ast.Import) else [statement.module]
            assert all(str(m).partition(".")[0] in ("triton", "__future__") for m in modules), ast.unparse(statement)
    unknown = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - bound
    assert not unknown, unknown
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "SystemExit" not in node.value and "import os" not in node.value
    assert all(not isinstance(n, ast.Attribute) or not n.attr.startswith("__") for n in ast.walk(tree))


# -- names ----------------------------------------------------------------------------------------------------------


@quick
@given(name=names, other=names)
def test_the_name_of_a_number_is_not_in_the_kernel(name: str, other: str) -> None:
    """Of scores and masks: the text is the same whatever the program calls what they depend on."""

    def key(scale: str, length: str) -> tuple[str, str]:
        a = sympy.Symbol(scale, real=True)
        n = sympy.Symbol(length, integer=True, positive=True)
        keep = sympy.Ne(Load(0, B, 0, 0, J), 0) & (I + n >= J)
        operands = (Operand(torch.bool, 4),)
        assume(a != S)
        return (
            prepare(ScoreSpec(a * S, keep, operands=operands, scalars=(a, n))),
            lists.prepare(MaskSpec(keep, (), operands, (n,))),
        )

    found = key(name, other + "_")
    assert found == key("scale", "length_")
    harmless(programs.program(found[0]).source)
    harmless(lists.program(found[1]).source)


@quick
@given(name=names)
def test_a_symbol_that_is_no_operand_has_no_kernel(name: str) -> None:
    unknown = sympy.Symbol(name, real=True)
    if unknown not in (GATE, UP):
        with pytest.raises(Unsupported):
            gated_codegen.generate(GATE * UP * unknown)
    if unknown not in (X, sympy.Symbol("keep", real=True)):
        with pytest.raises(ValueError, match=r"no operand is given|no name of a symbol"):
            bias_formula.parse(bias_formula.text_of(X * unknown), 0, 0)


class Attention(nn.Module):
    def __init__(self, names: list[str], labels: str) -> None:
        super().__init__()
        self.names, (q, _, i, j, d) = names, labels
        self.score, self.value = f"{q}{i}{d}, {q}{j}{d} -> {q}{i}{j}", f"{q}{i}{j},{q}{j}{d}->{q}{i}{d}"
        torch.manual_seed(0)
        self.register_parameter(names[0], nn.Parameter(torch.randn(16, 16) / 4))
        self.register_buffer(names[1], torch.randn(9, 9))

    def forward(self, x: Tensor) -> Tensor:
        q = F.linear(x, getattr(self, self.names[0]))
        scores = torch.tanh(torch.einsum(self.score, q, x)) + getattr(self, self.names[1])
        return torch.einsum(self.value, scores.softmax(-1), x)


class MLP(nn.Module):
    def __init__(self, names: list[str], labels: str) -> None:
        super().__init__()
        self.names = names
        torch.manual_seed(0)
        self.add_module(names[0], nn.Linear(16, 32))
        self.add_module(names[1], nn.Linear(16, 32, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(getattr(self, self.names[0])(x)) * getattr(self, self.names[1])(x)


class Activated(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(getattr(self, self.names[0])(x) + 2) * 3


def texts(model: nn.Module, folder: Path) -> set[str]:
    """What is stored for a model whose site runs by our kernel; results are compared with eager."""
    report: list[xfcompile.Report] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        report.append(xfcompile.rewrite(gm, inputs, {"strict": True, "routes": ROUTES}))
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = torch.compile(model, backend=backend)(x), model(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert [s.route for s in report[0].sites if s.matched] == [ROUTES[s.family] for s in report[0].sites if s.matched]
    assert any(s.matched for s in report[0].sites)
    return {p.name for p in folder.glob("*.py")}


def usable(name: str) -> bool:
    """Whether torch takes it for the name of a parameter or module."""
    return "." not in name and not hasattr(nn.Module(), name) and name not in ("names", "score", "value")


@slower
@given(
    given_names=st.lists(names.filter(usable), min_size=2, max_size=2, unique=True),
    labels=st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyzABCXYZ"), min_size=5, max_size=5, unique=True),
)
@example(given_names=['"""\nimport os\n"""', "x'); raise SystemExit(1) #"], labels=list("tlxyz"))
@pytest.mark.parametrize("kind", [Attention, MLP, Activated])
def test_names_and_strings_of_a_program_are_not_in_its_kernels(
    kind: Callable[..., nn.Module], given_names: list[str], labels: list[str]
) -> None:
    folder = cache.directory()
    plain = texts(kind(["one", "two"], "bkijd"), folder)
    assert plain
    assert texts(kind(given_names, "".join(labels)), folder) == plain
    for path in folder.glob("*.py"):
        harmless(path.read_text())


# -- constants ------------------------------------------------------------------------------------------------------

CONSTANTS = [
    math.nan, math.inf, -math.inf, 0.0, -0.0, 1e308, -1e308, 5e-324, 1e-45, 3.4028235e38, 3.5e38, -1e30, 2.0**63, 1e16,
    1 / 3, 0.1,
]  # fmt: skip
constants = st.one_of(st.sampled_from(CONSTANTS), st.floats())


def scaled(c: float) -> Callable[..., Tensor]:
    return lambda x, y, z: (torch.tanh(x @ y.mT) * c).softmax(-1) @ z


def filled(c: float) -> Callable[..., Tensor]:
    return lambda x, y, z: torch.tanh(x @ y.mT).masked_fill(z[..., 0] > 0, c).softmax(-1) @ z


def shifted(c: float) -> Callable[..., Tensor]:
    return lambda x, y, z: torch.where(x @ y.mT > c, torch.tanh(x @ y.mT), c).softmax(-1) @ z


def gated(c: float) -> Callable[..., Tensor]:
    return lambda x, y, z: F.silu(F.linear(x, y)) * (F.linear(x, z) + c)


def gated_clamped(c: float) -> Callable[..., Tensor]:
    return lambda x, y, z: torch.sigmoid(F.linear(x, y).clamp(max=c) * c) * F.linear(x, z)


def activated(c: float) -> Callable[..., Tensor]:
    return lambda x, y, z: F.gelu(F.linear(x, y) * c) + c


def leaky(c: float) -> Callable[..., Tensor]:
    return lambda x, y, z: F.leaky_relu(torch.tanh(F.linear(x, y) - c), c)


@quick
@given(c=constants)
@pytest.mark.parametrize("kind", [filled, shifted, gated, gated_clamped, activated, leaky])
def test_constants_are_what_they_are_or_are_declined(kind: Callable[[float], Callable[..., Tensor]], c: float) -> None:
    generator = torch.Generator().manual_seed(0)
    fn, inputs = kind(c), [torch.randn(8, 8, generator=generator) for _ in range(3)]
    try:
        expected = fn(*inputs)
    except RuntimeError:  # torch refuses some numbers itself
        assume(False)
    gm = fx.symbolic_trace(fn)
    exact = fn(*(x.double() for x in inputs))
    xfcompile.rewrite(gm, inputs, {"strict": True, "routes": ROUTES})
    found = gm(*inputs)
    scale = max(1.0, float(exact.nan_to_num(0, 0, 0).abs().max()))
    # What overflows in fp32 and not in fp64 is judged by eager alone.
    right = expected.double() if (expected.isfinite() != exact.isfinite()).any() else exact
    allowed = 2 * _error(expected, right) + 8 * torch.finfo().eps * scale
    assert _error(found, right) <= allowed, (found, expected)
    for path in cache.directory().glob("*.py"):
        harmless(path.read_text())


@pytest.mark.parametrize("c", [math.inf, -math.inf, 1e16, -1e16, 1e38, 1e308, 2.0**63])
def test_a_scale_that_leaves_no_digits_has_no_kernel(c: float) -> None:
    inputs = [torch.randn(8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    gm = fx.symbolic_trace(scaled(c))
    xfcompile.rewrite(gm, inputs, {"strict": True, "patterns": ["attention"], "routes": {"attention": "triton"}})
    torch.testing.assert_close(gm(*inputs), scaled(c)(*inputs), atol=0, rtol=0, equal_nan=True)
    assert not any("xfcompile.attention" in str(node.target) for node in gm.graph.nodes)


def _error(x: Tensor, right: Tensor) -> float:
    x = x.double()
    same = (x == right) | (x.isnan() & right.isnan())
    return float(torch.where(same, 0.0, (x - right).abs().nan_to_num(math.inf)).max())


# -- formulas that come with a program ------------------------------------------------------------------------------

ATTACKS = [
    "__import__('os').system('true')", "().__class__.__base__.__subclasses__()", "Symbol('x').__class__",
    "sympify('__import__(\"os\")')", "S('1')",
    "Function('f')", "Lambda(Symbol('x'), 1)(2)", "exec('1')", "(lambda: 1)()",
    "[x for x in (1,)]", "Symbol('x\\n')", "Symbol(name='x')", "Float('0.1', precision=open)", "Add(*[1])", "print(1)",
    "Add(1, evaluate=__import__('os'))", "f'{1}'", "x", "", "1 if 1 else 2", "Symbol('x') + 1", "Rational('1/2')",
    "'text'",
    "preview(Integer(1))", "lambdify(Integer(1), '1')", "(" * 500, "-" * 9000 + "1", "Integer(1).evalf", "oo.x", "True",
]  # fmt: skip


@pytest.mark.parametrize("text", ATTACKS)
def test_what_is_no_formula_is_not_run(text: str) -> None:
    with pytest.raises(ValueError, match="no "):
        formula_of(text, {"Where": Where, "Sigmoid": Sigmoid})


@quick
@given(text=st.one_of(st.text(), st.lists(st.sampled_from([*"()',.+-1x", "Add", "Symbol", "Integer"])).map("".join)))
def test_any_text_is_a_formula_or_an_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(formula_of(text, {}), sympy.Basic)


def written() -> Iterator[sympy.Basic]:
    n = sympy.Symbol("n0", integer=True, nonnegative=True)
    yield from (S / 8, sympy.oo, -sympy.oo, sympy.nan, sympy.pi * S, sympy.Float(0.1), sympy.Float("1e-310", 60))
    yield from (Where((I + n >= J) & sympy.Ne(Load(0, B, J), 0), S, -sympy.oo), sympy.true, sympy.Integer(-3))
    yield from (sympy.Max(S, 1), sympy.Mod(n, 3), sympy.exp(S) ** 2, sympy.Abs(S), sympy.Rational(-1, 3))


@pytest.mark.parametrize("formula", list(written()), ids=str)
def test_formulas_come_back(formula: sympy.Basic) -> None:
    assert formula_of(sympy.srepr(formula), {"Where": Where, "Load": Load}) == formula


def test_the_operator_refuses_a_formula_that_is_code() -> None:
    from xfcompile.kernels.bias_act_dropout import op

    assert op.LIBRARY is not None
    x = torch.ones(2, 4)
    with pytest.raises(Exception, match="no part of a formula"):
        torch.ops.xfcompile.bias_act_dropout(x, None, [], [], None, 0, "__import__('os')", 0.0, torch.float32, False)
    evil = "Symbol('x + __import__(1)', real=True)"
    with pytest.raises(Exception, match="no name of a symbol"):
        torch.ops.xfcompile.bias_act_dropout(x, None, [], [], None, 0, evil, 0.0, torch.float32, False)


def test_modules_of_bias_and_activation_are_harmless() -> None:
    formula = bias_formula.parse(bias_formula.text_of(X * Sigmoid(X) + sympy.Float(0.1)), 0, 0)
    harmless(bias_module(formula, 0.1))
