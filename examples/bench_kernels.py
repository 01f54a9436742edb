"""Times the kernels of a row of a benchmark one by one: where the time of a column goes, and what its host costs.

    python examples/bench_kernels.py bias-act-dropout "up, training K1024" --columns inductor,xformers-triton
    python examples/bench_kernels.py gated-mlp "mlp, backward M16384 K1024" --json kernels.json    # on a CUDA device

"kernels" is the sum of their times, which no host can make longer; "host" is the time until a call has been launched,
"ms" that of a call on a device which its host is ahead of. Where "host" is the larger one, a program of this row alone
takes as long as its host does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from xfcompile.bench import registry
from xfcompile.bench.job import Place
from xfcompile.bench.surroundings import surroundings
from xfcompile.bench.timing import Rounds, interleaved, wall


def kernels(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """Name, number and milliseconds of the kernels of a call, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        call()
        torch.cuda.synchronize()
    found = [x for x in seen.key_averages() if x.device_type == DeviceType.CUDA and x.self_device_time_total > 0]
    found.sort(key=lambda x: -x.self_device_time_total)
    return [{"kernel": x.key, "count": x.count, "ms": x.self_device_time_total / 1e3} for x in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=[name for name in registry.NAMES if name != "models"])
    parser.add_argument("row", help="words of its title; the first row that has them all")
    parser.add_argument("--columns", default="inductor,xformers,xformers-triton")
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("kernels are timed on a CUDA device, and torch sees none")
    benchmark = registry.benchmark(options.benchmark)
    words = options.row.lower().split()
    rows = [row for row in benchmark.rows("gpu") if all(word in row.title.lower() for word in words)]
    if not rows:
        parser.error(f"no row of {options.benchmark} has all of {words}: see `python -m xfcompile bench ... --list`")
    (row, *_) = rows
    work = benchmark.prepare(row, Place("cuda", torch.bfloat16, "gpu"))
    results = []
    for column in options.columns.split(","):
        torch._dynamo.reset()
        with torch.set_grad_enabled(work.grad):  # type: ignore[union-attr]
            call = work.way(column)  # type: ignore[union-attr]
            ms = interleaved({column: call}, "cuda", Rounds(most=15))[column].ms
            host = statistics.median(wall(call) for _ in range(15))
            found = kernels(call)
        results.append({"column": column, "ms": ms, "host": host, "kernels": found})
        print(f"{row.title}: {column}: {ms:.3f} ms, host {host:.3f}, kernels {sum(k['ms'] for k in found):.3f}")
        for kernel in found[:12]:
            print(f"    {kernel['ms']:8.3f} ms {kernel['count']:4d}  {kernel['kernel'][:90]}")
    if options.json is not None:
        whole = {**surroundings("cuda"), "benchmark": options.benchmark, "row": row.title, "results": results}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
