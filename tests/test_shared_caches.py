"""Processes and versions of this package share caches of compiled code: none is served what is another one's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import xfcompile
from xfcompile import Options, identity, unchanged

# Runs programs, compiled, and with `train` their gradients. Says of each whether our operators ran, by how much results
# are larger than eager's, and what was found in AOTAutograd's cache and in Inductor's.
STEPS = """
import json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
import xfcompile
from torch._dynamo.utils import counters
from xfcompile.kernels import attention, bias_act_dropout, gated_mlp

for name, before, after in json.loads(sys.argv[2]):  # while this process runs
    file = Path(xfcompile.__file__).parent / name
    assert before in file.read_text(), f"{name} reads otherwise by now: change another line of it"
    file.write_text(file.read_text().replace(before, after))

def attend(x, y, z):
    return torch.softmax(x @ y.mT / 4.0, -1) @ z

def gated(x, y, z):
    return F.silu(F.linear(x, y)) * F.linear(x, z)

def activated(x, y, z):
    return F.gelu(F.linear(x, y, z[0]))

def step(run, shape, train):
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(shape, generator=generator, requires_grad=train) for _ in range(3))
    out = run(x, y, z)
    return [out.detach(), *torch.autograd.grad(out.sum(), x)] if train else [out]

found = []
for name, train, options in json.loads(sys.argv[1]):
    fn, shape = {"attention": (attend, (1, 2, 9, 16)), "gated": (gated, (16, 16)),
                 "activated": (activated, (16, 16))}[name]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(fn, backend=xfcompile.xformers, options={"strict": True, **options})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        made = step(compiled, shape, train)
    autograd, inductor = counters["aot_autograd"], counters["inductor"]
    found.append({
        "factors": [round((x / y).nanmedian().item(), 3) for x, y in zip(made, step(fn, shape, train))],
        "ours": any(event.key.startswith("xfcompile::") for event in profile.key_averages()),
        "hits": [autograd["autograd_cache_hit"], inductor["fxgraph_cache_hit"]],
        "misses": [autograd["autograd_cache_miss"], inductor["fxgraph_cache_miss"]],
    })
