"""An error of ours at any stage of any family costs that site its kernel, and nothing else; `strict` names the line."""

from __future__ import annotations

import gc
import importlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fresh import forget
from torch import Tensor, fx

import xfcompile
from xfcompile import Report
from xfcompile.kernels.attention import fit

families = importlib.import_module("xfcompile.families")


def attention(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (17 * torch.tanh(x @ y.mT / 66)).softmax(-1) @ z


def gated(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.silu(F.linear(x, y)) * F.linear(x, z)


def activated(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.gelu(F.linear(x, y, z[0]))


@dataclass(frozen=True)
class Case:
    """fn: a program with one site. route: by which our kernel runs it. left: what the graph has if it is left alone."""

    family: Any
    fn: Callable[..., Tensor]
    shape: tuple[int, ...]
    route: str
    left: str


CASES = {
    "attention": Case(families.ATTENTION, attention, (1, 2, 9, 16), "triton", "softmax"),
    "gated_mlp": Case(families.GATED_MLP, gated, (16, 16), "triton", "silu"),
    "bias-act-dropout": Case(families.BIAS_ACT_DROPOUT, activated, (16, 16), "epilogue", "gelu"),
    "without its product": Case(families.BIAS_ACT_DROPOUT, activated, (16, 16), "triton", "gelu"),
}
OURS = list(CASES)[:3]


@pytest.fixture(autouse=True)
def nothing_said_or_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has prepared no kernel, in which they can be interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    forget()
    fit.say.cache_clear()
    yield
    forget()
    fit.say.cache_clear()


def inputs(case: Case, grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(case.shape, generator=generator, requires_grad=grad) for _ in range(3)]


def run(case: Case, grad: bool = False, **options: Any) -> tuple[Report, str]:
    """What reports say and the graph of a program that was compared with eager, of whose family alone is spoken."""
    code = []
    asked = {"patterns": [case.family.name], "routes": {case.family.name: case.route}, **options}

    def backend(gm: fx.GraphModule, examples: Any) -> Any:
        report = xfcompile.rewrite(gm, examples, asked)
        code.append(gm.code)
        xfcompile.report.publish(report)
        return torch._dynamo.lookup_backend("aot_eager")(gm, examples) if grad else gm

    torch._dynamo.reset()
    with xfcompile.collect() as report:
        found = step(torch.compile(case.fn, backend=backend, fullgraph=True), inputs(case, grad))
    doubles = [x.detach().double().requires_grad_(grad) for x in inputs(case, grad)]
    for ours, eager, exact in zip(found, step(case.fn, inputs(case, grad)), step(case.fn, doubles), strict=True):
        ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
        assert error(ours, exact) <= 2 * error(eager, exact) + 4 * ulp
    return report, code[0]


def error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item()


def step(fn: Callable[..., Tensor], x: list[Tensor]) -> list[Tensor]:
    out = fn(*x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), x)] if out.requires_grad else [out]


def fails(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("spoilt")


Spoil = Callable[[pytest.MonkeyPatch, Case], None]


def at(module: str, name: str) -> Spoil:
    return lambda patch, _: patch.setattr(importlib.import_module(module), name, fails)


def reading(patch: pytest.MonkeyPatch, _: Case) -> None:
    """No node can be traced, of which nothing is known."""
    patch.setattr("xfcompile.programs.trace", fails)
    patch.setattr("xfcompile.programs._OF_PYTORCH", {})


def part(name: str) -> Spoil:
    def spoil(patch: pytest.MonkeyPatch, case: Case) -> None:
        changed: Any = {name: fails}
        patch.setattr(families, "FAMILIES", (replace(case.family, **changed),))

    return spoil


def text(patch: pytest.MonkeyPatch, case: Case) -> None:
    """The text of a kernel cannot be made."""
    module, name = {
        "attention": ("xfcompile.kernels.attention.codegen", "generate"),
        "gated_mlp": ("xfcompile.kernels.gated_mlp.codegen", "generate"),
        "bias-act-dropout": ("xfcompile.kernels.bias_act_dropout.programs", "module"),
    }[case.family.name]
    at(module, name)(patch, case)


LINE = r"at test_soft_families.py:[0-9]+"
STAGES: dict[str, tuple[Spoil, str]] = {
    "reading": (reading, rf"reading \w+ {LINE}"),
    "anchors": (part("anchors"), "looking for {title}"),
    "matching": (part("match"), f"looking for {{title}} {LINE}"),
    "at a node": (part("at_node"), f"looking for {{title}} {LINE}"),
    "planning": (part("plan"), f"planning {{title}} {LINE}"),
    "replacing": (part("replace"), f"replacing {{title}} {LINE}"),
    "code generation": (text, f"(planning|replacing) {{title}} {LINE}"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OURS)
def test_an_error_leaves_a_site_as_it_was_and_strict_raises_it(
    name: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, (spoil, words) = CASES[name], STAGES[stage]
    assert [s.route for s in run(case)[0].sites] == [case.route]
    spoil(monkeypatch, case)
    forget()
    words = words.format(title=case.family.title)
    with pytest.warns(RuntimeWarning, match=rf"{words}.*: KeyError: 'spoilt'") as given:
        report, code = run(case)
    assert sum("spoilt" in str(w.message) for w in given) == 1
    assert len(report.failures) == 1 and "KeyError: 'spoilt'" in report.render(200)
    assert case.left in code and "xfcompile" not in code
    assert not any(site.replaced for site in report.sites)
    with pytest.raises(Exception, match=rf"RewriteError: {words}.*: KeyError: 'spoilt'"):
        run(case, strict=True)


# -- compilation of kernels, which is at their first launch -----------------------------------------------------------


@pytest.fixture
def uncompilable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No kernel compiles any more; the names of those that were tried."""
    from triton.runtime.interpreter import InterpretedFunction

    tried: list[str] = []

    def warmup(self: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(self.fn.__name__)
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(InterpretedFunction, "warmup", warmup)
    return tried


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_that_does_not_compile_is_computed_by_its_definition(name: str, uncompilable: list[str]) -> None:
    case = CASES[name]
    words = rf"compiling a kernel of {case.family.title} {LINE}: RuntimeError: PassManager::run failed"
    with pytest.warns(RuntimeWarning, match=words) as given:
        report, code = run(case, grad=True)
    assert "xfcompile" in code
    said = [str(w.message) for w in given if "PassManager" in str(w.message)]
    assert said and len(said) == len(set(said))
    assert [f"xfcompile: {failure}" for failure in report.failures] == said
    tried = len(uncompilable)
    assert tried
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run(case, grad=True)
    assert len(uncompilable) == tried  # no kernel is compiled in vain again


@pytest.mark.parametrize("name", CASES)
def test_strict_raises_that_a_kernel_does_not_compile_with_the_users_line(name: str, uncompilable: list[str]) -> None:
    case = CASES[name]
    with pytest.raises(xfcompile.RewriteError, match=rf"compiling a kernel of {case.family.title} {LINE}: .*Pass"):
        run(case, strict=True)


@pytest.mark.parametrize("name", OURS)
def test_a_backward_that_does_not_compile_is_its_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward has run by its kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    case, usual, tried = CASES[name], InterpretedFunction.warmup, list[str]()

    def warmup(self: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(self.fn.__name__)
        if "backward" in tried[-1]:
            raise RuntimeError("PassManager::run failed")
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "warmup", warmup)
    with pytest.warns(RuntimeWarning, match=f"{LINE}: RuntimeError.*its gradients are computed by their definition"):
        run(case, grad=True)
    assert any("backward" in x for x in tried) and any("backward" not in x for x in tried)
    with pytest.raises(xfcompile.RewriteError, match=f"compiling a kernel of {case.family.title} {LINE}"):
        run(case, grad=True, strict=True)


def test_a_backward_whose_text_cannot_be_made_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xfcompile.kernels.attention.backward.generate", fails)
    case = CASES["attention"]
    with pytest.warns(RuntimeWarning, match=f"{LINE}: KeyError: 'spoilt': its gradients are computed by"):
        run(case, grad=True)
    with pytest.raises(xfcompile.RewriteError, match=f"compiling a kernel of attention {LINE}"):
        run(case, grad=True, strict=True)


def test_lists_of_tiles_that_do_not_compile_have_every_tile(uncompilable: list[str]) -> None:
    from xfcompile.kernels.attention import blocks, lists
    from xfcompile.score import B, I, J, Load
    from xfcompile.site import MaskSpec, Operand

    document = Operand(torch.int64, 2)
    mask = MaskSpec(Load(0, B, I) - Load(0, B, J) >= 0, (), (document,), ())
    key, like = lists.prepare(mask), torch.zeros(1)
    operand = torch.arange(100).view(1, 100)
    with pytest.warns(RuntimeWarning, match="all tiles are visited"):
        made = lists.run(like, [operand], [], [], (1, 1, 100, 100), 32, 32, key)
    assert made[0, 0].tolist() == [[0, 0, 4, 3, 2, 1, 0]] * 4
    assert blocks.HEADER == 3


def freed(attempt: Callable[[Tensor], None]) -> bool:
    """Whether the tensors of several failed calls are gone after them."""
    seen = []
    for _ in range(3):
        x = torch.zeros(3)
        seen.append(weakref.ref(x))
        with pytest.raises(fit.NoTilesFit):
            attempt(x)
        del x
    gc.collect()
    return all(x() is None for x in seen)


def test_what_is_remembered_of_a_failure_keeps_no_tensors() -> None:
    known: dict[Any, Any] = {}

    def attempt(x: Tensor) -> None:
        def find() -> Any:
            raise fit.NoTilesFit(f"of {x.shape}")

        fit.remembered(known, ("kind",), lambda tiles: None, find, x, 1, "a kernel")

    assert freed(attempt)


def test_a_gated_mlp_without_tiles_keeps_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfcompile.kernels.gated_mlp import launch_triton, tiles

    def unfit(self: Any, tensors: list[Tensor]) -> Any:
        raise fit.NoTilesFit(f"of {len(tensors)} tensors")

    monkeypatch.setattr(launch_triton._Fitting, "_fitted", unfit)
    call = launch_triton._Fitting(None, lambda t: 1, tiles.INTERPRETED, [], {}, 16)
    assert freed(lambda x: call([x]))
