"""Times attention's forward kernel for Hopper, written in several ways: what the table of `hopper_variant` rests on.

    python examples/bench_hopper_attention.py --out examples/results/hopper_attention.json --processes 15

Needs a Hopper GPU. Times are of the kernel alone, by events, in ms, in bf16: the median of samples that take turns.
"default" is what is launched by default, with its lists of tiles; "cuDNN" is SDPA's, without a mask and without a bias,
to compare with. Errors are the largest of some heads' outputs and log-sum-exps, against fp64. In a first pass the
kernels are compiled by so many processes, in a second one they are timed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sympy
import torch
import triton
from rich.console import Console
from rich.table import Table

from xfcompile.bench.programs import CAP, WINDOW, Program, Sizes, programs, tensors
from xfcompile.kernels.attention import forward_call, hopper, launch, launch_hopper, lists, prepare, template
from xfcompile.kernels.attention.arguments import mask_values
from xfcompile.kernels.attention.exactness import speed
from xfcompile.kernels.attention.hopper_variant import Variant
from xfcompile.kernels.attention.programs import program as generated
from xfcompile.score import I, J, Load, S
from xfcompile.site import Operand, ScoreSpec

SIZES = (Sizes(4, 32, 4096, 64), Sizes(4, 16, 4096, 128))
DTYPE = torch.bfloat16
SAMPLES, CALLS = 7, 4
HEADS = ((0, 0), (1, 5), (3, -1))
"""Batches and heads that are compared."""

NAMES = (
    "no mask", "causal", "prefix LM", "key padding", "ALiBi", "soft-cap", "soft-cap, causal", "causal from a buffer",
    "T5 bias", "dense bias",
)  # fmt: skip

BOUNDED = ("causal", "prefix LM", "soft-cap, causal")
LISTED = ("key padding", "causal from a buffer", "T5 bias")
FEATURES = {"ALiBi": "columns", "soft-cap": "bounded", "soft-cap, causal": "bounded", "dense bias": "tiles"}
"""What the score of a program allows."""

POLYNOMIALS = {
    ("no mask", 64): ["3 turns persistent", "2 persistent"],
    ("no mask", 128): ["2 persistent"],
    ("causal", 64): ["2 queued"],
    ("causal", 128): ["2"],
    ("key padding", 64): ["2 persistent"],
    ("key padding", 128): ["2 persistent"],
    ("ALiBi", 64): ["3 turns persistent columns"],
    ("ALiBi", 128): ["2 turns persistent columns"],
    ("soft-cap", 64): ["2 persistent bounded", "3 persistent bounded", "3 turns persistent bounded"],
    ("soft-cap", 128): ["2 persistent bounded", "2 turns persistent bounded"],
    ("soft-cap, causal", 64): ["2 queued bounded"],
    ("soft-cap, causal", 128): ["2 queued bounded"],
}
"""Variants that are timed with polynomials too."""


def variants(name: str, dim: int) -> dict[str, Variant]:
    """By their fields, those that a program is timed with."""
    feature = FEATURES.get(name)
    # Lists are of 128 rows, and of 128 columns three warpgroups have too few registers.
    groups = (2,) if dim == 128 or name in (*LISTED, *BOUNDED) else (2, 3)
    flags = (False, True)
    made: dict[str, Variant] = {}
    orders = ("", "queued") if name in BOUNDED else ("", "persistent", "queued")
    for has, warpgroups, turns, order in itertools.product(flags if feature else (False,), groups, flags, orders):
        if name == "dense bias" and not has:
            continue
        named = {"turns": turns, **({order: True} if order else {}), **({feature: True} if feature and has else {})}
        words = [str(warpgroups), *(word for word, value in named.items() if value)]
        made[" ".join(words)] = Variant(stages(dim, warpgroups, named), warpgroups, **named)
    for key in POLYNOMIALS.get((name, dim), ()):
        made |= {f"{key} polynomials {n}": replace(made[key], polynomials=n) for n in range(1, 5)}
    return made


def stages(dim: int, warpgroups: int, named: Mapping[str, bool]) -> int:
    """As many as there is room for."""
    if dim == 128:
        return 2 if "tiles" in named or "columns" in named else 3
    return 3 if "tiles" in named and warpgroups == 3 else 4


def program(name: str) -> Program:
    return next(p for p in programs(DTYPE) if p.name == name)


def spec_of(name: str, sizes: Sizes) -> ScoreSpec:
    """The score as a compiled program's, whose numbers are no roots, and whose tensors may hold any number."""
    if name == "causal from a buffer":
        spec = ScoreSpec(S / sympy.sqrt(sizes.dim), sympy.Ne(Load(0, 0, 0, I, J), 0), "nan", coarse=True)
        spec = replace(spec, operands=(Operand(torch.float32, 4),))
    else:
        spec = program(name).spec(sizes)
    far = bool(spec.score.atoms(Load))
    return replace(spec, far=far, score=spec.score.xreplace({sympy.sqrt(2): sympy.Float(math.sqrt(2), 17)}))


