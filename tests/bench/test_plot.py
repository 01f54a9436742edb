"""Bars hold what the rows say, and losses point the other way."""

from __future__ import annotations

import importlib.util
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from entries import entry, results

from xfcompile.bench.plot import LOSS, NoPlot, bars, figure, save
from xfcompile.bench.results import Results, load

pytest.importorskip("matplotlib")
OLD = Path(__file__).parents[2] / "examples" / "results"


def made() -> Results:
    return results(
        entry("a", inductor=4.0, xformers=1.0, flex=2.0, sdpa=8.0, sdpa_flash=4.0),
        {**entry("a", inductor=16.0, xformers=1.0, flex=2.0), "sizes": {"S": 1024, "D": 128}},
        entry("b", inductor=1.0, xformers=2.0),
        entry("a", "forward+backward", inductor=3.0, xformers=1.0),
        entry("c", inductor={"failed": "out of memory"}, xformers=2.0),
    )


def texts(path: Path) -> dict[str, str]:
    """The texts that a PNG carries beside its picture."""
    data, at, found = path.read_bytes(), 8, dict[str, str]()
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        if kind == b"tEXt":
            key, _, value = body.partition(b"\0")
            found[key.decode()] = value.decode("latin-1")
        if kind == b"zTXt":
            key, _, value = body.partition(b"\0")
            found[key.decode()] = zlib.decompress(value[1:]).decode("latin-1")
        at += 12 + size
    return found


def test_a_bar_is_the_mean_over_sizes() -> None:
    found = {(b.panel, b.name, b.column): b for b in bars(made())}
    a = found["forward", "a", "xformers"]
    assert a.speedup == pytest.approx(8) and (a.least, a.most, a.rows) == (4, 16, 2)
    assert found["forward", "a", "flex"].speedup == pytest.approx(4)
    assert found["forward", "a", "sdpa"].speedup == pytest.approx(1)  # the fastest of them
    assert found["forward", "b", "xformers"].loss
    assert found["forward+backward", "a", "xformers"].speedup == pytest.approx(3)
    assert not any(b.name == "c" for b in bars(made()))


def test_lengths_are_panels_of_their_own() -> None:
    """What was measured at one length only is not compared with a mean over all."""
    longer = entry("a", inductor=32.0, xformers=1.0, length=4096)
    found = {(b.panel, b.name, b.column): b.speedup for b in bars(results(*made().rows, longer))}
    assert found["forward, 1024 tokens", "a", "xformers"] == pytest.approx(8)
    assert found["forward, 4096 tokens", "a", "xformers"] == pytest.approx(32)
    assert found["forward + backward, 1024 tokens", "a", "xformers"] == pytest.approx(3)
    axes = figure(results(*made().rows, longer)).axes
    assert sum(axis.get_visible() for axis in axes) == 3


def test_the_picture_has_these_bars() -> None:
    picture = figure(made())
    panels = {axis.get_title(loc="left").split("   ")[0]: axis for axis in picture.axes}
    drawn = {round(bar.get_x() + bar.get_width(), 6): bar for bar in panels["forward"].patches[:-1]}
    widths = sorted(drawn)
    assert widths == pytest.approx(sorted(b.speedup for b in bars(made()) if b.panel == "forward" and b.speedup))
    loss = drawn[0.5]
    assert loss.get_width() < 0 and loss.get_hatch()
    assert _hex(loss.get_facecolor()) == LOSS
    assert "0.50×" in {text.get_text() for text in panels["forward"].texts}
    assert "forward + backward" in panels


def _hex(colour: Any) -> str:
    from matplotlib.colors import to_hex

    return str(to_hex(colour))


def test_a_file_is_written_that_holds_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    save(made(), path)
    numbers = json.loads(texts(path)["Description"])
    assert {(n["panel"], n["name"], n["column"]): n["speedup"] for n in numbers} == {
        (b.panel, b.name, b.column): pytest.approx(b.speedup) for b in bars(made())
    }


def test_older_results_are_drawn_too(tmp_path: Path) -> None:
    found = {(b.panel, b.name): b.speedup for b in bars(load(OLD / "models_h200.json"))}
    assert found["infer, sdpa", "ViT-L 384"] == pytest.approx(3.17, abs=0.005)
    assert len(found) == 36
    save(load(OLD / "decode_h100.json"), tmp_path / "decode.png")
    assert texts(tmp_path / "decode.png")["Description"]


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoPlot, match="nothing to plot"):
        save(results(entry("a", inductor=1.0)), tmp_path / "a.png")
    with pytest.raises(NoPlot, match=r"is a \.png, \.svg or \.pdf, not 'a\.jpg'"):
        save(made(), tmp_path / "a.jpg")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(NoPlot, match=r"not installed: pip install 'xfcompile\[bench\]'"):
        save(made(), tmp_path / "a.png")
