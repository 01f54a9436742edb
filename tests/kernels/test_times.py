"""Tiles that are timed: the fastest are taken, kept for other processes, and looked for only where one asked for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xfcompile.kernels import asked
from xfcompile.kernels.attention import fit, times
from xfcompile.kernels.attention.tiles import Tiles, neighbours
from xfcompile.kernels.gated_mlp import launch_triton
from xfcompile.kernels.gated_mlp import tiles as gated_tiles
from xfcompile.tuning import measured_by, store, tuner

USUAL, FASTER, WIDE = Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3), Tiles(128, 64, 8, 3)
MS = {USUAL: 2.0, FASTER: 1.0, WIDE: 3.0}
NAME = "a kernel"
Q = torch.empty(1, 1, 64, 64)
KIND = (Q.device, torch.float32, 64)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(times, "_found", set())
    monkeypatch.setattr(fit, "fits_twice", lambda *args: True)
    with asked.tried([NAME], "attention, to time it"):
        yield store.directory()
    assert not times._until


def words(t: Tiles) -> str:
    return f"block_m {t.block_m}, block_n {t.block_n}, num_warps {t.num_warps}, num_stages {t.num_stages}"


class Launched:
    """What has been launched, and timed, in this order."""

    def __init__(self, *too_large: Tiles) -> None:
        self.launches: list[Tiles] = []
        self.timed: list[list[str]] = []
        self.too_large = too_large

    def launch(self, tiles: Tiles) -> Any:
        from triton.runtime.errors import OutOfResources

        if tiles in self.too_large:
            raise OutOfResources(300_000, 100_000, "shared memory")
        self.launches.append(tiles)
        return SimpleNamespace(n_spills=0, metadata=SimpleNamespace(shared=0))

    def timer(
        self, calls: Mapping[str, Callable[[], object]], device: torch.device, replayed: bool
    ) -> dict[str, float]:
        self.timed.append([*calls])
        found = {}
        for words, call in calls.items():
            call()
            found[words] = MS[self.launches[-1]]
        return found

    def find(self, known: dict[Any, Any], seconds: float | None = 100.0) -> Tiles:
        """seconds: for timing; None where no route is being timed."""

        def run() -> Tiles:
            candidates = fit.Candidates([USUAL], [Tiles(16, 16, 4, 1)], [FASTER, USUAL, WIDE])
            return fit.remembered(known, KIND, self.launch, lambda: candidates, Q, 64, NAME)

        with measured_by(self.timer):
            if seconds is None:
                return run()
            with times.timing(seconds):
                return run()


def test_the_fastest_are_taken_and_have_written_last() -> None:
    at, known = Launched(), dict[Any, Any]()
    assert at.find(known) == FASTER and known == {KIND: FASTER}
    assert at.timed == [[words(USUAL), words(FASTER), words(WIDE)]]
    assert at.launches[-1] == FASTER
    at.launches.clear()
    assert at.find(known) == FASTER and at.launches == [FASTER] and len(at.timed) == 1


def test_about_as_fast_is_not_faster() -> None:
    at = Launched()
    MS[FASTER] = 1.99
    try:
        assert at.find({}) == USUAL and at.launches[-1] == USUAL
    finally:
        MS[FASTER] = 1.0


def test_what_does_not_fit_is_not_timed() -> None:
    at = Launched(FASTER)
    assert at.find({}) == USUAL
    assert at.timed == [[words(USUAL), words(WIDE)]]


def test_other_processes_take_what_one_has_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the option, where routes are not timed again; on another GPU of the sort too."""
    Launched().find({})
    monkeypatch.setattr(times, "_found", set())
    at = Launched()
    assert at.find({}, seconds=None) == FASTER
    assert at.launches == [FASTER] and not at.timed
    monkeypatch.setattr(times, "_found", set())
    there = Launched()
    assert there.find({}, seconds=100.0) == FASTER and not there.timed


def test_tiles_that_were_taken_before_the_option_was_given_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Launched().find({KIND: USUAL}) == FASTER


def test_who_did_not_ask_has_the_usual_tiles() -> None:
    Launched().find({})
    asked.ask(NAME, "attention", strict=False)
    at = Launched()
    assert at.find({}) == USUAL and at.launches == [USUAL] and not at.timed


def test_without_time_the_usual_tiles_are_taken_and_nothing_is_kept(folder: Path) -> None:
    at = Launched()
    assert at.find({}, seconds=0.0) == USUAL and not at.timed
    assert at.find({}, seconds=None) == USUAL and not at.timed
    assert not folder.exists()


def test_what_was_not_compared_with_all_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "SHARE", 1e-9)
    at, known = Launched(), dict[Any, Any]()
    assert at.find(known) == FASTER and len(at.timed[0]) == 2  # the first that was compiled took all of the time
    assert not folder.exists()
    monkeypatch.setattr(times, "SHARE", 1.0)
    assert at.find(known) == FASTER and len(at.timed[1]) == 3  # with more time once more


SIZES = "block_m 64, block_n 32, num_warps 4"


