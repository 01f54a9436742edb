"""Bias, activation and dropout: ours by each route beside eager and Inductor, and beside what the hardware allows.

    python examples/bench_bias_act_dropout.py --out examples/results/bias_act_dropout_h200.json
    python examples/bench_bias_act_dropout.py --sweep --out sweep.json    # kernels alone, with many tile sizes

Needs a CUDA GPU. Times are medians in ms, in bf16, with a gradient for everything unless it says otherwise. The floors:
the linear's three products by cuBLAS alone (y, dx, dw), and a copy of 1 GiB on the device, of which `bandwidth` is the
share that a kernel without a product reaches. `peak` is the memory in MB that a training step takes at most, beside its
weights and inputs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import xfcompile
from xfcompile.activation import KEEP, X, gelu, tensor
from xfcompile.kernels.bias_act_dropout import bias_act_dropout, launch, linear_act_dropout, text_of
from xfcompile.kernels.bias_act_dropout.launch import Share, Tile
from xfcompile.measured import Fact

FAMILY = "bias-act-dropout"
ROWS = 16384
SIZES = ((768, 3072), (1024, 4096), (4096, 16384))
"""Features in and out."""

P = 0.1


@dataclass(frozen=True)
class Run:
    """Where and how long is measured; `scale` divides all sizes, to try this script where there is no GPU."""

    device: str
    scale: int = 1

    def ms(self, fn: Callable[[], Any]) -> float:
        """The median time of a call."""
        if self.device == "cuda":
            return float(triton.testing.do_bench(fn, warmup=50, rep=200, return_mode="median"))
        start = time.perf_counter()
        fn()
        return 1e3 * (time.perf_counter() - start)

    def peak(self, fn: Callable[[], Any]) -> float:
        """MB that a call takes at most, beside what is there before."""
        if self.device != "cuda":
            return float("nan")
        fn()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16, requires_grad=grad)


class Up(nn.Module):
    """dropout(gelu(linear))."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return F.dropout(F.gelu(self.linear(x)), P, self.training)


class Down(nn.Module):
    """residual + dropout(linear)."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, k)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(self.linear(x), P, self.training)


class MLP(nn.Module):
    """Layer norm, both, and the residual: GPT-2's."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(k), Up(k, n), Down(k, n)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x), x), x)


class Block(nn.Module):
    """GPT-2's block: attention by SDPA and the MLP."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.heads = max(k // 64, 1)
        self.norm, self.qkv, self.out, self.mlp = nn.LayerNorm(k), nn.Linear(k, 3 * k), nn.Linear(k, k), MLP(k, n)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        rows = x.view(-1, min(1024, x.shape[0]), x.shape[1])
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(rows)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        rows = rows + F.dropout(self.out(y), P, self.training)
        return self.mlp(rows.view_as(x), x)


PROGRAMS: dict[str, Callable[[int, int], nn.Module]] = {"up": Up, "down": Down, "mlp": MLP, "block": Block}
ROUTES = ("eager", "inductor", "triton", "epilogue")


def compiled(model: nn.Module, route: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    if route == "eager":
        return model
    if route == "inductor":
        return torch.compile(model)
    options = {"patterns": [FAMILY], "routes": {FAMILY: route}, "strict": True}
    return torch.compile(model, backend=xfcompile.xformers, options=options)


def sizes(run: Run) -> list[tuple[int, int, int]]:
    """Rows, features in and out."""
    return [(ROWS // run.scale, k // run.scale, n // run.scale) for k, n in SIZES]


def program(run: Run, name: str, rows: int, k: int, n: int) -> Iterable[dict[str, Any]]:
    """A row for each route of a whole program."""
    model = PROGRAMS[name](k, n).to(run.device, torch.bfloat16).train()
    x, residual = run.randn(rows, n if isinstance(model, Down) else k, grad=True), run.randn(rows, k, grad=True)
    for route in ROUTES:
        fn = compiled(model, route)
        dout = torch.randn_like(fn(x, residual))

        def step(fn: Callable[..., Tensor] = fn, dout: Tensor = dout) -> None:
            x.grad = residual.grad = None
            model.zero_grad(set_to_none=True)
            fn(x, residual).backward(dout)

        with torch.no_grad():
            inference = run.ms(lambda fn=fn: fn(x, residual))
        row = {"program": name, "k": k, "n": n, "rows": rows, "route": route}
        yield row | {"forward, no gradient": inference, "training step": run.ms(step), "peak": run.peak(step)}


def programs(run: Run) -> Iterable[dict[str, Any]]:
    for name in PROGRAMS:
        for rows, k, n in sizes(run):
            yield from program(run, name, rows, k, n)


def floor(run: Run, rows: int, k: int, n: int) -> dict[str, Any]:
    """A linear's products alone."""
    x, w, dout = run.randn(rows, k), run.randn(n, k), run.randn(rows, n)
    y, dx, dw = run.ms(lambda: x @ w.t()), run.ms(lambda: dout @ w), run.ms(lambda: dout.t() @ x)
    return {"k": k, "n": n, "rows": rows, "y": y, "dx": dx, "dw": dw, "all": y + dx + dw}


