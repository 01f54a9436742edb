"""Times what may compute a gated MLP of few rows, beside Inductor: what its tiles and routes are chosen by.

    python examples/bench_gated_few.py --budget 90 --json examples/results/gated_few.json

Needs a GPU of compute capability 9.0 (`TRITON_INTERPRET=1` and `--try`: tiny sizes on a CPU). Kernels are compiled,
run and compared with fp32 in processes beside each other: one that says nothing for a while is ended, and what it was
at counts as failed. Then they are timed, one after the other: in CUDA graphs of several calls, each with weights of its
own, so that an L2 cache holds none of them; and the best of a size besides as `python -m xfcompile bench gated-mlp`
does, one call with an empty cache. In bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfcompile.activation import GATE, UP, silu
from xfcompile.bench.surroundings import surroundings
from xfcompile.bench.timing import Rounds, captured, interleaved, wall
from xfcompile.kernels.gated_mlp import gated_mlp, launch_few, prepare, reference, tiles
from xfcompile.kernels.gated_mlp.launch_triton import by_triton
from xfcompile.kernels.gated_mlp.operands import Dropout, operands_of, starts
from xfcompile.kernels.gated_mlp.programs import program
from xfcompile.kernels.gated_mlp.tiles import Stream, Tiles
from xfcompile.measured import Fact
from xfcompile.site import Layout

Size = tuple[int, int, int]
Call = Callable[[], Any]

FIRST: tuple[Size, ...] = ((1, 4096, 11008), (16, 4096, 11008))
SIZES: tuple[Size, ...] = FIRST + tuple(
    size
    for size in ((m, k, n) for k, n in ((4096, 11008), (4096, 14336), (1024, 2816)) for m in (1, 4, 8, 16, 32, 64, 128))
    if size not in FIRST
)
"""Rows, width and features, in the order in which they are timed."""
TRIED: tuple[Size, ...] = ((1, 64, 72), (3, 80, 64))

ROTATED = 540 * 2**20
"""Bytes of weights that are read before the same are read again."""
SILENCE = 40.0
"""Seconds after which a process that says nothing is ended."""
FORMULA = silu(GATE) * UP


@dataclass(frozen=True)
class Candidate:
    """kernel: "hopper" (`hopper_few`, by `stream`), "few" (`gated_few`, by `tiles`), or "usual": what `launch` takes
    without the former."""

    kernel: str
    stream: Stream | None = None
    tiles: Tiles | None = None

    def __str__(self) -> str:
        if self.stream is not None:
            s = self.stream
            return f"hopper: {s.groups} groups, {s.parts} parts, {s.stages} stages, {s.programs} programs"
        if self.tiles is not None:
            t = self.tiles
            return f"few: {t.block_m}x{t.block_n}x{t.block_k}, {t.num_warps} warps, {t.num_stages} stages"
        return self.kernel

    def binary(self, rows: int) -> str:
        """What of a number of rows a compiled kernel knows."""
        of_rows = tiles.columns(rows) if self.stream is not None else (rows == 1, rows % 16 == 0, tiles.padded(rows))
        return f"{self} {of_rows if self.kernel != 'usual' else rows}"

    def packed(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def unpacked(x: dict[str, Any]) -> Candidate:
        stream, sizes = x["stream"], x["tiles"]
        return Candidate(x["kernel"], stream and Stream(**stream), sizes and Tiles(**sizes))


def streams(rows: int) -> Iterator[Stream]:
    """(groups, parts, programs): the most stages that fit, and half of them."""
    wide = tiles.columns(rows)
    shapes = (
        (1, 1, 1),
        (1, 2, 1),
        (1, 4, 1),
        (1, 2, 2),
        (1, 1, 2),
        (2, 1, 1),
        (2, 2, 1),
        (3, 1, 1),
        (3, 2, 1),
        (4, 1, 1),
    )
    for groups, parts, programs in shapes:
        fitting = [
            s
            for n in range(2, 33)
            if (s := Stream(groups, parts, n, programs)).shared(wide) * programs <= tiles.SHARED - 2048 * (programs - 1)
        ]
        if fitting and wide <= tiles.WIDEST[groups]:
            yield fitting[-1]
            if len(fitting) > 4 and programs == 1 and (groups, parts) in ((1, 2), (3, 1)):
                yield replace(fitting[-1], stages=fitting[-1].stages // 2)


ONE = (
    (4, 1024, 4, 1), (4, 1024, 4, 3), (4, 2048, 4, 2), (4, 2048, 8, 2), (4, 512, 2, 3), (4, 512, 4, 4),
    (8, 512, 4, 3), (8, 512, 4, 4), (8, 512, 4, 2), (8, 1024, 8, 2), (8, 1024, 8, 3), (8, 256, 4, 4), (8, 512, 4, 1),
    (16, 256, 4, 3), (16, 256, 4, 4), (16, 512, 8, 3), (2, 1024, 2, 1), (2, 2048, 4, 3), (1, 4096, 4, 1),
    (2, 4096, 8, 1),
)  # fmt: skip
SEVERAL = (
    (16, 256, 4, 3), (16, 256, 2, 3), (16, 256, 1, 3), (32, 128, 4, 4), (32, 128, 2, 4), (64, 64, 4, 4), (64, 64, 4, 6),
    (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 4, 2), (128, 64, 8, 4), (128, 128, 8, 3),
)  # fmt: skip
"""Features, block_k, warps and stages, of one row and of several."""


def candidates(rows: int) -> Iterator[Candidate]:
    yield Candidate("usual")
    for stream in streams(rows):
        yield Candidate("hopper", stream=stream)
    if rows <= 64:
        height = 1 if rows == 1 else tiles.padded(rows)
        for n, k, warps, stages in ONE if rows == 1 else SEVERAL:
            if 2 * stages * k * (2 * n + height) <= tiles.SHARED and (warps > 1 or rows <= 16):
                yield Candidate("few", tiles=Tiles(height, n, k, warps, stages))


class Case:
    """Tensors of a size, with as many pairs of weights as are asked for, and what computes with them."""

    def __init__(self, size: Size, pairs: int, device: str) -> None:
        rows, width, self.features = size

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        self.x = random(rows, width).bfloat16()
        shape, scale = (self.features, width), 1 / math.sqrt(width)
        self.weights = [tuple((random(*shape) * scale).bfloat16() for _ in range(2)) for _ in range(pairs)]
        self.out = torch.empty(rows, self.features, device=device, dtype=torch.bfloat16)
        self.program = program(prepare(FORMULA))

    def launcher(self, candidate: Candidate) -> Callable[..., Any]:
        operands = operands_of(self.x, *self.weights[0], None, None, "separate")
        if candidate.kernel == "hopper":
            reason = "it needs a GPU" if self.x.device.type == "cpu" else None
            reason = reason or launch_few.declines(FORMULA, operands, self.out[None], False)
            if reason is not None:
                raise RuntimeError(reason)
            return launch_few.Few(FORMULA, operands, starts("separate", self.features), False, candidate.stream)
        about = (self.program, operands, "separate", Dropout(), self.out[None], False)
        if candidate.tiles is None:
            return by_triton(*about)  # type: ignore[arg-type]
        place, most = (len(self.x) == 1, 16), tiles.FEW_ROWS
        usual = tiles.FEW[place]
        tiles.FEW[place], tiles.FEW_ROWS = Fact(candidate.tiles), 64
        try:
            fitting: Any = by_triton(*about)  # type: ignore[arg-type]
            return fitting._made(candidate.tiles)
        finally:
            tiles.FEW[place], tiles.FEW_ROWS = usual, most

    def calls(self, candidate: Candidate) -> list[Call]:
        """One for each pair of weights."""
        launcher, x = self.launcher(candidate), self.x[None]

        def call(gate: Tensor, up: Tensor) -> None:
            launcher([x, gate[None], up[None], self.out[None], x, x, x, x])

        return [lambda pair=pair: call(*pair) for pair in self.weights]  # type: ignore[misc]

    def error(self, pair: int = 0) -> float:
        """Of `out`: in multiples of what rounding the exact result, and its sums in fp32, may leave."""
        gate, up = (self.x.float() @ w.float().T for w in self.weights[pair])
        exact = F.silu(gate) * up
        ulps = 0.51 if self.x.device.type == "cuda" else 1.01  # the interpreter truncates
        allowed = ulps * torch.finfo(torch.bfloat16).eps * exact.abs() + 4e-4 * (1 + exact.abs() / 16)
        return ((self.out.float() - exact).abs() / allowed).nan_to_num(math.inf).max().item()


CHECKED = (Stream(1, 1, 5), Stream(1, 4, 2), Stream(1, 2, 3, 2), Stream(2, 2, 2), Stream(3, 1, 4), Stream(4, 1, 2))
"""With these, `hopper_few` is compared with fp64 at odd sizes."""
ODD: tuple[tuple[int, int, int, Layout], ...] = (
    (1, 72, 100, "separate"), (3, 200, 33, "gate first"), (8, 1032, 257, "up first"), (9, 64, 4300, "gate even"),
    (16, 8, 7, "up even"), (17, 520, 130, "separate"), (33, 136, 96, "gate first"), (64, 264, 200, "gate even"),
    (65, 1000, 31, "separate"), (128, 328, 520, "up even"),
)  # fmt: skip
"""Rows, width, features and layout."""


def check(stream: Stream) -> dict[str, Any]:
    """The largest error of product and projections, with biases, in multiples of what rounding may leave; and whether
    the product is the same, in every bit, where projections are not saved, and at each call."""
    worst, usual = 0.0, tiles.stream
    tiles.stream = lambda *_: stream
    key = prepare(FORMULA)
    try:
        for (rows, width, features, layout), dtype in itertools.product(ODD, (torch.bfloat16, torch.float16)):
            generator = torch.Generator("cuda").manual_seed(rows)

            def random(*shape: int, generator: torch.Generator = generator, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, device="cuda", generator=generator).to(dtype)

            both = layout != "separate"
            x, scale = random(rows, width), width**-0.5
            weights = [random(features * (2 if both else 1), width) * scale for _ in range(1 if both else 2)]
            biases = (random(features), random(features))
            given = (x, weights[0], None if both else weights[1], *biases, key, layout, "dual")
            program(key).calls.clear()
            out, saved = gated_mlp(*given, True, dtype)
            (made,) = program(key).calls.values()
            if not isinstance(made.launch.launch, launch_few.Few):  # type: ignore[attr-defined]
                raise RuntimeError(f"another kernel runs at {(rows, width, features, layout)}")
            for save in (True, False, False):
                if not torch.equal(gated_mlp(*given, save, dtype)[0], out):
                    raise RuntimeError(f"two calls differ at {(rows, width, features, layout)}")
            exact = reference.project(x, (weights[0], given[2]), biases, layout, torch.float64)
            truths = (F.silu(exact[0]) * exact[1], *exact)
            for ours, truth in zip((out, *reference.parts(saved, layout)), truths, strict=True):
                allowed = 0.51 * torch.finfo(dtype).eps * truth.abs() + 4e-4 * (1 + truth.abs() / 16)
                error = ((ours.double() - truth).abs() / allowed).nan_to_num(math.inf).max().item()
                worst = max(worst, error)
                if error > 1:
                    raise RuntimeError(f"wrong at {(rows, width, features, layout, dtype)}: {error:.3g}")
    finally:
        tiles.stream = usual
    return {"error": worst}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# -- processes that compile ---------------------------------------------------------------------------------------


def worker(device: str) -> None:
    """Compiles, runs and compares what comes in, a line each, and answers each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    torch.backends.cuda.matmul.allow_tf32 = False
    cases: dict[Size, Case] = {}
    for line in sys.stdin:
        item = json.loads(line)
        size = tuple(item.get("size", ()))
        try:
            if "check" in item:
                print(json.dumps(check(Stream(**item["check"]))), file=answers, flush=True)
                continue
            case = cases.get(size)
            if case is None:
                cases.clear()
                case = cases[size] = Case(size, 1, device)
            call = case.calls(Candidate.unpacked(item["candidate"]))[0]
            before: Tensor | None = None
            for _ in range(3):
                case.out.fill_(math.nan)
                call()
                synchronize(device)
                if before is not None and not torch.equal(before, case.out):
                    raise RuntimeError("two calls differ")
                before = case.out.clone()
            error = case.error()
            answer = {"error": error} if error <= 1 else {"failed": f"wrong: {error:.3g} times what rounding leaves"}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)
        if "CUDA" in str(answer.get("failed", "")):
            return  # its context is lost


