"""Whole models of transformers, unmodified: Inductor against xformers, inference and training steps.

    python examples/bench_models.py                                  # everything: tens of minutes on an H100
    python examples/bench_models.py --models llama,vit --modes infer --attn sdpa --budget-s 500
    python examples/bench_models.py --device cpu --tiny              # does the script work?

Writes examples/results/models_<device>.json after every case (and adds to it when started again), and a chart beside
it. The seconds of a first call are a hint only: the second backend finds much in Inductor's caches that the first put.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comparison import BACKENDS, Case, compare
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]


def _labelled(ids: Tensor, mode: str) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids} if mode == "train" else {"input_ids": ids}


def _llama_sizes(tiny: bool) -> dict[str, Any]:
    if tiny:
        return dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=99, max_position_embeddings=512, pad_token_id=0)  # fmt: skip
    return dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=16384, pad_token_id=0,
    )  # fmt: skip


def _decoder(family: str, batch: int, length: int, left_padded: bool = False, **more: Any) -> Callable[..., Any]:
    def make(tiny: bool, mode: str) -> tuple[str, Any, dict[str, Any]]:
        import transformers

        sizes = _llama_sizes(tiny) | (more if not tiny else {k: v for k, v in more.items() if k == "sliding_window"})
        if tiny and "sliding_window" in sizes:
            sizes["sliding_window"] = 16
        config = getattr(transformers, f"{family}Config")(**sizes)
        shape = (batch, 64 if tiny else length)
        arguments = _labelled(torch.randint(3, config.vocab_size, shape), mode)
        if left_padded:
            mask = torch.ones(shape, dtype=torch.long)
            mask[: batch // 2, : shape[1] // 4] = 0
            arguments["attention_mask"] = mask
        return f"{family}ForCausalLM", config, arguments

    return make


def _vit(tiny: bool, mode: str) -> tuple[str, Any, dict[str, Any]]:
    from transformers import ViTConfig

    sizes = dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=384
    )  # fmt: skip
    if tiny:
        sizes |= dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=48)
    return "ViTForImageClassification", ViTConfig(patch_size=16, **sizes), _images(2 if tiny else 32, sizes, mode)


def _swin(tiny: bool, mode: str) -> tuple[str, Any, dict[str, Any]]:
    from transformers import SwinConfig

    sizes: dict[str, Any] = dict(
        image_size=384, patch_size=4, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12
    )  # fmt: skip
    if tiny:
        sizes = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return "SwinForImageClassification", SwinConfig(**sizes), _images(2 if tiny else 32, sizes, mode)


def _images(batch: int, sizes: dict[str, Any], mode: str) -> dict[str, Any]:
    size = sizes["image_size"]
    images: dict[str, Any] = {"pixel_values": torch.randn(batch, 3, size, size)}
    return images | {"labels": torch.arange(batch) % 2} if mode == "train" else images


def _t5(tiny: bool, mode: str) -> tuple[str, Any, dict[str, Any]]:
    from transformers import T5Config

    sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=99) if tiny else dict(
        d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, vocab_size=32128
    )  # fmt: skip
    config = T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, **sizes)
    batch, length, target = (2, 64, 16) if tiny else (8, 1024, 256)
    ids = torch.randint(3, config.vocab_size, (batch, length))
    answer = torch.randint(3, config.vocab_size, (batch, target))
    return "T5ForConditionalGeneration", config, {
        "input_ids": ids, "labels" if mode == "train" else "decoder_input_ids": answer
    }  # fmt: skip


def _gpt2(tiny: bool, mode: str) -> tuple[str, Any, dict[str, Any]]:
    from transformers import GPT2Config

    config = (
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2)
        if tiny
        else GPT2Config()
    )
    ids = torch.randint(3, config.vocab_size, (2, 64) if tiny else (16, 1024))
    return "GPT2LMHeadModel", config, _labelled(ids, mode)


def _bert(tiny: bool, mode: str) -> tuple[str, Any, dict[str, Any]]:
    from transformers import BertConfig

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    config = BertConfig(**sizes) if tiny else BertConfig()
    batch, length = (2, 64) if tiny else (32, 512)
    lengths = torch.randint(length // 4, length + 1, (batch, 1))
    arguments = _labelled(torch.randint(3, config.vocab_size, (batch, length)), mode)
    return "BertForMaskedLM", config, arguments | {"attention_mask": (torch.arange(length) < lengths).long()}


MODELS: dict[str, Callable[..., Any]] = {
    "llama": _decoder("Llama", 2, 4096),
    "vit": _vit,
    "llama_left_padded": _decoder("Llama", 2, 4096, left_padded=True),
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "mistral": _decoder("Mistral", 1, 8192, sliding_window=1024),
    "gemma2": _decoder("Gemma2", 2, 4096, hidden_size=2304, intermediate_size=9216, num_attention_heads=8,
                       num_key_value_heads=4, head_dim=256),
    "swin": _swin,
}  # fmt: skip
"""The sizes of the models are those of the functions above; `tiny` is for trying the script."""


def build(name: str, mode: str, attention: str, device: str, dtype: torch.dtype, tiny: bool) -> Built:
    """The model as `from_config` gives it, and the arguments of one call."""
    import transformers

    kind, config, arguments = MODELS[name](tiny, mode)
    model = getattr(transformers, kind)._from_config(config, attn_implementation=attention, dtype=dtype).to(device)
    return model, {k: (x.to(dtype) if x.is_floating_point() else x).to(device) for k, x in arguments.items()}


def main() -> int:
    options = _options()
    device, dtype = options.device, torch.float32 if options.device == "cpu" else torch.bfloat16
    path = Path(
        options.out or Path(__file__).parent / "results" / f"models_{'tiny_' if options.tiny else ''}{device}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() and not options.fresh else []
    start = time.perf_counter()
    for name in options.models:
        for mode in options.modes:
            for attention in options.attn:
                case = Case(name, attention, mode, lambda n=name, m=mode, a=attention: build(
                    n, m, a, device, dtype, options.tiny))  # fmt: skip
                if time.perf_counter() - start > options.budget_s:
                    print(f"{case.title}: not started, {options.budget_s:g} s are over", flush=True)
                    continue
                row = _tolerant(case, options)
                rows = [r for r in rows if _key(r) != _key(row)] + [row]
                path.write_text(json.dumps({"machine": _machine(device), "rows": rows}, indent=1) + "\n")
                print(f"{time.perf_counter() - start:5.0f} s  {_line(row)}", flush=True)
    print_table(rows)
    chart(rows, path.with_suffix(".png"))
    return 0 if all(r.get("close") is not False and not r.get("error") for r in rows) else 1


def _tolerant(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    try:
        return compare(
            case, options.device, options.backends, warmup=options.warmup, rounds=options.rounds,
            errors=not options.no_errors,
        )  # fmt: skip
    except Exception as error:
        traceback.print_exc()
        failed = {"model": case.name, "mode": case.mode, "attention": case.attention, "backends": {}}
        return failed | {"error": f"{type(error).__name__}: {error}"[:400]}


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["mode"], row["attention"]


def _machine(device: str) -> dict[str, str]:
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{title}: {cell}" for title, cell in zip(COLUMNS, _cells(row), strict=True))


COLUMNS = (
    "model",
    "mode",
    "attn",
    "inductor ms",
    "xformers ms",
    "speedup",
    "peak GB",
    "first call s",
    "error",
    "sites",
)


def _cells(row: dict[str, Any]) -> list[str]:
    ours, theirs = row["backends"].get("xformers", {}), row["backends"].get("inductor", {})
    error = row.get("error") or ours.get("error") or theirs.get("error")
    pair = lambda key, form: f"{_number(theirs.get(key), form)} > {_number(ours.get(key), form)}"  # noqa: E731
    return [
        row["model"], row["mode"], row["attention"], _number(theirs.get("ms"), ".2f"), _number(ours.get("ms"), ".2f"),
        _number(row.get("speedup"), ".2f"), pair("peak_gb", ".1f"), pair("first_call_s", ".0f"),
        error[:60] if error else pair("error_to_fp32", ".1e"), row.get("sites", "-"),
    ]  # fmt: skip


def print_table(rows: list[dict[str, Any]]) -> None:
    """All rows; plain text where the output is no terminal."""
    if not sys.stdout.isatty():
        print(" | ".join(COLUMNS))
        for row in rows:
            print(" | ".join(_cells(row)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar a case: how many times as fast as Inductor."""
    shown = [r for r in rows if r.get("speedup")]
    try:
        import matplotlib as mpl
    except ImportError:
        return print("no chart: matplotlib is not installed")
    if not shown:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(shown)))
    colours = ["tab:green" if r["speedup"] >= 0.98 else "tab:red" for r in shown]
    bars = axes.barh([" ".join(_key(r)) for r in shown], [r["speedup"] for r in shown], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as Inductor")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(allowed: list[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [x for x in given if x not in allowed]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(allowed)}")
            return given

        return parse

    add = parser.add_argument
    add("--models", type=several(list(MODELS)), default=list(MODELS))
    add("--modes", type=several(["infer", "train"]), default=["infer", "train"])
    add("--attn", type=several(["sdpa", "eager"]), default=["sdpa", "eager"])
    add("--backends", type=several(list(BACKENDS)), default=["inductor", "xformers"])
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--tiny", action="store_true", help="sizes for trying the script")
    add("--budget-s", type=float, default=float("inf"), help="start no case after so many seconds")
    add("--no-errors", action="store_true", help="time only; do not compare with fp32")
    add("--warmup", type=int, default=3)
    add("--rounds", type=int, default=10)
    add("--out", help="the JSON file")
    add("--fresh", action="store_true", help="forget earlier results in the file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
