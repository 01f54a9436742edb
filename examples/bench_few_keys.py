"""Times attention in windows (few keys, heads of 32 columns) with many tile sizes: what `tiles.WINDOWS` rests on.

    python examples/bench_few_keys.py --out examples/results/few_keys.json --processes 15

Needs a CUDA GPU (`--try`: tiny sizes, Triton's interpreter on a CPU, no times). A bias of each head that is learned is
added to the scores, as in Swin, and a mask of each window; times are a profiler's, in µs, of each kernel alone, in
bf16, the median of a few. Beside them stands SDPA, which is given the sum of both. Forward and backward are compiled
and run as a user's are once; what their launches were given is then launched with other tiles. In a first pass so many
processes compile the kernels, in a second one they are timed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_backward import in_parts, kernels
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from xfcompile.bench.surroundings import surroundings


class Windows(NamedTuple):
    """masked: whether a mask of each window is added."""

    name: str
    batch: int
    heads: int
    keys: int
    masked: bool
    dim: int = 32


SHAPES = [
    Windows(name, batch, heads, keys, masked)
    for masked in (True, False)
    for name, batch, heads, keys in (
        ("Swin-B 384, stage 1", 2048, 4, 144),
        ("Swin-B 384, stage 3", 128, 16, 144),
        ("Swin-T 224, stage 1", 4096, 3, 49),
        ("windows of 64", 1024, 8, 64),
    )
]
TINY = [Windows("tiny", 3, 2, 40, masked) for masked in (True, False)]
KERNELS = ("forward", "dq", "dkdv", "load")
CANDIDATES = {
    "forward": [
        (64, 64, 4, 3), (64, 32, 4, 2), (64, 16, 4, 3), (32, 32, 2, 2), (32, 16, 2, 3), (16, 32, 1, 2), (16, 32, 1, 3),
        (16, 16, 1, 3), (16, 64, 1, 2), (32, 64, 2, 2),
    ],
    "dq": [
        (64, 32, 4, 3), (64, 32, 4, 1), (32, 32, 2, 2), (32, 16, 2, 3), (16, 16, 1, 2), (16, 16, 1, 3), (16, 32, 1, 2),
        (64, 64, 4, 3),
    ],
    "dkdv": [
        (32, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 2, 3), (16, 16, 1, 2), (16, 32, 1, 2), (32, 32, 2, 2),
        (32, 16, 1, 2),
    ],
    "load": [
        (64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 64, 2, 2), (16, 64, 2, 2), (16, 64, 2, 3), (16, 32, 1, 2),
        (32, 32, 2, 3),
    ],
}  # fmt: skip
"""Queries and keys of a tile, warps and stages."""
NUMBERS = range(max(map(len, CANDIDATES.values())))
DEFAULT = -1
"""In place of a candidate's number: the tiles that are usual."""
REPEATS = 5


