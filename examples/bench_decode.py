"""Times one step of decoding, a query row against a cache of keys that is full or partly filled, by six ways.

    python examples/bench_decode.py --json examples/results/decode.json
    python examples/bench_decode.py --quick    # tiny sizes, also on a CPU: does it run

Times are medians in ms (`triton.testing.do_bench`, which empties the L2 cache before each run), of a CUDA graph's
replay, as decoding is run, and of the call itself with its time on the host. GB/s are bytes of live keys and values
over the replay's time, and are compared with those that a copy on the device reads and writes in the same run. Errors
are largest differences of the first sequence from the program in fp64, in units of eager's own. FlexAttention's block
mask is made beforehand.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from xfcompile.backend import xformers
from xfcompile.kernels.attention import prepare
from xfcompile.score import B, J, Load, S
from xfcompile.site import Operand, ScoreSpec

COLUMNS = ("eager", "inductor", "sdpa", "flex", "xformers", "kernel")
FILLED = (1.0, 1 / 2, 1 / 4, 1 / 16)
TARGET = 0.8
"""Of a copy's bandwidth: what a kernel that reads each live key and value once should reach."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Sizes:
    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    cache: int = 8192
    dim: int = 128


@dataclass(frozen=True)
class Case:
    """mask: how the program says which keys are live: none, a boolean "mask" [B, 1, 1, S], or a "position" tensor."""

    mask: str
    filled: float

    @property
    def name(self) -> str:
        return f"{self.mask}, {self.filled:g} filled" if self.mask != "none" else "no mask"


CASES = [Case("none", 1.0), *(Case(mask, filled) for mask in ("mask", "position") for filled in FILLED)]


