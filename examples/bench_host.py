"""Measures what a replaced call costs the thread that launches it, beside launches that Inductor generates.

    python examples/bench_host.py --out examples/results/host.json    # on a CUDA device, about a minute
    python examples/bench_host.py --quick                             # on a CPU, what runs there: does it run
    TRITON_INTERPRET=1 python examples/bench_host.py --quick          # our kernels too

Problems are so small that the GPU waits for its host. A row is a compiled program with `MANY` calls and one with `FEW`:
the difference of their times over that of their calls (or launches, where Inductor decides how many there are) is a
call's, without Dynamo's guards and what else a program costs once. A call's time is until it is launched, not until it
is done. "Under CUDA graphs" are the same programs with Inductor's option "triton.cudagraphs", which
mode="reduce-overhead" is: whether all of each is captured, what a replay costs the host and takes, and how far its
results are from those without, with inputs elsewhere in memory too.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import xfcompile
from xfcompile.backend import xformers
from xfcompile.bench.surroundings import surroundings
from xfcompile.kernels.attention.tiles import interpreting

FEW, MANY = 2, 6
BATCH, HEADS, LENGTH, DIM = 1, 4, 128, 64
WIDE = HEADS * DIM
CACHE = 2048
"""Keys of a decoding step."""
QUICK = {LENGTH: 16, CACHE: 256}
"""Sizes on a CPU."""

Program = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """program: of a number of calls, what is compiled. inputs: shapes. options: of our backend; None is Inductor alone.
    counted: launches are, in what Inductor generates, which decides how many there are; else a call is one. gpu: what
    cannot be done without one. kernels: of ours, for which the interpreter will do."""

    name: str
    program: Callable[[int], Program]
    inputs: Sequence[Sequence[int]]
    options: dict[str, Any] | None = None
    train: bool = False
    counted: bool = False
    gpu: bool = False
    kernels: bool = False


# -- programs ------------------------------------------------------------------------------------------------------


def pointwise(calls: int) -> Program:
    """Each step needs a sum over all of the one before it, which no kernel has that makes it."""

    def program(x: Tensor) -> Tensor:
        for _ in range(calls):
            x = torch.sin(x) + x.sum()
        return x

    return program


def matmul(calls: int) -> Program:
    def program(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(calls):
            x = x @ w
        return x

    return program


def opaque(calls: int) -> Program:
    def program(x: Tensor) -> Tensor:
        for _ in range(calls):
            x = torch.ops.bench_host.doubled(x)
        return x

    return program


def inlined(calls: int) -> Program:
    def program(x: Tensor) -> Tensor:
        for _ in range(calls):
            x = torch.ops.bench_host.doubled_inlined(x)
        return x

    return program


def attention(calls: int) -> Program:
    def program(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(calls):
            scores = x @ k.transpose(-2, -1) / math.sqrt(DIM)
            x = torch.softmax(scores, dim=-1) @ v
        return x

    return program


def gated(calls: int) -> Program:
    def program(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        for _ in range(calls):
            x = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return x

    return program


def activated(calls: int) -> Program:
    def program(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        for _ in range(calls):
            x = F.gelu(F.linear(x, w, bias))
        return x

    return program


QKV = [(BATCH, HEADS, LENGTH, DIM)] * 3
STEP = [(BATCH, HEADS, 1, DIM), (BATCH, HEADS, CACHE, DIM), (BATCH, HEADS, CACHE, DIM)]
ROWS_OF_X = (LENGTH, WIDE)
SQUARE = (WIDE, WIDE)


def route(family: str, name: str) -> dict[str, Any]:
    return {"routes": {family: name}, "strict": True}


ROWS = [
    Row("Inductor: pointwise, a launch", pointwise, [ROWS_OF_X], counted=True, gpu=True),
    Row("Inductor: matmul", matmul, [ROWS_OF_X, SQUARE]),
    Row("custom_op around a kernel", opaque, [ROWS_OF_X]),
    Row("triton_op around a kernel", inlined, [ROWS_OF_X], gpu=True),
    Row("attention, sdpa", attention, QKV, route("attention", "sdpa")),
    Row("attention, triton", attention, QKV, route("attention", "triton"), kernels=True),
    Row("attention, sdpa, and its backward", attention, QKV, route("attention", "sdpa"), train=True),
    Row("attention, triton, and its backward", attention, QKV, route("attention", "triton"), train=True, kernels=True),
    Row("decoding step, triton", attention, STEP, route("attention", "triton"), kernels=True),
    Row("gated MLP, triton", gated, [ROWS_OF_X, SQUARE, SQUARE], route("gated_mlp", "triton"), kernels=True),
    Row(
        "bias and gelu, triton",
        activated,
        [ROWS_OF_X, SQUARE, (WIDE,)],
        route("bias-act-dropout", "triton"),
        kernels=True,
    ),
]
"""A bias row is a matmul's launch too: `F.linear` stays a product of PyTorch's before the kernel."""


# -- an op of somebody else's ----------------------------------------------------------------------------------------


def define_ops(device: str) -> None:
    """A kernel behind torch.library.custom_op, launched as Triton's users launch kernels, and one in a triton_op; a CPU
    has none, and multiplies."""

    @torch.library.custom_op("bench_host::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        if device == "cpu":
            return x * 2
        out = torch.empty_like(x)
        kernel()[(-(-x.numel() // 1024),)](x, out, x.numel(), BLOCK=1024)
        return out

    @doubled.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    if device == "cpu":
        return

    @torch.library.triton_op("bench_host::doubled_inlined", mutates_args=())
    def doubled_inlined(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.library.wrap_triton(kernel())[(-(-x.numel() // 1024),)](x, out, x.numel(), BLOCK=1024)
        return out


try:
    import triton
    import triton.language as tl

    @triton.jit
    def _double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n)
        tl.store(out_ptr + offs, x * 2, mask=offs < n)
except ImportError:
    _double = None


@functools.cache
def kernel() -> Any:
    return _double


# -- measuring -------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def microseconds(call: Callable[[], object], device: str, rounds: int, together: int) -> float:
    """Of the host, a call: the median over rounds, each of which begins with nothing under way."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter_ns()
        for _ in range(together):
            call()
        times.append((time.perf_counter_ns() - start) / together / 1e3)
    return statistics.median(times)


