"""The backend: what it hands to Inductor, what it does with an error of its own, and what caches see of it."""

from __future__ import annotations

import ast
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import xfcompile
from xfcompile import Options, Report, SiteReport, explain, rewrite, xformers
from xfcompile.family import FROM_CPP

backend = importlib.import_module("xfcompile.backend")
identity = importlib.import_module("xfcompile.identity")

Rewriter = Callable[[fx.GraphModule, Sequence[Any], Options, Report, object], None]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 8, -1) @ v


def qkv(grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 17, 64, generator=generator, requires_grad=grad) for _ in range(3)]


@pytest.fixture
def rewriter(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rewriter], None]:
    """Puts another rewriter in the place of ours."""
    return lambda instead: monkeypatch.setattr(backend, "rewrite_graph", instead)


def spoil(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, report: Report, tuner: object) -> None:
    """A rewriter that fails after it has made the graph, and the graphs inside it, compute something else."""
    report.add(SiteReport(family="attention", matched=True, route="sdpa"))
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="output"):
                first = node.all_input_nodes[0]
                with module.graph.inserting_before(node):
                    node.replace_input_with(first, module.graph.call_function(torch.neg, (first,)))
            module.recompile()
    raise KeyError("spoilt")


# -- what goes in and out -----------------------------------------------------------------------------------------


def test_compiled_is_equal_to_eager_and_reported() -> None:
    q, k, v = qkv()
    with xfcompile.collect() as report:
        found = torch.compile(attention, backend=xformers)(q, k, v)
    torch.testing.assert_close(found, attention(q, k, v))
    assert report.summary() == "1 attention site: 1 matched (1 sdpa)"
    assert report.failures == []


def test_inductor_gets_the_mode_and_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # there, no site was tuned before
    patches: list[dict[str, Any]] = []

    def record(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
        patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", record)
    x = qkv()
    for arguments in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True, "strict": True}}):
        torch._dynamo.reset()
        torch.compile(attention, backend=xformers, **arguments)(*x)
    mine = [{k: v for k, v in p.items() if k != identity.FIELD} for p in patches]
    settings = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    # The mode also tunes sites, whose ways to run are compiled with the same settings before the graph itself.
    assert len(mine) == 4 and mine[:2] == [{**settings, "triton.cudagraphs": False}] * 2
    assert mine[2:] == [settings, {"max_autotune": True}]
    assert all(isinstance(p[identity.FIELD], identity.Identified) for p in patches[2:])


def test_an_unknown_option_reaches_the_user() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"unknown option 'route' \(did you mean 'routes'"):
        torch.compile(attention, backend=xformers, options={"route": {}})(*qkv())


def test_compiling_changes_no_setting_of_inductor() -> None:
    before = torch._inductor.config.get_config_copy()
    torch.compile(attention, backend=xformers, options={"max_autotune": False, "epilogue_fusion": False})(*qkv())
    assert torch._inductor.config.get_config_copy() == before


def test_families_can_be_switched_off() -> None:
    with xfcompile.collect() as report:
        torch.compile(attention, backend=xformers, options={"patterns": []})(*qkv())
    assert report.summary() == "no sites in 1 graph"


# -- errors of ours -----------------------------------------------------------------------------------------------


def test_an_error_of_ours_leaves_the_program_as_it_was(rewriter: Callable[[Rewriter], None]) -> None:
    rewriter(spoil)
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="KeyError: 'spoilt'.*strict"), xfcompile.collect() as report:
        found = torch.compile(attention, backend=xformers)(q, k, v)
    torch.testing.assert_close(found, attention(q, k, v))
    assert report.failures == ["rewriting a graph: KeyError: 'spoilt'"]
    assert report.sites == []


