"""Results as bars: how many times as fast as Inductor, on a logarithmic axis, where a loss points the other way."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xfcompile.bench import columns as c
from xfcompile.bench.results import Entry, Results
from xfcompile.bench.summary import NO_SLOWER, geometric_mean, groups, number, ratio

COLOURS = {
    c.XFORMERS: "#1f5fbf", c.XFORMERS_MAX: "#0b2f6b", "xformers-triton": "#6f9fe0", "xformers-cublas": "#8fb8ea",
    "xformers-epilogue": "#a9cbf2", c.FLEX: "#f0a63a", c.TOLD: "#5ba86f", c.SDPA: "#5ba86f", c.MAX: "#9a9a9a",
    c.LIGER: "#a070c0", c.FLOOR: "#cccccc",
}  # fmt: skip
"""Of the columns that are shown, in the order in which they are shown."""
LOSS = "#c8102e"
ABOVE, BELOW = 0.85, 0.35
"""Inches for the title and the legend, and for where it was measured."""
BAR = 0.17
"""Inches that a bar is high."""
TALL = 6.0
"""Inches of a panel from which four stand in a line."""
LEFT_OUT = {
    "attention": ("xformers-triton",),
    "decode": ("xformers-triton",),
    "models": (c.MAX, c.XFORMERS_MAX),
}
"""Of a benchmark, the columns that only tables have: forced routes that are mostly taken anyway, and what would make a
picture of many models one that nobody reads."""
BEST_SDPA = "the fastest SDPA"


class NoPlot(Exception):
    """A plot cannot be made: said to the user."""


@dataclass(frozen=True)
class Bar:
    """One bar: the geometric mean of the speed-ups of `rows` rows over the baseline, and the least and the most."""

    panel: str
    name: str
    column: str
    speedup: float
    least: float
    most: float
    rows: int

    @property
    def loss(self) -> bool:
        return self.speedup < NO_SLOWER


def bars(results: Results) -> list[Bar]:
    """All bars, panel by panel. A panel is a mode and variant, of attention at one length; rows that differ in other
    sizes alone are one bar."""
    found, base = [], over(results)
    timed = [r for r in results.rows if not r["mode"].startswith("start")]
    names = dict.fromkeys(_name(results, r) for r in timed)
    for panel, rows in _panels(results, timed).items():
        for name in names:
            mine = [r for r in rows if _name(results, r) == name]
            for column in (x for x in COLOURS if x not in LEFT_OUT.get(results.benchmark, ())):
                ratios = [x for r in mine if (x := _speedup(r, column, base)) is not None]
                if ratios:
                    mean = geometric_mean(ratios)
                    assert mean is not None
                    found.append(Bar(panel, name, column, mean, min(ratios), max(ratios), len(ratios)))
    return found


def _panels(results: Results, rows: Sequence[Entry]) -> dict[str, list[Entry]]:
    lengths = _lengths(results)
    found = groups(rows)
    if len(lengths) < 2:
        return found
    # What was measured at some lengths only is compared with what was measured there.
    return {
        f"{PANELS.get(panel, panel)}, {length} tokens": [r for r in mine if r["sizes"]["S"] == length]
        for panel, mine in found.items()
        for length in lengths
    }


def _lengths(results: Results) -> list[int]:
    """Of attention's rows."""
    return sorted({r["sizes"]["S"] for r in results.rows}) if results.benchmark == "attention" else []


def _name(results: Results, entry: Entry) -> str:
    """Programs of attention are one bar for all head dims; others are told apart by what their sizes are."""
    sizes = entry["sizes"]
    if results.benchmark in ("gated-mlp", "bias-act-dropout"):
        return f"{entry['name']}, {sizes['M']} × {sizes['K']} × {sizes['N']}"
    if results.benchmark == "decode":
        return f"{entry['name']}, 1/{sizes['S'] // sizes['filled']} filled"
    return str(entry["name"])