class Supervised:
    """A process that does one item after the other, and another one when it is lost."""

    def __init__(self, device: str) -> None:
        self.trial = ["--try"] if device == "cpu" else []
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()

    def do(self, item: dict[str, Any]) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(item) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=SILENCE)
        except (queue.Empty, OSError):
            line = ""
        if not line:
            code = self.process.poll()
            self.stop()
            return {"failed": "hangs, or compiles for long" if code is None else f"died ({code})"}
        return dict(json.loads(line))

    def _start(self) -> None:
        command = [sys.executable, __file__, "--worker", *self.trial]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines = queue.Queue()
        threading.Thread(target=_forward, args=(self.process.stdout, self.lines), daemon=True).start()

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.kill()
            self.process.wait()


def _forward(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")  # it has ended


class Compiling:
    """Candidates on their way through processes: what is known of each, by its binary."""

    def __init__(self, sizes: Sequence[Size], processes: int, device: str) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.waiting: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self.over = False
        seen = set()
        for size in sizes:
            for candidate in candidates(size[0]):
                name = candidate.binary(size[0])
                if name not in seen:
                    seen.add(name)
                    self.waiting.put((name, {"size": size, "candidate": candidate.packed()}))
        self.total = len(seen)
        for stream in CHECKED if device == "cuda" else ():
            self.waiting.put((f"at odd sizes: {stream}", {"check": asdict(stream)}))
        self.processes = [Supervised(device) for _ in range(processes)]
        self.threads = [threading.Thread(target=self._through, args=(p,), daemon=True) for p in self.processes]
        for thread in self.threads:
            thread.start()

    def _through(self, process: Supervised) -> None:
        while not self.over:
            try:
                name, item = self.waiting.get_nowait()
            except queue.Empty:
                break
            found = process.do(item)
            if not self.over:
                self.found[name] = found
                if "failed" in found:
                    print(f"    failed: {name}: {found['failed'][:300]}", flush=True)
        process.stop()

    def finish(self, end: float) -> None:
        """Waits for all, or until then; what is not known by then stays unknown."""
        for thread in self.threads:
            thread.join(max(end - time.perf_counter(), 0))
        self.over = True
        for process in self.processes:
            process.stop()


# -- times --------------------------------------------------------------------------------------------------------


def milliseconds(calls: Sequence[Call], device: str, least: int = 6) -> float:
    """Of one of several calls that follow each other in a CUDA graph."""
    if device == "cpu":
        return wall(calls[0])
    repeated = list(itertools.islice(itertools.cycle(calls), max(least, len(calls))))

    def run() -> None:
        for call in repeated:
            call()

    replay = captured(run, "cuda")
    times = []
    for _ in range(6):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000)
        before.record()
        replay()
        replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / (2 * len(repeated)))
    return statistics.median(times[1:])