@pytest.mark.parametrize(
    "route",
    [
        "triton",
        SIZES,
        f"{SIZES}, num_stages 0",
        f"{SIZES}, num_stages three",
        f"{SIZES}, stages 3",
        "block_m 63, block_n 32, num_warps 4, num_stages 3",
        f"{SIZES}, num_stages 03",
    ],
)
def test_what_says_no_tiles_is_not_read(route: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Launched().find({})
    (path,) = folder.iterdir()
    found = json.loads(path.read_text())
    found["timings"]["trials"] = [{"route": route, "ms": 0.5, "reason": None}]
    path.write_text(json.dumps(found))
    monkeypatch.setattr(times, "_found", set())
    at = Launched()
    monkeypatch.setattr(store, "_warned", list)
    with pytest.warns(RuntimeWarning, match="are not used, and made anew: they are of no tiles"):
        assert at.find({}) == FASTER
    assert len(at.timed) == 1


def test_tiles_that_do_not_fit_any_more_are_looked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    Launched().find({})
    monkeypatch.setattr(times, "_found", set())
    at = Launched(FASTER)
    assert at.find({}) == USUAL


def test_neighbours_are_one_step_away_and_can_be_launched() -> None:
    for first in (USUAL, Tiles(16, 16, 1, 1), Tiles(128, 128, 8, 5), Tiles(32, 16, 2, 3)):
        found = list(neighbours(first))
        assert found and first not in found and len(set(found)) == len(found)
        for t in found:
            assert 16 <= t.block_m <= 128 and 16 <= t.block_n <= 128 and t.num_warps in (1, 2, 4, 8)
            assert 1 <= t.num_stages <= 5


def test_a_graph_that_is_tuned_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels that it launches from then on; and routes are tried while there is time for tiles."""
    timed: list[bool] = []
    call_of = tuner.call_of

    def watching(*about: Any) -> Any:
        call = call_of(*about)

        def run() -> Any:
            timed.append(bool(times._until))
            return call()

        return run

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tuner, "call_of", watching)
    torch._dynamo.reset()

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(30 * torch.tanh(q @ k.transpose(-1, -2) / 240), -1) @ v

    def first_is_slowest(calls: Mapping[str, Any], device: torch.device, replayed: bool) -> dict[str, float]:
        return {name: 1.0 if name == "triton" else 2.0 for name in calls}

    x = torch.randn(1, 2, 40, 16)
    before = dict(asked._asked)
    with measured_by(first_is_slowest):
        torch.compile(fn, backend="xformers", options={"autotune": True, "strict": True})(x, x, x)
    assert timed and all(timed)
    new = [about for name, about in asked._asked.items() if before.get(name) is not about]
    assert [(about.autotune, about.strict) for about in new] == [(True, True)]


GATED = gated_tiles.Tiles(128, 128, 64, 8, 4, parts=2)


class Launches:
    """In the place of `Launch` in the gated MLP's: of tiles that are told by what they are launched with."""

    def __init__(self) -> None:
        self.made: list[gated_tiles.Tiles] = []
        self.launched: list[gated_tiles.Tiles] = []

    def make(self, t: gated_tiles.Tiles) -> Any:
        self.made.append(t)
        return lambda tensors: self.launched.append(t)


def test_tiles_of_gated_mlps_are_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first that fit, and what is a step away; another process has them from the disk."""
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    operands: Any = SimpleNamespace(sizes=(1, 4096, 512, 256), x=x)
    monkeypatch.setattr(store, "device_name", lambda device: "a GPU")

    def timer(calls: Mapping[str, Callable[[], object]], device: torch.device, replayed: bool) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: 1.0 if "block_k 32," in name else 2.0 for name in calls}

    def found(seconds: float) -> tuple[Launches, Any]:
        at = Launches()
        looked_for = launch_triton._LookedFor("gated_forward", NAME, operands, GATED, {"EVEN_K": True})
        with measured_by(timer), times.timing(seconds):
            return at, looked_for.launch([GATED, *gated_tiles.smaller(GATED)], at.make, [])

    at, launch = found(100.0)
    best = replace(GATED, block_k=32, num_stages=5)
    assert at.launched[0] == GATED and at.launched[-1] == best and len(set(at.made)) == len(at.made) > 8
    launch([])
    assert at.launched[-1] == best
    monkeypatch.setattr(times, "_found", set())
    at, _ = found(0.0)
    assert at.launched == [best]
    asked.ask(NAME, "a gated MLP", strict=False)
    monkeypatch.setattr(times, "_found", set())
    at, _ = found(100.0)
    assert at.launched == [GATED]


@pytest.mark.parametrize("first", [*(fact.value for fact in (*gated_tiles.DUAL.values(), *gated_tiles.FEW.values()))])
def test_neighbours_of_gated_tiles(first: gated_tiles.Tiles) -> None:
    found = list(gated_tiles.neighbours(first))
    assert len(found) >= 3 and first not in found and len(set(found)) == len(found)
    for t in found:
        assert (t.block_m == 1) == (first.block_m == 1) and t.block_n % t.parts == 0
        assert times._tiles_of(gated_tiles.Tiles, times._words(t)) == t