def expanded(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ expanded(k, q).mT / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ expanded(v, q)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ expanded(k, q).mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ expanded(v, q)


def positioned(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    return masked(q, k, v, torch.arange(k.shape[2], device=k.device) <= position)


PROGRAMS: dict[str, Callable[..., Tensor]] = {"none": plain, "mask": masked, "position": positioned}


def tensors(case: Case, z: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, the cache's keys and values, and what says how far it is filled."""
    torch.manual_seed(0)
    q = torch.randn(z.batch, z.heads, 1, z.dim, device=device, dtype=dtype)
    kv = [torch.randn(z.batch, z.kv_heads, z.cache, z.dim, device=device, dtype=dtype) for _ in range(2)]
    live = round(case.filled * z.cache)
    mask = (torch.arange(z.cache, device=device) < live).expand(z.batch, 1, 1, -1).contiguous()
    extra = {"none": [], "mask": [mask], "position": [torch.tensor([live - 1], device=device)]}[case.mask]
    return [q, *kv, *extra]


def spec(case: Case, z: Sizes) -> ScoreSpec:
    score = S / sympy.sqrt(z.dim)
    if case.mask == "mask":
        return ScoreSpec(score, sympy.Ne(Load(0, B, 0, 0, J), 0), "nan", (Operand(torch.bool, 4),))
    if case.mask == "position":
        return ScoreSpec(score, Load(0, 0) >= J, "nan", (Operand(torch.int64, 1),))
    return ScoreSpec(score)


def way(column: str, case: Case, z: Sizes, x: list[Tensor]) -> Call:
    """How one column computes the step."""
    q, k, v, *extra = x
    program = PROGRAMS[case.mask]
    if column == "eager":
        return lambda: program(*x)
    if column in ("inductor", "xformers"):
        # The function rather than its name: this also runs from a checkout that is not installed.
        compiled = torch.compile(program, backend=xformers if column == "xformers" else column, dynamic=False)
        return lambda: compiled(*x)
    if column == "kernel":
        key = prepare(spec(case, z))
        return lambda: torch.ops.xfcompile.attention(q, k, v, extra, [], [], key)[0]
    if column == "sdpa":

        def sdpa() -> Tensor:
            mask = extra[0] if case.mask == "mask" else None
            if case.mask == "position":
                mask = (torch.arange(k.shape[2], device=k.device) <= extra[0])[None, None, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        return sdpa
    return flex(case, x)


def flex(case: Case, x: list[Tensor]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, *extra = x
    block_mask = None
    if case.mask != "none":

        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return extra[0][b, 0, 0, j] if case.mask == "mask" else j <= extra[0][0]

        block_mask = create_block_mask(keep, q.shape[0], None, 1, k.shape[2], device=q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


def median(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return float(triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def replay(call: Call, device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph; on a CPU itself."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(device: torch.device, size: int) -> float:
    """GB/s that a copy reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median(lambda: target.copy_(source), device) / 1e6


def live_bytes(case: Case, z: Sizes, dtype: torch.dtype) -> int:
    return 2 * z.batch * z.kv_heads * round(case.filled * z.cache) * z.dim * dtype.itemsize


def relative_error(call: Call, case: Case, x: list[Tensor]) -> float:
    """The largest difference of the first sequence from fp64, over eager's."""
    first = [t if case.mask == "position" and t is x[-1] else t[:1] for t in x]
    program = PROGRAMS[case.mask]
    exact = program(*(t.double() if t.is_floating_point() else t for t in first))
    eager = (program(*first) - exact).abs().max().item()
    return (call()[:1] - exact).abs().max().item() / eager


def measure(column: str, case: Case, z: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One cell. A column that fails says so: that too is a result."""
    torch.compiler.reset()
    try:
        x = tensors(case, z, device, dtype)
        call = way(column, case, z, x)
        call()  # compiles
        error = relative_error(call, case, x)
        ms = median(replay(call, device), device)
        found = {"ms": ms, "call_ms": median(call, device), "error": error}
        return {**found, "gb_per_s": live_bytes(case, z, dtype) / ms / 1e6}
    except Exception as failure:
        return {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200] if str(failure) else ''}"}


def show(rows: list[dict[str, Any]], z: Sizes, copy: float) -> Table:
    shape = f"B{z.batch}, {z.heads} query heads, {z.kv_heads} KV heads, D{z.dim}, cache of {z.cache}"
    table = Table(
        title=f"one step of decoding, {shape}: ms (ms with the host; error over eager's)",
        caption=f"% of the {copy:.0f} GB/s that a copy reads and writes",
    )
    table.add_column("cache")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_column("kernel: GB/s live", justify="right")
    table.add_column(f"{TARGET:.0%}", justify="right")
    for row in rows:
        times = [row[c]["ms"] for c in COLUMNS if "ms" in row[c]]
        cells = []
        for column in COLUMNS:
            cell = row[column]
            if "ms" not in cell:
                cells.append("[red]failed[/]" if "failed" in cell else "–")
                continue
            text = f"{cell['ms']:.4f}"
            text = f"[green]{text}[/]" if cell["ms"] == min(times) else text
            cells.append(f"{text} {cell['gb_per_s'] / copy:.0%} ({cell['call_ms']:.3f}; {cell['error']:.2f})")
        reached = row["kernel"].get("gb_per_s")
        cells.append("–" if reached is None else f"{reached:.0f}")
        cells.append("–" if reached is None else "[green]reached[/]" if reached >= TARGET * copy else "[red]no[/]")
        table.add_row(row["cache"], *cells)
    return table


def surroundings(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="only these columns")
    parser.add_argument("--batch", type=int, default=Sizes.batch)
    parser.add_argument("--cache", type=int, default=Sizes.cache)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, also on a CPU")
    options = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available() and not options.quick:
        parser.error("this measures GPUs and none was found; --quick runs tiny sizes on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    z = Sizes(2, 8, 2, 512, 16) if options.quick else Sizes(batch=options.batch, cache=options.cache)
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress, torch.no_grad():
        copy = copy_bandwidth(device, 2**24 if options.quick else 2**30)
        task = progress.add_task("", total=len(CASES) * len(options.columns))
        for case in CASES:
            row: dict[str, Any] = {"cache": case.name, **{c: {} for c in COLUMNS}}
            for column in options.columns:
                progress.update(task, description=f"{case.name}, {column}")
                row[column] = measure(column, case, z, device, dtype)
                progress.advance(task)
            rows.append(row)
            # Written after each case: a long run that is cut off still leaves what it has measured.
            if options.json:
                found = {**surroundings(device), "sizes": asdict(z), "copy_gb_per_s": copy, "rows": rows}
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    console.print(show(rows, z, copy))
    for row in rows:
        for column in COLUMNS:
            if "failed" in row[column]:
                console.print(row["cache"], column, row[column]["failed"], style="red")


if __name__ == "__main__":
    main()
