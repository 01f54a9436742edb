"""Times twelve attention programs in plain PyTorch: Inductor, FlexAttention by hand, this backend, its kernel, SDPA.

    python examples/bench_programs.py --json examples/results/programs.json --plot examples/results/programs.png
    python examples/bench_programs.py --train    # forward and backward
    python examples/bench_programs.py --quick    # tiny sizes on a CPU: does it run

Times are medians in ms of the forward pass in bf16 (`triton.testing.do_bench`), or of forward and backward, with the
peak of extra memory. Errors are largest differences from the program run in fp64 on a shorter sequence, in units of
eager's own. In training T5's table and the dense bias are parameters: they get gradients too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_programs import Program, Sizes, programs
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from xfcompile.backend import xformers
from xfcompile.kernels.attention import prepare

SIZES = [Sizes(4, 32, 4096, 64), Sizes(4, 16, 4096, 128)]
QUICK = [Sizes(1, 2, 64, 16)]
COLUMNS = ("inductor", "flex", "xformers", "kernel", "sdpa")
CHECKED_LENGTH = 300

# Of each program: how many times as fast as Inductor it is meant to be at least, and what part of FlexAttention's time
# it is meant to take at most.
GOALS = {
    "causal": (10.0, None),
    "causal from a buffer": (10.0, 0.95),
    "ALiBi": (5.0, 0.8),
    "soft-cap": (5.0, 0.4),
    "soft-cap, causal": (5.0, 0.4),
    "sliding window": (10.0, 0.95),
    "prefix LM": (10.0, 0.95),
    "documents": (10.0, 0.95),
    "key padding": (1.3, 0.8),
    "T5 bias": (4.0, 0.5),
    "dense bias": (1.2, 0.85),
}

# In training: at least as many times as fast as Inductor, and no more than FlexAttention's time.
TRAINING_GOALS = {
    name: (4.0 if name not in ("no mask", "causal", "key padding", "dense bias") else None, 1.0) for name in GOALS
}

Call = Callable[[], Any]


def tensors(program: Program, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v in the layout of projections, and the program's own tensors."""
    torch.manual_seed(0)
    shape = (sizes.batch, sizes.length, sizes.heads, sizes.dim)
    qkv = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    return [*qkv, *program.tensors(sizes, device, dtype)]


def way(column: str, program: Program, sizes: Sizes, x: list[Tensor]) -> Call | None:
    """How one column computes the program; None where it has no way."""
    q, k, v, *rest = x
    if column in ("inductor", "xformers"):
        # The function rather than its name: this also runs from a checkout that is not installed.
        backend = xformers if column == "xformers" else column
        compiled = torch.compile(program.plain, backend=backend, dynamic=False)
        return lambda: compiled(*x)
    if column == "kernel":
        key, operands = prepare(program.spec(sizes)), program.operands(sizes, *rest)
        return lambda: torch.ops.xfcompile.attention(q, k, v, operands, [], [], key)[0]
    if column == "sdpa":
        if program.sdpa is None:
            return None
        words: dict[str, Any] = program.sdpa(*rest)
        return lambda: F.scaled_dot_product_attention(q, k, v, **words)
    return flex(program, sizes, x)


def flex(program: Program, sizes: Sizes, x: list[Tensor]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, *rest = x
    score, mask = program.flex(*rest)
    n = sizes.length
    block_mask = None if mask is None else create_block_mask(mask, sizes.batch, None, n, n, device=q.device.type)
    scale = 1.0 if program.name == "T5 bias" else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=score, block_mask=block_mask, scale=scale)


def trained(call: Call, program: Program, x: list[Tensor]) -> Call:
    """The call, followed by its backward: the gradients of q, k, v and of what is learned."""
    leaves = x if program.learned else x[:3]
    for leaf in leaves:
        leaf.requires_grad_()
    dout = torch.randn_like(x[0])

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, dout)

    return both


def median(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        import triton

        return float(triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_memory(call: Call, device: torch.device) -> float | None:
    """GB beyond what was allocated before."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def relative_error(
    column: str, program: Program, sizes: Sizes, device: torch.device, dtype: torch.dtype, train: bool
) -> float | None:
    """The largest difference from fp64, over eager's; in training the largest such ratio of all gradients."""
    small = Sizes(min(sizes.batch, 2), sizes.heads, min(CHECKED_LENGTH, sizes.length), sizes.dim)
    x = tensors(program, small, device, dtype)
    call = way(column, program, small, x)
    if call is None:
        return None
    wide = [t.double() if t.is_floating_point() else t for t in x]
    if not train:
        exact = program.plain(*wide)
        return (call() - exact).abs().max().item() / (program.plain(*x) - exact).abs().max().item()
    dout = torch.randn_like(x[0])
    leaves = range(len(x) if program.learned else 3)

    def gradients(call: Callable[[], Tensor], x: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), [x[n] for n in leaves], dout.to(x[0].dtype))

    for t in (*[x[n] for n in leaves], *[wide[n] for n in leaves]):
        t.requires_grad_()
    right = gradients(lambda: program.plain(*wide), wide)
    eager = gradients(lambda: program.plain(*x), x)
    ours = gradients(call, x)
    largest = [((a - b).abs().max() / (c - b).abs().max()).item() for a, b, c in zip(ours, right, eager, strict=True)]
    return max(largest)


def measure(
    column: str, program: Program, sizes: Sizes, device: torch.device, dtype: torch.dtype, check: bool, train: bool
) -> dict[str, object]:
    """One cell. A column that fails says so: that too is a result."""
    torch.compiler.reset()
    try:
        error = relative_error(column, program, sizes, device, dtype, train) if check else None
        x = tensors(program, sizes, device, dtype)
        if train:
            for leaf in x if program.learned else x[:3]:
                leaf.requires_grad_()
        call = way(column, program, sizes, x)
        if call is None:
            return {}
        if train:
            call = trained(call, program, x)
        call()  # compiles
        return {"ms": median(call, device), "gb": peak_memory(call, device), "error": error}
    except Exception as failure:
        return {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200] if str(failure) else ''}"}