def inputs_of(row: Row, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = row.inputs if device == "cuda" else [[QUICK.get(n, n) for n in shape] for shape in row.inputs]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made = [x / math.sqrt(WIDE) if x.shape == SQUARE else x for x in made]
    return [x.to(device, dtype).requires_grad_(row.train) for x in made]


def compiled(row: Row, program: Program, **options: Any) -> Program:
    torch._dynamo.reset()
    # The function rather than its name: this also runs from a checkout that is not installed.
    backend = "inductor" if row.options is None else xformers
    return torch.compile(program, backend=backend, options={**(row.options or {}), **options} or None)  # type: ignore


def one_call(row: Row, run: Program, x: Sequence[Tensor]) -> Callable[[], Tensor]:
    if not row.train:
        return functools.partial(run, *x)

    def step() -> Tensor:
        for leaf in x:
            leaf.grad = None
        out = run(*x)
        out.backward(out.detach())  # a gradient of its shape, without another launch
        return out

    return step


def measured(row: Row, device: str, rounds: int) -> dict[str, Any]:
    times, counts = [], []
    for calls in (FEW, MANY):
        program = row.program(calls)
        x = inputs_of(row, device)
        with torch.set_grad_enabled(row.train), xfcompile.collect() as report:
            run = compiled(row, program)
            step = one_call(row, run, x)
            _, codes = run_and_get_code(step)
            for _ in range(1 if device == "cpu" else 3):
                step()
            times.append(microseconds(step, device, rounds, 4 if device == "cuda" else 1))
        replaced = sum(site.replaced for site in report.sites)
        if row.options is not None and replaced != calls:
            raise RuntimeError(f"{replaced} of {calls} calls were replaced: {[site.reason for site in report.sites]}")
        launches = sum(code.count(".run(") for code in codes)
        counts.append(launches if row.counted else calls)
    each = (times[1] - times[0]) / (counts[1] - counts[0])
    found = {"us": each, "few_us": times[0], "many_us": times[1], "counts": counts}
    if device == "cuda" and row.options is not None:
        found["graphs"] = captured(row, program, run, x, rounds)
    return found


# -- CUDA graphs -----------------------------------------------------------------------------------------------------


def events(call: Callable[[], object]) -> dict[str, int]:
    """Launches of graphs and of kernels that a call makes of itself."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    found = {"graphs": 0, "kernels": 0}
    for event in seen.events():
        found["graphs"] += event.name.startswith(("cudaGraphLaunch", "cuGraphLaunch"))
        found["kernels"] += event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
    return found


def captured(row: Row, program: Program, usual: Program, x: Sequence[Tensor], rounds: int) -> dict[str, Any]:
    """All of a program as CUDA graphs. usual: the same without."""
    moved = [(y.detach().clone() * 0.5).requires_grad_(row.train) for y in x]
    with torch.set_grad_enabled(row.train):
        wanted = [gradients(one_call(row, usual, y), y) for y in (x, moved)]
        counters.clear()
        run = compiled(row, program, **{"triton.cudagraphs": True})
        step = one_call(row, run, x)
        for _ in range(5):  # it is warmed up, recorded and replayed
            torch.compiler.cudagraph_mark_step_begin()
            step()
        errors = [difference(gradients(one_call(row, run, y), y), z) for y, z in zip((x, moved), wanted, strict=True)]
        for _ in range(5):
            step()
        return {
            "replay_us": microseconds(step, "cuda", rounds, 1),
            "launched": events(step),
            "ms": elapsed(step, rounds),
            "error": errors[0],
            "error_elsewhere": errors[1],
            "skips": counters["inductor"]["cudagraph_skips"],
        }


def gradients(step: Callable[[], Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    out = step().detach().clone()
    return [out, *[y.grad.clone() for y in x if y.grad is not None]]


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest, over the largest value."""
    pairs = zip(found, wanted, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in pairs)


def elapsed(step: Callable[[], Tensor], rounds: int) -> float:
    """Milliseconds of a call until it is done, one after another."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds * 1e3


# -- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="on a CPU, few rounds, and what runs there")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    arguments = parser.parse_args()
    device = "cpu" if arguments.quick else "cuda"
    rounds = 1 if arguments.quick else 60
    begin = time.perf_counter()
    define_ops(device)
    rows = [row for row in ROWS if arguments.only in row.name and runs(row, device)]
    results: dict[str, Any] = {
        **surroundings(device),
        "few": FEW,
        "many": MANY,
        "rows": {row.name: attempt(row, device, rounds) for row in rows},
    }
    results["seconds"] = time.perf_counter() - begin
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def runs(row: Row, device: str) -> bool:
    return device == "cuda" or not (row.gpu or (row.kernels and not interpreting()))


def attempt(row: Row, device: str, rounds: int) -> dict[str, Any]:
    """A row that fails says why, and the others are measured."""
    try:
        return measured(row, device, rounds)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def show(results: dict[str, Any]) -> None:
    title = f"{results['hardware']['device']}, torch {results['versions']['torch']}, {results['seconds']:.0f} s"
    table = Table("", "us of the host, a call", title=title)
    for name, found in results["rows"].items():
        table.add_row(name, found.get("failed") or f"{found['us']:.1f}")
    console = Console(width=120)
    console.print(table)
    graphs = {name: (found, found["graphs"]) for name, found in results["rows"].items() if "graphs" in found}
    if not graphs:
        return
    titles = ("skips", "graphs + kernels", "us, without", "us, replayed", "ms", "difference, elsewhere")
    table = Table("under CUDA graphs", *titles)
    for name, (found, graph) in graphs.items():
        table.add_row(
            name, str(graph["skips"]), f"{graph['launched']['graphs']} + {graph['launched']['kernels']}",
            f"{found['many_us']:.0f}", f"{graph['replay_us']:.0f}", f"{graph['ms']:.3f}",
            f"{graph['error']:.1e}, {graph['error_elsewhere']:.1e}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
