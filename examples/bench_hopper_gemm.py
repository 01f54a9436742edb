"""Checks and times the product of matrices for Hopper: every tile variant, every epilogue.

    python examples/bench_hopper_gemm.py --json examples/results/hopper_gemm.json
    python examples/bench_hopper_gemm.py --only check        # or: time

Needs a GPU of compute capability 9.0. Results are compared with fp64, element by element, at odd and even sizes; memory
around them has to stay as it was, and repeated calls have to agree in every bit. What runs on the GPU runs in other
processes: one that says nothing for a while is ended, and what it was at counts as failed. Times are medians in ms, in
bf16, with an empty L2 cache, all columns in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gemm_jobs import DROPPING_VARIANTS, EPILOGUES, NAMES, VARIANTS, WIDE
from torch import Tensor

from xfcompile.activation import KEEP, tensor, vector
from xfcompile.bench.surroundings import surroundings
from xfcompile.bench.timing import Rounds, interleaved
from xfcompile.evaluate import Evaluator
from xfcompile.kernels import philox
from xfcompile.kernels.gemm.hopper import Epilogue
from xfcompile.kernels.gemm.launch import Gemm
from xfcompile.kernels.gemm.tiles import Tile

Item = dict[str, Any]

SILENCE = {"check": 40.0, "prepare": 60.0, "time": 40.0}
"""Seconds after which a process that says nothing is ended."""

SIZES = (
    (1, 8, 8), (7, 64, 40), (63, 72, 128), (64, 128, 136), (65, 200, 264), (127, 1024, 520), (128, 256, 256),
    (129, 328, 1032), (130, 4096, 64), (300, 64, 2056), (2000, 328, 4104), (4096, 1024, 2048),
)  # fmt: skip
"""M, K, N: tiles with and without ends in them, one step and many, one tile a program and several."""

GATED = ((256, 4096, 11008), (1024, 4096, 11008), (4096, 4096, 11008), (16384, 4096, 14336), (16384, 1024, 2816))
LINEAR = ((4096, 1024, 4096), (16384, 1024, 4096), (16384, 768, 3072), (4096, 4096, 16384))
P, STREAM = 0.1, 3
"""Of dropout."""
NAMED = ("result", "saved", "saved")
CHECKED = ("wide", "narrow", "joined")
ROUNDS = Rounds(warmup=3, least=5, most=40, seconds=3.0)


class Case:
    """Tensors of a size, and our kernel with them. Around the result stands memory that must stay as it is."""

    def __init__(self, epilogue: Epilogue, dtype: torch.dtype, size: Sequence[int], biased: bool) -> None:
        m, k, n = size
        generator = torch.Generator("cuda").manual_seed(m + k + n)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(*shape, device="cuda", generator=generator, dtype=torch.float32)
            return (x * scale).to(dtype)

        self.epilogue = epilogue
        self.x = random(m, k)
        self.weights = [random(n, k, scale=1 / math.sqrt(k)) for _ in epilogue.sums]
        self.biases = [random(n) if biased else None for _ in epilogue.sums]
        self.vectors = [random(n) for _ in range(epilogue.vectors)]
        self.tensors = [random(m, n) for _ in range(epilogue.tensors)]
        self.around = torch.full((m + 2, n), 77.0, device="cuda", dtype=dtype)
        self.out = self.around[1:-1]
        self.saved = self._saved(m, n)
        self.seed = torch.tensor([12345678901234 + m], device="cuda") if epilogue.drops else None
        self.dropout = (philox.threshold(P), philox.scale(P), STREAM) if epilogue.drops else ()

    def _saved(self, m: int, n: int) -> list[Tensor]:
        """Both products of a gated MLP side by side."""
        if not self.epilogue.saves:
            return []
        width = len(self.epilogue.sums) * n
        return list(torch.full((m, width), 77.0, device="cuda", dtype=self.x.dtype).split(n, 1))

    def variants(self) -> dict[str, Tile]:
        return DROPPING_VARIANTS if self.epilogue.drops else VARIANTS

    def gemm(self, tile: Tile) -> Callable[[], Any]:
        count = torch.cuda.get_device_properties(0).multi_processor_count
        made = Gemm(self.epilogue, tile, self.x, self.weights, self.biases, count)
        outs = [self.out, *self.saved]
        return lambda: made(
            self.x, self.weights, outs, self.biases, self.vectors, self.tensors, self.seed, self.dropout
        )

    def across(self) -> Callable[[], Any]:
        """With the weight [K, N]."""
        count = torch.cuda.get_device_properties(0).multi_processor_count
        weights = [w.T.contiguous() for w in self.weights]
        made = Gemm(self.epilogue, WIDE, self.x, weights, self.biases, count, across=True)
        return lambda: made(self.x, weights, [self.out], self.biases)

    def expected(self) -> list[Tensor]:
        """In fp64: the result, and what is saved."""
        products = [self.x.double() @ w.double().T for w in self.weights]
        sums = [s if b is None else s + b.double() for s, b in zip(products, self.biases, strict=True)]
        scope: dict[Any, Any] = dict(zip(self.epilogue.sums, sums, strict=True))
        scope |= {vector(n): v.double() for n, v in enumerate(self.vectors)}
        scope |= {tensor(n): r.double() for n, r in enumerate(self.tensors)}
        keep = torch.ones_like(sums[0])
        if self.seed is not None:
            keep = philox.linear_keep(self.seed, P, self.out.shape, STREAM) * philox.scale(P)
        value = Evaluator({**scope, KEEP: keep}, (), torch.float64, self.x.device)(self.epilogue.value)
        out = torch.as_tensor(value) * (keep if self.epilogue.gated else 1)
        return [out, *((sums if self.epilogue.gated else products) if self.epilogue.saves else [])]


def check(item: Item) -> Item:
    """The largest error, in multiples of what rounding the exact result and its sums in fp32 may leave."""
    dtype = {name: d for d, name in NAMES.items()}[item["dtype"]]
    worst, at = 0.0, None
    problems: list[str] = []
    for size in SIZES:
        case = Case(EPILOGUES[item["epilogue"]], dtype, size, item["biased"])
        run = case.gemm(case.variants()[item["tile"]])
        run()
        torch.cuda.synchronize()
        for name, made, exact in zip(NAMED, [case.out, *case.saved], case.expected(), strict=False):
            allowed = 0.51 * torch.finfo(dtype).eps * exact.abs() + 2e-4 * (1 + exact.abs() / 16)
            ratio = ((made.double() - exact).abs() / allowed).nan_to_num(math.inf)
            error = ratio.max().item()
            if error > worst:
                worst, at = error, size
            if error > 1:
                wrong = (ratio > 1).nonzero()
                problems.append(f"{size}, {name}: {error:.3g} at {len(wrong)} places, the first {wrong[0].tolist()}")
        if not bool((case.around[0] == 77).all() and (case.around[-1] == 77).all()):
            problems.append(f"{size}: wrote beyond the result")
        before = case.out.clone()
        for _ in range(3):
            case.out.fill_(-3)
            run()
            torch.cuda.synchronize()
            if not torch.equal(before, case.out):
                problems.append(f"{size}: two calls differ")
                break
    return {"error": worst, "at": at, "problems": problems}


_prepared: dict[str, dict[str, Callable[[], Any]]] = {}


def prepare(item: Item) -> Item:
    """Compiles all that is timed at a size."""
    _prepared[str((item["form"], *item["size"]))] = columns(item["form"], item["size"])
    torch.cuda.empty_cache()
    return {}


def columns(form: str, size: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """What is timed, each called once."""
    case = Case(EPILOGUES["SwiGLU" if form == "gated" else "gelu"], torch.bfloat16, size, form == "linear")
    names = ("SwiGLU, saving", "SwiGLU, dropout, saving") if form == "gated" else ("gelu, dropout, saving", "identity")
    others = {name: Case(EPILOGUES[name], torch.bfloat16, size, form == "linear") for name in names}
    x, weights, (m, _, n) = case.x, case.weights, size
    packed = torch.cat(weights)
    made = torch.empty(m, len(weights) * n, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Callable[[], Any]] = {"mm": lambda: torch.mm(x, packed.T, out=made)}
    torch._dynamo.reset()
    if form == "gated":
        from xfcompile.activation import GATE, UP, silu
        from xfcompile.kernels.gated_mlp import gated_mlp
        from xfcompile.kernels.gated_mlp import prepare as generate

        halves = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in weights]
        key = generate(silu(GATE) * UP)

        def two() -> None:
            for w, out in zip(weights, halves, strict=True):
                torch.mm(x, w.T, out=out)

        def swiglu(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
            return F.silu(F.linear(x, w)) * F.linear(x, v)

        def of_both(x: Tensor, w: Tensor) -> Tensor:
            gate, up = F.linear(x, w).chunk(2, -1)
            return F.silu(gate) * up

        def dropped(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
            return F.dropout(swiglu(x, w, v), P)

        compiled, compiled_packed = (torch.compile(fn, dynamic=False) for fn in (swiglu, of_both))
        calls |= {
            "two mm": two,
            "inductor": lambda: compiled(x, *weights),
            "inductor, packed": lambda: compiled_packed(x, packed),
            "op": lambda: gated_mlp(
                x, weights[0], weights[1], None, None, key, "separate", "dual", False, torch.bfloat16
            ),
        }
    else:
        from xfcompile.activation import X, gelu
        from xfcompile.kernels.bias_act_dropout import bias_act_dropout, linear_act_dropout, text_of

        bias, text = case.biases[0], text_of(gelu(X, "none"))

        def activated(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.gelu(F.linear(x, w, b))

        def dropped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.dropout(activated(x, w, b), P)

        linear = torch.compile(activated, dynamic=False)
        drops = others[names[0]]
        pointwise = text_of(drops.epilogue.value)

        def two_kernels() -> Tensor:
            torch.mm(x, weights[0].T, out=made)
            return bias_act_dropout(made, bias, [], [], drops.seed, STREAM, pointwise, P, torch.bfloat16, False)

        calls |= {
            "inductor": lambda: linear(x, weights[0], bias),
            "op": lambda: linear_act_dropout(x, weights[0], bias, [], [], None, 0, text, 0.0, torch.bfloat16, False),
            "mm, triton: gelu, dropout, saving": two_kernels,
        }
    calls |= {f"gluon {name}": case.gemm(tile) for name, tile in VARIANTS.items()}
    if form == "linear":
        calls["gluon wide, weight [K, N]"] = case.across()
    for name, other in others.items():
        calls |= {f"gluon {tile}: {name}": other.gemm(sizes) for tile, sizes in other.variants().items()}
    calls |= inductors_training(
        {"saving": swiglu, "dropout, saving": dropped} if form == "gated" else {"dropout, saving": dropped},
        (x, *weights, *case.biases),
    )
    with torch.no_grad():
        for call in calls.values():
            call()
    torch.cuda.synchronize()
    return calls


def inductors_training(
    programs: dict[str, Callable[..., Tensor]], given: Sequence[Tensor | None]
) -> dict[str, Callable[[], Any]]:
    """The forwards of programs of which gradients are needed: with what Inductor saves for the backward."""
    leaves = [t.detach().requires_grad_() for t in given if t is not None]

    def forward(compiled: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> Tensor:
            with torch.enable_grad():
                return compiled(*leaves).detach()

        return run

    return {f"inductor: {name}": forward(torch.compile(fn, dynamic=False)) for name, fn in programs.items()}


def measure(item: Item) -> Item:
    key = str((item["form"], *item["size"]))
    calls = _prepared.pop(key, None) or columns(item["form"], item["size"])
    failures: dict[str, str] = {}
    with torch.no_grad():
        times = interleaved(
            calls, "cuda", ROUNDS, failed=lambda name, error: failures.update({name: f"{type(error)}: {error}"[:300]})
        )
    calls.clear()
    torch.cuda.empty_cache()
    return {"ms": {name: round(t.ms, 5) for name, t in times.items()}, "failed": failures}


DO = {"check": check, "prepare": prepare, "time": measure}


def worker() -> None:
    """Does what comes in, a line each, and answers each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    for line in sys.stdin:
        item = json.loads(line)
        try:
            answer = DO[item["kind"]](item)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:1500], "where": traceback.format_exc()[-1500:]}
        print(json.dumps(answer), file=answers, flush=True)
        if "failed" in answer and "CUDA" in str(answer["failed"]):
            return  # its context is lost


