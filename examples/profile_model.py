"""Where a step of one of the benchmark's models spends its time, kernel by kernel, under Inductor and this backend.

    python examples/profile_model.py "T5 1.1" --mode train                  # on a CUDA device, a minute or two
    python examples/profile_model.py "GPT-2" --attention eager --json gpt2.json
    python examples/profile_model.py Whisper --route attention=sdpa --recompile-limit 64
    python examples/profile_model.py "GPT-2" --scale quick                  # on a CPU, its operators: does it run
    python examples/profile_model.py "T5 1.1" --host                        # and which lines its host is at

Times are ms of a step, in the mean of some. "Waiting" is what a step takes beyond its kernels: the GPU waits for its
host there. A step's time is measured without the profiler, whose own work would be part of it. With --host the threads
that run Python are looked at now and then: the share of looks that found each line at work, "at" it or below it. Looks
come where Python or a library gives its lock up, so that calls that do so are seen more often than they last.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from xfcompile import families
from xfcompile.bench import columns as c
from xfcompile.bench import models
from xfcompile.bench.job import Place, Row
from xfcompile.bench.surroundings import surroundings
from xfcompile.bench.zoo import MODELS

KINDS: dict[str, str] = {
    "attention by this backend": r"^(attention_(for|back)ward|decode_|tile_|prepare_rows|finish_dq|fill_dead)",
    "gated MLPs and activations by this backend": r"^(gated_|(forward|backward|linear|partial_sum|gemm)$)",
    "attention by SDPA": r"flash|fmha|cudnn.*sdpa|attention",
    "products of matrices": r"gemm|nvjet|cutlass|xmma|cublas|split_?k|\bb?mm\b|addmm|gemv",
    "fused by Inductor": r"^triton_",
    "copies and fills": r"memcpy|memset|fill|copy",
}
"""By which of these its name matches first, letters of any size; what matches none is "the rest"."""
REST = "the rest"


@dataclass
class Kernel:
    """ms: of a step, of all its launches together."""

    name: str
    kind: str
    launches: float
    ms: float


@dataclass
class Profile:
    """Of one column. step_ms: a step, from a device that does nothing to one that is done. busy_ms: its kernels. host:
    the share of looks at its threads that found a line, at work itself or in what it called."""

    column: str
    step_ms: float
    busy_ms: float
    kernels: list[Kernel] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)

    @property
    def waiting(self) -> float:
        return max(0.0, self.step_ms - self.busy_ms)

    def by_kind(self) -> dict[str, float]:
        found = dict.fromkeys([*KINDS, REST], 0.0)
        for kernel in self.kernels:
            found[kernel.kind] += kernel.ms
        return found


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def profiled(column: str, call: Callable[[], Any], device: str, steps: int, look_s: float = 0.0) -> Profile:
    """Steps after two that compile and warm up. look_s: for so long, more steps are made to look at the host."""

    def finished() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    finished()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    finished()
    step_ms = (time.perf_counter() - start) * 1e3 / steps

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        for _ in range(steps):
            call()
        finished()
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    kernels = []
    for event in seen.key_averages():
        us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if event.device_type == wanted and us > 0:
            kernels.append(Kernel(event.key, kind_of(event.key), event.count / steps, us / 1e3 / steps))
    kernels.sort(key=lambda kernel: -kernel.ms)
    host = looked_at(call, finished, look_s) if look_s else {}
    return Profile(column, step_ms, sum(kernel.ms for kernel in kernels), kernels, host)


LOOK_S = 0.0005
"""Between looks at what the host does."""


def looked_at(call: Callable[[], Any], finished: Callable[[], None], seconds: float) -> dict[str, float]:
    """The shares of looks that found a line of Python at work in some thread, steps being made for so long."""
    found: Counter[str] = Counter()
    done, mine = threading.Event(), threading.get_ident()
    looks = 0

    def look() -> None:
        nonlocal looks
        me = threading.get_ident()
        while not done.wait(LOOK_S):
            looks += 1
            frames = [f for i, f in sys._current_frames().items() if i != me and _works(f, i == mine)]
            found.update({line for frame in frames for line in _lines(frame)})

    usual = sys.getswitchinterval()
    sys.setswitchinterval(LOOK_S / 10)
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            call()
            finished()
    finally:
        done.set()
        watcher.join()
        sys.setswitchinterval(usual)
    return {line: count / looks for line, count in found.most_common()}


def _works(frame: FrameType, main: bool) -> bool:
    """Whether a thread is in a step: the one that calls, and those of autograd, which begin in compiled code."""
    return main or "threading" not in _outermost(frame).f_code.co_filename


def _outermost(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def _lines(frame: FrameType | None) -> list[str]:
    lines = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        lines.append(f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return [f"at {lines[0]}", *lines]


def host_table(p: Profile, most: int) -> Table:
    table = Table(f"{p.column}: the host is", "looks", box=None)
    for line, share in list(p.host.items())[:most]:
        table.add_row(line, f"{share:.1%}")
    return table


def kinds_table(profiles: Sequence[Profile]) -> Table:
    table = Table("ms of a step", *[p.column for p in profiles], box=None)
    for kind in [*KINDS, REST]:
        times = [p.by_kind()[kind] for p in profiles]
        if any(times):
            table.add_row(kind, *[f"{ms:.2f}" for ms in times])
    table.add_row("waiting", *[f"{p.waiting:.2f}" for p in profiles])
    table.add_row("the step", *[f"{p.step_ms:.2f}" for p in profiles], style="bold")
    return table


def kernels_table(p: Profile, most: int) -> Table:
    table = Table(f"{p.column}: kernel", "kind", "launches", "ms", "of the step", box=None)
    for kernel in p.kernels[:most]:
        name = kernel.name if len(kernel.name) <= 72 else f"{kernel.name[:69]}..."
        share = kernel.ms / p.step_ms
        table.add_row(name, kernel.kind, f"{kernel.launches:.0f}", f"{kernel.ms:.3f}", f"{share:.0%}")
    return table


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[name for name, model in MODELS.items() if "infer" in model.modes])
    parser.add_argument("--mode", choices=[models.INFER, models.TRAIN], default=models.TRAIN)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--backends", default=f"{c.INDUCTOR},{c.XFORMERS}", help="columns, separated by commas")
    parser.add_argument("--scale", choices=["gpu", "cpu", "quick"], help="gpu on a CUDA device, else cpu")
    parser.add_argument(
        "--route", action="append", default=[], metavar="FAMILY=ROUTE", help="attention=sdpa, as options"
    )
    parser.add_argument("--recompile-limit", type=int, default=8, help="compilations of a function that Dynamo allows")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--most", type=int, default=20, help="kernels of each column that are shown")
    parser.add_argument("--host", action="store_true", help="show which lines the host is at, too")
    parser.add_argument("--json", type=Path, help="write all kernels there")
    asked = parser.parse_args(given)
    columns = asked.backends.split(",")
    if unknown := [name for name in columns if name not in models.BENCHMARK.columns]:
        parser.error(f"--backends: {', '.join(unknown)}: there are {', '.join(models.BENCHMARK.columns)}")
    for route in asked.route:
        family, equals, name = route.partition("=")
        if not equals or name not in families.routes().get(family, ()):
            known = ", ".join(f"{family}={'|'.join(names)}" for family, names in families.routes().items())
            parser.error(f"--route {route}: it is one of {known}")
    if asked.attention not in MODELS[asked.model].attentions:
        parser.error(f"--attention: {asked.model} has {', '.join(MODELS[asked.model].attentions)}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = Place(
        device,
        torch.bfloat16 if device == "cuda" else torch.float32,
        asked.scale or ("gpu" if device == "cuda" else "cpu"),
    )
    routes = dict(route.partition("=")[::2] for route in asked.route)
    work = models.prepare(Row(asked.model, asked.mode, (), asked.attention), place, routes)
    console = Console()
    profiles = []
    limit = torch._dynamo.config.patch(recompile_limit=asked.recompile_limit)
    with torch.set_grad_enabled(asked.mode == models.TRAIN), limit:
        for column in columns:
            with console.status(f"{asked.model}, {asked.mode}: {column}"):
                profiles.append(profiled(column, work.way(column), device, asked.steps, 4.0 if asked.host else 0.0))
            torch._dynamo.reset()
    console.print(kinds_table(profiles))
    for p in profiles:
        console.print()
        console.print(kernels_table(p, asked.most))
        if p.host:
            console.print()
            console.print(host_table(p, 3 * asked.most))
    if asked.json is not None:
        about = {"model": asked.model, "mode": asked.mode, "attention": asked.attention, "scale": place.scale,
                 "routes": routes, "recompile_limit": asked.recompile_limit}  # fmt: skip
        found = {**surroundings(device), **about, "columns": [asdict(p) for p in profiles]}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"results: {asked.json}")


if __name__ == "__main__":
    main()
