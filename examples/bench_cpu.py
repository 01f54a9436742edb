"""GPT-2 and Llama of 4 layers at 2048 tokens on a CPU in fp32: Inductor against xformers.

    python examples/bench_cpu.py [--threads 2] [--length 2048] [--rounds 9]

Writes examples/results/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from comparison import Case, compare
from torch import nn

LAYERS, WIDTH, HEADS = 4, 768, 12


def build(name: str, attention: str, length: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model without a head: the states that its layers make."""
    import transformers

    if name == "gpt2":
        config: Any = transformers.GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=length)
        kind: Any = transformers.GPT2Model
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=2048, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, max_position_embeddings=length,
        )  # fmt: skip
        kind = transformers.LlamaModel
    model = kind._from_config(config, attn_implementation=attention)
    return model, {"input_ids": torch.randint(0, 1000, (1, length))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'model':8}{'attention':>10}{'inductor ms':>13}{'xformers ms':>13}{'speedup':>9}")
    for name in ("gpt2", "llama"):
        for attention in ("eager", "sdpa"):
            case = Case(name, attention, "infer", lambda n=name, a=attention: build(n, a, options.length))
            row = compare(case, "cpu", warmup=1, rounds=options.rounds, seconds=60)
            rows.append(row)
            ms = {backend: row["backends"][backend].get("ms", float("nan")) for backend in ("inductor", "xformers")}
            apart = row["backends"]["xformers"].get("difference_to_inductor")
            print(
                f"{name:8}{attention:>10}{ms['inductor']:13.0f}{ms['xformers']:13.0f}{row['speedup'] or 0:9.2f}"
                f"  difference {apart:.1e}, {row.get('sites')}",
                flush=True,
            )
    machine = {
        "threads": options.threads, "torch": torch.__version__, "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(), "length": options.length,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "cpu.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")
    return int(any(row["speedup"] is None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
