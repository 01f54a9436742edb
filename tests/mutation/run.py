"""Breaks every guard in turn and sees a test fail: `python tests/mutation/run.py [--only patterns/attention.py]`.

First all tests run once over sources that note which guards refuse in which test. Each guard is then broken in a copy
of its own, in which only the tests run in which it refuses: no other can tell. A process that has imported torch forks
for each, so that one takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import guards  # noqa: E402
from guards import FILES, ROOT, Guard  # noqa: E402

TESTS = {
    "tests/reading/test_gated_near_misses.py": "all",
    "tests/reading/test_near_misses.py": "all",
    "tests/reading/test_refusals.py": "all",
    "tests/reading/test_guards.py": "all",
    "tests/fuzz/test_found.py": "all",
    "tests/reading/test_elementwise.py": "all",
    "tests/reading/test_masks.py": "all",
    "tests/reading/test_mask_algebra.py": "all",
    "tests/reading/test_indexing.py": "all",
    "tests/reading/test_contraction.py": "all",
    "tests/reading/test_magnitude.py": "all",
    "tests/reading/test_diagonal.py": "all",
    "tests/reading/test_activation.py": "all",
    "tests/reading/test_trace.py": "all",
    "tests/reading/test_unfold.py": "all",
    "tests/reading/test_emit.py": "all",
    "tests/reading/test_layout.py": "all",
    "tests/reading/test_mutation.py": "all",
    "tests/reading/test_bodies.py": "all",
    "tests/reading/test_replace.py": "all",
    "tests/test_devices.py": "quick",
    "tests/reading/test_reading.py": "all",
    "tests/reading/test_custom_gradients.py": "all",
    "tests/reading/test_hopper_routes.py": "all",
    "tests/training/test_rows.py": "quick",
    "tests/reading/test_dead_rows.py": "quick",
    "tests/reading/test_bias_act_dropout_near_misses.py": "all",
    "tests/reading/test_bias_act_dropout.py": "quick",
    "tests/test_rewrite.py": "all",
    "tests/test_plan.py": "all",
    "tests/test_families.py": "quick",
    "tests/reading/test_dynamic.py": "quick",
    "tests/reading/test_gated_spellings.py": "quick",
    "tests/reading/test_spellings.py": "quick",
    "tests/reading/test_gated_modes.py": "quick",
    "tests/reading/test_far_masks.py": "quick",
}
"""The tests that can tell whether a guard is there, and whether those marked as slow are among them."""

SECONDS = 25.0
"""Tests of one guard that take longer than this together are not all run: those go first that are quick."""

PATIENCE = 60
"""Seconds after which a broken guard is taken to have made a loop endless, beyond what its tests take."""

_COPIED = ("xfcompile", "patterns", "kernels", "tests", "pyproject.toml")


@dataclass
class Trace:
    """What one run of the tests over recording sources says: each test's seconds, and for each guard the tests."""

    seconds: dict[str, float] = field(default_factory=dict)
    fired: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What became of one broken guard: "killed", "survived", or "never" (it refuses in no test), and by what test."""

    guard: str
    fate: str
    by: str
    seconds: float


def copy_of_sources(folder: Path) -> Path:
    """The package and its tests in a folder."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder


class Recorder:
    """A pytest plugin: which guards refuse in which test, and how long each test takes."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.now: set[str] = set()
        self.failed: set[str] = set()
        """Tests that fail though nothing is broken, which say nothing."""

    def __call__(self, name: str) -> bool:
        self.now.add(name)
        return True  # of `fired() and False` nothing but False is left then

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: Any) -> Any:
        self.now.clear()
        start = time.time()
        try:
            return (yield)
        finally:
            self.trace.seconds[item.nodeid] = time.time() - start
            for name in self.now if item.nodeid not in self.failed else ():
                self.trace.fired.setdefault(name, []).append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)


class Chosen:
    """A pytest plugin that runs some tests, in an order, and keeps the first that fails."""

    def __init__(self, tests: Iterable[str]) -> None:
        self.order = {test: n for n, test in enumerate(tests)}
        self.failed = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = f"collection of {report.nodeid}"


def run_tests(folder: Path, tests: Iterable[str], plugin: object, *more: str) -> int:
    """Run tests over the sources in a folder, in this process."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    given = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *more, *tests]
    return int(pytest.main(given, plugins=[plugin]))


