"""A small GPT trained on Python's own documentation, byte by byte: eager, Inductor and xformers from one seed.

    python examples/train_gpt.py            # 200 steps of each; writes results/train_gpt.json and .png
    python examples/train_gpt.py --quick    # 4 steps of each, and nothing is written

How far curves may be apart is measured too: a fourth run is eager's in fp64, from the same weights. Ends with 1 if a
compiled run leaves that by more than `SLACK` times as much as eager's in fp32 does.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import xfcompile

RESULTS = Path(__file__).parent / "results"
SLACK = 2.0
"""All are samples of rounding noise, whose largest values vary by less than that (so in tests/models/measure.py)."""

EXACT = "eager in fp64"

console = Console()


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training. Its vocabulary is the bytes."""

    layers: int = 3
    width: int = 96
    heads: int = 3
    length: int = 256
    batch: int = 4
    steps: int = 200
    warmup: int = 20
    rate: float = 2e-3
    seed: int = 0


class Attention(nn.Module):
    """Causal self-attention as it is written by hand."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (y.transpose(1, 2) for y in split.unbind(2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.before, self.between = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, config.width)
        self.positions = nn.Parameter(torch.zeros(config.length, config.width))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        """text, following [batch, length] -> the mean loss of a byte, in nats."""
        x = self.bytes(text) + self.positions[: text.shape[1]]
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), following.flatten())


class Training:
    """One of the runs: its own weights and optimiser, on the same batches as all others."""

    def __init__(self, model: GPT, config: Config, compiled: Callable[[GPT], Any]) -> None:
        self.model, self.config = model, config
        self.step_of = compiled(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=0.1, betas=(0.9, 0.95))
        self.losses: list[float] = []
        self.ms: list[float] = []

    def step(self, text: Tensor, following: Tensor) -> None:
        done = len(self.losses)
        rising = min(1.0, (done + 1) / self.config.warmup)
        falling = 0.55 + 0.45 * math.cos(math.pi * done / self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate * rising * falling
        start = time.perf_counter()
        loss = self.step_of(text, following)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.ms.append((time.perf_counter() - start) * 1e3)

    @torch.no_grad()
    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """By the model itself, uncompiled: it is the weights that are judged."""
        return statistics.mean(self.model(*batch).item() for batch in batches)


def documentation() -> Tensor:
    """The topics of `help()`: the language reference, as CPython ships it. Its bytes."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batch(text: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - config.length - 1, (config.batch,), generator=generator)
    rows = torch.stack([text[n : n + config.length + 1] for n in starts.tolist()])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(config: Config) -> tuple[dict[str, Training], dict[str, Any]]:
    text = documentation()
    border = len(text) * 9 // 10
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    model = GPT(config)
    compiled: dict[str, Callable[[GPT], Any]] = {
        "eager": lambda m: m,
        EXACT: lambda m: m,
        "inductor": lambda m: torch.compile(m, backend="inductor"),
        "xformers": lambda m: torch.compile(m, backend=xfcompile.xformers),
    }
    runs = {
        name: Training(copy.deepcopy(model).to(torch.float64 if name == EXACT else torch.float32), config, backend)
        for name, backend in compiled.items()
    }
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    with xfcompile.collect() as report, Progress(*columns, console=console) as progress:
        task = progress.add_task("steps", total=config.steps, losses="")
        for n in range(config.steps):
            given = batch(text[:border], config, generator)
            names = list(runs)
            for name in names[n % len(names) :] + names[: n % len(names)]:  # none is always the first
                runs[name].step(*given)
            losses = "  ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items() if name != EXACT)
            progress.update(task, advance=1, losses=losses)
    held_out = [batch(text[border:], config, generator) for _ in range(8)]
    data = {
        "text": "the topics of pydoc_data, sorted by name",
        "bytes": len(text),
        "sha256": hashlib.sha256(bytes(text.to(torch.uint8).tolist())).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": report.summary(),
        "validation": {name: run.validate(held_out) for name, run in runs.items()},
    }
    return runs, data


