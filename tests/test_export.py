"""Exported programs: rewritten in place they stay exported programs, which run, are saved and are loaded elsewhere."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fresh import forget
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram, export

import xfcompile
from xfcompile.aten import is_exported


class Layer(nn.Module):
    """Causal attention and a gated MLP; `window` is a buffer, the mask is made of positions and data."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.window: Tensor
        self.register_buffer("window", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 32)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        i = torch.arange(x.shape[1])
        keep = (i[:, None] >= i) & (i[:, None] - i < self.window)
        weights = (q @ k.mT / 5.6).masked_fill(~keep, float("-inf")).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Called(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Any:
        return self.fn(*args)


def qkv(length: int = 17) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, length, 64, generator=generator) for _ in range(3))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 8, -1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (20 * torch.tanh(q @ k.mT / 160)).softmax(-1) @ v


def two(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    out = attention(q, k, v)
    return {"first": out, "second": attention(out, k, v), "third": out + 1}


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    scores = q @ k.mT / 8 + slopes * (i - i[:, None])
    scores = scores.masked_fill(i > i[:, None], torch.finfo(torch.float32).min)
    return scores.softmax(-1) @ v


def without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        x = attention(q, k, v)
    return x * 2


def cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A tensor of the caller's is written into, which becomes a result of the graph."""
    k[:, :, :3] = q[:, :, :3]
    return attention(q, k, v)


def rewritten(module: nn.Module, args: tuple[Tensor, ...], **options: Any) -> tuple[ExportedProgram, xfcompile.Report]:
    program = export(module, args)
    return program, xfcompile.rewrite(program.graph_module, args, {"strict": True, **options})


def check(program: ExportedProgram, module: nn.Module, *args: Tensor) -> None:
    """It is still an exported program, and computes what the module does, also after it was saved and loaded."""
    program.validate()
    assert all(is_exported(gm.graph) for gm in program.graph_module.modules() if isinstance(gm, torch.fx.GraphModule))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    expected = module(*[x.clone() for x in args])
    for again in (program, torch.export.load(file), program.run_decompositions()):
        torch.testing.assert_close(again.module()(*[x.clone() for x in args]), expected)


@pytest.mark.parametrize("fn", [attention, two, biased, without_gradients, cached])
def test_a_rewritten_program_is_still_one(fn: Callable[..., Any]) -> None:
    program, report = rewritten(Called(fn), qkv())
    assert report.sites and all(site.route == "sdpa" for site in report.sites)
    names = [str(node.target) for gm in program.graph_module.modules() for node in gm.graph.nodes]  # type: ignore
    assert any("scaled_dot_product_attention" in name for name in names)
    assert not any("softmax" in name for name in names)
    check(program, Called(fn), *qkv())


def test_results_keep_their_names() -> None:
    before = export(Called(two), qkv()).graph_signature.user_outputs
    program, _ = rewritten(Called(two), qkv())
    (output,) = program.graph.find_nodes(op="output")
    assert tuple(node.name for node in output.all_input_nodes) == tuple(before)


@pytest.mark.parametrize("fn", [attention, capped, biased])
def test_our_own_kernel_in_an_exported_program(fn: Callable[..., Any]) -> None:
    program, report = rewritten(Called(fn), qkv(), routes={"attention": "triton"})
    # Without Triton's interpreter there is nothing on a CPU that could run it.
    assert [site.route for site in report.sites] == ["inductor"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        program, report = rewritten(Called(fn), qkv(), routes={"attention": "triton"})
        assert [site.route for site in report.sites] == ["triton"]
        check(program, Called(fn), *qkv())


def test_lengths_stay_symbols() -> None:
    layer, x = Layer().eval(), torch.randn(2, 9, 64)
    program = export(layer, (x,), dynamic_shapes=({1: Dim("n", min=2, max=64)},))
    report = xfcompile.rewrite(program.graph_module, (x,), {"strict": True})
    assert [site.route for site in report.sites if site.family == "attention"] == ["sdpa"]
    check(program, layer, x)
    torch.testing.assert_close(program.module()(x[:, :5]), layer(x[:, :5]))


def test_gradients_flow_through_a_loaded_program() -> None:
    layer, x = Layer(), torch.randn(2, 9, 64)
    program, _ = rewritten(layer, (x,))
    module = program.module()
    found = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    theirs = dict(layer.named_parameters())
    expected = torch.autograd.grad(layer(x).sum(), [theirs[name] for name in names])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_a_linear_and_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says of an exported program whether its gradients will be wanted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer = nn.Sequential(nn.Linear(8, 12), nn.GELU())
    x = torch.randn(3, 8, requires_grad=True)
    program = export(layer, (x,))
    options = {"routes": {"bias-act-dropout": "epilogue"}, "strict": True}
    report = xfcompile.rewrite(program.graph_module, (x,), options)
    assert [site.route for site in report.sites] == ["epilogue"]
    module = program.module()
    names = [name for name, _ in module.named_parameters()]
    found = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    theirs = dict(layer.named_parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *(theirs[name] for name in names)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


class Padded(nn.Module):
    """Rows of padding see no key, under a mask that is added: gradients go through their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        scores = self.q(x) @ x.mT * 0.25 + torch.where(keep, 0.0, torch.finfo(torch.float32).min)
        return scores.softmax(-1) @ x


@pytest.mark.parametrize("how", ["exported", "traced"])
def test_gradients_of_rows_without_keys(how: str) -> None:
    torch.manual_seed(0)
    layer, x = Padded(), torch.randn(2, 3, 5, 16)
    keep = torch.rand(2, 1, 5, 5) > 0.3
    keep[0, :, 2] = False
    expected = torch.autograd.grad(layer(x, keep).square().sum(), list(layer.parameters()))
    program = export(layer, (x, keep)) if how == "exported" else None
    gm = torch.fx.symbolic_trace(layer) if program is None else program.graph_module
    (site,) = xfcompile.rewrite(gm, (x, keep), {"strict": True}).sites
    assert site.route == "inductor" and "send gradients" in (site.reason or "")
    module = gm if program is None else program.module()
    found = torch.autograd.grad(module(x, keep).square().sum(), list(module.parameters()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_is_rewritten_where_gradients_are_off_is_for_inference() -> None:
    layer, x, keep = Padded(), torch.randn(2, 3, 5, 16), torch.rand(2, 1, 5, 5) > 0.3
    program = export(layer, (x, keep))
    with torch.no_grad():
        (site,) = xfcompile.rewrite(program.graph_module, (x, keep), {"strict": True}).sites
    assert site.route == "sdpa"


def test_an_error_leaves_an_exported_program_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xfcompile.aten._as_operators", lambda reading, node: None)
    program = export(Called(attention), qkv())
    with pytest.warns(RuntimeWarning, match="cannot be written with operators"):
        report = xfcompile.rewrite(program.graph_module, qkv())
    assert report.sites == [] and "softmax" in program.graph_module.code
    check(program, Called(attention), *qkv())


def test_graphs_of_other_kinds_are_not_spelt_out() -> None:
    gm = torch.fx.symbolic_trace(attention)
    assert not is_exported(gm.graph)
    xfcompile.rewrite(gm, qkv())
    assert "nn_functional.scaled_dot_product_attention" in gm.code.replace("torch._C._nn", "nn_functional")


def test_a_loaded_program_is_compiled_like_any_other() -> None:
    program, _ = rewritten(Called(attention), qkv())
    with xfcompile.collect() as report:
        found = torch.compile(program.module(), backend=xfcompile.xformers)(*qkv())
    torch.testing.assert_close(found, attention(*qkv()))
    assert [site.reason for site in report.sites] == ["as it was: SDPA is told all there is to tell"]


LOADING = """
import sys
import torch
import xfcompile.kernels.attention

x = torch.load(sys.argv[2])
torch.save(torch.export.load(sys.argv[1]).module()(*x), sys.argv[3])
"""


def test_another_process_loads_what_was_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operators find their kernels in the cache folder, by the name that stands in the program."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))

    def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (19 * torch.tanh(q @ k.mT / 123)).softmax(-1) @ v

    program, _ = rewritten(Called(shifted), qkv(), routes={"attention": "triton"})
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(qkv(), tmp_path / "x.pt")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    files = [str(tmp_path / name) for name in ("program.pt2", "x.pt", "y.pt")]

    def load() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", LOADING, *files], env=env, capture_output=True, text=True)

    done = load()
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), shifted(*qkv()), atol=1e-5, rtol=1e-4)
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "elsewhere")
    done = load()
    assert "no kernel" in done.stderr and "was prepared in this process and none is stored" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_with_sdpa_is_packaged_ahead_of_time(dynamic: bool, tmp_path: Path) -> None:
    layer, x = Layer().eval(), torch.randn(2, 9, 64)
    with torch.no_grad():
        program = export(layer, (x,), dynamic_shapes=({1: Dim("n", min=2, max=64)},) if dynamic else None)
        xfcompile.rewrite(program.graph_module, (x,), {"strict": True})
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        found = torch._inductor.aoti_load_package(path)(x)
        torch.testing.assert_close(found, layer(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.down(F.silu(self.gate(x)) * self.up(x))) + x


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With lengths, a number and a tensor among what its kernel is given."""
    n = q.shape[2]
    i = torch.arange(n)
    scores = (q @ k.mT / 8 + v[..., :1].mT).masked_fill((i[:, None] - i).abs() > n // 2, float("-inf"))
    return scores.softmax(-1) @ v


def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With lists of tiles, a node of their own."""
    document = torch.arange(q.shape[2]) // 3
    return (q @ k.mT / 8).masked_fill(document[:, None] != document, float("-inf")).softmax(-1) @ v


PACKAGED: dict[str, tuple[nn.Module, tuple[Tensor, ...], Any]] = {
    "attention": (Called(attention), qkv(), None),
    "window": (Called(window), qkv(), ({2: Dim("n", min=2, max=64)},) * 3),
    "documents": (Called(documents), qkv(), None),
    "gated MLP and activation": (Gated(), (torch.randn(5, 16),), ({0: Dim("rows", min=2, max=64)},)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGED)
def test_a_program_with_our_kernels_is_packaged_ahead_of_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch 2.13 packages hand None to operators in place of empty lists. Another process runs it, which imports the
    operators and finds the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    module, x, shapes = PACKAGED[name]
    wanted = {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": "epilogue"}
    with torch.no_grad():
        program = export(module, x, dynamic_shapes=(shapes,) if isinstance(module, Called) and shapes else shapes)
        report = xfcompile.rewrite(program.graph_module, x, {"strict": True, "routes": wanted})
        assert report.sites and all(site.route == wanted[site.family] for site in report.sites)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*x), module(*x), atol=1e-5, rtol=1e-4)
        torch.save(x, tmp_path / "x.pt")
        code = """
import sys
import torch
import xfcompile.kernels.attention, xfcompile.kernels.bias_act_dropout, xfcompile.kernels.gated_mlp
torch.save(torch._inductor.aoti_load_package(sys.argv[1])(*torch.load(sys.argv[2])), sys.argv[3])
"""
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        files = [str(tmp_path / name) for name in ("program.pt2", "x.pt", "y.pt")]
        done = subprocess.run([sys.executable, "-c", code, *files], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), module(*x), atol=1e-5, rtol=1e-4)


def test_operators_take_none_for_an_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    import sympy

    from xfcompile.activation import X
    from xfcompile.kernels import attention as kernels
    from xfcompile.kernels import bias_act_dropout as activations
    from xfcompile.score import S
    from xfcompile.site import ScoreSpec

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    key, formula = kernels.prepare(ScoreSpec(S / 8)), activations.text_of(X * sympy.tanh(X))
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))

    def computed(lists: Any) -> list[Tensor]:
        q, k, v = (x.requires_grad_() for x in qkv())
        out = kernels.attention(q, k, v, lists, lists, lists, key)[0]
        out = activations.bias_act_dropout(out, None, lists, lists, None, 0, formula, 0.0, torch.float32, False)
        out = activations.linear_act_dropout(
            out, weight, None, lists, lists, None, 0, formula, 0.0, torch.float32, True
        )[0]
        return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]

    torch.testing.assert_close(computed(None), computed([]), atol=0, rtol=0)


@pytest.mark.parametrize("place", ["val", "example_value"])
def test_what_sdpa_refuses_on_gpus_is_copied_whoever_made_the_graph(place: str) -> None:
    """Rows that do not begin at multiples of 16 bytes, and masks whose neighbouring keys are apart."""
    from xfcompile import replace

    class Copies:
        def call(self, *about: object, **more: object) -> str:
            return "copied"

    def on_gpu(x: Tensor) -> Tensor:
        return FakeTensor(FakeTensorMode(), x, torch.device("cuda", 0))

    node = torch.fx.Graph().placeholder("x")
    rows = torch.empty(2, 4, 6, 40, device="meta", dtype=torch.bfloat16)
    node.meta[place] = on_gpu(rows[..., 1:33])
    assert replace._aligned(Copies(), node) == "copied"  # type: ignore[arg-type, comparison-overlap]
    node.meta[place] = on_gpu(rows[..., :32])
    assert replace._aligned(Copies(), node) is node  # type: ignore[arg-type]
    node.meta[place] = on_gpu(rows.mT)
    assert replace._dense(Copies(), node) == "copied"  # type: ignore[arg-type, comparison-overlap]
