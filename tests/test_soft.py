"""An error of ours, wherever it is, leaves the program as it was and is told once; `strict` names the user's line."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

import xfcompile
from xfcompile import Report
from xfcompile.kernels.attention import cache

families = importlib.import_module("xfcompile.families")
rewriting = importlib.import_module("xfcompile.rewrite")
attention_family = importlib.import_module("xfcompile.families.attention")


def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 8, -1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (20 * torch.tanh(q @ k.mT / 160)).softmax(-1) @ v


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(lambda q: program(q, k, v) + q, q, use_reentrant=False)


def qkv(grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 17, 64, generator=generator, requires_grad=grad) for _ in range(3)]


def fails(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("spoilt")


def run(fn: Callable[..., Any], **options: Any) -> tuple[Report, str]:
    """The report and the graph of a program that was compared with eager, through the graph alone."""
    reports, code = [], []

    def backend(gm: fx.GraphModule, examples: Any) -> Any:
        reports.append(xfcompile.rewrite(gm, examples, options))
        code.append("\n".join(m.code for m in gm.modules() if isinstance(m, fx.GraphModule)))
        return torch._dynamo.lookup_backend("aot_eager")(gm, examples)

    mine, theirs = qkv(True), qkv(True)
    found, expected = torch.compile(fn, backend=backend, fullgraph=True)(*mine), fn(*theirs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), mine), torch.autograd.grad(expected.sum(), theirs))
    return reports[0], code[0]


Spoil = Callable[[pytest.MonkeyPatch], None]


def at(module: str, name: str, spoilt: Callable[..., Any] = fails) -> Spoil:
    return lambda patch: patch.setattr(importlib.import_module(module), name, spoilt)


def reading(patch: pytest.MonkeyPatch) -> None:
    """No node can be traced, of which nothing is known."""
    patch.setattr("xfcompile.programs.trace", fails)
    patch.setattr("xfcompile.programs._OF_PYTORCH", {})


def part(name: str) -> Spoil:
    """One of the functions of the attention family fails."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        changed: Any = {name: fails}
        patch.setattr(families, "FAMILIES", (replace(families.ATTENTION, **changed),))

    return spoil


LINE = r"at test_soft.py:[0-9]+"
STAGES: dict[str, tuple[Spoil, str]] = {
    "reading a node": (reading, rf"reading \w+ {LINE}"),
    "reading a graph": (at("xfcompile.read", "Values"), "rewriting a graph"),
    "anchors": (part("anchors"), "looking for attention"),
    "matching": (part("match"), f"looking for attention {LINE}"),
    "the mathematics of matching": (at("xfcompile.patterns.attention", "separate"), f"looking for attention {LINE}"),
    "at a node": (part("at_node"), f"looking for attention {LINE}"),
    "planning": (part("plan"), f"planning attention {LINE}"),
    "the table of routes": (at("xfcompile.families.attention", "choose"), f"planning attention {LINE}"),
    "replacing": (part("replace"), f"replacing attention {LINE}"),
    "laying out": (at("xfcompile.replace", "with_layout"), f"replacing attention {LINE}"),
    "cleaning up": (at("xfcompile.rewrite", "erase_orphans"), "rewriting a graph"),
    "spelling out": (at("xfcompile.rewrite", "unfold"), "rewriting a graph"),
}


