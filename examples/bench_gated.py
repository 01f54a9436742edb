"""Times gated MLPs, forward and with their backward: eager, Inductor, this backend by each of its routes, bare cuBLAS.

    python examples/bench_gated.py --json examples/results/gated.json       # all programs and sizes
    python examples/bench_gated.py --program swiglu --rows 1 16             # some of them
    python examples/bench_gated.py --sweep --json examples/results/gated_tiles.json   # our kernels, by tile sizes
    python examples/bench_gated.py --quick                                  # tiny sizes on a CPU: does it run

Programs, in bf16: "swiglu" is silu(x Wg^T) * (x Wu^T), "packed" the same of one weight; "mlp" and "packed mlp" have the
linear after it, and are timed with their backward; "block" is a norm, "mlp" and the residual. Times are medians in ms;
up to 1023 rows, without a backward, those of a CUDA graph of 20 calls, which leaves out what the CPU does. "floor" is
the products of matrices alone, by cuBLAS. Errors are largest differences from fp64 of some rows, in units of eager's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from xfcompile import activation
from xfcompile.activation import GATE, UP
from xfcompile.backend import xformers
from xfcompile.kernels.gated_mlp import gated_mlp, launch, prepare, tiles
from xfcompile.measured import Fact

Call = Callable[[], Any]
COLUMNS = ("eager", "inductor", "max-autotune", "triton", "cublas", "floor")
SIZES = (
    (1, 4096, 11008),
    (16, 4096, 11008),
    (256, 4096, 11008),
    (4096, 4096, 11008),
    (16384, 4096, 14336),
    (16384, 1024, 2816),
)
"""Rows, width and hidden features."""
QUICK = ((5, 32, 48),)
CHECKED = 64


@dataclass(frozen=True)
class Program:
    """A program and its tensors but for the input, given rows, width and features; `products`: how many GEMMs of
    [rows, width] x [width, features] its forward has, and how many its backward."""

    name: str
    fn: Callable[..., Tensor]
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    training: bool
    products: tuple[int, int]


def swiglu(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(F.linear(x, w)) * F.linear(x, v)


def packed(x: Tensor, w: Tensor) -> Tensor:
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate) * up


def block(x: Tensor, w: Tensor, v: Tensor, d: Tensor, g: Tensor) -> Tensor:
    return x + F.linear(swiglu(F.rms_norm(x, (x.shape[-1],), g), w, v), d)


PROGRAMS = (
    Program("swiglu", swiglu, lambda k, n: [(n, k), (n, k)], False, (2, 4)),
    Program("packed", packed, lambda k, n: [(2 * n, k)], False, (2, 4)),
    Program(
        "mlp", lambda x, w, v, d: F.linear(swiglu(x, w, v), d), lambda k, n: [(n, k), (n, k), (k, n)], True, (3, 6)
    ),
    Program("packed mlp", lambda x, w, d: F.linear(packed(x, w), d), lambda k, n: [(2 * n, k), (k, n)], True, (3, 6)),
    Program("block", block, lambda k, n: [(n, k), (n, k), (k, n), (k,)], False, (3, 6)),
    Program("block, training", block, lambda k, n: [(n, k), (n, k), (k, n), (k,)], True, (3, 6)),
)


def tensors(program: Program, size: tuple[int, int, int], device: str, dtype: torch.dtype) -> list[Tensor]:
    rows, width, features = size
    torch.manual_seed(0)
    x = torch.randn(rows, width, device=device, dtype=dtype)
    rest = [torch.randn(s, device=device, dtype=dtype) / math.sqrt(s[-1]) for s in program.shapes(width, features)]
    return [t.requires_grad_(program.training) for t in (x, *rest)]


def function(column: str, program: Program) -> Callable[..., Tensor]:
    """The program as one column compiles it."""
    if column == "eager":
        return program.fn
    if column == "inductor":
        return torch.compile(program.fn, dynamic=False)
    if column == "max-autotune":
        return torch.compile(program.fn, dynamic=False, mode="max-autotune-no-cudagraphs")
    # The function rather than its name: this also runs from a checkout that is not installed.
    options = {"routes": {"gated_mlp": column}, "strict": True}
    return torch.compile(program.fn, dynamic=False, backend=xformers, options=options)


def way(column: str, program: Program, size: tuple[int, int, int], given: list[Tensor]) -> Call:
    if column == "floor":
        return floor(program, size, given)
    fn = function(column, program)
    if not program.training:
        return lambda: fn(*given)
    rows, width, _ = size
    dout = torch.randn(rows, width, device=given[0].device, dtype=given[0].dtype)
    return lambda: torch.autograd.grad(fn(*given), given, dout)


def floor(program: Program, size: tuple[int, int, int], given: list[Tensor]) -> Call:
    """The products of matrices alone, those of gate and up as one where the program has them packed."""
    rows, width, features = size
    x = given[0].detach()

    def empty(*shape: int) -> Tensor:
        return torch.randn(shape, device=x.device, dtype=x.dtype)

    one = "packed" in program.name
    hidden, both, down = empty(rows, features), empty(rows, 2 * features), empty(width, features)
    weights = [empty(2 * features, width)] if one else [empty(features, width), empty(features, width)]
    grads = [both] if one else [hidden, hidden]

    def run() -> None:
        for w in weights:
            torch.mm(x, w.t())
        if program.products[0] == 3:
            torch.mm(hidden, down.t())
        if not program.training:
            return
        torch.mm(x, down)
        torch.mm(x.t(), hidden)
        for g, w in zip(grads, weights, strict=True):
            torch.mm(g, w)
            torch.mm(g.t(), x)

    return run


def applies(column: str, program: Program) -> bool:
    return column != "cublas" or "packed" in program.name


def median(call: Call, device: str, graph: bool) -> float:
    if device == "cpu":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)
    import triton

    if not graph:
        return float(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median"))
    # Several calls a graph: one that begins alone has the weights of the one before in its cache no more than these.
    call()
    torch.cuda.synchronize()
    return (
        float(triton.testing.do_bench_cudagraph(lambda: [call() for _ in range(20)], rep=100, return_mode="median"))
        / 20
    )


def peak(call: Call, device: str) -> float | None:
    """GB beyond what was allocated before."""
    if device == "cpu":
        return None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def error(column: str, program: Program, given: list[Tensor], call: Call) -> float | None:
    """Of the first rows, or of the gradients of a program of so many; the largest over eager's, over all results."""
    if column == "floor":
        return None
    detached = [t.detach() for t in given]
    if not program.training:
        some = [detached[0][:CHECKED], *detached[1:]]
        exact = program.fn(*(t.double() for t in some))
        eagers = (program.fn(*some) - exact).abs().max().item()
        return (call()[:CHECKED] - exact).abs().max().item() / eagers
    small = [detached[0][:CHECKED].clone(), *detached[1:]]
    fn = function(column, program)

    def gradients(f: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in small]
        out = f(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(small[0].dtype)
        return torch.autograd.grad(out, leaves, weights.to(dtype))

    found = [
        gradients(f, d) for f, d in ((fn, small[0].dtype), (program.fn, small[0].dtype), (program.fn, torch.double))
    ]
    return max(
        (a - c).abs().max().item() / max((b - c).abs().max().item(), 1e-30) for a, b, c in zip(*found, strict=True)
    )


def measure(
    column: str, program: Program, size: tuple[int, int, int], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """One cell. A column that fails says so: that too is a result."""
    torch.compiler.reset()
    try:
        given = tensors(program, size, device, dtype)
        with torch.set_grad_enabled(program.training):
            call = way(column, program, size, given)
            wrong = error(column, program, given, call)
            graph = size[0] < 1024 and not program.training
            return {"ms": median(call, device, graph), "gb": peak(call, device), "error": wrong}
    except Exception as failure:
        return {"failed": f"{type(failure).__name__}: {failure}"[:300]}


def show(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in ("program", "M, K, N", *COLUMNS, "ours / Inductor", "ours / floor", "memory"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for (name, size), cells in itertools.groupby(results, key=lambda r: (r["program"], tuple(r["size"]))):
        found = {cell["column"]: cell for cell in cells}
        ms = {column: cell["ms"] for column, cell in found.items() if "ms" in cell}
        theirs = min((ms[c] for c in ("inductor", "max-autotune") if c in ms), default=math.nan)
        best = min(((ms[c], c) for c in ("triton", "cublas") if c in ms), default=(math.nan, ""))
        memory = [found.get(c, {}).get("gb") for c in (best[1], "inductor")]
        texts = [_cell(found.get(column)) for column in COLUMNS]
        texts += [f"{best[0] / theirs:.2f}", f"{best[0] / ms.get('floor', math.nan):.2f}"]
        texts.append(f"{memory[0] / memory[1]:.2f}" if all(memory) else "")
        table.add_row(name, ", ".join(map(str, size)), *texts)
    return table


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "failed" in cell:
        return "[red]failed[/]"
    wrong = cell["error"]
    return f"{cell['ms']:.4f}" + (f" [red]error {wrong:.1f}[/]" if wrong is not None and wrong > 2 else "")


# -- tile sizes ---------------------------------------------------------------------------------------------------


def candidates(rows: int) -> Iterator[tuple[str, tiles.Tiles]]:
    """The kernel's name in the tables of tiles, and the tiles to try for it."""
    if rows <= tiles.FEW_ROWS:
        first = tiles.few(torch.bfloat16, rows)
        for n, k, warps, stages in itertools.product((4, 8, 16, 32, 64), (64, 128, 256, 512, 1024), (4, 8), (2, 3, 4)):
            if 2048 <= n * k <= 16384 and (rows == 1 or n >= 16):
                yield "few", replace(first, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        return
    first = tiles.dual(tiles.HOPPER, torch.bfloat16, rows)
    shapes = (
        (128, 128, 64, 8),
        (256, 64, 64, 8),
        (128, 64, 64, 8),
        (128, 64, 64, 4),
        (64, 128, 64, 4),
        (128, 128, 128, 8),
    )
    for (m, n, k, warps), stages, group, parts, flatten in itertools.product(
        shapes, (2, 3, 4), (4, 8, 16), (1, 2), (False, True)
    ):
        if stages * k * (m + 2 * n) * 2 <= 227 * 1024 and (rows >= m or m == 64):
            more = {"num_warps": warps, "num_stages": stages, "group": group, "parts": parts, "flatten": flatten}
            yield "dual", replace(first, block_m=m, block_n=n, block_k=k, **more)


def sweep(size: tuple[int, int, int], console: Console) -> list[dict[str, Any]]:
    """Our kernel alone, by tile sizes, the fastest first."""
    given = tensors(PROGRAMS[0], size, "cuda", torch.bfloat16)
    key = prepare(activation.silu(GATE) * UP)
    found = []
    for kind, t in track(list(candidates(size[0])), f"tiles of {size}", console=console, transient=True):
        table: dict[Any, Fact[tiles.Tiles]] = tiles.FEW if kind == "few" else tiles.DUAL
        place = (size[0] == 1, 16) if kind == "few" else (tiles.HOPPER, 16)
        usual = table[place]
        table[place] = Fact(t)
        launch.program(key).calls.clear()

        def call() -> Any:
            return gated_mlp(given[0], given[1], given[2], None, None, key, "separate", "dual", False, torch.bfloat16)

        try:
            found.append({"size": size, "tiles": asdict(t), "ms": median(call, "cuda", size[0] < 1024)})
        except Exception as failure:
            found.append({"size": size, "tiles": asdict(t), "failed": f"{type(failure).__name__}: {failure}"[:200]})
        table[place] = usual
    launch.program(key).calls.clear()
    return sorted(found, key=lambda r: r.get("ms", math.inf))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", nargs="*", choices=[p.name for p in PROGRAMS], help="only these programs")
    parser.add_argument("--rows", nargs="*", type=int, help="only sizes with so many rows")
    parser.add_argument("--column", nargs="*", choices=COLUMNS, help="only these columns")
    parser.add_argument("--sweep", action="store_true", help="our kernel alone, by tile sizes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    console = Console()
    device = "cpu" if options.quick or not torch.cuda.is_available() else "cuda"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    sizes = [s for s in (QUICK if options.quick else SIZES) if not options.rows or s[0] in options.rows]
    triton = importlib.metadata.version("triton")
    about = {"device": name, "torch": torch.__version__, "triton": triton, "dtype": "bfloat16"}
    results: list[dict[str, Any]] = []

    def store() -> None:
        if options.json:
            options.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")

    if options.sweep:
        for size in sizes:
            results += sweep(size, console)
            for r in [r for r in results if r["size"] == size][:8]:
                console.print(r)
            store()
        return
    cells = [
        (program, size, column)
        for program in PROGRAMS
        if not options.program or program.name in options.program
        for size in sizes
        if not (program.training and size[0] < 256 and not options.quick)
        for column in options.column or COLUMNS
        if applies(column, program)
    ]
    for program, size, column in track(cells, "timing", console=console, transient=True):
        cell = measure(column, program, size, device, torch.bfloat16)
        results.append({"program": program.name, "size": size, "column": column, **cell})
        store()
    console.print(show(results, f"gated MLPs, bf16, ms, {name}, torch {torch.__version__}"))
    for r in results:
        if "failed" in r:
            console.print(f"{r['program']} {r['size']} {r['column']}: {r['failed']}", style="red")


if __name__ == "__main__":
    main()