def bandwidth(run: Run) -> float:
    """GB a second that a copy reads and writes."""
    source = torch.empty(2**30 // run.scale**3, device=run.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / run.ms(lambda: target.copy_(source)) / 1e6


FORMULAS = {
    "gelu, dropout": KEEP * gelu(X, "none"),
    "gelu by tanh, dropout": KEEP * gelu(X, "tanh"),
    "dropout, residual": KEEP * X + tensor(0),
}


def kernel(run: Run, name: str, rows: int, k: int, n: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """The kernels of a formula, and the bytes that those without a product move."""
    seed, text = torch.tensor([12345], device=run.device), text_of(FORMULAS[name])
    x, h, w, b, dout = run.randn(rows, k), run.randn(rows, n), run.randn(n, k), run.randn(n), run.randn(rows, n)
    tensors = [run.randn(rows, n)] if tensor(0) in FORMULAS[name].free_symbols else []
    call = (b, [], tensors, seed, 0, text, P, torch.bfloat16)
    back = (dout, None if tensors else h, b, [], seed, 0, text, P, len(tensors), [True, True], [torch.bfloat16] * 2)
    size = 2 * rows * n
    return {
        "forward": (lambda: bias_act_dropout(h, *call), size * (2 + len(tensors))),
        "backward": (lambda: torch.ops.xfcompile.bias_act_dropout_backward(*back), size * (2 if tensors else 3)),
        "linear": (lambda: linear_act_dropout(x, w, *call, False), 0),
        "linear, kept": (lambda: linear_act_dropout(x, w, *call, True), 0),
    }


def kernels(run: Run, copied: float, only: str = "") -> Iterable[dict[str, Any]]:
    """The kernels alone, without a graph around them."""
    for rows, k, n in sizes(run):
        for formula in FORMULAS:
            for name, (fn, moved) in kernel(run, formula, rows, k, n).items():
                row: dict[str, Any] = {"kernel": name, "formula": formula, "k": k, "n": n}
                if not name.startswith(only):
                    continue
                try:
                    row["ms"] = run.ms(fn)
                    row["bandwidth"] = moved / row["ms"] / 1e6 / copied if moved else None
                    row["tflops"] = 2e-9 * rows * n * k / row["ms"] if not moved else None
                except Exception as error:  # tiles that do not fit are a result
                    row["failed"] = f"{type(error).__name__}: {error}"[:120]
                yield row


PRODUCTS = [
    Tile(m, n, w, k, s, r)
    for m, n, w, k, s, r in (
        (128, 128, 8, 64, 3, None), (128, 128, 4, 64, 3, None), (128, 128, 8, 64, 4, None), (128, 128, 8, 64, 3, 128),
        (128, 256, 8, 64, 3, None), (128, 256, 8, 64, 4, None), (256, 128, 8, 64, 3, None), (64, 128, 4, 64, 4, None),
        (128, 64, 4, 64, 4, None), (128, 128, 8, 128, 2, None), (64, 256, 4, 64, 3, None), (128, 192, 8, 64, 3, None),
    ) if n & (n - 1) == 0
]  # fmt: skip
SHARES = [
    Share(elements, widest, warps)
    for elements in (1024, 2048, 4096, 8192)
    for widest in (128, 256, 512, 1024, 2048)
    for warps in (4, 8)
]


def sweep(run: Run, copied: float) -> Iterable[dict[str, Any]]:
    """The kernels alone with other tile sizes."""
    usual, shares = launch.PRODUCT[2], dict(launch.POINTWISE)
    for tile in PRODUCTS:
        launch.PRODUCT[2] = Fact(tile)
        yield from ({**row, "tile": str(tile)} for row in kernels(run, copied, "linear"))
    launch.PRODUCT[2] = usual
    for name in ("forward", "backward"):
        for share in SHARES:
            launch.POINTWISE[name] = Fact(share)
            yield from ({**row, "tile": str(share)} for row in kernels(run, copied, name))
        launch.POINTWISE[name] = shares[name]


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=title)
    for row in rows:
        cells = [row.get(name) for name in columns]
        table.add_row(*("" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells))
    console.print(table)


def verdicts(rows: list[dict[str, Any]], floor: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each program's time by Inductor's, and by the floor's where it is one linear."""
    found = []
    for row in rows:
        (other,) = [r for r in rows if all(r[x] == row[x] for x in ("program", "k", "n")) and r["route"] == "inductor"]
        (bare,) = [f["all"] for f in floor if (f["k"], f["n"]) == (row["k"], row["n"])]
        if row["route"] in ("triton", "epilogue"):
            verdict = {x: row[x] for x in ("program", "k", "n", "route")}
            verdict |= {
                f"{x} / Inductor's": row[x] / other[x] for x in ("forward, no gradient", "training step", "peak")
            }
            verdict["training step / three products"] = row["training step"] / bare if row["program"] == "up" else None
            found.append(verdict)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers, versions and hardware there")
    parser.add_argument("--sweep", action="store_true", help="tile sizes instead of programs")
    parser.add_argument("--try", dest="trial", action="store_true", help="tiny sizes on a CPU: does this script run?")
    options = parser.parse_args()
    if not options.trial and not torch.cuda.is_available():
        parser.error("this measures GPUs and none was found")
    run = Run("cpu", 128) if options.trial else Run("cuda")
    torch.manual_seed(0)
    console = Console(width=200)
    copied = bandwidth(run)
    found: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if run.device == "cuda" else "cpu",
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "copy, GB/s": copied,
    }  # fmt: skip
    sections: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {"sweep": lambda: sweep(run, copied)}
    if not options.sweep:
        sections = {
            "floors": lambda: [floor(run, *s) for s in sizes(run)],
            "kernels": lambda: kernels(run, copied),
            "programs": lambda: programs(run),
        }
    for title, section in sections.items():
        found[title] = []
        for row in section():
            found[title].append(row)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")
        show(console, title, found[title])
    if not options.sweep:
        judged = verdicts(found["programs"], found["floors"])
        show(console, "by Inductor", judged)
        ups = [v["training step / Inductor's"] for v in judged if v["program"] == "up"]
        console.print(
            f"copy: {copied:.0f} GB/s; linear, gelu and dropout by Inductor: {statistics.geometric_mean(ups):.3f}"
        )


if __name__ == "__main__":
    main()