def show(rows: list[dict[str, Any]], sizes: Sizes, what: str) -> Table:
    shape = f"B{sizes.batch} H{sizes.heads} S{sizes.length} D{sizes.dim}"
    table = Table(title=f"{what} at {shape}: ms (extra GB; error over eager's)")
    table.add_column("program")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        times = {c: row[c]["ms"] for c in COLUMNS if "ms" in row[c]}
        cells = []
        for column in COLUMNS:
            cell = row[column]
            if "ms" not in cell:
                cells.append("[red]failed[/]" if "failed" in cell else "–")
                continue
            memory = "" if cell["gb"] is None else f"{cell['gb']:.1f}; "
            best = cell["ms"] == min(times.values())
            text = f"{cell['ms']:.3f}"
            error = "" if cell["error"] is None else f"{cell['error']:.2f}"
            note = f"{memory}{error}".removesuffix("; ")
            cells.append(f"{f'[green]{text}[/]' if best else text} ({note})")
        table.add_row(row["program"], *cells)
    return table


def goals(rows: list[dict[str, Any]], train: bool) -> Table:
    """What was meant to be reached, and what was."""
    table = Table(title="goals: times as fast as Inductor, part of FlexAttention's time")
    for column in ("program", "Inductor", "FlexAttention"):
        table.add_column(column)
    for row in rows:
        least, most = (TRAINING_GOALS if train else GOALS).get(row["program"], (None, None))
        ours, inductor, flex = (row[c].get("ms") for c in ("xformers", "inductor", "flex"))
        cells = []
        for goal, ratio, reached in (
            (least, inductor / ours if ours and inductor else None, lambda x, g: x >= g),
            (most, ours / flex if ours and flex else None, lambda x, g: x <= g),
        ):
            if goal is None or ratio is None:
                cells.append("–" if ratio is None else f"{ratio:.2f}")
            else:
                colour = "green" if reached(ratio, goal) else "red"
                cells.append(f"[{colour}]{ratio:.2f}[/] ({goal:g})")
        table.add_row(row["program"], *cells)
    return table


def plot(results: list[dict[str, Any]], path: Path, what: str) -> None:
    """Bars of times, a panel a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(13, 4.2 * len(results)), squeeze=False, layout="constrained")
    for axis, result in zip(axes[:, 0], results, strict=True):
        rows = result["rows"]
        measured = [c for c in COLUMNS if any("ms" in row[c] for row in rows)]
        for n, column in enumerate(measured):
            heights = [row[column].get("ms", float("nan")) for row in rows]
            centre = 0.16 * (n - (len(measured) - 1) / 2)
            axis.bar([x + centre for x in range(len(rows))], heights, 0.15, label=column)
        axis.set_xticks(range(len(rows)), [row["program"] for row in rows], rotation=20, ha="right")
        axis.set_ylabel("ms")
        axis.set_yscale("log")
        axis.set_title("B{batch} H{heads} S{length} D{dim}, ".format(**result["sizes"]) + what)
        axis.legend(ncols=len(measured), fontsize="small")
    figure.savefig(path, dpi=120)


def surroundings(device: torch.device) -> dict[str, str]:
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return {"hardware": hardware, "python": platform.python_version(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--plot", type=Path, help="write a bar plot (PNG) there")
    parser.add_argument("--only", action="append", help="only programs whose name contains this")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="only these columns")
    parser.add_argument("--no-errors", action="store_true", help="time only; do not compare with fp64 first")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, also on a CPU")
    options = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available() and not options.quick:
        parser.error("this measures GPUs and none was found; --quick runs tiny sizes on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = [p for p in programs(dtype) if not options.only or any(text in p.name for text in options.only)]
    results: list[dict[str, Any]] = []
    what = "forward and backward" if options.train else "forward"
    with Progress(console=console, transient=True) as progress, torch.set_grad_enabled(options.train):
        for sizes in QUICK if options.quick else SIZES:
            task = progress.add_task(f"D{sizes.dim}", total=len(chosen) * len(options.columns))
            rows: list[dict[str, Any]] = []
            results.append({"sizes": vars(sizes), "rows": rows})
            for program in chosen:
                row: dict[str, Any] = {"program": program.name, **{c: {} for c in COLUMNS}}
                for column in options.columns:
                    progress.update(task, description=f"D{sizes.dim} {program.name}, {column}")
                    row[column] = measure(column, program, sizes, device, dtype, not options.no_errors, options.train)
                    progress.advance(task)
                rows.append(row)
                # Written after each program: a long run that is cut off still leaves what it has measured.
                if options.json:
                    found = {**surroundings(device), "what": what, "results": results}
                    options.json.write_text(json.dumps(found, indent=1) + "\n")
            console.print(show(rows, sizes, what))
            console.print(goals(rows, options.train))
    failures = [
        (r["program"], c, r[c]["failed"]) for x in results for r in x["rows"] for c in COLUMNS if "failed" in r[c]
    ]
    for failure in failures:
        console.print(*failure, style="red")
    if options.plot:
        plot(results, options.plot, what)


if __name__ == "__main__":
    main()
