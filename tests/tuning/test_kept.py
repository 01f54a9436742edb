"""Timings are kept on disk, for this user's processes, and only for what they are of."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from xfcompile import identity
from xfcompile.options import Options
from xfcompile.tuning import Timings, Trial, Tuner, store

PROGRAM = """
import json, sys
import torch
import xfcompile
from xfcompile.tuning import measured_by, timer

def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / 4, -1) @ v

asked = []
def watch(calls, device, replayed):
    asked.append(list(calls))
    return {name: 1.0 if name == "inductor" else 2.0 for name in calls}

q = torch.randn(1, 2, 24, 16)
with xfcompile.collect() as report, measured_by(watch):
    options = {"autotune": True, "strict": True, **json.loads(sys.argv[1])}
    out = torch.compile(attend, backend="xformers", options=options)(q, q, q)
torch.testing.assert_close(out, attend(q, q, q))
print(json.dumps([asked, [s.route for s in report.sites], [s.reason for s in report.sites]]))
"""

TIMINGS = Timings(
    (Trial("sdpa", 2.0), Trial("inductor", 1.0), Trial("triton", None, "RuntimeError: no")), True, "words"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    store._warned.cache_clear()
    return tmp_path


def about(**other: Any) -> dict[str, Any]:
    return {**store.identity(torch.device("cpu"), "site", "options"), **other}


def in_a_process(said: bool = False, **options: Any) -> tuple[list[list[str]], list[str], list[str]]:
    """said: what it warns of is this process's output too."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    if said:
        print(done.stderr, file=sys.stderr)
    asked, routes, reasons = json.loads(done.stdout.splitlines()[-1])
    return asked, routes, reasons


def test_a_second_process_times_nothing_and_takes_what_the_first_found() -> None:
    asked, routes, reasons = in_a_process()
    assert (asked, routes, reasons) == ([["sdpa", "inductor"]], ["inductor"], ["timed: inductor 1 ms, sdpa 2"])
    asked, routes, reasons = in_a_process()
    assert (asked, routes, reasons) == ([], ["inductor"], ["timed before: inductor 1 ms, sdpa 2"])
    asked, routes, _ = in_a_process(max_autotune=True)  # other code of Inductor's
    assert (asked, routes) == ([["sdpa", "inductor"]], ["inductor"])


def test_timings_of_a_route_that_there_is_not_are_made_anew(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    in_a_process()
    (path,) = (cache / "xfcompile" / "timings").iterdir()
    path.write_text(path.read_text().replace('"sdpa"', '"sdpaX"'))
    asked, routes, _ = in_a_process(said=True)
    assert asked and routes == ["inductor"]
    assert "they are of 'sdpaX', which is no route here" in capfd.readouterr().err
    assert in_a_process()[0] == []


def test_what_cannot_be_read_is_said() -> None:
    store._path(about()).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="it cannot be read"):
        assert store.find(about()) is None


def test_what_is_stored_is_found_as_it_was() -> None:
    assert store.find(about()) is None
    store.store(about(), TIMINGS)
    assert store.find(about()) == TIMINGS


@pytest.mark.parametrize("field", ["format", "device", "torch", "triton", "source", "options", "site"])
def test_nothing_is_found_of_another(field: str) -> None:
    store.store(about(), TIMINGS)
    assert store.find(about(**{field: "other"})) is None


def test_other_sources_of_the_package_are_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    store.store(about(), TIMINGS)
    monkeypatch.setattr(identity, "package_hash", lambda: "edited")
    assert store.find(about()) is None


def test_files_are_the_users_own(cache: Path) -> None:
    store.store(about(), TIMINGS)
    folder = cache / "xfcompile" / "timings"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert [stat.S_IMODE(f.stat().st_mode) for f in files] == [0o600]


def text(**changes: Any) -> str:
    return json.dumps({"about": about(), "timings": {**TIMINGS.to_dict(), **changes}})


@pytest.mark.parametrize(
    "found",
    [
        b"",
        b"\xff\xfe not text",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        text(trials=[]).encode(),
        text(trials=3).encode(),
        text(trials=[{"route": 3, "ms": 1.0, "reason": None}]).encode(),
        text(trials=[{"route": "sdpa", "ms": "fast", "reason": None}]).encode(),
        text(trials=[{"route": "sdpa", "ms": float("nan"), "reason": None}]).encode(),
        text(trials=[{"route": "sdpa", "ms": -1.0, "reason": None}]).encode(),
        text(complete="yes").encode(),
        text().replace('"site"', '"another"').encode(),
    ],
    ids=lambda found: repr(found[:30]),
)
def test_a_damaged_file_is_as_none_with_one_warning(found: bytes) -> None:
    store.store(about(), TIMINGS)
    path = store._path(about())
    path.write_bytes(found)
    with pytest.warns(RuntimeWarning, match="are not used, and made anew"):
        assert store.find(about()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.find(about()) is None
        store.store(about(), TIMINGS)
        assert store.find(about()) == TIMINGS


def test_another_users_file_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store.store(about(), TIMINGS)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.warns(RuntimeWarning, match="another user"):
        assert store.find(about()) is None


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_keeping(cache: Path) -> None:
    (cache / "xfcompile").mkdir()
    (cache / "xfcompile" / "timings").write_text("a file where the folder would be")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.store(about(), TIMINGS)
        assert store.find(about()) is None


def test_a_full_disk_leaves_no_half_of_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    store.store(about(), TIMINGS)
    assert list((cache / "xfcompile" / "timings").iterdir()) == []


def write_and_read(n: int) -> bool:
    """Many times, each time other timings of the same thing: what is found is always one of these, whole."""
    good = True
    for _ in range(50):
        store.store(
            about(),
            Timings(
                (
                    Trial("sdpa", float(n)),
                    Trial("inductor", float(n)),
                ),
                True,
                "x" * (n + 1) * 999,
            ),
        )
        found = store.find(about())
        good &= found is not None and len(found.about) == 999 * (int(found.trials[1].ms or 0) + 1)
    return good


def test_processes_that_write_the_same_file_do_not_spoil_it(cache: Path) -> None:
    import multiprocessing

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert all(pool.map(write_and_read, range(4)))
    assert len(list((cache / "xfcompile" / "timings").iterdir())) == 1


def test_settings_without_a_name_keep_nothing() -> None:
    assert Tuner(Options(autotune=True), {"post_grad_custom_post_pass": print})._about(None, "key") is None  # type: ignore[arg-type]
