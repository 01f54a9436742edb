"""Every model type of transformers, shrunk by rules: is any of them wrong, or does any break?

    python tests/models/sweep.py                       # all, their default attention and eager; hours on two cores
    python tests/models/sweep.py bert "qwen.*" --attention eager --modes training
    TRITON_INTERPRET=1 python tests/models/sweep.py --routes kernels   # by the kernels, interpreted
    python tests/models/sweep.py --build               # which can be built and called: half an hour
    python tests/models/sweep.py --show                # what is in --json: counts, and reasons of what is left

Nothing here is counted by hand, as it is in the zoo: a model is judged by its numbers alone (`measure.py`), forward and
gradients, with a padded row where it takes a mask (`sweep_judge.py`). What cannot be built from a configuration of
`sweep_configs.py`, or takes nothing that `sweep_inputs.py` makes, is listed. Each model has a process of its own, and a
result a line in `--json`; with the same file a sweep goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[".*"], help="model types, or patterns of their names")
    parser.add_argument("--attention", choices=["default", "eager", "sdpa"], action="append")
    parser.add_argument("--modes", choices=["training", "inference"], action="append")
    parser.add_argument(
        "--routes", choices=["sdpa", "triton", "inductor", "kernels"], help="force attention's, or all to our kernels"
    )
    parser.add_argument("--build", action="store_true", help="build and call them, and that is all")
    parser.add_argument("--show", action="store_true", help="say what was found, and run nothing")
    parser.add_argument("--json", type=Path, default=Path("sweep.jsonl"))
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of a model")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three parts")
    asked = parser.parse_args()
    if asked.show:
        show([json.loads(line) for line in asked.json.read_text().splitlines()])
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE))
    import torch
    import transformers  # noqa: F401  (first: it asks torchvision for its version)
    from torchvision_stub import torchvision_stub

    with torchvision_stub():
        import timm  # noqa: F401  (backbones are its models)

    torch.set_num_threads(1)
    torch._logging.set_logs(dynamo=logging.ERROR)
    sweep(asked)


def sweep(asked: argparse.Namespace) -> None:
    import sweep_judge
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    number, parts = map(int, asked.part.split("/"))
    types = dict.fromkeys(x for p in asked.names for x in MODEL_MAPPING_NAMES if re.fullmatch(p, x))
    wanted = [(name, attention) for attention in asked.attention or ["default", "eager"] for name in types]
    wanted = wanted[number - 1 :: parts]
    done = set()
    if asked.json.exists():
        results = map(json.loads, asked.json.read_text().splitlines())
        done = {(r["name"], r["attention_implementation"]) for r in results}
    if not asked.build and set(wanted) - done:
        sweep_judge.warm_up()
    counts: Counter[str] = Counter()
    for n, (name, attention) in enumerate(wanted):
        if (name, attention) in done:
            continue
        found = alone(name, attention, asked)
        with asked.json.open("a") as file:
            file.write(json.dumps(found) + "\n")
        counts[found["how"]] += 1
        why = found.get("why", "") if found["how"].isupper() else ""
        print(f"[{n + 1}/{len(wanted)}] {name} [{attention}]: {found['how']} {why}", flush=True)
    print(dict(counts))


def alone(name: str, attention: str, asked: argparse.Namespace) -> dict[str, Any]:
    """What comes of one model in a process of its own."""
    start = time.monotonic()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_one, args=(theirs, name, attention, asked))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(asked.limit) else {"how": "too slow", "why": f"{asked.limit:.0f} s"}
    except EOFError:
        found = {"how": "DIED", "why": "?"}
    process.kill()
    process.join()
    about = {"name": name, "attention_implementation": attention, "seconds": round(time.monotonic() - start, 1)}
    return {**found, **about}


def _one(to: Connection, name: str, attention: str, asked: argparse.Namespace) -> None:
    import sweep_judge

    try:
        if asked.build:
            model, given, why = sweep_judge.built(name, attention)
            how = "not built" if model is None else "not called" if given is None else "right"
            to.send({"how": how, "why": why, "given": list(given or ())})
        else:
            to.send(sweep_judge.judge(name, attention, asked.routes, tuple(asked.modes or ("training", "inference"))))
    except Exception:
        to.send({"how": "FAILED", "why": traceback.format_exc()[-600:]})


def show(results: list[dict[str, Any]]) -> None:
    """Counts, and why sites are left, by the number of model types that have one."""
    print(Counter((r["attention_implementation"], r["how"]) for r in results))
    sites = [(r["name"], mode, site) for r in results for mode, of in r.get("sites", {}).items() for site in of]
    print(Counter(f"{site['family']}: {site['route']}" for _, _, site in sites))
    types: dict[str, set[str]] = defaultdict(set)
    for name, _, site in sites:
        if site["route"] == "left":
            types[f"{site['family']}: {site['reason']}"].add(name)
    for reason, names in sorted(types.items(), key=lambda item: -len(item[1])):
        print(f"{len(names):4} {reason[:200]}: {', '.join(sorted(names)[:6])}")


if __name__ == "__main__":
    main()