@pytest.mark.parametrize("fn", [program, checkpointed])
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_leaves_the_program_as_it_was(
    stage: str, fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, words = STAGES[stage]
    spoil(monkeypatch)
    with pytest.warns(RuntimeWarning, match=rf"{words}.*: KeyError: 'spoilt'") as given:
        report, code = run(fn)
    assert sum("spoilt" in str(w.message) for w in given) == 1
    assert len(report.failures) == 1 and "KeyError: 'spoilt'" in report.failures[0]
    assert "KeyError: 'spoilt'" in report.render(200)
    assert "softmax" in code and "scaled_dot_product" not in code
    assert not any(site.replaced for site in report.sites)


@pytest.mark.parametrize("stage", STAGES)
def test_strict_raises_it_with_the_users_line(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, words = STAGES[stage]
    spoil(monkeypatch)
    with pytest.raises(Exception, match=rf"{words}.*: KeyError: 'spoilt'") as raised:
        run(program, strict=True)
    assert "RewriteError" in str(raised.value)
    torch._dynamo.reset()
    with pytest.raises(xfcompile.RewriteError, match=words.split(" at ")[0]) as bare:
        xfcompile.rewrite(torch.export.export(Program(), tuple(qkv())).module(), qkv(), {"strict": True})
    assert isinstance(bare.value.__cause__, KeyError | xfcompile.RewriteError)


class Program(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return program(q, k, v)


def test_words_that_fail_cost_only_words(monkeypatch: pytest.MonkeyPatch) -> None:
    part("words")(monkeypatch)
    with pytest.warns(RuntimeWarning, match=rf"describing attention {LINE}: KeyError"):
        report, code = run(program)
    (site,) = report.sites
    assert (site.route, site.expression) == ("sdpa", None)
    assert "scaled_dot_product" in code


@pytest.mark.parametrize("name", ["anchors", "match", "at_node", "plan", "replace", "words"])
def test_one_family_that_fails_costs_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: Any = {"name": "another", name: fails}
    another = replace(families.ATTENTION, **changed)
    monkeypatch.setattr(families, "FAMILIES", (another, families.ATTENTION))
    with pytest.warns(RuntimeWarning, match=r"another.*KeyError: 'spoilt'"):
        report, code = run(program)
    assert code.count("scaled_dot_product_attention(") == 1
    taken = "another" if name == "words" else "attention"
    assert [s.family for s in report.sites if s.route == "sdpa"] == [taken]


def test_one_site_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def sometimes(reading: Any, candidate: Any, setting: Any) -> Any:
        if candidate.node.meta["example_value"].shape[-2] == 5:
            raise KeyError("spoilt")
        return families.ATTENTION.plan(reading, candidate, setting)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return program(q[:, :, :5], k, v).sum() + program(q, k, v)

    monkeypatch.setattr(families, "FAMILIES", (replace(families.ATTENTION, plan=sometimes),))
    with pytest.warns(RuntimeWarning, match="planning attention"):
        report, code = run(both)
    assert [s.route for s in report.sites] == ["inductor", "sdpa"]
    assert code.count("scaled_dot_product_attention(") == 1 and code.count("torch.softmax(") == 1


# -- the next route -----------------------------------------------------------------------------------------------


def test_a_route_that_fails_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_first(reading: Any, candidate: Any, setting: Any) -> Any:
        if setting.routes:
            return families.ATTENTION.plan(reading, candidate, setting)
        found = families.ATTENTION.plan(reading, candidate, replace(setting, routes={"attention": "triton"}))
        assert found.route.name == "triton"
        return found

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(families, "FAMILIES", (replace(families.ATTENTION, plan=kernel_first),))
    assert "xfcompile.attention" in run(program)[1]

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(3):
            q = program(q, k, v)
        return q

    torch._dynamo.reset()
    monkeypatch.setattr("xfcompile.kernels.attention.prepare", fails)
    with pytest.warns(RuntimeWarning, match=rf"replacing attention {LINE}: KeyError: 'spoilt'"):
        report, code = run(layers)
    reason = "triton failed: an error of xfcompile: KeyError: 'spoilt'"
    assert [(s.route, s.reason) for s in report.sites] == [("sdpa", reason)] * 3
    assert len(report.failures) == 1
    assert "scaled_dot_product" in code and "softmax" not in code
    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="spoilt"):
        report, code = run(capped)  # SDPA cannot say it
    assert [s.route for s in report.sites] == ["inductor"]
    assert "softmax" in code


def test_a_route_that_the_user_asked_for_is_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("xfcompile.kernels.attention.prepare", fails)
    with pytest.warns(RuntimeWarning, match="spoilt"):
        report, code = run(program, routes={"attention": "triton"})
    assert [s.route for s in report.sites] == ["inductor"]
    assert "scaled_dot" not in code


def test_a_device_without_the_kernel_takes_another_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("xfcompile.kernels.attention.supports", lambda *args: "this device is too old")
    report, _ = run(program, routes={"attention": "triton"})
    assert report.failures == []
    assert [s.route for s in report.sites] == ["inductor"]
    assert "too old" in str(report.sites[0].reason)


def test_tiles_that_need_too_much_memory_give_way_to_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from xfcompile.kernels.attention import fit
    from xfcompile.kernels.attention.tiles import Tiles

    monkeypatch.setattr(fit, "fits_twice", lambda *args: True)
    tried = []

    class Made:
        n_spills = 0

        class metadata:
            shared = 0

    def launch(tiles: Tiles) -> Any:
        tried.append(tiles)
        if tiles.block_m > 32:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return Made

    sizes = [Tiles(block_m=m, block_n=32, num_warps=4, num_stages=2) for m in (128, 64, 32, 16)]
    assert fit.launch(launch, fit.Candidates(sizes[:2], sizes[2:]), torch.empty(0), 64) is sizes[2]
    assert tried == sizes[:3]


# -- compilation --------------------------------------------------------------------------------------------------


def test_what_inductor_refuses_is_compiled_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def compile_fx(gm: fx.GraphModule, inputs: Any, config_patches: Any) -> Callable[..., Any]:
        given.append(gm.code)
        if "scaled_dot_product" in gm.code:
            raise KeyError("spoilt")
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    with pytest.warns(RuntimeWarning, match="compiling a rewritten graph: KeyError"), xfcompile.collect() as report:
        found = torch.compile(program, backend=xfcompile.xformers)(*qkv())
    torch.testing.assert_close(found, program(*qkv()))
    assert len(given) == 2 and "softmax" in given[1]
    assert report.sites == [] and len(report.failures) == 1
    torch._dynamo.reset()
    with pytest.raises(Exception, match="spoilt"):
        torch.compile(program, backend=xfcompile.xformers, options={"strict": True})(*qkv())


def test_what_inductor_refuses_without_us_is_an_error_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(Exception, match="spoilt"):
            torch.compile(program, backend=xfcompile.xformers)(*qkv())


# -- the cache folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has prepared no kernel."""
    from xfcompile.kernels.attention import programs

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for cached in (programs.prepare, cache._private_directory):
        getattr(cached, "cache_clear", lambda: None)()
    yield tmp_path
    cache._private_directory.cache_clear()


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_full_disk_moves_kernels_to_a_temporary_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = cache.tempfile.mkstemp

    def full_there(*args: Any, dir: Any = None, **kwargs: Any) -> Any:
        return full() if Path(dir).is_relative_to(folder) else make(*args, dir=dir, **kwargs)

    monkeypatch.setattr(cache.tempfile, "mkstemp", full_there)

    def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (19 * torch.tanh(q @ k.mT / 161)).softmax(-1) @ v

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report, _ = run(shifted, routes={"attention": "triton"})
    assert [s.route for s in report.sites] == ["triton"]
    assert list(folder.rglob("attention_*")) == []


def test_a_machine_without_any_space_is_left_to_inductor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.tempfile, "mkstemp", full)
    monkeypatch.setattr(cache.tempfile, "mkdtemp", full)

    def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (18 * torch.tanh(q @ k.mT / 162)).softmax(-1) @ v

    with pytest.warns(RuntimeWarning, match="No space left on device"):
        report, _ = run(shifted, routes={"attention": "triton"})
    assert [s.route for s in report.sites] == ["inductor"]


STORING = """
import sys, time
from xfcompile.kernels.attention import cache
time.sleep(max(0, float(sys.argv[1]) - time.time()))
for n in range(200):
    source = f"# text {n}\\n" * 50
    path = cache.store(source)
    assert path.read_text() == source, path
    assert cache.find(cache.key_of(source)) == source
"""


def test_two_processes_write_the_same_kernels_at_once(folder: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", STORING, str(time.time() + 4)]
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    files = sorted(p.name for p in (folder / "xfcompile").iterdir())
    assert len(files) == 200 and all(name.endswith(".py") for name in files)
