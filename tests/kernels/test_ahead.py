"""Kernels are compiled ahead of their first launch, for a GPU that need not be here, and nothing else comes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gated_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import compile_tasks
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import xfcompile
from xfcompile import activation, ahead, pretend
from xfcompile.activation import X
from xfcompile.ahead import Call, Gpu, Outline
from xfcompile.kernels.attention import launch, launch_backward, prepare, repeat, tiles
from xfcompile.kernels.attention.repeat import Launch
from xfcompile.kernels.bias_act_dropout import text_of
from xfcompile.kernels.gated_mlp import programs as gated_programs
from xfcompile.measured import multiprocessors
from xfcompile.score import B, I, J, Load, S
from xfcompile.site import Band, Operand, ScoreSpec

PROPERTIES = (("multi_processor_count", 132), ("shared_memory_per_multiprocessor", 233472))


def gpu(target: GPUTarget, capability: tuple[int, int], name: str) -> Gpu:
    return Gpu(target, capability, name, PROPERTIES, ahead.compiler_of(target))


H200 = gpu(GPUTarget("cuda", 90, 32), (9, 0), "NVIDIA H200")
A100 = gpu(GPUTarget("cuda", 80, 32), (8, 0), "NVIDIA A100")
MI300 = gpu(GPUTarget("hip", "gfx942", 64), (9, 4), "MI300X")
BF16 = torch.bfloat16

CAUSAL = ScoreSpec(S / 8, I >= J, band=Band(None, I + 1, True))
PADDED = ScoreSpec(S / 8, Load(0, B, J) >= 1, "nan", (Operand(torch.int64, 2),))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Triton keeps what it compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ahead, "_asked", set())
    monkeypatch.setattr(ahead, "_pending", [])
    monkeypatch.setattr(pretend, "_kind", None)
    compile_for = Launch._compile

    def compiled(self: Launch, *args: Any) -> Any:
        KERNELS.append(self.kernel)
        return compile_for(self, *args)

    monkeypatch.setattr(Launch, "_compile", compiled)
    _forget()
    yield tmp_path / "triton"
    _forget()
    assert Launch._compiled_for is None


KERNELS: list[Any] = []
"""That were compiled, in this process, for a GPU that is not here."""


def _forget() -> None:
    """As in another process: kernels that were compiled are on disk alone, and no GPU is known."""
    for kernel in KERNELS:
        kernel.device_caches.clear()
    KERNELS.clear()
    tiles.capability.cache_clear()
    multiprocessors.cache_clear()
    for program in gated_programs.known.values():
        program.calls.clear()


def laid_out(*shape: int, dtype: torch.dtype = BF16, offset: int = 0) -> Outline:
    return Outline.of(shape, torch.empty(shape, device="meta").stride(), offset, dtype)


Q = laid_out(4, 16, 512, 64)
KEPT = laid_out(4, 512, dtype=torch.int64)
LSE = laid_out(4, 16, 512, dtype=torch.float32)


def call(op: str, *args: Any, gpu: Gpu = H200, **kwargs: Any) -> Call:
    return ahead.call_of(getattr(torch.ops.xfcompile, op).default, args, kwargs, gpu)


def attention(spec: ScoreSpec, *operands: Outline, gpu: Gpu = H200) -> Call:
    return call("attention", Q, Q, Q, operands, (), (), prepare(spec), gpu=gpu)


def backward(spec: ScoreSpec, *operands: Outline) -> Call:
    needs = (True, True, True, *[False] * len(operands))
    return call("attention_backward", Q, Q, Q, Q, Q, LSE, operands, (), (), prepare(spec), needs)


def linear(gpu: Gpu = H200, dtype: torch.dtype = BF16) -> Call:
    x, weight, bias = (laid_out(*shape, dtype=dtype) for shape in ((4096, 256), (512, 256), (512,)))
    text = text_of(activation.gelu(X, "none"))
    return call("linear_act_dropout", x, weight, bias, (), (), None, 0, text, 0.0, dtype, False, gpu=gpu)


def gated() -> Call:
    x, weight = laid_out(4096, 256), laid_out(512, 256)
    return call("gated_mlp", x, weight, weight, None, None, gated_cases.key_of("silu"), "separate", "dual", False, BF16)


def compiled(call: Call) -> list[str]:
    """Here and now."""
    return pretend.compile_call(call, ahead._environment())


def entries(folder: Path) -> int:
    return len([x for x in folder.iterdir() if x.name != "xfcompile"]) if folder.exists() else 0


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (lambda: attention(CAUSAL), ["attention_forward"]),
        (lambda: attention(PADDED, KEPT), ["tile_verdicts", "tile_lists", "attention_forward"]),
        (lambda: backward(CAUSAL), ["prepare_rows", "attention_backward", "finish_dq"]),
        (lambda: linear(), ["gemm"]),
        (lambda: gated(), ["gemm"]),
        (lambda: attention(CAUSAL, gpu=A100), ["attention_forward"]),
        (lambda: attention(CAUSAL, gpu=MI300), ["attention_forward"]),
        (lambda: linear(A100, torch.float32), ["linear"]),
    ],
    ids=["forward", "masked", "backward", "linear", "gated", "sm_80", "gfx942", "fp32 sm_80"],
)
def test_all_kernels_of_a_call_are_compiled(made: Callable[[], Call], names: list[str], folder: Path) -> None:
    assert compiled(made()) == names
    before = entries(folder)
    assert before >= len(set(names))
    _forget()
    assert compiled(made()) == names
    assert entries(folder) == before  # what a launch finds


def test_the_assembler_is_decided_on_before_the_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor decides on it when it first compiles in this process, and kernels are called otherwise from then on."""
    done: list[str] = []
    found = SimpleNamespace(name="a GPU", multi_processor_count=132)
    active = SimpleNamespace(get_current_target=lambda: H200.target)
    monkeypatch.setattr(compile_tasks, "_set_triton_ptxas_path", lambda: done.append("assembler"))
    monkeypatch.setattr(ahead, "compiler_of", lambda target: done.append("compiler") or "its name")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(driver, "_active", active)
    assert Gpu.of.__wrapped__(0).compiler == "its name"  # type: ignore[attr-defined]
    assert done == ["assembler", "compiler"]


