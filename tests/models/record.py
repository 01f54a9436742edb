"""Runs the whole zoo and writes RESULTS.md: what was found in each model, what runs it, and how far off it is.

python tests/models/record.py            # all, through autograd's graphs: about a quarter of an hour on two cores
python tests/models/record.py --through inductor llama gpt2     # names that contain these
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from measure import Outcome, measure  # noqa: E402
from zoo import Entry, entries  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "timm", "diffusers", "x-transformers", "vit-pytorch")
HEAD = "| model | sites | matched | expected | routes | masks read | error / allowed | |\n" + "|---" * 8 + "|\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names to run; without any, all")
    parser.add_argument("--through", choices=["graph", "aot", "inductor"], default="aot")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [e for e in entries() if not options.names or any(part in e.name for part in options.names)]
    rows, notes, bad = [], [], 0
    for entry in chosen:
        start = time.perf_counter()
        row, note, good = _row(entry, options.through)
        bad += not good
        rows.append(row)
        notes += [f"- {entry.name}: {line}" for line in note]
        print(f"{time.perf_counter() - start:6.1f} s {row}", *note, sep="\n    ", flush=True)
    if not options.names:
        (HERE / "RESULTS.md").write_text(_page(options.through, rows, notes, bad))
    print(f"{len(chosen)} models, {bad} not as expected")
    return int(bad > 0)


def _row(entry: Entry, through: str) -> tuple[str, list[str], bool]:
    expected = f"{entry.attentions} of {entry.attentions + entry.declined}"
    if entry.missing:
        return f"| {entry.name} | | | {expected} | | | | not installed |", [], True
    try:
        outcome = measure(entry, through)  # type: ignore[arg-type]
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"| {entry.name} | | | {expected} | | | | **failed** |", [text], False
    counts = (outcome.matched, len(outcome.sites)) == (entry.attentions, entry.attentions + entry.declined)
    good = counts and not outcome.wrong and not outcome.baseless and not outcome.report.failures
    cells = [entry.name, len(outcome.sites), outcome.matched, expected, _routes(outcome), _masks(outcome)]
    row = "| " + " | ".join(map(str, [*cells, _ratio(outcome), "" if good else "**differs**"])) + " |"
    return row, _notes(outcome), good


def _routes(outcome: Outcome) -> str:
    return ", ".join(f"{n} {route}" for route, n in Counter(s.route for s in outcome.sites if s.matched).items())


def _masks(outcome: Outcome) -> str:
    return ", ".join(dict.fromkeys(s.mask or "none" for s in outcome.sites if s.matched)).replace("|", "or")


def _ratio(outcome: Outcome) -> str:
    worst = outcome.worst
    return f"{worst.ours / worst.bound:.2f}" if worst.bound else str(worst.ours)


def _notes(outcome: Outcome) -> list[str]:
    notes = [f"not matched: {r}" for r in dict.fromkeys(s.reason for s in outcome.sites if not s.matched)]
    notes += [f"left to Inductor: {r}" for r in dict.fromkeys(s.reason for s in outcome.sites if s.route == "inductor")]
    return notes + outcome.report.failures + [str(e) for e in (outcome.wrong + outcome.baseless)[:3]]


def _page(through: str, rows: list[str], notes: list[str], bad: int) -> str:
    how = {"graph": "run as it stands", "aot": "run through AOTAutograd's graphs", "inductor": "compiled by Inductor"}
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    return f"""# The zoo's last results

Written by `python tests/models/record.py`; CPU, fp32, Python {platform.python_version()}, {", ".join(versions)}.
The rewritten graph was {how[through]}. {len(rows)} models, {bad} not as expected.

*expected*: attentions to match, of candidates to report. *error / allowed*: the worst result's error to fp64 over twice
eager's own and four ulps; `_train` models are judged by their gradients too.

{HEAD}{chr(10).join(rows)}

## Reasons

{chr(10).join(notes)}
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