def apart(a: Training, b: Training) -> float:
    """The largest difference of their losses at any step."""
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def summarize(runs: dict[str, Training], config: Config) -> dict[str, Any]:
    steady = min(config.warmup, config.steps // 2)  # the first steps compile
    ms = {name: statistics.median(run.ms[steady:]) for name, run in runs.items()}
    return {
        "ms": {name: round(x, 2) for name, x in ms.items()},
        "quartiles": {
            name: [round(x, 2) for x in statistics.quantiles(run.ms[steady:], n=4)[::2]] for name, run in runs.items()
        },
        "speedup_over_inductor": round(ms["inductor"] / ms["xformers"], 3),
        "faster_in_pairs": round(
            statistics.mean(
                a > b for a, b in zip(runs["inductor"].ms[steady:], runs["xformers"].ms[steady:], strict=True)
            ), 3,
        ),
        "first_step_seconds": {name: round(run.ms[0] / 1e3, 2) for name, run in runs.items()},
        "final_loss": {name: statistics.mean(run.losses[-10:]) for name, run in runs.items()},
        "apart_from_fp64": {name: apart(run, runs[EXACT]) for name, run in runs.items() if name != EXACT},
        "apart_from_eager": {name: apart(runs[name], runs["eager"]) for name in ("inductor", "xformers")},
    }  # fmt: skip


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), model)
    except OSError:
        pass
    return {
        "processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()], "torch": torch.__version__, "python": platform.python_version(),
        "xfcompile": xfcompile.__version__,
    }  # fmt: skip


def plot(runs: dict[str, Training], summary: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    styles = {"eager": ("0.6", "-", 5.0), "inductor": ("tab:blue", "-", 2.0), "xformers": ("tab:red", "--", 1.2)}
    for name, (color, line, width) in styles.items():
        label = f"{name}, {summary['ms'][name]:.0f} ms a step"
        above.plot(runs[name].losses, color=color, linestyle=line, linewidth=width, label=label)
    above.set_ylabel("loss of a byte, nats")
    above.set_title("A small GPT on Python's documentation, from one seed")
    above.legend()
    for name, (color, line, width) in styles.items():
        differences = [abs(x - y) for x, y in zip(runs[name].losses, runs[EXACT].losses, strict=True)]
        below.plot([max(x, 1e-9) for x in differences], color=color, linestyle=line, linewidth=width / 2, label=name)
    below.set_yscale("log")
    below.set_ylabel("apart from fp64, nats")
    below.set_xlabel("step")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def show(summary: dict[str, Any], data: dict[str, Any]) -> None:
    table = Table(title=f"{data['parameters']} parameters, {data['attention']}")
    for title in ("", "ms a step", "first step, s", "last losses", "validation", "at most apart from fp64"):
        table.add_column(title, justify="right" if title else "left")
    for name in summary["ms"]:
        table.add_row(
            name, f"{summary['ms'][name]:.1f}", f"{summary['first_step_seconds'][name]:.1f}",
            f"{summary['final_loss'][name]:.4f}", f"{data['validation'][name]:.4f}",
            f"{summary['apart_from_fp64'].get(name, 0):.2g}",
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 steps of a smaller batch; nothing is written")
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--threads", type=int, help="default: torch's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = Config(steps=4, length=128, warmup=2) if options.quick else Config(steps=options.steps)
    runs, data = train(config)
    summary = summarize(runs, config)
    show(summary, data)
    apart_from_fp64 = summary["apart_from_fp64"]
    noise = apart_from_fp64["eager"]
    far = {name: x for name, x in apart_from_fp64.items() if x > SLACK * max(noise, 1e-6)}
    if not options.quick:
        losses = {name: [round(x, 7) for x in run.losses] for name, run in runs.items()}
        page = {"machine": machine(), "config": asdict(config), "data": data, "summary": summary, "losses": losses}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "train_gpt.json").write_text(json.dumps(page, indent=1) + "\n")
        plot(runs, summary, RESULTS / "train_gpt.png")
        console.print(f"wrote {RESULTS / 'train_gpt.json'} and .png")
    for name, x in far.items():
        console.print(f"[red]{name} is {x:.3g} off fp64, more than {SLACK:g} times as far as eager ({noise:.3g})")
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