def test_addresses_are_those_of_views(folder: Path) -> None:
    """A view that starts at no multiple of 16 bytes is compiled for as such: not by descriptors."""
    usual = attention(CAUSAL)
    elsewhere = dataclasses.replace(Q, offset=1)
    compiled(usual)
    before = entries(folder)
    moved = dataclasses.replace(usual, args=(elsewhere, *usual.args[1:]))
    compiled(moved)
    assert entries(folder) > before


def test_how_fp32_is_multiplied_is_the_users(folder: Path) -> None:
    """Other kernels are compiled, as they are launched."""
    products = torch.backends.cuda.matmul
    before, usual = products.fp32_precision, linear(A100, torch.float32)
    with pretend.instead(products, "fp32_precision", "tf32"):
        other = linear(A100, torch.float32)
    assert other.fp32 == "tf32" != usual.fp32 and ahead._mark(usual, {}) != ahead._mark(other, {})
    compiled(usual)
    found = entries(folder)
    compiled(other)
    assert entries(folder) == found + 1 and products.fp32_precision == before


def test_a_call_of_which_too_little_is_known_costs_the_others_nothing(calls: list[Call]) -> None:
    graph = fx.Graph()
    known, unknown = graph.placeholder("known"), graph.placeholder("unknown")
    known.meta["val"] = torch.empty(4, 16, 512, 64, dtype=BF16, device="meta")
    for q in (unknown, known):
        graph.call_function(torch.ops.xfcompile.attention.default, (q, known, known, [], [], [], prepare(CAUSAL)))
    ahead.planned(fx.GraphModule(torch.nn.Module(), graph))
    assert [call.args[0] for call in calls] == [Q]


def test_nothing_is_allocated_or_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("memory of a GPU was asked for")

    monkeypatch.setattr(repeat, "_empty_strided_cuda", never)
    monkeypatch.setattr(repeat, "_current_device", lambda: 0)
    assert compiled(attention(CAUSAL)) == ["attention_forward"]


def test_in_a_process_of_inductors(folder: Path) -> None:
    """What is submitted is compiled by one of its workers, with this process's folder for it, once."""
    with config.patch(compile_threads=2):
        for _ in range(3):
            ahead.submit(attention(CAUSAL))
        assert len(ahead._pending) == 1
        ahead.settle()
    assert not ahead._pending
    before = entries(folder)
    assert before
    assert compiled(attention(CAUSAL)) == ["attention_forward"]
    assert entries(folder) == before