def record(out: Path) -> None:
    """Run all tests over recording sources, file by file; what is in `out` already is not run again."""
    import builtins

    recorder = Recorder()
    if out.exists():
        recorder.trace = Trace(**json.loads(out.read_text()))
    setattr(builtins, guards.RECORDER, recorder)
    done = {test.split("::")[0] for test in recorder.trace.seconds}
    with tempfile.TemporaryDirectory(prefix="guards-") as name:
        folder = copy_of_sources(Path(name))
        for file in FILES:
            (folder / file).write_text(guards.recording(file))
        for test, which in TESTS.items():
            if (ROOT / test).exists() and test not in done:
                run_tests(folder, [test], recorder, "-m", "not gpu" if which == "all" else "not gpu and not slow")
                out.write_text(json.dumps(recorder.trace.__dict__, indent=0))


def tests_for(guard: Guard, trace: Trace) -> list[str]:
    """The tests in which a guard refuses, the quick ones first, as many as there is time for."""
    found: list[str] = []
    total = 0.0
    for test in sorted(trace.fired.get(guard.name, ()), key=lambda t: trace.seconds[t]):
        total += trace.seconds[test]
        if found and total > SECONDS:
            break
        found.append(test)
    return found


def in_a_child(work: Callable[[], str], seconds: float) -> tuple[str, bool]:
    """What `work` says, run in a fork of this process; and whether it came to an end in time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        try:
            said = work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    end = time.time() + seconds
    while time.time() < end:
        done, _ = os.waitpid(child, os.WNOHANG)
        if done:
            with os.fdopen(read, "rb") as pipe:
                return pipe.read().decode(), True
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    return "", False


NOTHING = f"pytest ended with {int(pytest.ExitCode.NO_TESTS_COLLECTED)}"


def judge(guard: Guard, folder: Path, trace: Trace) -> Verdict:
    """Break one guard in a copy of the sources, run the tests in which it refuses, and mend it again."""
    tests = tests_for(guard, trace)
    if not tests:
        return Verdict(guard.name, "never", "", 0.0)
    start = time.time()
    target = folder / guard.file
    whole = target.read_text()
    target.write_text(guards.broken(guard.file, guard.name, whole))

    def work() -> str:
        chosen = Chosen(tests)
        code = run_tests(folder, sorted({t.split("::")[0] for t in tests}), chosen, "-x", "-m", "not gpu")
        return chosen.failed or ("" if code == 0 else f"pytest ended with {int(code)}")

    try:
        said, ended = in_a_child(work, PATIENCE + 2 * sum(trace.seconds[t] for t in tests))
    finally:
        target.write_text(whole)
    by = said if ended else "out of time"
    if by == NOTHING:
        raise SystemExit(f"{guard.name}: the tests in which it refuses are no more; record them anew")
    return Verdict(guard.name, "killed" if by else "survived", by, time.time() - start)


def judge_all(chosen: list[Guard], trace: Trace, log: Path | None) -> list[Verdict]:
    """Judge guards, one after another."""
    import hypothesis  # noqa: F401
    import sympy  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx

    torch.set_num_threads(1)  # threads don't survive a fork
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="guards-") as name:
        folder = copy_of_sources(Path(name))
        for guard in chosen:
            verdicts.append(judge(guard, folder, trace))
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(verdicts[-1].__dict__) + "\n")
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="a file, or a part of a guard's name")
    parser.add_argument(
        "--trace", type=Path, help="where to keep what the tests say of the guards (read if it is there)"
    )
    parser.add_argument(
        "--log", type=Path, help="a file to which each verdict is added; guards that it has are left out"
    )
    given = parser.parse_args()
    path = given.trace or Path(tempfile.mkdtemp()) / "trace.json"
    child = os.fork()
    if child == 0:
        record(path)
        os._exit(0)
    os.waitpid(child, 0)
    trace = Trace(**json.loads(path.read_text()))
    done = set()
    if given.log is not None and given.log.exists():
        done = {json.loads(line)["guard"] for line in given.log.read_text().splitlines()}
    chosen = [g for file in FILES for g in guards.guards(file)]
    chosen = [g for g in chosen if g.name not in done and (not given.only or any(o in g.name for o in given.only))]
    verdicts = judge_all(chosen, trace, given.log)
    for verdict in verdicts:
        if verdict.fate != "killed":
            print(f"{verdict.fate:8s}  {verdict.guard}")
    print({fate: sum(v.fate == fate for v in verdicts) for fate in ("killed", "survived", "never")})


if __name__ == "__main__":
    main()