def inputs(name: str, sizes: Sizes) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """q, k and v; what the score loads."""
    q, k, v, *own = tensors(program(name), sizes, torch.device("cuda"), DTYPE)
    operands = own if name == "causal from a buffer" else program(name).operands(sizes, *own)
    return [q, k, v], operands


def expected(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, operands: Sequence[torch.Tensor], b: int, h: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one head, in fp64."""
    length, dim = q.shape[2:]
    n = torch.arange(length, device=q.device)
    i, j = n[:, None], n[None, :]
    s = q[b, h].double() @ k[b, h].double().T
    if name != "T5 bias":
        s = s / math.sqrt(dim)
    x = operands[0].double() if operands and operands[0].is_floating_point() else None
    if name == "key padding":
        s = s + x[b, 0]
    elif name == "ALiBi":
        s = s + x[h] * (j - i)
    elif name in ("soft-cap", "soft-cap, causal"):
        s = CAP * torch.tanh(s / CAP)
    elif name == "causal from a buffer":
        s = s.masked_fill(x[0, 0] == 0, -math.inf)
    elif name == "T5 bias":
        s = s + x[h][j - i + length - 1]
    elif name == "dense bias":
        s = s + x[0, h]
    if name in BOUNDED:
        s = s.masked_fill((j > i) & (j >= WINDOW if name == "prefix LM" else True), -math.inf)
    return s.softmax(-1) @ v[b, h].double(), s.logsumexp(-1)


class Case:
    """A program at a size, and the launches of its variants."""

    def __init__(self, name: str, sizes: Sizes) -> None:
        self.name, self.sizes = name, sizes
        self.key = prepare(spec_of(name, sizes))
        self.prepared = generated(self.key)
        self.qkv, self.operands = inputs(name, sizes)

    def call(self, variant: Variant | None) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """A launch, of what is launched by default for None."""
        q, k, v = self.qkv
        if variant is None:
            return lambda: launch.run(q, k, v, self.operands, [], [], self.key)
        spec = self.prepared.spec
        flags: dict[str, Any] = {"UNIT": template.unit(spec, DTYPE)}
        if "FAST" in self.prepared.kernel(False).arg_names:
            flags["FAST"] = speed(spec, q)
        strides = [stride for operand in self.operands for stride in operand.stride()]
        kernel = launch_hopper.Hopper(self.prepared, q, k, v, strides, flags, False, self.operands, variant)
        out, lse = forward_call.outputs(q, v)
        tiles = None
        if self.prepared.mask is not None:
            arguments = mask_values(self.prepared, self.operands, [])
            shape = (*q.shape[:3], k.shape[2])
            tiles = lists.run(q, *arguments, shape, hopper.ROWS, hopper.KEYS, self.prepared.mask)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            kernel(q, k, v, out, lse, self.operands, [], tiles)
            return out, lse

        return run

    def lists(self) -> Callable[[], Any]:
        """Makes the lists of tiles, of which "default" makes some for each call."""
        mask, (q, k, _) = self.prepared.mask, self.qkv
        assert mask is not None
        arguments = mask_values(self.prepared, self.operands, [])
        return lambda: lists.run(q, *arguments, (*q.shape[:3], k.shape[2]), hopper.ROWS, hopper.KEYS, mask)

    def cudnn(self) -> Callable[[], Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run() -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(*self.qkv)

        return run


def errors(found: tuple[torch.Tensor, torch.Tensor], exact: Sequence[Any]) -> dict[str, Any]:
    out, lse = found
    return {
        "out": max((out[b, h].double() - x).abs().max().item() for b, h, x, _ in exact),
        "lse": max((lse[b, h].double() - y).abs().max().item() for b, h, _, y in exact),
        "finite": bool(torch.isfinite(out).all() and torch.isfinite(lse).all()),
    }


def sample(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def measured(name: str, sizes: Sizes, only: str | None, marks: Path | None) -> list[dict[str, Any]]:
    case = Case(name, sizes)
    b_h = [(b, h % sizes.heads) for b, h in HEADS]
    exact = [(b, h, *expected(name, *case.qkv, case.operands, b, h)) for b, h in b_h]
    rows: list[dict[str, Any]] = []
    calls: list[Callable[[], Any]] = []
    usual = None
    wanted = {key: v for key, v in variants(name, sizes.dim).items() if only is None or only in key}
    for key, variant in {"default": None, **wanted}.items():
        about = {"program": name, "dim": sizes.dim, "variant": key}
        if marks is not None and state(marks, name, sizes, key) != "ok":
            print(f"{name} D{sizes.dim} {key}: was not compiled: {state(marks, name, sizes, key)}", flush=True)
            rows.append({**about, "failed": state(marks, name, sizes, key)})
            continue
        try:
            call = case.call(variant)
            found = call()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{name} D{sizes.dim} {key}: {type(error).__name__}: {error}"[:300], flush=True)
            rows.append({**about, "failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        if usual is None:
            usual = found[0].clone()
        about |= errors(found, exact)
        about["moved"] = (found[0].float() - usual.float()).abs().max().item()
        rows.append(about)
        calls.append(call)
    kept = [row for row in rows if "failed" not in row]
    kept.append({"program": name, "dim": sizes.dim, "variant": "cuDNN"})
    calls.append(case.cudnn())
    if case.prepared.mask is not None:
        kept.append({"program": name, "dim": sizes.dim, "variant": "lists"})
        calls.append(case.lists())
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        sample(call)
    for _ in range(SAMPLES):
        for n, call in enumerate(calls):
            times[n].append(sample(call))
    for row, each in zip(kept, times, strict=True):
        row["ms"] = statistics.median(each)
        row["least"] = min(each)
        words = "" if "out" not in row else f"out {row['out']:.1e} lse {row['lse']:.1e} moved {row['moved']:.1e}"
        bad = "" if row.get("finite", True) else " NOT FINITE"
        print(f"{name} D{sizes.dim} {row['variant']}: {row['ms']:.3f} ({row['least']:.3f}) {words}{bad}", flush=True)
    return [*kept, *(row for row in rows if "failed" in row)]


def mark(marks: Path, name: str, sizes: Sizes, key: str) -> Path:
    return marks / f"{name}-{sizes.dim}-{key}".replace(" ", "_")


def state(marks: Path, name: str, sizes: Sizes, key: str) -> str:
    """What became of a kernel in the first pass."""
    at = mark(marks, name, sizes, key)
    return at.read_text() if at.exists() else "not reached"


def compile_part(part: int, of: int, jobs: Sequence[tuple[str, Sizes]], only: str | None, marks: Path) -> None:
    """Launches each kernel of a part once: Triton keeps what it has compiled on the disk. One that does not end, or
    reads where it must not, is left behind with its process."""
    wanted = [
        (name, sizes, key, variant)
        for name, sizes in jobs
        for key, variant in {"default": None, **variants(name, sizes.dim)}.items()
        if only is None or only in key or variant is None
    ]
    for name, sizes, key, variant in wanted[part::of]:
        at = mark(marks, name, sizes, key)
        if at.exists():
            continue
        at.write_text("compiling")
        try:
            # The sizes that a kernel is compiled for: of numbers Triton asks whether they are multiples of 16.
            call = Case(name, replace(sizes, batch=1, heads=16)).call(variant)
            at.write_text("running")
            call()
            done = torch.cuda.Event()
            done.record()
            limit = time.monotonic() + 6
            while not done.query():
                if time.monotonic() > limit:
                    raise TimeoutError("does not end: CUDA")
                time.sleep(0.02)
            at.write_text("ok")
        except Exception as error:
            at.write_text(f"{type(error).__name__}: {error}"[:300])
            print(f"{name} D{sizes.dim} {key}: {type(error).__name__}: {error}"[:300], flush=True)
            if "CUDA" in str(error):  # the context is lost
                os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--processes", type=int, default=1, help="that compile at once")
    parser.add_argument("--only", action="append", help="a program; may be repeated")
    parser.add_argument("--dim", type=int, help="this head dim alone")
    parser.add_argument("--variant", help="variants whose name has this")
    parser.add_argument("--budget", type=float, default=110.0, help="seconds after which nothing more is measured")
    parser.add_argument("--marks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, nargs=2, metavar=("N", "OF"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    begun = time.monotonic()
    if not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found")
    chosen = options.only or list(NAMES)
    sizes = [z for z in SIZES if options.dim in (None, z.dim)]
    jobs = [(name, z) for z in sizes for name in chosen]
    if options.part:
        compile_part(*options.part, jobs, options.variant, options.marks)
        return
    marks = None
    if options.processes > 1:
        marks = Path(tempfile.mkdtemp())
        command = [sys.executable, __file__, *sys.argv[1:], "--marks", str(marks), "--part"]
        parts = [subprocess.Popen([*command, str(n), str(options.processes)]) for n in range(options.processes)]
        for part in parts:
            try:
                part.wait(max(5.0, 0.6 * options.budget - (time.monotonic() - begun)))
            except subprocess.TimeoutExpired:
                part.kill()
        print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for name, z in jobs:
        if time.monotonic() - begun > options.budget:
            print(f"{name} D{z.dim}: no time is left", flush=True)
            continue
        rows += measured(name, z, options.variant, marks)
        torch.cuda.empty_cache()
        if options.out:
            found = {
                "date": str(datetime.date.today()), "hardware": torch.cuda.get_device_name(),
                "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
                "rows": rows,
            }  # fmt: skip
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    show(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    console = Console(width=160)
    for dim in sorted({row["dim"] for row in rows}):
        mine = [row for row in rows if row["dim"] == dim]
        names = list(dict.fromkeys(row["program"] for row in mine))
        table = Table("variant", *names, title=f"D{dim}: ms")
        for variant in dict.fromkeys(row["variant"] for row in mine):
            of = {row["program"]: row for row in mine if row["variant"] == variant}
            table.add_row(variant, *(f"{of[name]['ms']:.3f}" if "ms" in of.get(name, {}) else "" for name in names))
        console.print(table)


if __name__ == "__main__":
    main()
