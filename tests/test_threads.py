"""Threads, and compilation within compilation: every program gets its own results, its own report, and no other's."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fresh import forget
from torch import Tensor, nn

import xfcompile
from xfcompile import extension, families, xformers

MANY = 4


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 8, -1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (20 * torch.tanh(q @ k.mT / 160)).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-2]
    keep = torch.arange(n)[:, None] >= torch.arange(n)
    return (q @ k.mT / 8).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q * 0.1 @ k.mT, -1) @ (v + 1)


PROGRAMS = [attention, capped, causal, scaled]


def qkv(length: int = 17, seed: int = 0, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, length, 64, generator=generator, requires_grad=grad) for _ in range(3)]


def at_once(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs functions in as many threads, all of which begin together; an error of one is raised."""
    barrier = threading.Barrier(len(work))

    def begin(fn: Callable[[], Any]) -> Any:
        barrier.wait()
        return fn()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(begin, work))


def step(fn: Callable[..., Tensor], x: list[Tensor]) -> list[Tensor]:
    """The result and the gradients."""
    out = fn(*x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]


# -- threads --------------------------------------------------------------------------------------------------------


def test_threads_compile_and_train_at_once() -> None:
    def job(fn: Callable[..., Tensor]) -> tuple[list[Tensor], xfcompile.Report]:
        with xfcompile.collect() as report:
            return step(torch.compile(fn, backend=xformers), qkv(grad=True)), report

    results = at_once([lambda fn=fn: job(fn) for fn in PROGRAMS])  # type: ignore[misc]
    for fn, (found, report) in zip(PROGRAMS, results, strict=True):
        torch.testing.assert_close(found, step(fn, qkv(grad=True)))
        assert len(report.sites) == 1 and report.failures == []
        assert str(report.sites[0].source).startswith("test_threads.py")


def test_threads_share_what_one_compiled_and_each_runs_its_own_backward() -> None:
    compiled = torch.compile(attention, backend=xformers, dynamic=True)
    jobs = [(seed, length) for seed, length in enumerate([17, 12, 17, 9])]
    found = at_once([lambda s=s, n=n: step(compiled, qkv(n, s, True)) for s, n in jobs])  # type: ignore[misc]
    for (seed, length), result in zip(jobs, found, strict=True):
        torch.testing.assert_close(result, step(attention, qkv(length, seed, True)))


def test_a_backward_runs_in_another_thread_than_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = qkv(grad=True)
    with xfcompile.collect() as report:
        out = torch.compile(capped, backend=xformers, options={"routes": {"attention": "triton"}})(*x)
    assert [s.route for s in report.sites] == ["triton"]
    (found,) = at_once([lambda: torch.autograd.grad(out.square().sum(), x)])
    torch.testing.assert_close([out.detach(), *found], step(capped, qkv(grad=True)), atol=1e-5, rtol=1e-4)