def over(results: Results) -> str:
    """What speed-ups are over: the baseline, or, where it was not measured, that of these which most rows have."""

    def rows(column: str) -> int:
        return sum(bool(number(entry, column)) for entry in results.rows)

    if rows(results.baseline):
        return results.baseline
    best = max((c.SDPA, c.FLEX, c.EAGER), key=rows)
    return best if rows(best) else results.baseline


def _speedup(entry: Entry, column: str, base: str) -> float | None:
    if column != c.SDPA or base == c.SDPA:
        return ratio(entry, column, base) if column != base else None
    every = [x for sdpa in c.SDPAS if (x := ratio(entry, sdpa, base)) is not None]
    return max(every, default=None)


def figure(results: Results) -> Any:
    """A matplotlib figure of all bars."""
    from matplotlib.figure import Figure

    found = bars(results)
    if not found:
        raise NoPlot(
            f"nothing to plot: no row has a time both of a column and of {over(results)!r}, which speed-ups are over"
        )
    panels = list(dict.fromkeys(bar.panel for bar in found))
    heights = [_height([bar for bar in found if bar.panel == panel]) for panel in panels]
    wide = len(_lengths(results)) if len(panels) > 2 else 0
    wide = wide if wide > 1 else min(len(panels), 4 if len(panels) > 3 and max(heights) > TALL else 2)
    # Panels of a row are as high as the higher of them.
    lines = [max(heights[n : n + wide]) for n in range(0, len(panels), wide)]
    size = ((5.6 if wide > 2 else 7.4) * wide, ABOVE + BELOW + sum(lines) + 0.75 * len(lines))
    made = Figure(figsize=size, layout="constrained", dpi=150)
    engine: Any = made.get_layout_engine()
    engine.set(rect=(0, BELOW / size[1], 1, 1 - (ABOVE + BELOW) / size[1]), hspace=0.04)
    axes = made.subplots(len(lines), wide, squeeze=False, height_ratios=lines)
    span = _span(found)
    base = c.COLUMNS[over(results)].label
    for n, panel in enumerate(panels):
        mine = [bar for bar in found if bar.panel == panel]
        _draw(axes[n // wide][n % wide], panel, mine, span, (lines[n // wide] - 0.3) / BAR)
    for n in range(len(panels), len(lines) * wide):
        axes[n // wide][n % wide].set_visible(False)
    title = f"{_head(results)}: times as fast as {base}"
    made.text(0.02, 1 - 0.12 / size[1], title, fontsize=14 if wide > 1 else 12, fontweight="bold", va="top")
    _legend(made, found, 1 - 0.42 / size[1])
    made.text(0.02, 0.12 / size[1], _where(results), fontsize=7, color="#555555", va="bottom")
    return made


def _height(found: Sequence[Bar]) -> float:
    """Inches."""
    names = len(dict.fromkeys(bar.name for bar in found))
    return BAR * (len(found) + 0.9 * names) + 0.3


def _span(found: Sequence[Bar]) -> tuple[float, float]:
    """The axis, which all panels share, with room for a bar's number."""
    least = min(min(bar.least for bar in found), 0.9)
    most = max(max(bar.most for bar in found), 1.25)
    return least / (most / least) ** 0.06, most * (most / least) ** 0.16


def _draw(axis: Any, panel: str, found: Sequence[Bar], span: tuple[float, float], room: float) -> None:
    """room: how many bars the panel is high."""
    from matplotlib.ticker import FixedLocator, NullLocator

    place, ticks = 0.0, dict[str, list[float]]()
    for n, bar in enumerate(found):
        place += 1.9 if n and found[n - 1].name != bar.name else 1.0
        ticks.setdefault(bar.name, []).append(place)
        ours, colour = c.ours(bar.column), COLOURS[bar.column]
        # A bar begins at 1: what is slower than Inductor points to the left, and ours is red then.
        axis.barh(
            place, bar.speedup - 1, 0.92, left=1, color=LOSS if ours and bar.loss else colour,
            hatch="////" if bar.loss else None, edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        if bar.rows > 1 and bar.most > bar.least:
            axis.plot([bar.least, bar.most], [place, place], color="black", linewidth=0.7, alpha=0.55)
        end = max(bar.speedup, 1.0, bar.most if bar.rows > 1 else 0.0)
        axis.annotate(
            f"{bar.speedup:.2f}×", (end, place), (3, 0), textcoords="offset points", va="center", fontsize=7,
            color=LOSS if bar.loss else "black", fontweight="bold" if ours else "normal",
        )  # fmt: skip
    axis.set_yticks([sum(p) / len(p) for p in ticks.values()], list(ticks), fontsize=9)
    axis.set_xscale("log")
    axis.set_xlim(*span)
    steps = [x for x in (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if span[0] <= x <= span[1]]
    if span[1] / span[0] > 12:
        steps = [x for x in steps if x != 1.5]
    if span[1] / span[0] > 300:
        steps = [x for x in (0.01, 0.1, 1, 3, 10, 30, 100, 300) if span[0] <= x <= span[1]]
    axis.xaxis.set_major_locator(FixedLocator(steps))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{x:g}×" for x in steps], fontsize=8)
    axis.axvline(1, color="black", linewidth=1)
    axis.axvspan(span[0], 1, color=LOSS, alpha=0.05, linewidth=0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(room, 0)
    title = PANELS.get(panel, panel)
    means = {col: geometric_mean([b.speedup for b in found if b.column == col]) for col in (c.XFORMERS,)}
    if (mean := means[c.XFORMERS]) is not None:
        title += f"   (mean {mean:.2f}×)"
    axis.set_title(title, loc="left", fontsize=11)


PANELS = {
    "infer, sdpa": "inference, default attention", "infer, eager": "inference, eager attention",
    "train, sdpa": "training step, default attention", "train, eager": "training step, eager attention",
    "decode, sdpa": "decoding, default attention", "decode, eager": "decoding, eager attention",
    "forward+backward": "forward + backward", "step": "one step",
}  # fmt: skip


def _legend(made: Any, found: Sequence[Bar], top: float) -> None:
    from matplotlib.patches import Patch

    shown = [column for column in COLOURS if any(bar.column == column for bar in found)]
    labels = {column: c.COLUMNS[column].label for column in shown} | {c.SDPA: BEST_SDPA}
    handles = [Patch(color=COLOURS[column], label=labels[column]) for column in shown]
    if any(bar.loss for bar in found):
        handles.append(Patch(facecolor=LOSS, hatch="////", edgecolor="white", label="a loss (red: of xformers)"))
    most = 4 if made.get_figwidth() < 10 else 7
    made.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.01, top), ncols=min(len(handles), most), fontsize=8,
        frameon=False,
    )  # fmt: skip


def _head(results: Results) -> str:
    return results.title[0].upper() + results.title[1:]


def _where(results: Results) -> str:
    """Where it was measured, and what a bar is."""
    found = []
    for run in results.runs:
        versions = run.get("versions", {})
        words = [run.get("hardware", {}).get("device")]
        words += [f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions]
        if run.get("revision"):
            words.append(f"revision {run['revision']}")
        text = ", ".join(filter(None, words))
        if text not in found:
            found.append(text)
    sizes = len({json.dumps(r["sizes"]) for r in results.rows})
    shown = f"{found[-1]}, and {len(found) - 1} runs before" if len(found) > 2 else "; ".join(found)
    if sizes > 1 and results.benchmark == "attention":
        shown += "\na bar is the geometric mean over head dims, its thin line reaches from the least to the most"
    return shown


def needs(path: Path) -> None:
    """Raises `NoPlot` where there can be none."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise NoPlot(f"a plot is a .png, .svg or .pdf, not {path.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise NoPlot("a plot was asked for, and matplotlib is not installed: pip install 'xfcompile[bench]'")


def save(results: Results, path: Path) -> None:
    """Write the figure; a PNG also holds the numbers of its bars, as JSON under "Description"."""
    needs(path)
    made = figure(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(bar) for bar in bars(results) if math.isfinite(bar.speedup)])
    made.savefig(path, metadata={"Description": numbers} if path.suffix.lower() == ".png" else None)
