"""How long reading, matching and replacing take on a Llama's graph, beside the time that Inductor takes to compile it.

    python examples/bench_reading.py [--layers 4,8,16,32] [--width 128]

The widths are small: neither reading nor Inductor's own work depends on them, running the model would. Inductor
compiles from nothing (its caches are off). Ends with 1 if reading takes 5 % or more of Inductor's time at the most
layers, or if its time grows faster than the layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import xfcompile

SHARE, GROWTH = 0.05, 1.25
"""What is allowed: a share of Inductor's time, and growth of the time a layer from the fewest layers to the most."""


def capture(layers: int, width: int, attention: str) -> tuple[fx.GraphModule, list[Any]]:
    """The graph of a Llama as Dynamo hands it to a backend, and its (fake) inputs."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1000, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def recording(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((gm, list(example_inputs)))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=recording)(torch.randint(3, 1000, (2, 128)))
    assert len(graphs) == 1, f"{len(graphs)} graphs where one was expected"
    return graphs[0]


def reading_seconds(gm: fx.GraphModule, inputs: list[Any], repeats: int) -> tuple[float, str]:
    """The median time of `xfcompile.rewrite` on fresh copies of the graph, and its summary."""
    times = []
    for _ in range(repeats):
        fresh = _copied(gm)
        start = time.perf_counter()
        report = xfcompile.rewrite(fresh, inputs, {"strict": True})
        times.append(time.perf_counter() - start)
    return statistics.median(times), report.summary()


def inductor_seconds(gm: fx.GraphModule, inputs: list[Any]) -> float:
    """The time that Inductor takes for the graph, code generation and the C++ compiler included."""
    from torch._inductor.compile_fx import compile_fx

    fresh = _copied(gm)
    torch._dynamo.reset()
    patches = {"force_disable_caches": True}
    start = time.perf_counter()
    with torch.no_grad():
        compiled = compile_fx(fresh, inputs, config_patches=patches)
        compiled(*inputs)  # the first call may compile what is left
    return time.perf_counter() - start


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Another graph module of the same nodes; their metadata, which nobody changes, is shared."""
    return fx.GraphModule(gm, copy.deepcopy(gm.graph))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,8,16,32")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--attn", choices=["eager", "sdpa"], default="eager")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    counts = sorted(int(n) for n in options.layers.split(","))
    print(f"{'layers':>7}{'nodes':>7}{'reading s':>11}{'a layer ms':>12}{'Inductor s':>12}{'share':>8}  found")
    rows = []
    # What torch and sympy load and remember at first use is no part of the first row.
    gm, inputs = capture(2, options.width, options.attn)
    reading_seconds(gm, inputs, 1)
    inductor_seconds(gm, inputs)
    for layers in counts:
        gm, inputs = capture(layers, options.width, options.attn)
        seconds, found = reading_seconds(gm, inputs, options.repeats)
        inductor = inductor_seconds(gm, inputs)
        rows.append({
            "layers": layers, "nodes": len(gm.graph.nodes), "reading_s": seconds, "inductor_s": inductor,
            "share": seconds / inductor, "found": found,
        })  # fmt: skip
        print(
            f"{layers:7}{len(gm.graph.nodes):7}{seconds:11.3f}{seconds / layers * 1e3:12.1f}{inductor:12.1f}"
            f"{seconds / inductor:8.1%}  {found}",
            flush=True,
        )
    first, last = rows[0], rows[-1]
    growth = (last["reading_s"] / last["layers"]) / (first["reading_s"] / first["layers"])
    small, linear = last["share"] < SHARE, growth < GROWTH
    below, straight = "below" if small else "NOT BELOW", "linear" if linear else "NOT LINEAR"
    print(f"share of Inductor's time at {last['layers']} layers: {last['share']:.1%} ({below} {SHARE:.0%})")
    print(f"time a layer, {first['layers']} to {last['layers']} layers: times {growth:.2f} ({straight})")
    path = Path(__file__).parent / "results" / f"reading_{options.attn}.json"
    path.parent.mkdir(exist_ok=True)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "width": options.width}
    path.write_text(json.dumps({"machine": machine, "rows": rows, "growth": growth}, indent=1) + "\n")
    return int(not (small and linear))


if __name__ == "__main__":
    sys.exit(main())