def program(masked: bool) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        """q, k, v [windows, keys, heads, dim], bias [heads, keys, keys], mask [windows, keys, keys]."""
        added = bias[None] + mask[:, None] if masked else bias[None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(1, 2).flatten(2)

    return attention


def tensors(shape: Windows, device: str) -> list[Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(shape.batch, shape.keys, shape.heads, shape.dim, device=device, dtype=dtype) for _ in range(3)
    )
    bias = torch.randn(shape.heads, shape.keys, shape.keys, device=device, dtype=dtype)
    dropped = torch.rand(shape.batch, shape.keys, shape.keys, device=device) < 0.2
    mask = torch.where(dropped, -100.0, 0.0).to(dtype)
    return [x.requires_grad_() for x in (q, k, v, bias)] + [mask]


Candidates = Mapping[str, Sequence[tuple[int, int, int, int]]]


@dataclass
class Trial:
    """What the launches of one forward and one backward were given, and the tiles that they take next."""

    candidates: Candidates
    number: int = DEFAULT
    given: dict[str, inspect.BoundArguments] = field(default_factory=dict)

    def install(self) -> None:
        from xfcompile.kernels.attention import backward_call, launch, launch_backward, launch_blocks
        from xfcompile.kernels.attention.tiles import Tiles

        usual, usual_backward = launch_blocks.choose, backward_call.choose_backward
        runs = {"forward": launch.run, "backward": launch_backward.run}

        def seen(name: str) -> Callable[..., Any]:
            def run(*arguments: Any, **more: Any) -> Any:
                self.given[name] = inspect.signature(runs[name]).bind(*arguments, **more)
                return runs[name](*arguments, **more)

            return run

        def tiles(kernel: str) -> Tiles | None:
            candidates = self.candidates.get(kernel, ())
            return Tiles(*candidates[self.number]) if 0 <= self.number < len(candidates) else None

        def choose(*about: Any) -> Tiles:
            return tiles("forward") or usual(*about)

        def choose_backward(name: str, *about: Any) -> Tiles:
            return tiles("load" if name.startswith("load") else name) or usual_backward(name, *about)

        self.runs = runs
        launch.run, launch_backward.run = seen("forward"), seen("backward")
        launch_blocks.choose, backward_call.choose_backward = choose, choose_backward  # type: ignore[assignment]

    def forget(self) -> None:
        """What is remembered of tiles, and of tensors of this layout."""
        from xfcompile.kernels.attention import backward_layout, programs

        key, needs = self.given["forward"].arguments["key"], self.given["backward"].arguments["needs"]
        forward, backward = programs.program(key), backward_layout.prepare(key, needs.operands)
        for known in (forward.fitting, forward.calls, backward.fitting, backward.layouts):
            known.clear()

    def again(self, name: str) -> Any:
        """A launch as it was, but for what a graph remembers of this call of it."""
        self.given[name].arguments["site"] = None
        return self.runs[name](*self.given[name].args, **self.given[name].kwargs)


def times(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds by kernel."""
    call()
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for name, us in kernels(call, REPEATS):
        if us > 0:
            found.setdefault(name, []).append(us)
    return {name: statistics.median(each) * len(each) / REPEATS for name, each in found.items()}


def by_kernel(found: dict[str, float]) -> dict[str, float]:
    """Ours by short names, and what else ran together."""
    known = {"attention_forward": "forward", "attention_backward_dq": "dq", "attention_backward_dkdv": "dkdv"}
    made: dict[str, float] = {}
    for name, us in found.items():
        short = "load" if name.startswith("attention_backward_load") else known.get(name, "others")
        made[short] = made.get(short, 0.0) + us
    return made


def sdpa(shape: Windows) -> dict[str, float]:
    x, fn = tensors(shape, "cuda"), program(shape.masked)
    with torch.no_grad():
        dout = torch.randn_like(fn(*x))

    def forward() -> None:
        with torch.no_grad():
            fn(*x)

    def both() -> None:
        torch.autograd.grad(fn(*x), x[:4], dout)

    return {"forward": sum(times(forward).values()), "both": sum(times(both).values())}


def prepared(shape: Windows, trial: Trial, device: str) -> None:
    from xfcompile.backend import xformers

    trial.number = DEFAULT
    torch._dynamo.reset()
    options = {"routes": {"attention": "triton"}, "patterns": ["attention"], "strict": True}
    x = tensors(shape, device)
    out = torch.compile(program(shape.masked), backend=xformers, dynamic=False, options=options)(*x)
    out.backward(torch.randn_like(out))


def measured(trial: Trial, timed: bool) -> list[dict[str, Any]]:
    """Kernels whose candidates are fewer than `trial.number` are left out."""
    trial.forget()
    rows = []
    for name, of in (("forward", KERNELS[:1]), ("backward", KERNELS[1:])):
        try:
            trial.again(name)
            found = by_kernel(times(lambda name=name: trial.again(name))) if timed else {}  # type: ignore[misc]
        except Exception as error:
            rows.append({"kernel": name, "number": trial.number, "failed": f"{type(error).__name__}: {error}"[:120]})
            continue
        for kernel in of:
            candidates = trial.candidates.get(kernel, ())
            if trial.number < len(candidates) and kernel in found:
                tiles = candidates[trial.number] if trial.number >= 0 else None
                rows.append({"kernel": kernel, "tiles": tiles and list(tiles), "us": found[kernel]})
    return rows


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """What is asked of a script that times tiles."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--processes", type=int, default=1, help="that compile at once")
    parser.add_argument("--usual", action="store_true", help="only with the tiles that are taken without being told")
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny sizes, interpreted, on a CPU")
    parser.add_argument("--part", type=int, nargs=2, metavar=("N", "OF"), help=argparse.SUPPRESS)
    return parser


def device_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Where it runs; ends the program where it cannot."""
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found; --try runs it on a CPU")
    return "cpu" if options.tiny else "cuda"


def main() -> None:
    parser = parser_of(__doc__)
    options = parser.parse_args()
    device = device_of(options, parser)
    if options.processes > 1 and not options.part:
        in_parts([sys.executable, __file__, "--part"], options.processes)
    trial = Trial(CANDIDATES)
    trial.install()
    rows: list[dict[str, Any]] = []
    about = surroundings(device)
    for shape in track(TINY if options.tiny else SHAPES, "windows", disable=bool(options.part)):
        prepared(shape, trial, device)
        if device == "cuda" and not options.part:
            rows.append({**named(shape), "kernel": "SDPA", **sdpa(shape)})
        for number in (DEFAULT,) if options.usual else (DEFAULT, *NUMBERS):
            if options.part and number % options.part[1] != options.part[0]:
                continue
            trial.number = number
            rows += [{**named(shape), **row} for row in measured(trial, device == "cuda" and not options.part)]
        if options.out and not options.part:
            options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if not options.part:
        show(rows)


def named(shape: Windows) -> dict[str, Any]:
    return {"windows": shape._asdict()}


def show(rows: list[dict[str, Any]]) -> None:
    console = Console()
    shapes = list(dict.fromkeys(tuple(r["windows"].values()) for r in rows))
    for kernel in KERNELS:
        titles = [
            f"{name}, {batch}x{heads}x{keys}{' masked' * masked}" for name, batch, heads, keys, masked, _ in shapes
        ]
        table = Table("tiles", *titles, title=f"{kernel}: µs")
        for tiles in (None, *CANDIDATES[kernel]):
            wanted = tiles and list(tiles)
            cells = []
            for shape in shapes:
                of = [r for r in rows if tuple(r["windows"].values()) == shape and r["kernel"] == kernel and "us" in r]
                cells.append(next((f"{r['us']:.0f}" for r in of if r["tiles"] == wanted), "-"))
            table.add_row("{}x{} w{} s{}".format(*tiles) if tiles else "the default", *cells)
        console.print(table)
    for r in rows:
        if r["kernel"] == "SDPA":
            console.print(f"SDPA, {r['windows']}: forward {r['forward']:.0f} µs, with its backward {r['both']:.0f}")
    failed = [r for r in rows if "failed" in r]
    for r in failed:
        console.print(f"failed: {r}")
    if failed and len(failed) == len(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
