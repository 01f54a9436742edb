"""Runs random programs by hand: `python tests/fuzz/run.py --examples 3000 --seed 1 --family blocks --route triton`.

Prints what failed, each cause once, by its smallest program; and a line to keep.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "reading"), str(HERE.parent.parent)]

from outcome import TALLY, fate  # noqa: E402
from strategies import STRATEGIES  # noqa: E402
from writer import Program  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=list(STRATEGIES), default="attention", help="what the programs are about")
    parser.add_argument("--route", choices=["sdpa", "triton", "inductor"], help="the route to force")
    parser.add_argument("--dynamic", action="store_true", help="compile all with sizes that may change")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    given_args = parser.parse_args()
    warnings.simplefilter("ignore")
    fates: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: dict[str, tuple[Program, str]] = {}
    start = time.time()

    @settings(
        max_examples=given_args.examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @hypothesis.seed(given_args.seed)
    @given(STRATEGIES[given_args.family])
    def search(program: Program) -> None:
        if time.time() - start > given_args.seconds:
            return
        if given_args.dynamic:
            program = replace(program, dynamic=True)
        try:
            word, why = fate(program, given_args.route)
            fates[word] += 1
            reasons.update(why)
        except Exception as error:
            fates["FAILED"] += 1
            cause = getattr(error, "inner_exception", None) or error.__cause__ or error
            sys.modules["torch._dynamo"].reset()
            frames = traceback.extract_tb(cause.__traceback__)
            places = [
                f"{Path(f.filename).name}:{f.lineno}"
                for f in frames
                if "xfcompile" in f.filename or "patterns" in f.filename
            ]
            what = f"{type(cause).__name__} at {', '.join(places[-2:]) or 'comparison'}"
            known = failures.get(what)
            if known is None or len(program.source) < len(known[0].source):
                failures[what] = (program, str(cause).strip().splitlines()[0][:300])

    search()
    for what, (program, text) in failures.items():
        print(f"\n# {what}: {text}\n{program}")
    for reason, n in reasons.most_common():
        print(f"{n:6d}  {reason}")
    if TALLY.elements:
        expected = f"{TALLY.expected:.0f} +- {TALLY.variance**0.5:.0f}"
        print(f"\nkept {TALLY.kept} of {TALLY.elements} elements, expected {expected}")
    counts = ", ".join(f"{n} {fate}" for fate, n in fates.most_common())
    seconds = f"{time.time() - start:.0f} s"
    row = (
        date.today(),
        torch.__version__,
        given_args.family,
        (given_args.route or "default") + (", sizes that may change" if given_args.dynamic else ""),
        given_args.seed,
        sum(fates.values()),
        counts,
        seconds,
    )
    print(f"\n| {' | '.join(map(str, row))} |")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