print(json.dumps([xfcompile.__file__, found]))
"""

KERNELS = {"routes": {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": "epilogue"}}
INDUCTOR = {"routes": {"attention": "inductor", "gated_mlp": "inductor", "bias-act-dropout": "inductor"}}
FAMILIES = ("attention", "gated", "activated")

Change = tuple[str, str, str]
Changes = Sequence[Change]
Step = tuple[str, bool, dict[str, Any]]
Found = list[dict[str, Any]]


def run(
    caches: Path, *steps: tuple[str, bool, dict[str, Any]], package: Path | None = None, edits: Changes = ()
) -> Found:
    """In a process of its own. package: the folder of a copy of ours, to be imported in its place."""
    where = package or Path(xfcompile.__file__).parents[1]
    environment = {
        **os.environ, "PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", STEPS, json.dumps(steps), json.dumps(edits)]
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    file, found = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(where), "another package than the copy was imported"
    return list(found)


def copied(to: Path) -> Path:
    """A folder with a copy of this package, which can be changed."""
    source = Path(xfcompile.__file__).parent
    shutil.copytree(source, to / "xfcompile", symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def change(package: Path, what: Change) -> None:
    name, before, after = what
    text = (package / "xfcompile" / name).read_text()
    assert before in text, f"{name} reads otherwise by now: change another line of it"
    (package / "xfcompile" / name).write_text(text.replace(before, after))


def is_new(found: dict[str, Any]) -> bool:
    """Whether nothing of a program came out of a cache; what did not come from one went into it."""
    assert sum(found["hits"]) + sum(found["misses"]) > 0, "caches were not asked"
    return sum(found["hits"]) == 0


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_option_is_another_entry(tmp_path: Path) -> None:
    (first,) = run(tmp_path, ("attention", False, KERNELS))
    others = ({"routes": {"attention": "sdpa"}}, {**KERNELS, "patterns": []}, KERNELS)
    found = [first, *run(tmp_path, *[("attention", False, o) for o in others])]
    assert [x["factors"] for x in found] == [[1.0]] * 4
    assert [x["ours"] for x in found] == [True, False, False, True]
    # The last shows that there was something to be served.
    assert [is_new(x) for x in found] == [True, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_every_family_are_other_entries(family: str, tmp_path: Path) -> None:
    every = [KERNELS, INDUCTOR, {**KERNELS, "patterns": []}, {**KERNELS, "strict": False}]
    for number, options in enumerate(every):
        caches = tmp_path / str(number)
        caches.mkdir()
        first, *found = [*run(caches, (family, True, options)), *run(caches, *[(family, True, o) for o in every])]
        assert [is_new(x) for x in (first, *found)] == [True, *(n != number for n in range(len(every)))]
        assert [x["ours"] for x in found] == [True, False, False, True]
        assert all(x["factors"] == [1.0, 1.0] for x in (first, *found))


# -- versions of the package ----------------------------------------------------------------------------------------

# What AOTAutograd traces is in the compiled backward, and in its cached copies; a kernel's text is only called there.
FORMULAS: dict[str, Change] = {
    "attention": ("kernels/attention/op.py", "return *made[:3],", "return 2 * made[0], *made[1:3],"),
    "gated": ("kernels/gated_mlp/op.py", "dproduct = dout\n", "dproduct = 2 * dout\n"),
    "activated": ("kernels/bias_act_dropout/op.py", "else dpre @ weight", "else 2 * (dpre @ weight)"),
}
TEXTS: dict[str, Change] = {
    "attention": ("kernels/attention/forward_text.py", "DV + offs_dv, out", "DV + offs_dv, (3.0 * out)"),
    "gated": ("kernels/gated_mlp/template.py", "n[None, :], product.to(out", "n[None, :], (3.0 * product).to(out"),
    "activated": ("kernels/bias_act_dropout/template.py", "out_offs, out.to(", "out_offs, (3.0 * out).to("),
}
VERSION = ("__init__.py", f'__version__ = "{xfcompile.__version__}"', '__version__ = "9.9.9"')


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_another_version_of_the_package_is_served_nothing(family: str, tmp_path: Path) -> None:
    """Each of its kernels, its formulas and its number alone."""
    package, step = copied(tmp_path / "packages"), (family, True, KERNELS)
    found = [*run(tmp_path, step, package=package), *run(tmp_path, step, package=package)]
    for what in (FORMULAS[family], TEXTS[family], VERSION):
        change(package, what)
        found += run(tmp_path, step, package=package)
    assert all(x["ours"] for x in found)
    of_results, of_gradients = ([x["factors"][n] for x in found] for n in (0, 1))
    assert of_results == [1.0, 1.0, 1.0, 3.0, 3.0]
    # Attention's backward reads its result too.
    assert of_gradients[:3] == [1.0, 1.0, 2.0] and of_gradients[3] == of_gradients[4]
    assert [is_new(x) for x in found] == [True, False, True, True, True]


def test_after_its_sources_have_changed_a_process_caches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = identity.identified({}, Options().fingerprint())[identity.FIELD].uuid()
    assert known is not None
    monkeypatch.setattr(unchanged, "BEGAN", 0.0)  # all were written since
    assert Options().fingerprint() is None
    assert identity.identified({}, Options().fingerprint())[identity.FIELD].uuid() is None


@pytest.mark.slow
def test_a_package_that_changes_while_it_runs_stores_nothing(tmp_path: Path) -> None:
    """What an older version compiles would else be found under the hash of the newer sources."""
    package, step = copied(tmp_path / "packages"), ("attention", True, KERNELS)
    (before,) = run(tmp_path, step, package=package, edits=[FORMULAS["attention"]])
    (after,) = run(tmp_path, step, package=package)
    assert [before["factors"], after["factors"]] == [[1.0, 1.0], [1.0, 2.0]]
    assert is_new(after)
