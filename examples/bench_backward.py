"""Times the kernels of attention's backward with many tile sizes: what `choose_backward` rests on.

    python examples/bench_backward.py --out examples/results/backward.json --processes 15

Needs a CUDA GPU. Programs are compiled as a user's are and made to take our kernels; times are a profiler's, in ms, of
each kernel of a backward alone, in bf16, the median of a few. In a first pass the kernels are compiled by so many
processes, in a second one they are timed. Beside them stands the one kernel for Hopper that computes all three
gradients, with what runs before and after it, where it is launched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from xfcompile.bench import attention, columns
from xfcompile.bench.programs import Sizes, programs, tensors
from xfcompile.bench.surroundings import surroundings
from xfcompile.kernels.attention import backward_call, backward_layout, fit, launch_backward, launch_hopper_backward
from xfcompile.kernels.attention.tiles import Tiles

ONE, ONE_RUNS = "dq, dk and dv", ("prepare_rows", "attention_backward", "finish_dq")
"""The kernel for Hopper that computes all three, and what is launched for it."""

SIZES = (Sizes(4, 32, 4096, 64), Sizes(4, 16, 4096, 128))
KERNELS = {
    "no mask": ("dq", "dkdv"), "soft-cap, causal": ("dq", "dkdv"), "dense bias": ("dq", "dkdv", "load"),
    "T5 bias": ("load",), "documents": ("dq", "dkdv"), "sliding window": ("dq", "dkdv"), "ALiBi": ("dq", "dkdv"),
    "key padding": ("dq", "dkdv"),
}  # fmt: skip
"""Of programs, those that are timed."""


def _tiles(*sizes: tuple[int, int, int, int]) -> list[Tiles]:
    return [Tiles(*each) for each in sizes]


CANDIDATES = {
    "dq": _tiles(
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 3),
        (128, 128, 8, 2), (64, 128, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2),
    ),
    "dkdv": _tiles(
        (64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 3),
        (128, 128, 8, 2), (32, 128, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2),
    ),
    "load": _tiles(
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 1), (128, 64, 8, 1), (128, 64, 8, 2), (64, 128, 8, 2),
        (128, 128, 8, 1), (128, 128, 16, 1), (128, 128, 8, 2), (128, 64, 4, 1),
    ),
}  # fmt: skip
RUNS = len(CANDIDATES["dq"])
DEFAULT, ALL_AT_ONCE = -1, -2
"""In place of a candidate's number: the tiles that are usual; and the kernel for Hopper."""
REPEATS = 3


@dataclass
class Trial:
    """The tiles that the next backward takes: the candidates of one number. used: what they became, by kernel."""

    number: int = 0
    used: dict[str, Tiles] = field(default_factory=dict)

    def install(self) -> None:
        chosen, launched = backward_call.choose_backward, fit.launch
        asked: list[tuple[str, Tiles]] = []

        def choose(name: str, *about: Any) -> Tiles:
            kernel = "load" if name.startswith("load") else name
            asked.append((kernel, CANDIDATES[kernel][self.number] if self.number >= 0 else chosen(name, *about)))
            return asked[-1][1]

        def launch(call: Callable[[Tiles], Any], candidates: Sequence[Any], *about: Any) -> Tiles:
            if not asked:  # of a forward
                return launched(call, candidates, *about)
            kernel, _ = asked.pop()
            self.used[kernel] = launched(call, candidates, *about)
            return self.used[kernel]

        def definition(*about: Any) -> Any:
            raise RuntimeError("no tiles fit")

        one = launch_hopper_backward.run

        def all_at_once(*about: Any) -> bool:
            return self.number == ALL_AT_ONCE and one(*about)

        launch_hopper_backward.run = all_at_once
        backward_call.choose_backward = choose  # type: ignore[assignment]
        launch_backward.by_definition = definition  # type: ignore[assignment]
        fit.launch = launch  # type: ignore[assignment]


def step(name: str, sizes: Sizes) -> Callable[[], Any]:
    """A forward and backward of a program, by our kernels."""
    (program,) = (p for p in programs(torch.bfloat16) if p.name == name)
    x = tensors(program, sizes, torch.device("cuda"), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x if program.learned else x[:3])]
    fn = columns.compiled(program.plain, "xformers-triton", attention.FAMILY, dynamic=False)
    dout = torch.randn_like(x[0])
    return lambda: torch.autograd.grad(fn(*x), leaves, dout)


