"""A backward that was changed is never served as it was before, though caches of compiled code are shared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import xfcompile

STEP = """
import json, sys
import torch
import xfcompile
from torch._dynamo.utils import counters

def program(q, k, v):
    return torch.softmax(5.0 * torch.tanh(q @ k.transpose(-2, -1) / 20.0), -1) @ v

generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, 9, 16, generator=generator, requires_grad=True) for _ in range(3))
options = {"strict": True, "routes": {"attention": "triton"}}
compiled = torch.compile(program, backend=xfcompile.xformers, options=options)
with xfcompile.collect() as report:
    out = compiled(q, k, v)
out.square().sum().backward()
expected = torch.autograd.grad(program(q, k, v).square().sum(), (q, v))
print(json.dumps({
    "package": xfcompile.__file__,
    "routes": [site.route for site in report.sites],
    "factors": [round((x.grad / y).median().item(), 3) for x, y in zip((q, v), expected)],
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
}))
"""

# AOTAutograd traces this formula: what it says is in the compiled backward, and in its cached copies.
FORMULA = (
    "kernels/attention/op.py",
    "return *made[:3],",
    "return 2 * made[0], *made[1:3],",
)
# A kernel's text is only called from there.
KERNEL = ("kernels/attention/backward_dkdv.py", "dv = tl.dot(", "dv = 2.0 * tl.dot(")


def copied(to: Path) -> Path:
    """This package, in a folder of its own, so that it can be changed."""
    source = Path(xfcompile.__file__).parent
    shutil.copytree(source, to / "xfcompile", symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    return to / "xfcompile"


def run(packages: Path, caches: Path) -> dict[str, object]:
    """One training step in a process of its own, by the package in that folder."""
    environment = {
        **os.environ, "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=environment, cwd=packages, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert Path(str(found["package"])).is_relative_to(packages), "another package than the copy was imported"
    assert found["routes"] == ["triton"]
    return found


def change(package: Path, what: tuple[str, str, str]) -> None:
    name, before, after = what
    text = (package / name).read_text()
    assert before in text, f"{name} reads otherwise by now: change another line of it"
    (package / name).write_text(text.replace(before, after))


@pytest.mark.slow
def test_a_changed_backward_is_seen_by_the_next_process(tmp_path: Path) -> None:
    packages, caches = tmp_path / "packages", tmp_path / "caches"
    package = copied(packages)
    found = [run(packages, caches), run(packages, caches)]
    change(package, FORMULA)
    found.append(run(packages, caches))
    change(package, KERNEL)
    found.append(run(packages, caches))
    assert [x["factors"] for x in found] == [[1.0, 1.0], [1.0, 1.0], [2.0, 1.0], [2.0, 2.0]]
    # The second run shows that there is something to be served.
    assert [(x["hits"], x["misses"]) for x in found] == [(0, 1), (1, 0), (0, 1), (0, 1)]