def swiglu(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(F.linear(x, w)) * F.linear(x, v)


class Timing:
    """Sizes that are timed, one after the other; tensors of the last width are kept."""

    def __init__(self, compiling: Compiling, end: float, device: str) -> None:
        self.compiling, self.end, self.device = compiling, end, device
        self.inductor: dict[Size, Callable[..., Tensor]] = {}
        self.case: Case | None = None

    def prepare(self, size: Size) -> None:
        """Has Inductor compile a size."""
        compiled = torch.compile(swiglu, dynamic=False)
        rows, width, features = size
        shapes = ((rows, width), (features, width), (features, width))
        with torch.no_grad():
            compiled(*(torch.zeros(shape, device=self.device, dtype=torch.bfloat16) for shape in shapes))
        self.inductor[size] = compiled

    def size(self, size: Size) -> list[dict[str, Any]]:
        """All candidates of a size, the fastest first; then `cold` of the best, one call with an empty cache."""
        rows, width, features = size
        weights = 4 * width * features
        old = self.case
        kept = [] if old is None or old.weights[0][0].shape != (features, width) else old.weights
        self.case = old = None
        pairs = -(-ROTATED // weights) if self.device == "cuda" else 1
        case = self.case = Case(size, 0 if kept else pairs, self.device)
        case.weights = kept or case.weights
        results: list[dict[str, Any]] = []
        calls: dict[str, list[Call]] = {}

        def one(name: str, make: Callable[[], list[Call]], about: dict[str, Any]) -> None:
            row = {"size": size, "name": name, **about}
            try:
                made = make()
                made[-1]()
                synchronize(self.device)
                if name != "inductor" and (error := case.error(len(made) - 1)) > 1:
                    raise RuntimeError(f"wrong: {error:.3g} times what rounding leaves")
                row["ms"] = milliseconds(made, self.device)
                row["TB/s"] = weights / row["ms"] / 1e9
                calls[name] = made
            except Exception as failure:
                row["failed"] = f"{type(failure).__name__}: {failure}"[:400]
            results.append(row)
            shown = f"{row['ms'] * 1e3:8.2f} us {row['TB/s']:5.2f} TB/s" if "ms" in row else row["failed"][:200]
            print(f"  {size} {name:60} {shown}", flush=True)

        if size in self.inductor:
            compiled = self.inductor[size]
            pairs = case.weights
            one("inductor", lambda: [lambda p=p: compiled(case.x, *p) for p in pairs], {})  # type: ignore[misc]
        for candidate in candidates(rows):
            known = self.compiling.found.get(candidate.binary(rows), {"failed": "not compiled in time"})
            if "failed" in known:
                results.append({"size": size, "name": str(candidate), **candidate.packed(), **known})
            elif time.perf_counter() < self.end:
                one(str(candidate), lambda c=candidate: case.calls(c), candidate.packed())  # type: ignore[misc]
        results.sort(key=lambda r: r.get("ms", math.inf))
        best = [r["name"] for r in results if "ms" in r and r["name"] not in ("inductor", "usual")][:3]
        chosen = {name: calls[name][0] for name in ("inductor", "usual", *best) if name in calls}
        if chosen and time.perf_counter() < self.end:
            graphs = {name: captured(call, self.device) for name, call in chosen.items()}
            cold = interleaved(graphs, self.device, Rounds(warmup=2, least=5, most=40, seconds=0.6))
            for row in results:
                if row["name"] in cold:
                    row["cold"] = cold[row["name"]].ms
        return results


def summary(results: Sequence[dict[str, Any]]) -> None:
    """The best of each size beside Inductor and what is usual."""
    for size in dict.fromkeys(tuple(r["size"]) for r in results):
        rows = {r["name"]: r for r in results if tuple(r["size"]) == size and "ms" in r}
        base = rows.get("inductor")
        print(f"{size}")
        best = [r for name, r in rows.items() if name not in ("inductor", "usual")][:3]
        for r in [x for x in (base, rows.get("usual"), *best) if x]:
            ratio = f"{r['ms'] / base['ms']:.3f} of Inductor" if base else ""
            cold = f"cold {r['cold'] * 1e3:7.2f} us" if "cold" in r else ""
            if cold and base and "cold" in base:
                cold += f", {r['cold'] / base['cold']:.3f}"
            print(f"    {r['name']:60} {r['ms'] * 1e3:7.2f} us {r['TB/s']:5.2f} TB/s {ratio}; {cold}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, help="only sizes with so many rows")
    parser.add_argument("--budget", type=float, default=90, help="seconds, after which nothing is begun")
    parser.add_argument("--processes", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="that compile at once")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--try", dest="trial", action="store_true", help="tiny sizes on a CPU: does this script run?")
    options = parser.parse_args()
    device = "cpu" if options.trial else "cuda"
    if options.worker:
        worker(device)
        return
    start = time.perf_counter()
    if options.trial:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("on a CPU kernels run in Triton's interpreter: TRITON_INTERPRET=1")
    elif not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("this is for GPUs of compute capability 9.0")
    torch._dynamo.config.recompile_limit = 2 * len(SIZES)
    sizes = [size for size in (TRIED if options.trial else SIZES) if not options.rows or size[0] in options.rows]
    end = start + options.budget - 5
    compiling = Compiling(sizes, options.processes, device)
    timing = Timing(compiling, end, device)
    for size in sizes:
        if time.perf_counter() < start + options.budget * 0.4:
            try:
                timing.prepare(size)
            except Exception as error:
                print(f"  Inductor fails at {size}: {type(error).__name__}: {error}"[:400], flush=True)
    print(f"Inductor is ready after {time.perf_counter() - start:.0f} s", flush=True)
    compiling.finish(start + options.budget * 0.55)
    checked = {name: found for name, found in compiling.found.items() if name.startswith("at odd sizes")}
    for name, found in checked.items():
        print(f"{name}: {found}", flush=True)
    done = f"{len(compiling.found) - len(checked)} of {compiling.total} kernels"
    print(f"{done} are compiled after {time.perf_counter() - start:.0f} s", flush=True)
    about = surroundings(device)
    results: list[dict[str, Any]] = []
    for size in sizes:
        if time.perf_counter() > end:
            print(f"  no time is left for {size}")
            continue
        try:
            results += timing.size(size)
        except Exception as error:
            print(f"  {size}: {type(error).__name__}: {error}"[:400], flush=True)
        if options.json:
            options.json.write_text(json.dumps({**about, "checks": checked, "results": results}, indent=1) + "\n")
    summary(results)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
