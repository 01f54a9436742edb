"""Families of other packages: found, reported, switched off and cached as ours are, without a line of this package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import xfcompile
from xfcompile import Options, extension, identity

EXAMPLE = Path(__file__).parents[1] / "examples" / "extension.py"
NAMES = itertools.count()


def imported(path: Path) -> ModuleType:
    """A file as a module of its own."""
    name = f"extension_{next(NAMES)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = imported(EXAMPLE)


@pytest.fixture
def registered() -> Iterator[Any]:
    yield xfcompile.register_family(example.FAMILY)
    xfcompile.unregister_family("add_rms_norm")


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *(shape or (3, 5, 16)), generator=generator)
    return x, residual


def run(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[xfcompile.Report, str]:
    """The report and the graph of a program that was compared with eager."""
    reports, code = [], []

    def backend(gm: Any, examples: Any) -> Any:
        reports.append(xfcompile.rewrite(gm, examples, {"strict": True, **options}))
        code.append(gm.code)
        return gm

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fn, backend=backend, fullgraph=True)(*args), fn(*args))
    return reports[0], code[0]


def norms(report: xfcompile.Report) -> list[xfcompile.SiteReport]:
    """What it says of the example; a linear with its bias may be a site of another family."""
    return [site for site in report.sites if site.family == "add_rms_norm"]


# -- the example --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
def test_the_example_is_matched_and_right() -> None:
    block = example.Block(16)
    with torch.no_grad():
        report, code = run(block, *inputs())
        assert "1 add_rms_norm site: 1 matched (1 fused)" in report.summary()
        assert "example.add_rms_norm" in code and "rsqrt" not in code
        verified = xfcompile.verify(block, *inputs())
        found = torch.compile(block, backend=xfcompile.xformers)(*inputs())
        torch.testing.assert_close(found, block(*inputs()))
    assert [check.ok for check in verified.checks] == [True]
    report, code = run(block, *inputs())
    assert [(s.route, s.reason) for s in norms(report)] == [("inductor", "the op has no backward")]
    assert "rsqrt" in code


WEIGHT = torch.rand(16)


def normed(h: Tensor, dim: int = -1, weight: Tensor = WEIGHT, other: Tensor | None = None) -> Tensor:
    return (h if other is None else other) * torch.rsqrt(h.pow(2).mean(dim, keepdim=True) + 1e-6) * weight


NEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another axis": lambda x, r: normed(x + r, 1),
    "two axes": lambda x, r: (x + r) * torch.rsqrt((x + r).pow(2).mean((-1, -2), keepdim=True) + 1e-6) * WEIGHT,
    "a weight of one element": lambda x, r: normed(x + r, weight=WEIGHT[:1]),
    "a weight of every position": lambda x, r: normed(x + r, weight=x),
    "another tensor is scaled": lambda x, r: normed(x + r, other=x),
    "a third power": lambda x, r: (x + r) * torch.rsqrt((x + r).pow(3).mean(-1, keepdim=True).abs() + 1e-6) * WEIGHT,
    "a sum with a factor": lambda x, r: normed(torch.add(x, r, alpha=2)),
    "a residual that is broadcast": lambda x, r: normed(x + r[:1]),
    "a number for a residual": lambda x, r: normed(x + 1.0),
    "an epsilon that is data": lambda x, r: (
        (x + r) * torch.rsqrt((x + r).pow(2).mean(-1, keepdim=True) + r[..., :1].abs()) * WEIGHT
    ),
    "a mean in fp64": lambda x, r: (
        (x + r) * torch.rsqrt((x + r).pow(2).mean(-1, keepdim=True, dtype=torch.float64) + 1e-6).float() * WEIGHT
    ),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", NEAR)
def test_what_is_not_quite_the_example_is_left(name: str) -> None:
    report, code = run(NEAR[name], *inputs())
    assert "add_rms_norm" not in code
    assert not any(site.replaced for site in report.sites)


@pytest.mark.usefixtures("registered")
def test_square_sizes_do_not_confuse_it() -> None:
    assert "add_rms_norm" in run(lambda x, r: normed(x + r), *inputs(16, 16))[1]
    assert "add_rms_norm" not in run(lambda x, r: normed(x + r, -2), *inputs(16, 16))[1]
    assert "add_rms_norm" not in run(lambda x, r: normed(x + r, weight=WEIGHT[:, None]), *inputs(16, 16))[1]


@pytest.mark.usefixtures("registered")
def test_it_is_beside_attention_in_one_graph() -> None:
    def layer(x: Tensor, r: Tensor) -> Tensor:
        h = normed(x + r)
        return x + r + torch.softmax(h @ h.mT / 4, -1) @ h

    report, code = run(layer, *inputs())
    assert [(s.family, s.route) for s in report.sites] == [("attention", "sdpa"), ("add_rms_norm", "fused")]
    assert "add_rms_norm" in code and "scaled_dot_product" in code


# -- registering ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
def test_options_know_it() -> None:
    program = example.Block(16)
    assert "add_rms_norm" in Options().patterns
    with torch.no_grad():
        assert run(program, *inputs(), patterns=["attention"])[0].sites == []
        assert run(program, *inputs(), patterns=["add_rms_norm"])[0].sites[0].route == "fused"
        left = norms(run(program, *inputs(), routes={"add_rms_norm": "inductor"})[0])
        assert [s.route for s in left] == ["inductor"]
    with pytest.raises(ValueError, match="add_rms_norm has no route 'triton'; its routes are 'fused', 'inductor'"):
        Options(routes={"add_rms_norm": "triton"})


def test_what_is_not_registered_is_not_known() -> None:
    with torch.no_grad():
        assert norms(run(example.Block(16), *inputs())[0]) == []
    with pytest.raises(ValueError, match="unknown family 'add_rms_norm'"):
        Options(patterns=frozenset({"add_rms_norm"}))
    with pytest.raises(KeyError):
        xfcompile.unregister_family("add_rms_norm")


def test_a_family_is_checked_when_it_is_registered() -> None:
    for wrong, words in [
        (example, "takes an xfcompile.Family, not module"),
        (replace(example.FAMILY, name="attention"), "has a family 'attention' of its own"),
        (replace(example.FAMILY, name="rms norm"), "has to be a word"),
        (replace(example.FAMILY, routes=("fused",)), "needs a route 'inductor'"),
    ]:
        with pytest.raises(ValueError, match=words):
            xfcompile.register_family(wrong)
    assert extension.registered() == ()


@pytest.mark.usefixtures("registered")
def test_a_name_that_is_registered_again_is_the_new_one() -> None:
    xfcompile.register_family(replace(example.FAMILY, routes=("fused", "other", "inductor")))
    assert len(extension.registered()) == 1
    Options(routes={"add_rms_norm": "other"})


class Point:
    """An entry point, of a package that is installed or broken."""

    value = "somewhere:FAMILY"

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.load = name, load


def test_installed_families_are_found_by_their_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point("broken", lambda: importlib.import_module("no_such_module")), Point("good", lambda: example.FAMILY)]

    def entry_points(*, group: str) -> list[Point]:
        assert group == "xfcompile.families"
        return points

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    extension._installed.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"family broken \(somewhere:FAMILY\) cannot be loaded: ModuleNotFound"):
            assert "add_rms_norm" in Options().patterns
    finally:
        xfcompile.unregister_family("add_rms_norm")
    assert "add_rms_norm" not in Options().patterns


# -- identity -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Callable[[str], xfcompile.Family[Any, Any]]]:
    """The example as a file of its own, with a line added; its op is the one that is there already."""
    source = EXAMPLE.read_text()
    begin, end = source.index("@torch.library.custom_op"), source.index("@dataclass")
    file = tmp_path / "someone.py"

    def written(line: str) -> xfcompile.Family[Any, Any]:
        file.write_text(source[:begin] + source[end:] + line)
        family: xfcompile.Family[Any, Any] = imported(file).FAMILY
        return family

    yield written
    for family in extension.registered():
        xfcompile.unregister_family(family.name)


def test_sources_are_part_of_the_identity(copied: Callable[[str], Any], tmp_path: Path) -> None:
    before = Options().fingerprint()
    found = []
    for line in ("", "# another\n", ""):
        xfcompile.register_family(copied(line))
        found.append(Options().fingerprint())
        assert Options(patterns=frozenset({"attention"})).fingerprint() == before.replace(  # type: ignore[union-attr]
            str(sorted(Options().patterns - {"add_rms_norm"})), "['attention']"
        )
    assert found[0] == found[2] != found[1]
    assert before not in found
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for text in ("1", "2"):
        (kernels / "norm.py").write_text(text)
        xfcompile.register_family(copied(""), sources=[kernels])
        found.append(Options().fingerprint())
    assert len(set(found)) == 4


def test_a_family_without_a_source_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    scope: dict[str, Any] = {"__name__": "nowhere"}
    exec("def anchors(values):\n    return []", scope)
    try:
        xfcompile.register_family(replace(example.FAMILY, anchors=scope["anchors"]))
        assert Options().fingerprint() is None
        assert identity.identified({}, Options().fingerprint())[identity.FIELD].uuid() is None
        assert Options(patterns=frozenset({"attention"})).fingerprint() is not None
        xfcompile.register_family(example.FAMILY, sources=[Path("/no/such/file.py")])
        assert Options().fingerprint() is None
    finally:
        xfcompile.unregister_family("add_rms_norm")


def test_of_a_package_all_modules_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "norms_of_someone"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "family.py").write_text("def anchors(values):\n    return []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("norms_of_someone.deep.family")
    found = []
    try:
        for text in ("A = 1", "A = 2"):
            (package / "kernels.py").write_text(text)
            xfcompile.register_family(replace(example.FAMILY, anchors=module.anchors))
            found.append(Options().fingerprint())
    finally:
        xfcompile.unregister_family("add_rms_norm")
    assert None not in found and found[0] != found[1]


def test_what_another_source_compiled_is_not_taken_from_the_cache(copied: Callable[[str], Any]) -> None:
    block = nn.Sequential(nn.Linear(16, 16))

    def program(x: Tensor) -> Tensor:
        return normed(block(x) + x)

    def compiled(line: str) -> int:
        xfcompile.register_family(copied(line))
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad(), xfcompile.collect() as report:
            torch.compile(program, backend=xfcompile.xformers)(inputs()[0])
        assert [s.route for s in norms(report)] == ["fused"]
        return counters["inductor"]["fxgraph_cache_hit"]

    with fresh_cache():
        assert [compiled(line) for line in ("", "", "# another\n")] == [0, 1, 0]