class Pool:
    """Inductor's, with futures in the test's hands."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, *job: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool()
    monkeypatch.setattr(AsyncCompile, "process_pool", staticmethod(lambda: made))
    return made


def test_what_was_compiled_before_is_not_asked_for(pool: Pool, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """By this process or by another: nothing is waited for at a warm start."""
    wanted, environment = attention(CAUSAL), ahead._environment()
    pretend.compile_call(wanted, environment, str(ahead._mark(wanted, environment)))
    ahead.submit(wanted)
    assert not pool.futures and not ahead._pending
    for change in ({"args": attention(PADDED, KEPT).args}, {"gpu": A100}):
        monkeypatch.setattr(ahead, "_asked", set())
        ahead.submit(dataclasses.replace(wanted, **change))
    assert len(pool.futures) == 2
    monkeypatch.setattr(ahead, "_asked", set())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "elsewhere"))
    ahead.submit(wanted)
    assert len(pool.futures) == 3


def test_where_kernels_are_kept_is_decided_as_inductor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead._keep_beside_inductors(1)
    assert not os.environ["TRITON_CACHE_DIR"].endswith("1")  # the user's own
    monkeypatch.delenv("TRITON_CACHE_DIR")
    ahead._keep_beside_inductors(1)
    assert os.environ["TRITON_CACHE_DIR"] == triton_cache_dir(0) and os.environ["TRITON_CACHE_DIR"].endswith("triton/1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/")  # so that it is put back


def test_a_failure_there_is_nothing_here(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    ahead.submit(attention(CAUSAL))
    pool.futures[0].set_exception(RuntimeError("LLVM does not like it"))
    with caplog.at_level(logging.DEBUG, "xfcompile.ahead"):
        ahead.settle()
    assert "LLVM does not like it" in caplog.text and not ahead._pending


def test_patience_ends(pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ahead, "PATIENCE", 0.05)
    ahead.submit(attention(CAUSAL))
    ahead.submit(linear())
    ahead.settle()
    assert "not compiled ahead within 0.05 s" in caplog.text and not ahead._pending
    ahead.settle()


def test_processes_that_have_not_begun_are_not_waited_for(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    first: Future[Any] = Future()
    monkeypatch.setattr(AsyncCompile, "_ready_future", first)
    ahead.submit(attention(CAUSAL))
    started = time.perf_counter()
    ahead.settle()
    assert time.perf_counter() - started < ahead.PATIENCE / 10 and ahead._pending
    first.set_result("ready")
    threading.Timer(0.2, pool.futures[0].set_result, [["attention_forward"]]).start()
    ahead.settle()
    assert pool.futures[0].done() and not ahead._pending


def test_a_failure_to_start_processes_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed() -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ahead, "_wanted", lambda: True)
    monkeypatch.setattr(AsyncCompile, "warm_pool", failed)
    ahead.start_processes()


def test_a_forked_process_waits_for_nothing(pool: Pool) -> None:
    ahead.submit(attention(CAUSAL))
    assert ahead._pending
    with ahead._lock:  # as another thread may hold it just then
        child = os.fork()
        if child == 0:
            ahead.settle()
            os._exit(len(ahead._pending))
    assert os.waitpid(child, 0)[1] == 0 and ahead._pending


def test_the_process_is_afterwards_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_OF_ITS_OWN", "1")
    before, available = dict(os.environ), torch.cuda.is_available()
    seen: list[str | None] = []
    monkeypatch.setattr(pretend, "_make_launcher", lambda kernel: seen.append(os.environ.get("TRITON_OF_THE_OTHER")))
    other = {"TRITON_CACHE_DIR": os.environ["TRITON_CACHE_DIR"], "TRITON_OF_THE_OTHER": "2"}
    pretend.compile_call(attention(CAUSAL), other)
    assert seen == ["2"] and dict(os.environ) == before
    assert torch.cuda.is_available() == available and driver._active is None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Calls as they would be submitted if graphs, which are on a CPU here, were on a GPU: those of the graph that we
    have rewritten, and then those that Inductor lowers."""
    calls: list[Call] = []
    monkeypatch.setattr(ahead, "_wanted", lambda: True)
    monkeypatch.setattr(ahead, "_gpu_of", lambda devices: H200)
    monkeypatch.setattr(ahead, "_is_on_gpu", lambda kernel: True)
    monkeypatch.setattr(ahead, "submit", calls.append)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):  # what is found there is not lowered
        yield calls


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(30 * torch.tanh(q @ k.transpose(-1, -2) / 240), -1) @ v