def test_an_error_of_ours_leaves_inner_graphs_as_they_were(rewriter: Callable[[Rewriter], None]) -> None:
    rewriter(spoil)
    q, k, v = qkv(grad=True)

    # No attention: Inductor's own pattern for it fails on checkpointed graphs (torch 2.13: "list index out of range").
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(q @ k.transpose(-2, -1)) @ v

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(program, q, k, v, use_reentrant=False)

    with pytest.warns(RuntimeWarning, match="spoilt"):
        found = torch.compile(checkpointed, backend=xformers)(q, k, v)
    gradients = torch.autograd.grad(found.sum(), (q, k, v))
    expected = program(q, k, v)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), (q, k, v)))


def test_strict_raises_it(rewriter: Callable[[Rewriter], None]) -> None:
    rewriter(spoil)
    with pytest.raises(BackendCompilerFailed, match="spoilt"):
        torch.compile(attention, backend=xformers, options={"strict": True})(*qkv())
    with pytest.raises(xfcompile.RewriteError, match="rewriting a graph: KeyError: 'spoilt'"):
        rewrite(fx.symbolic_trace(attention), qkv(), {"strict": True})


def test_the_warning_is_given_once(rewriter: Callable[[Rewriter], None]) -> None:
    rewriter(spoil)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(attention, backend=xformers)(*qkv())  # importing Inductor makes Python forget what it has shown
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(attention, backend=xformers)(*qkv())
    assert sum("spoilt" in str(w.message) for w in given) == 1


def test_a_site_that_failed_is_warned_of_too(rewriter: Callable[[Rewriter], None]) -> None:
    rewriter(lambda gm, inputs, options, report, tuner: report.failed("replacing attention", IndexError("i")))
    with pytest.warns(RuntimeWarning, match="replacing attention: IndexError: i"):
        rewrite(fx.symbolic_trace(attention), qkv())


# -- explain and rewrite ------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(17)

    def forward(self, x: Tensor) -> Tensor:
        return attention(x, x, self.norm(x))


def test_explain_says_what_and_where() -> None:
    report = explain(attention, *qkv())
    (site,) = report.sites
    assert (site.family, site.matched, site.route) == ("attention", True, "sdpa")
    assert site.source is not None
    assert site.source.startswith("test_backend.py:")
    assert site.expression == "s/8"


@pytest.mark.parametrize("train", [True, False])
def test_explain_takes_modules_in_either_mode(train: bool) -> None:
    module = Layer().train(train)
    report = explain(module, torch.randn(3, 17, 64))
    assert len(report.sites) == 1
    assert module.training is train


def test_explain_sees_every_graph() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(x, k, v)

    report = explain(broken, *qkv())
    assert report.graphs == 2
    assert len(report.sites) == 2


@pytest.mark.parametrize("breaks", [True, False])
def test_explain_is_not_deaf_to_what_was_compiled_before(breaks: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = attention(q, k, v)
        if breaks:
            torch._dynamo.graph_break()
        return x + 1

    compiled = torch.compile(program, backend=xformers)
    compiled(*qkv())
    for fn in (program, compiled, program):
        assert explain(fn, *qkv()).summary() == "1 attention site: 1 matched (1 sdpa)"


def test_explain_unwraps_a_compiled_module_and_leaves_it_compiled() -> None:
    x = torch.randn(3, 17, 64)
    compiled = torch.compile(Layer().eval(), backend=xformers)
    compiled(x)
    assert len(explain(compiled, x).sites) == 1
    with xfcompile.collect() as again:
        compiled(x)
    assert again.graphs == 0


def test_explain_can_be_asked_more_often_than_dynamo_recompiles() -> None:
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=2):
        found = [len(explain(attention, *qkv()).sites) for _ in range(4)]
    assert found == [1] * 4
    assert torch._dynamo.config.recompile_limit == limit


