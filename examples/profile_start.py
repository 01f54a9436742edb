"""Where the first call of one of the benchmark's models spends its time under this backend: reading, and its kernels.

    python examples/profile_start.py "BERT, padded"                          # on a CUDA device, cold and then warm
    python examples/profile_start.py "T5 1.1" --mode train --attention eager
    python examples/profile_start.py "GPT-2" --scale quick                   # on a CPU: does it run
    python examples/profile_start.py "T5 1.1" --functions functions.txt      # warm once more, by function

Each state is a process of its own: `cold` with nothing compiled, `warm` with what the first has left. It shows when
Inductor's processes first answered; when each graph's reading ended and how long it took; which calls were handed to
these processes to be compiled ahead, when, and when they were done; how long the first launches waited for them; and
how long Triton took at each first launch, which is next to nothing for a kernel that was compiled ahead. Seconds since
the call began. --functions: all of Python's functions that a third process ran, warm, as cProfile lists them; its own
time is added to each.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


def measured(name: str, mode: str, attention: str, scale: str, functions: Path | None) -> dict[str, Any]:
    """In this process, which has compiled nothing yet."""
    import torch
    from torch._inductor.async_compile import AsyncCompile

    from xfcompile import ahead, backend
    from xfcompile.bench import columns as c
    from xfcompile.bench.job import Place
    from xfcompile.bench.models import TRAIN, build, step
    from xfcompile.kernels.attention import fit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, given = build(name, mode, attention, Place(device, dtype, scale))  # type: ignore[arg-type]
    x = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    (x @ x).sum().backward()
    found: dict[str, list[Any]] = {"processes": [], "readings": [], "ahead": [], "waits": [], "first launches": []}
    begin = time.perf_counter()

    def timed(kind: str, what: Callable[..., str | None], function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                now = time.perf_counter()
                if (words := what(*args)) is not None:
                    found[kind].append({"what": words, "took_s": now - since, "at_s": now - begin})

        return run

    def submitted(call: ahead.Call) -> None:
        before = len(ahead._pending)
        submit(call)
        if len(ahead._pending) > before:
            entry = {"what": call.op, "at_s": time.perf_counter() - begin}
            found["ahead"].append(entry)
            ahead._pending[-1].add_done_callback(
                lambda future: entry.update(done_s=time.perf_counter() - begin, made=_outcome(future))
            )

    submit = ahead.submit
    ahead.submit = submitted
    backend._rewritten = timed("readings", lambda gm, *_: f"{len(gm.graph.nodes)} nodes", backend._rewritten)
    ahead.settle = timed("waits", lambda: "for kernels" if ahead._pending or found["ahead"] else None, ahead.settle)
    fit.compile_first = timed(
        "first launches", lambda kernel, *_: str(getattr(kernel, "__name__", kernel)), fit.compile_first
    )
    with torch.set_grad_enabled(mode == TRAIN), contextlib.nullcontext() if functions is None else _listed(functions):
        compiled = c.compiled(model, c.XFORMERS)
        if (started := AsyncCompile._ready_future) is not None:
            started.add_done_callback(
                lambda _: found["processes"].append({"what": "answer", "at_s": time.perf_counter() - begin})
            )
        step(model, compiled, given, mode)()
        if device == "cuda":
            torch.cuda.synchronize()
    return {"total_s": time.perf_counter() - begin, **found}


@contextlib.contextmanager
def _listed(path: Path) -> Iterator[None]:
    """Writes which functions ran, and how long."""
    with cProfile.Profile() as profile:
        yield
    with path.open("w") as file:
        pstats.Stats(profile, stream=file).sort_stats("cumulative").print_stats()


def _outcome(future: Any) -> str:
    error = future.exception()
    return ", ".join(future.result()) if error is None else f"failed: {str(error).strip().splitlines()[-1][:200]}"


def show(state: str, found: dict[str, Any], console: Console) -> None:
    table = Table("what", "at", "took", "made", title=f"{state}: {found['total_s']:.1f} s", title_justify="left")
    for kind in ("processes", "readings", "ahead", "waits", "first launches"):
        for x in found[kind]:
            took = x["done_s"] - x["at_s"] if "done_s" in x else x.get("took_s", float("nan"))
            table.add_row(f"{kind}: {x['what']}", f"{x['at_s']:.1f}", f"{took:.2f}", x.get("made", ""))
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as the benchmark's rows are called")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--scale", choices=("gpu", "cpu", "quick"), default="gpu")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--functions", type=Path, help="list there how long each function took, in a third process")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.here:
        print(json.dumps(measured(asked.model, asked.mode, asked.attention, asked.scale, asked.functions)))
        return 0
    console, results = Console(), {}
    usual = [asked.model, "--mode", asked.mode, "--attention", asked.attention, "--scale", asked.scale, "--here"]
    with tempfile.TemporaryDirectory(prefix="xfcompile-start-") as folder:
        for state in ("cold", "warm"):
            with console.status(f"{asked.model}, {state}"):
                results[state] = _apart(usual, folder)
            show(state, results[state], console)
        if asked.functions is not None:
            with console.status(f"{asked.model}, by function"):
                _apart([*usual, "--functions", str(asked.functions.absolute())], folder)
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _apart(arguments: Sequence[str], folder: str) -> dict[str, Any]:
    import os

    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(
        command, env=os.environ | caches | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
