"""On a CUDA device tiles are timed with the option, taken again by other processes, and compute the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fresh import forget
from torch import Tensor

from xfcompile.backend import xformers
from xfcompile.tuning import store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    forget()
    yield store.directory()
    forget()


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(30 * torch.tanh(q @ k.transpose(-1, -2) / 240), -1) @ v


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(x @ gate.T) * (x @ up.T)


def searches(folder: Path) -> list[dict[str, object]]:
    found = [json.loads(path.read_text()) for path in folder.iterdir()]
    return [x for x in found if str(x["about"]["site"]).startswith("tiles of")]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("fn", [soft_capped, swiglu])
def test_tiles_are_timed_once_for_all_processes(fn: object, train: bool, folder: Path) -> None:
    """In fp32, which Triton's kernels compute everywhere."""
    shapes = [(2, 4, 512, 64)] * 3 if fn is soft_capped else [(2048, 256), (512, 256), (512, 256)]
    torch.manual_seed(0)
    x = [torch.randn(shape, device="cuda") for shape in shapes]
    if fn is swiglu:
        x = [y / 4 for y in x]  # of 256 features: projections are near 1
    x = [y.requires_grad_(train) for y in x]
    options = {"autotune": True, "strict": True, "autotune_budget": 400.0}
    wanted = fn(*(y.double() for y in x))  # type: ignore[operator]
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        with torch.set_grad_enabled(train):
            out = torch.compile(fn, backend=xformers, options=options)(*x)  # type: ignore[call-overload]
            grads = torch.autograd.grad(out.sum(), x) if train else ()
        torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-4)
        found.append((out, *grads))
        before = searches(folder)
        forget()  # as another process would begin, with what is on the disk
    assert before, "nothing was timed"
    for search in before:
        trials = search["timings"]["trials"]  # type: ignore[index]
        assert len(trials) >= 3 and all(t["ms"] > 0 for t in trials)
    assert searches(folder) == before
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