ROUTES = {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": "epilogue"}


def test_what_inductor_lowers_is_what_runs(monkeypatch: pytest.MonkeyPatch, calls: list[Call]) -> None:
    """Forward and backward, of views of one projection, are described as they are when they run."""
    seen: list[tuple[Outline, ...]] = []

    def recorded(run: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*args: Any, **kwargs: Any) -> Any:
            seen.append(tuple(outline_of(x) for x in args if isinstance(x, Tensor)))
            return run(*args, **kwargs)

        return recording

    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "run", recorded(module.run))
    weight = torch.randn(96, 32, requires_grad=True)

    def fn(x: Tensor) -> Tensor:
        q, k, v = (x @ weight.T).view(2, 24, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return soft_capped(q, k, v).transpose(1, 2).flatten(2)

    made = torch.compile(fn, backend="xformers", options={"routes": ROUTES, "strict": True})
    made(torch.randn(2, 24, 32, requires_grad=True)).sum().backward()
    planned, *lowered = calls
    assert [call.op for call in lowered] == ["attention", "attention_backward"]
    assert planned == lowered[0]
    for call, run in zip(lowered, seen, strict=True):
        assert tuple(x for x in call.args if isinstance(x, Outline)) == run, call.op
    monkeypatch.delenv("TRITON_INTERPRET")
    assert compiled(_in_bf16(lowered[0])) == ["attention_forward"]
    assert compiled(_in_bf16(lowered[1]))


def outline_of(x: Tensor) -> Outline:
    return Outline.of(x.shape, x.stride(), int(x.storage_offset()), x.dtype)


def _in_bf16(call: Call) -> Call:
    def half(x: Any) -> Any:
        return dataclasses.replace(x, dtype=BF16) if isinstance(x, Outline) and x.dtype.is_floating_point else x

    return dataclasses.replace(call, args=tuple(map(half, call.args)))


def test_symbolic_sizes_are_those_of_the_first_call(calls: list[Call]) -> None:
    fn = torch.compile(soft_capped, backend="xformers", dynamic=True, options={"routes": ROUTES, "strict": True})
    x = torch.randn(2, 3, 40, 16)
    fn(x, x + 1, x + 2)
    planned, lowered = calls
    assert planned == lowered
    assert lowered.args[0] == Outline((2, 3, 40, 16), (1920, 640, 16, 1), 0, torch.float32)


def test_other_families_are_described_too(calls: list[Call]) -> None:
    gate, up, down = (torch.randn(n, 16, requires_grad=True) for n in (32, 32, 24))

    def fn(x: Tensor) -> Tensor:
        return (F.silu(x @ gate.T) * (x @ up.T)).sum() + F.gelu(F.linear(x, down)).sum()

    made = torch.compile(fn, backend="xformers", options={"routes": ROUTES, "strict": True})
    made(torch.randn(64, 16, requires_grad=True)).backward()
    found = {call.op: calls.count(call) for call in calls}
    forward, back = ("gated_mlp", "linear_act_dropout"), ("gated_mlp_backward", "bias_act_dropout_backward")
    assert found == dict.fromkeys(forward, 2) | dict.fromkeys(back, 1)  # forwards before Inductor begins, and then


@pytest.mark.parametrize("why", ["a CPU", "two GPUs", "one thread", "the interpreter"])
def test_nothing_is_submitted_where_nothing_would_run(why: str, monkeypatch: pytest.MonkeyPatch, pool: Pool) -> None:
    def outlined(x: Any, devices: set[torch.device]) -> Any:
        if isinstance(x, Outline):
            devices.add(torch.device("cpu" if why == "a CPU" else "cuda", 0))
            devices.add(torch.device("cpu" if why == "a CPU" else "cuda", int(why == "two GPUs")))
        return x

    monkeypatch.setattr(Gpu, "of", staticmethod(lambda index: H200))
    if why == "the interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    wanted = attention(CAUSAL)
    with config.patch(compile_threads=1 if why == "one thread" else 2):
        if ahead._wanted():
            ahead._ask_for(torch.ops.xfcompile.attention.default, wanted.args, dict(wanted.kwargs), outlined)
        else:
            assert why in ("one thread", "the interpreter")
    assert not pool.futures
    if why == "a CPU":  # else it is
        why = "a GPU"
        ahead._ask_for(torch.ops.xfcompile.attention.default, wanted.args, dict(wanted.kwargs), outlined)
        assert len(pool.futures) == 1


def test_an_error_while_it_is_described_leaves_the_program(monkeypatch: pytest.MonkeyPatch, calls: list[Call]) -> None:
    def fails(what: Any) -> None:
        told.append(what)
        raise KeyError("of another version of Inductor")

    told: list[Any] = []
    monkeypatch.setattr(ahead, "planned", fails)
    monkeypatch.setattr(ahead, "lowered", fails)
    x = torch.randn(1, 2, 8, 16)
    fn = torch.compile(soft_capped, backend="xformers", options={"routes": ROUTES, "strict": True})
    with xfcompile.collect() as report:
        torch.testing.assert_close(fn(x, x, x), soft_capped(x, x, x), rtol=1e-4, atol=1e-4)
    assert report.sites[0].route == "triton" and len(told) == 2