def test_a_site_is_reported_once_though_dynamo_traces_twice() -> None:
    """A scale that Dynamo takes for a symbol at first; Inductor has it trace again with the number."""
    calls = []

    def counted(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        calls.append(gm)
        return xformers(gm, inputs)

    def scaled(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    compiled = torch.compile(scaled, backend=counted, dynamic=True)
    for scale in (0.3, 0.4, 0.5):
        with xfcompile.collect() as report:
            found = compiled(*qkv(), scale)
        torch.testing.assert_close(found, scaled(*qkv(), scale))
        assert len(calls) > 1, "nothing was traced twice"
        assert (len(report.sites), report.graphs) == (1, 1)


def _sdp_settings() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("written", [False, True])
def test_backends_that_the_user_chose_are_left_alone(written: bool) -> None:
    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            out = attention(q, k, v) if written else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out + attention(k, q, v)

    before = _sdp_settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = explain(chosen, *qkv())
        found = torch.compile(chosen, backend=xformers)(*qkv())
    assert _sdp_settings() == before
    torch.testing.assert_close(found, chosen(*qkv()))
    inside, outside = report.sites
    assert inside.matched
    assert inside.route == ("inductor" if written else "sdpa")
    assert "sdpa_kernel" in str(inside.reason)
    assert (outside.matched, outside.route, outside.reason) == (True, "sdpa", None)


def test_a_process_without_a_math_backend_keeps_what_is_written_out() -> None:
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        warnings.simplefilter("ignore")
        report = explain(attention, *qkv())
    (site,) = report.sites
    assert site.route == "inductor"
    assert "math backend is switched off" in str(site.reason)


def test_explain_in_a_thread_hears_its_own_only() -> None:
    found: list[Report] = []
    with xfcompile.collect() as mine:
        thread = threading.Thread(target=lambda: found.append(explain(attention, *qkv())))
        thread.start()
        thread.join()
    assert len(found[0].sites) == 1
    assert mine.graphs == 0


def test_rewrite_works_in_place_on_an_exported_program() -> None:
    module = Layer().eval()
    x = torch.randn(3, 17, 64)
    gm = torch.export.export(module, (x,)).module()
    report = rewrite(gm, [x])
    assert report.summary() == "1 attention site: 1 matched (1 sdpa)"
    assert "softmax" not in gm.code
    torch.testing.assert_close(gm(x), module(x))


def test_rewrite_refuses_what_is_not_ours() -> None:
    with pytest.raises(ValueError, match="unknown option 'max_autotune'"):
        rewrite(fx.symbolic_trace(attention), qkv(), {"max_autotune": True})


# -- caches -------------------------------------------------------------------------------------------------------


@pytest.fixture
def caches() -> Iterator[Callable[[str, dict[str, Any]], tuple[int, int, int, int]]]:
    """Compiles with the package's hash being what is given; returns hits and misses of both caches."""

    def compile_with(package: str, options: dict[str, Any]) -> tuple[int, int, int, int]:
        torch._dynamo.reset()
        counters.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(identity, "package_hash", lambda: package)
            q, k, v = qkv(grad=True)
            torch.compile(attention, backend=xformers, options=options)(q, k, v).sum().backward()
        autograd, inductor = counters["aot_autograd"], counters["inductor"]
        return (
            autograd["autograd_cache_hit"],
            autograd["autograd_cache_miss"],
            inductor["fxgraph_cache_hit"],
            inductor["fxgraph_cache_miss"],
        )

    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        yield compile_with


def test_another_version_of_the_package_finds_nothing_in_the_caches(caches: Callable[..., tuple[int, ...]]) -> None:
    assert caches("one", {}) == (0, 1, 0, 2)
    assert caches("one", {}) == (1, 0, 2, 0)
    assert caches("two", {}) == (0, 1, 0, 2)
    assert caches("two", {"strict": True}) == (0, 1, 0, 2)
    assert caches("one", {}) == (1, 0, 2, 0)


def test_the_package_hash_sees_kernels_and_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(identity.os.path, "relpath", lambda path, root: seen.append(path) or path)
    identity.package_hash.cache_clear()
    assert len(identity.package_hash()) == 64
    identity.package_hash.cache_clear()
    for name in ("backend.py", "patterns/attention.py", "kernels/attention/op.py"):
        assert any(path.endswith(f"xfcompile/{name}") for path in seen)
    root = Path(identity.__file__).parent
    assert {Path(path) for path in seen} == {
        path for path in _sources(root) if path.relative_to(root).parts[0] not in identity.APART
    }


def _sources(root: Path) -> list[Path]:
    return [Path(f, n) for f, _, names in os.walk(root, followlinks=True) for n in names if n.endswith(".py")]


def test_nothing_that_compiles_imports_what_the_package_hash_leaves_out() -> None:
    """Only the command line does, and what is left out itself."""
    root = Path(identity.__file__).parent
    importing = set()
    for path in _sources(root):
        name = path.relative_to(root)
        for node in ast.walk(ast.parse(path.read_text())):
            module = ["xfcompile", *name.parts[:-1]]
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = [] if not node.level else module[: len(module) - node.level + 1]
                found = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = [node.value]  # for import_module, or a process of its own
            else:
                continue
            if any(f"xfcompile.{apart}" in x for x in found for apart in identity.APART):
                importing.add(name.parts[0])
    assert importing == {"__main__.py", *identity.APART}


class Counting(CustomGraphPass):
    def __init__(self, name: str | None) -> None:
        self.name = name
        self.calls = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> Any:
        return self.name


@pytest.mark.parametrize("globally", [True, False])
def test_the_users_own_pass_still_runs(globally: bool) -> None:
    mine = Counting("mine")
    options = {} if globally else {identity.FIELD: mine}
    patch = {identity.FIELD: mine} if globally else {}
    with fresh_cache(), torch._inductor.config.patch(patch):
        torch.compile(attention, backend=xformers, options=options)(*qkv())
    assert mine.calls == 1


def test_a_pass_without_a_name_is_not_cached() -> None:
    assert identity.identified({}, "f")[identity.FIELD].uuid() == ("xfcompile", f"{identity.package_hash()} f")
    for passes, known in ((Counting("a"), True), ([Counting("a"), Counting("b")], True), (Counting(None), False)):
        uuid = identity.identified({identity.FIELD: passes}, "f")[identity.FIELD].uuid()
        assert (uuid is not None) is known
    assert identity.identified({identity.FIELD: lambda graph: None}, "f")[identity.FIELD].uuid() is None


def _biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).softmax(-1) @ v


def _dropped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.dropout(F.gelu(F.linear(x, weight, bias)), 0.1)


@pytest.mark.parametrize("cpp", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("fn", "family", "shapes"),
    [
        (_biased_attention, "attention", [(1, 2, 9, 8)] * 3 + [(2, 9, 9)]),
        (_dropped, "bias-act-dropout", [(9, 8), (16, 8), (16,)]),
    ],
)
def test_gradients_in_lists_are_not_for_a_wrapper_in_cpp(
    fn: Callable[..., Tensor],
    family: str,
    shapes: list[tuple[int, ...]],
    training: bool,
    cpp: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found: list[tuple[str | None, str | None]] = []

    def planned(gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        with torch._inductor.config.patch(cpp_wrapper=cpp):
            report = rewrite(gm, examples, {"routes": {family: "triton"}, "strict": True})
        found.extend((s.route, s.reason) for s in report.sites)
        return gm.forward

    inputs = [torch.randn(s, requires_grad=training) for s in shapes]
    torch.compile(fn, backend=planned)(*inputs)
    declined = cpp and training
    assert found == [("inductor", FROM_CPP) if declined else ("triton", "asked for")]


@pytest.mark.slow
def test_a_training_step_with_a_wrapper_in_cpp() -> None:
    inputs = [torch.randn(s, requires_grad=True) for s in [(1, 2, 9, 8)] * 3 + [(2, 9, 9)]]
    compiled = torch.compile(_biased_attention, backend="xformers", options={"cpp_wrapper": True, "strict": True})
    found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for mine, theirs in zip(found, torch.autograd.grad(_biased_attention(*inputs).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
