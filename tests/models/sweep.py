"""Every model type of transformers, shrunk by rules: is any of them wrong, or does any break?

    python tests/models/sweep.py                       # all, SDPA and eager attention; hours on two cores
    python tests/models/sweep.py bert "qwen.*" --attention eager
    TRITON_INTERPRET=1 python tests/models/sweep.py --routes triton    # by the kernels, interpreted

Nothing here is counted by hand, as it is in the zoo: a model is judged by its numbers alone (`measure.py`), forward and
gradients, with a padded row where it takes a mask. What cannot be built from such a configuration is listed. Each model
has a process of its own, and a result a line in `--json`; with the same file a sweep goes on where it ended.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BATCH, LENGTH, VOCABULARY, IMAGE = 2, 24, 99, 32
LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2, 4, 2, 16, 64

RULES: list[tuple[str, Any]] = [
    (
        r"(num|n)_(hidden_|decoder_|encoder_|text_|vision_|attention_|transformer_)?layers?$|depth$|(en|de)coder_layers$",
        LAYERS,
    ),
    (r"(num|n)_(key_value|kv)_heads$|multi_query_group_num$", KV_HEADS),
    (r"(num|n)_(attention_|encoder_attention_|decoder_attention_)?heads?$|(en|de)coder_attention_heads$", HEADS),
    (
        r"(en|de)coder_(ffn_dim|intermediate_size)$|(intermediate|ffn|inner)_(size|dim)$|n_inner$|d_ff$|ffn_hidden_size$",
        128,
    ),
    (r"moe_intermediate_size$|shared_expert_intermediate_size$", 32),
    (
        r"(hidden|embedding|embed|projection|emb)_(size|dim)$|d_model$|n_embd$|dim$|encoder_embed_dim$|decoder_hidden_size$",
        WIDTH,
    ),
    (r"head_dim$|d_kv$|d_head$|attention_head_size$|v_head_dim$|qk_nope_head_dim$", HEAD_DIM),
    (r"qk_rope_head_dim$|rotary_dim$", 8),
    (r"q_lora_rank$|kv_lora_rank$", 16),
    (r"(source_|target_|tgt_|src_)?vocab_size$", VOCABULARY),
    (r"image_size$|img_size$", IMAGE),
    (r"patch_size$", 8),
    (r"max_(position_embeddings|sequence_length|seq_len)$|n_positions$", 128),
    (r"(sliding_window|attention_window|window_size|local_attention|attention_chunk_size)$", 8),
    (r"(num|n)_(local_|routed_)?experts$", 4),
    (r"(num_experts_per_tok|top_k|num_experts_per_token|moe_topk)$", 2),
    (r"n_shared_experts$|n_group$|topk_group$|first_k_dense_replace$", 1),
    (r".*(dropout|drop_rate|drop_path_rate|_pdrop|layerdrop|drop)$", 0.0),
]
"""What a field is set to whose name is one of these to its end, where it is a number that is larger."""


def shrunk(kind: Any) -> Any:
    """A configuration of this class that is small."""
    usual = kind()
    return kind(**fields_of(usual))


def fields_of(usual: Any) -> dict[str, Any]:
    parts = set(getattr(usual, "sub_configs", {}))
    fields: dict[str, Any] = {}
    for name, x in usual.to_dict().items():
        if name in parts:
            part = getattr(usual, name)
            if part is not None:
                fields[name] = type(part)(**fields_of(part))
        elif name.endswith("_token_id") and isinstance(x, int) and x >= VOCABULARY:
            fields[name] = 3
        elif isinstance(x, int | float) and not isinstance(x, bool):
            rule = next((value for pattern, value in RULES if re.fullmatch(pattern, name)), None)
            if rule is not None and (x > rule or isinstance(rule, float)):
                fields[name] = rule
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]  # which the rotation is of
    if isinstance(kinds := getattr(usual, "layer_types", None), list) and kinds:
        distinct = list(dict.fromkeys(kinds))
        fields["layer_types"] = (distinct * LAYERS)[: max(LAYERS, len(distinct))]
        for name in list(fields):
            if re.fullmatch(RULES[0][0], name):
                fields[name] = len(fields["layer_types"])
    return fields


def inputs_of(model: Any) -> Iterator[dict[str, Any]]:
    """What the model may take, the likeliest first."""
    import torch

    names = set(inspect.signature(model.forward).parameters)
    config = model.config

    def ids(length: int) -> Any:
        return torch.randint(3, VOCABULARY, (BATCH, length))

    def seek(name: str, otherwise: int) -> int:
        for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))):
            x = getattr(part, name, None)
            if isinstance(x, int):
                return x
            if isinstance(x, list | tuple) and x and isinstance(x[0], int):
                return x[0]
        return otherwise

    base: dict[str, Any] = {}
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -7:] = 0
    if "input_ids" in names:
        base["input_ids"] = ids(LENGTH)
    if "bbox" in names:
        base["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
    if "decoder_input_ids" in names:
        base["decoder_input_ids"] = ids(17)
    channels, size = seek("num_channels", 3), seek("image_size", IMAGE)
    image = torch.randn(BATCH, channels, size, size)
    mels = seek("num_mel_bins", seek("feature_size", 80))
    frames = 2 * seek("max_source_positions", 48)
    more: list[dict[str, Any]] = [{}]
    if "pixel_values" in names:
        clip = torch.randn(BATCH, seek("num_frames", 4), channels, size, size)
        more = [{"pixel_values": image}, {"pixel_values": clip}, {}]
    elif "input_features" in names:
        more = [
            {"input_features": torch.randn(BATCH, mels, frames)},
            {"input_features": torch.randn(BATCH, frames, mels)},
        ]
    elif "input_values" in names:
        more = [{"input_values": torch.randn(BATCH, 4000)}, {"input_values": torch.randn(BATCH, 1024, 128)}]
    for extra in more:
        if "attention_mask" in names and "input_ids" in base:
            yield {**base, **extra, "attention_mask": mask}
        yield {**base, **extra}


def sweep_one(name: str, attention: str, route: str | None) -> dict[str, Any]:
    """What came of one model type: "how" and why."""
    sys.path.insert(0, str(HERE))
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from zoo import Program

    torch.set_num_threads(1)
    try:
        config = shrunk(transformers.CONFIG_MAPPING[name])
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    except Exception as error:
        return {"how": "not built", "why": _said(error)}
    given, reason = None, ""
    for candidate in inputs_of(model):
        try:
            with torch.no_grad():
                model(**candidate)
            given = candidate
            break
        except Exception as error:
            reason = reason or _said(error)
    if given is None:
        return {"how": "not called", "why": reason}

    def make() -> Program:
        return Program(model, (), given)

    found = {
        "training": _judged(name, model, given, route, True),
        "inference": _judged(name, model, given, route, False),
    }
    worst = max(found.values(), key=lambda x: SEVERITY.index(x["how"]))
    return {
        **worst,
        "modes": {mode: x["how"] for mode, x in found.items()},
        "sites": found["inference"].get("sites", {}),
    }


SEVERITY = [
    "right",
    "random",
    "not compared",
    "as without us",
    "wrong, fp64 is another program",
    "not compiled",
    "BREAKS",
    "WRONG",
]


def _judged(name: str, model: Any, given: dict[str, Any], route: str | None, grad: bool) -> dict[str, Any]:
    """By its results, or with `grad` by its gradients too."""
    import measure
    import torch
    from zoo import Entry, Program

    def make() -> Program:
        return Program(model, (), given)

    entry = Entry(name, make, 0, grad=grad)
    try:
        eager = [measure._results(make(), grad) for _ in range(2)]
        exact = measure._exact(make(), entry)
    except Exception as error:
        return {"how": "not compared", "why": _said(error)}
    if any(not torch.equal(x.nan_to_num(), eager[1][key].nan_to_num()) for key, x in eager[0].items()):
        return {"how": "random", "why": "two calls in eager differ"}
    if exact.keys() != eager[0].keys():
        return {"how": "not compared", "why": "other results in fp64"}
    try:
        outcome = measure.measure(entry, "aot", **({"routes": {"attention": route}} if route else {}))
    except Exception as error:
        torch._dynamo.reset()
        try:  # is it ours?
            measure._results(Program(torch.compile(model, backend="aot_eager"), (), given), grad)
        except Exception as other:
            return {"how": "not compiled", "why": _said(other)}
        return {"how": "BREAKS", "why": _said(error)}
    sites = outcome.report.sites
    about = {
        "sites": dict(Counter(f"{s.family}: {s.route if s.matched else 'left'}" for s in sites)),
        "left": sorted({f"{s.family}: {s.reason}"[:300] for s in sites if not s.matched and s.reason}),
    }
    if outcome.wrong:
        if outcome.baseless:
            return {"how": "wrong, fp64 is another program", "why": str(outcome.baseless[0]), **about}
        plain = _plain_errors(measure, model, given, grad, exact)
        wrong = [e for e in outcome.wrong if e.ours > 2 * plain.get(e.name, math.inf) + (e.bound - 2 * e.eager)]
        return {"how": "WRONG" if wrong else "as without us", "why": "; ".join(map(str, outcome.wrong[:3])), **about}
    ratio = outcome.worst.ours / outcome.worst.bound if outcome.worst.bound else 0.0
    return {"how": "right", "worst": round(ratio, 3), **about}


def _plain_errors(
    measure: Any, model: Any, given: dict[str, Any], grad: bool, exact: dict[str, Any]
) -> dict[str, float]:
    """Errors of the same graphs without this backend: other orders of the same sums."""
    import torch
    from zoo import Program

    torch._dynamo.reset()
    found = measure._results(Program(torch.compile(model, backend="aot_eager"), (), given), grad)
    return {key: measure._error(x, exact[key]) for key, x in found.items() if key in exact}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, or patterns of their names; all without any")
    parser.add_argument("--attention", choices=["eager", "sdpa"], action="append")
    parser.add_argument("--routes", choices=["sdpa", "triton", "inductor"], help="force attention's")
    parser.add_argument("--json", type=Path, default=Path("sweep.jsonl"))
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of a model")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three parts")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print("\n" + json.dumps(sweep_one(*asked.one, asked.routes)))
        return
    import transformers

    patterns = [re.compile(x) for x in asked.names or [".*"]]
    types = (
        [x for x in transformers.MODEL_MAPPING_NAMES if any(p.fullmatch(x) for p in patterns)]
        if hasattr(transformers, "MODEL_MAPPING_NAMES")
        else [
            x
            for x in transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
            if any(p.fullmatch(x) for p in patterns)
        ]
    )
    number, parts = map(int, asked.part.split("/"))
    wanted = [(name, attention) for name in types for attention in asked.attention or ["eager", "sdpa"]][
        number - 1 :: parts
    ]
    done = set()
    if asked.json.exists():
        done = {
            (r["name"], r["attention_implementation"]) for r in map(json.loads, asked.json.read_text().splitlines())
        }
    counts: Counter[str] = Counter()
    for n, (name, attention) in enumerate(wanted):
        if (name, attention) in done:
            continue
        start = time.monotonic()
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            attention,
            *(["--routes", asked.routes] if asked.routes else []),
        ]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=asked.limit, env=os.environ)
            lines = ran.stdout.strip().splitlines()
            found = (
                json.loads(lines[-1])
                if lines and ran.returncode == 0
                else {"how": "DIED", "why": (ran.stderr.strip().splitlines() or ["?"])[-1][:200]}
            )
        except subprocess.TimeoutExpired:
            found = {"how": "too slow", "why": f"{asked.limit:.0f} s"}
        found |= {"name": name, "attention_implementation": attention, "seconds": round(time.monotonic() - start, 1)}
        with asked.json.open("a") as file:
            file.write(json.dumps(found) + "\n")
        counts[found["how"]] += 1
        loud = found["how"].isupper()
        print(
            f"[{n + 1}/{len(wanted)}] {name} [{attention}]: {found['how']} {found.get('why', '') if loud else ''}",
            flush=True,
        )
    print(dict(counts))


if __name__ == "__main__":
    main()