def kernels(call: Callable[[], Any], repeats: int) -> list[tuple[str, float]]:
    """Each kernel that so many calls launch, with its microseconds; and 0 of what else the profiler has seen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return [(event.name, event.device_time) for event in profile.events() or ()]


def times(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel of a backward."""
    found: dict[str, list[float]] = {}
    for kernel, us in kernels(call, REPEATS):
        if kernel.startswith("attention_backward_") or kernel in ONE_RUNS:
            name = kernel.removeprefix("attention_backward_").rstrip("0123456789")
            found.setdefault(name, []).append(us / 1e3)
    each = {name: statistics.median(times) for name, times in found.items()}
    if "attention_backward" in each:
        each[ONE] = sum(each.pop(name) for name in ONE_RUNS)
    return each


def measured(name: str, sizes: Sizes, trial: Trial, call: Callable[[], Any], timed: bool) -> list[dict[str, Any]]:
    trial.used.clear()
    backward_layout.prepare.cache_clear()
    about = {"program": name, "dim": sizes.dim, "candidate": trial.number}
    try:
        call()
        torch.cuda.synchronize()
        found = times(call) if timed else {}
    except Exception as error:
        return [{**about, "failed": f"{type(error).__name__}: {error}"[:120]}]
    return [
        {**about, "kernel": kernel, "tiles": None if kernel == ONE else asdict(trial.used[kernel]), "ms": found[kernel]}
        for kernel in ((ONE,) if trial.number == ALL_AT_ONCE else KERNELS[name])
        if kernel in found
    ]


def in_parts(command: Sequence[str], processes: int) -> None:
    """Runs a command whose last option is `--part`, in so many processes, each of which compiles its part."""
    parts = [subprocess.Popen([*command, str(n), str(processes)]) for n in range(processes)]
    for part in parts:
        part.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--processes", type=int, default=1, help="that compile at once")
    parser.add_argument("--only", action="append", help="a program; may be repeated")
    parser.add_argument("--part", type=int, nargs=2, metavar=("N", "OF"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found")
    chosen = options.only or list(KERNELS)
    jobs = [(sizes, name, n) for sizes in SIZES for name in chosen for n in range(ALL_AT_ONCE, RUNS)]
    if options.processes > 1 and not options.part:
        more = [word for name in chosen for word in ("--only", name)]
        command = [sys.executable, __file__, *more, "--part"]
        in_parts(command, options.processes)
    if options.part:
        # Neighbours are compiled by different processes.
        jobs = jobs[options.part[0] :: options.part[1]]
    trial = Trial()
    trial.install()
    about = surroundings("cuda")
    rows: list[dict[str, Any]] = []
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for sizes, name, number in track(jobs, "kernels", disable=bool(options.part)):
        trial.number = number
        if (name, sizes.dim) not in calls:
            calls.clear()
            torch._dynamo.reset()
            calls[name, sizes.dim] = step(name, sizes)
        rows += measured(name, sizes, trial, calls[name, sizes.dim], not options.part)
        if options.out and not options.part:
            options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if not options.part:
        show(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    console = Console()
    for sizes in SIZES:
        for kernel in CANDIDATES:
            mine = [r for r in rows if (r["dim"], r.get("kernel")) == (sizes.dim, kernel)]
            names = list(dict.fromkeys(r["program"] for r in mine))
            table = Table("tiles", *names, title=f"{kernel}, D{sizes.dim}: ms, and what fitted where the tiles did not")
            for number in range(DEFAULT, RUNS):
                wanted = "the default" if number < 0 else _words(CANDIDATES[kernel][number])
                cells = []
                for name in names:
                    of = [r for r in mine if (r["program"], r["candidate"]) == (name, number)]
                    words = _words(Tiles(**of[0]["tiles"])) if of else ""
                    cells.append(f"{of[0]['ms']:.3f}{'' if words == wanted else f' ({words})'}" if of else "-")
                table.add_row(wanted, *cells)
            console.print(table)
        mine = [r for r in rows if (r["dim"], r.get("kernel")) == (sizes.dim, ONE)]
        if mine:
            table = Table(*(r["program"] for r in mine), title=f"{ONE} by one kernel, D{sizes.dim}: ms")
            table.add_row(*(f"{r['ms']:.3f}" for r in mine))
            console.print(table)


def _words(tiles: Tiles) -> str:
    return f"{tiles.block_m}x{tiles.block_n} w{tiles.num_warps} s{tiles.num_stages}"


if __name__ == "__main__":
    main()