class Supervised:
    """A process that does one item after the other, and another one when it is lost."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()

    def do(self, item: Item) -> Item:
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        start = time.perf_counter()
        try:
            self.process.stdin.write(json.dumps(item) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=SILENCE[item["kind"]])
        except (queue.Empty, OSError):
            line = ""
        seconds = round(time.perf_counter() - start, 1)
        if not line:
            code = self.process.poll()
            self.stop()
            return {**item, "failed": "hangs" if code is None else f"died ({code})", "seconds": seconds}
        return {**item, **json.loads(line), "seconds": seconds}

    def _start(self) -> None:
        command = [sys.executable, __file__, "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines = queue.Queue()
        threading.Thread(target=_forward, args=(self.process.stdout, self.lines), daemon=True).start()

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.kill()
            self.process.wait()
            self.process = None


def _forward(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")  # it has ended


def checks() -> list[Item]:
    """By tile variant: the first with every epilogue in bf16 and biases, some in fp16 and without, the others with
    fewer."""
    several = ["SwiGLU", "SwiGLU, dropout, saving", "gelu, dropout, saving", "dropout, scale, residual"]
    some = [(name, "bf16", True) for name in several] + [("SwiGLU", "fp16", True), ("gelu", "fp16", False)]
    every = some + [(name, "bf16", True) for name in EPILOGUES if name not in several] + [("SwiGLU", "bf16", False)]
    return [
        {"kind": "check", "tile": tile, "epilogue": name, "dtype": dtype, "biased": biased}
        for tile in CHECKED
        for name, dtype, biased in (every if tile == "wide" else some)
    ]


def run(only: str | None, save: Callable[[list[Item]], None], seconds: float) -> list[Item]:
    """Checks, the variants side by side, and meanwhile what is to be timed is compiled; then times."""
    end = time.perf_counter() + seconds
    results: list[Item] = []
    lock = threading.Lock()

    def through(items: Sequence[Item], process: Supervised) -> None:
        hung = 0
        for item in items:
            if time.perf_counter() > end or hung > 1:
                found = {**item, "failed": "not done: " + ("others hang" if hung > 1 else "no time is left")}
            else:
                found = process.do(item)
                hung += found.get("failed") == "hangs"
            with lock:
                results.append(found)
                save(results)

    processes = [Supervised() for _ in (*CHECKED, "time")]
    threads = []
    if only != "time":
        for tile, process in zip(CHECKED, processes, strict=False):
            items = [item for item in checks() if item["tile"] == tile]
            threads.append(threading.Thread(target=through, args=(items, process)))
    sizes = [{"form": "gated", "size": size} for size in GATED] + [{"form": "linear", "size": size} for size in LINEAR]
    if only != "check":
        prepared = [{"kind": "prepare", **size} for size in sizes]
        threads.append(threading.Thread(target=through, args=(prepared, processes[-1])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes[:-1]:
        process.stop()
    if only != "check":
        through([{"kind": "time", **size} for size in sizes], processes[-1])
    processes[-1].stop()
    return results


def show(results: Sequence[Item]) -> None:
    """A short table, for whoever sees the end of the output."""
    for r in results:
        if r["kind"] == "check":
            bad = r.get("failed") or "; ".join(r.get("problems", []))
            about = f"{r['tile']:14} {r['epilogue']:16} {r['dtype']} {'biases' if r['biased'] else '      '}"
            print(f"check {about} {'ok' if not bad else 'BAD ' + str(bad)[:600]} {r.get('error', math.nan):.3f}")
            if "where" in r:
                print(r["where"][-600:])
        elif r.get("failed"):
            print(r["kind"], r.get("form"), r.get("size"), str(r["failed"])[:900])
    for r in results:
        if r["kind"] == "time" and "ms" in r:
            m, k, n = r["size"]
            flops = 2 * m * k * n * (2 if r["form"] == "gated" else 1)
            print(f"{r['form']} {m} x {k} x {n}")
            for name, ms in r["ms"].items():
                ratio = ms / r["ms"]["mm"]
                print(f"    {name:34} {ms:8.4f} ms {flops / ms / 1e9:5.0f} TFLOP/s {ratio:6.3f} of one mm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("check", "time"))
    parser.add_argument("--seconds", type=float, default=80, help="begin nothing later than this")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("this is for GPUs of compute capability 9.0")
    about = surroundings("cuda")

    def save(results: list[Item]) -> None:
        if options.json:
            text = json.dumps(
                {**about, "tiles": {k: repr(t) for k, t in VARIANTS.items()}, "results": results}, indent=1
            )
            options.json.write_text(text + "\n")

    show(run(options.only, save, options.seconds))


if __name__ == "__main__":
    main()
