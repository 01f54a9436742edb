"""On a CUDA device no kernel of ours is compiled at its first launch: it has been before, by another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROGRAM = """
import json, os, sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._inductor.async_compile import AsyncCompile
from triton.compiler import compiler

import xfcompile
from xfcompile import ahead
from xfcompile.backend import xformers

compiled = []
sort = type(compiler.make_backend(ahead.Gpu.of(0).target))
cubin = sort.make_cubin


def counted(self, source, metadata, *args, **kwargs):
    compiled.append(metadata["name"])
    return cubin(self, source, metadata, *args, **kwargs)


sort.make_cubin = counted
ahead.start_processes()
AsyncCompile._ready_future.result()  # which take longer to begin than so small a program to launch: nobody waits for it
torch.manual_seed(0)
w = [torch.randn(n, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (768, 1024, 1024, 1024)]
x = torch.randn(8, 512, 256, device="cuda", dtype=torch.bfloat16)


def fn(x, qkv, gate, up, wide):
    q, k, v = (x @ qkv.T).view(8, 512, 3, 4, 64).permute(2, 0, 3, 1, 4)
    a = torch.softmax(30 * torch.tanh(q @ k.transpose(-1, -2) / 240), -1) @ v
    h = a.transpose(1, 2).flatten(2)
    return F.gelu(F.linear(h, wide)), F.silu(h @ gate.T) * (h @ up.T)


routes = {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": "epilogue"}
run = torch.compile(fn, backend=xformers, options={"routes": routes})
train = sys.argv[1] == "train"
with torch.set_grad_enabled(train), xfcompile.collect() as report:
    out = run(x, *w)
    if train:
        sum(y.float().square().mean() for y in out).backward()
torch.cuda.synchronize()
with torch.no_grad():
    exact = fn(x.double(), *(y.double() for y in w))
    off = max(((y - z).abs().max() / z.abs().max()).item() for y, z in zip(out, exact))
marks = len([*(Path(os.environ["TRITON_CACHE_DIR"]) / "xfcompile").iterdir()])
routes = sorted(site.route for site in report.sites)
own = [name for name in compiled if not name.startswith("triton_")]  # Inductor's, until its processes have started
found = {"compiled": own, "off": off, "marks": marks, "routes": routes, "pending": len(ahead._pending)}
print(json.dumps(found))
"""


def run(folder: Path, mode: str) -> dict[str, Any]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, env=os.environ | caches | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_first_launches_compile_nothing(mode: str, tmp_path: Path) -> None:
    cold = run(tmp_path, mode)
    assert cold["off"] < 0.05 and cold["pending"] == 0
    assert cold["routes"] == ["epilogue", "triton", "triton"], cold
    assert cold["compiled"] == [], cold
    assert cold["marks"] >= (3 if mode == "infer" else 6), cold
    warm = run(tmp_path, mode)
    assert warm["compiled"] == [] and warm["marks"] == cold["marks"] and warm["off"] == cold["off"]