def gated(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.silu(F.linear(x, y)) * F.linear(x, z)


def activated(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.gelu(F.linear(x, y, z[0]))


WEIGHT = (16, 16)
KERNELS: dict[str, tuple[str, Callable[..., Tensor], Callable[[int], list[tuple[int, ...]]]]] = {
    "attention": ("attention", capped, lambda n: [(1, 2, n, 16)] * 3),
    "decoding": ("attention", capped, lambda n: [(1, 1, n % 3 + 1, 16), *[(1, 1, 256 + n, 16)] * 2]),
    "gated_mlp": ("gated_mlp", gated, lambda n: [(n, 16), WEIGHT, WEIGHT]),
    "bias-act-dropout": ("bias-act-dropout", activated, lambda n: [(n, 16), WEIGHT, WEIGHT]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_threads_launch_kernels_for_the_first_time_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one layout, and each of its own."""
    family, fn, shapes = KERNELS[name]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    forget()

    def given(n: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randn(s, generator=generator) / 2).requires_grad_() for s in shapes(n)]

    graphs = {n: torch.fx.symbolic_trace(fn) for n in (5, 6, 7, 8, 9)}
    for n, gm in graphs.items():
        options = {"strict": True, "patterns": [family], "routes": {family: "triton"}}
        assert [s.route for s in xfcompile.rewrite(gm, given(n, 0), options).sites] == ["triton"]

    def job(seed: int) -> None:
        for n in (9, 5 + seed, 9):
            found, expected = step(graphs[n], given(n, seed)), step(fn, given(n, seed))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        at_once([lambda seed=seed: job(seed) for seed in range(MANY)])  # type: ignore[misc]
    finally:
        sys.setswitchinterval(interval)
        forget()


def test_threads_that_launch_in_vain_take_the_other_kernel_each() -> None:
    from xfcompile.kernels.attention.fallback import FirstThatRuns

    done: list[int] = []
    both = threading.Barrier(MANY)

    def vain(n: int) -> None:
        both.wait()
        raise RuntimeError("it does not run here")

    launch = FirstThatRuns(vain, lambda: done.append)
    at_once([lambda n=n: launch(n) for n in range(MANY)])  # type: ignore[misc]
    assert sorted(done) == list(range(MANY))
    launch(MANY)
    assert done[-1] == MANY


def test_the_bare_pass_runs_in_many_threads() -> None:
    class Program(nn.Module):
        def __init__(self, fn: Callable[..., Tensor]) -> None:
            super().__init__()
            self.fn = fn

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.fn(q, k, v)

    graphs = [torch.export.export(Program(fn), tuple(qkv())).module() for fn in PROGRAMS * 2]
    reports = at_once([lambda gm=gm: xfcompile.rewrite(gm, qkv(), {"strict": True}) for gm in graphs])  # type: ignore
    assert [len(report.sites) for report in reports] == [1] * len(graphs)
    for fn, gm in zip(PROGRAMS * 2, graphs, strict=True):
        torch.testing.assert_close(gm(*qkv()), fn(*qkv()))


def test_the_first_run_is_verified_once_by_whichever_thread_it_is() -> None:
    from xfcompile.backend import rewritten

    gm = torch.fx.symbolic_trace(attention)
    _, verification = rewritten(gm, qkv(), xfcompile.Options(verify=True))
    assert verification is not None
    run = verification.before(gm.forward, strict=True)

    def job() -> tuple[Tensor, list[xfcompile.Check]]:
        with xfcompile.collect() as report:
            return run(*qkv()), report.checks

    results = at_once([job] * MANY)
    assert [check.ok for _, checks in results for check in checks] == [True]
    for out, _ in results:
        torch.testing.assert_close(out, attention(*qkv()))


def test_families_are_registered_while_others_compile() -> None:
    family = families.ATTENTION
    names = [f"mine_{n}" for n in range(20)]
    graphs = [torch.fx.symbolic_trace(attention) for _ in range(2)]

    def register() -> None:
        for name in names:
            xfcompile.register_family(replace(family, name=name, anchors=lambda values: []))
            xfcompile.unregister_family(name)

    def look() -> int:
        return len(xfcompile.rewrite(graphs.pop(), qkv(), {"strict": True, "patterns": ["attention"]}).sites)

    assert at_once([register, look, look]) == [None, 1, 1]
    assert extension.registered() == ()


# -- compilation within compilation -----------------------------------------------------------------------------------


def test_a_compiled_function_inside_of_another() -> None:
    inner = torch.compile(attention, backend=xformers)

    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return inner(inner(q, k, v), k, v) + attention(k, q, v)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(attention(q, k, v), k, v) + attention(k, q, v)

    for backend, sites in ((xformers, 3), ("eager", 0)):
        torch._dynamo.reset()
        with xfcompile.collect() as report:
            found = torch.compile(outer, backend=backend)(*qkv())
        torch.testing.assert_close(found, eager(*qkv()))
        assert len(report.sites) == sites  # what is inlined is the outer one's


def test_explain_and_verify_inside_of_a_compiled_program() -> None:
    """Past a graph break a program may do what it likes."""
    reports = []

    @torch.compiler.disable
    def look() -> None:
        reports.extend([xfcompile.explain(scaled, *qkv()), xfcompile.verify(causal, *qkv())])

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = attention(q, k, v)
        look()
        return attention(x, k, v)

    with xfcompile.collect() as outer:
        found = torch.compile(program, backend=xformers)(*qkv())
    torch.testing.assert_close(found, attention(attention(*qkv()), *qkv()[1:]))
    assert [len(report.sites) for report in reports] == [1, 1]
    assert [check.ok for check in reports[1].checks] == [True]
    assert len(outer.sites) == 4  # a collector hears all that its thread compiles


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 32)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("parts", ["each layer", "one layer", "layers and all"])
def test_parts_of_a_model_are_compiled(parts: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer(), nn.Linear(64, 64)), torch.randn(2, 9, 64)
    expected = model(x)
    expected_grads = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for layer in list(model)[: 1 if parts == "one layer" else 2]:
        layer.compile(backend=xformers)
    if parts == "layers and all":
        model.compile(backend=xformers)
    with xfcompile.collect() as report:
        found = model(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), list(model.parameters())), expected_grads)
    assert len(report.sites) == (1 if parts == "one layer" else 2)


def test_a_program_that_recompiles_too_often_runs_on() -> None:
    counts = []
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(attention, backend=xformers, dynamic=False)
        for length in (3, 4, 5, 6, 3):
            with xfcompile.collect() as report:
                found = compiled(*qkv(length))
            torch.testing.assert_close(found, attention(*qkv(length)))
            counts.append(len(report.sites))
    assert counts == [1, 1, 0, 0, 0]


def test_after_a_reset_everything_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = {"routes": {"attention": "triton"}}
    compiled = torch.compile(capped, backend=xformers, options=options)
    before = qkv(grad=True)
    out = compiled(*before)
    for _ in range(2):
        torch._dynamo.reset()
        with xfcompile.collect() as report:
            again = compiled(*qkv())
        torch.testing.assert_close(again, out.detach())
        assert [s.route for s in report.sites] == ["triton"]
    # What was compiled before the reset still has its backward.
    expected = step(capped, qkv(grad=True))[1:]
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), before), tuple(expected), atol=1e-5, rtol=1e-4)
