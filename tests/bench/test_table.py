"""Tables of results, losses as plain as wins."""

from __future__ import annotations

from entries import cell, entry, results
from rich.console import Console

from xfcompile.bench.results import Results
from xfcompile.bench.table import colour, report


def text(made: Results) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report(made))
    return console.export_text()


def test_a_cell_has_time_spread_ratio_memory_and_error() -> None:
    shown = text(
        results(
            entry("a", inductor=cell(8.0, peak_gb=4.25, error_by_eager=1.0), xformers=cell(2.0, error_by_eager=3.25)),
            entry("slow", inductor=1.0, xformers=2.0),
        )
    )
    assert "8.000 ±10% 4.00×" in shown and "4.2 GB err 1" in shown and "err 3.2" in shown
    assert "1.000 ±10% 0.50×" in shown
    assert "NVIDIA H200; torch 2.11.0, triton 3.6.0; revision 0123456789ab" in shown


def test_losses_are_red_and_wins_green() -> None:
    assert colour(0.9) == "bold red" and colour(1.5) == "green" and colour(1.0) == ""


def test_what_has_no_number_says_why() -> None:
    made = results(
        entry("a", inductor=8.0, flex={"failed": "out of memory"}, liger={"skipped": "liger_kernel is not installed"}),
        {**entry("b", inductor={}), "skipped": "timm is not installed"},
        {**entry("c", inductor=1.0), "errors": "not compared: out of memory"},
        entry("d", inductor=1.0, xformers=cell(1.0, failures=["bug in us"])),
        {**entry("f", inductor=1.0), "disturbed": "another process computes on the GPU"},
    )
    made.not_run = [{"row": "e, forward", "reason": "the budget of 5 s was over"}]
    shown = text(made)
    assert "failed: flex: out of memory (a, forward, S1024)" in shown
    assert "not measured: liger: liger_kernel is not installed (a, forward, S1024)" in shown
    assert "not measured: timm is not installed (b, forward, S1024)" in shown
    assert "not measured: errors not compared: out of memory (c, forward, S1024)" in shown
    assert "failed: xformers, an error of this package: bug in us (d, forward, S1024)" in shown
    assert "failed: timed while another process computes on the GPU (f, forward, S1024)" in shown
    assert "not run: 1 rows" in shown and "e, forward: the budget of 5 s was over" in shown


def test_goals_say_which_rows_fall_short() -> None:
    shown = text(results(entry("a", inductor=8.0, xformers=1.0), entry("b", inductor=0.9, xformers=1.0)))
    assert "forward: 8 times as fast as Inductor" in shown and "not reached" in shown
    assert "b, forward, S1024 0.900" in shown
    assert "not measured" in shown  # FlexAttention was not asked for


def test_compile_times_are_a_table_of_their_own() -> None:
    starts = {"inductor": {"cold_s": 10.0, "warm_s": 2.0}, "xformers": {"cold_s": 12.0, "warm_s": 2.0}}
    shown = text(results(entry("a", "start", "sdpa", **starts), benchmark="models"))
    assert "10.0, 2.0 1.20× 1.00×" in shown and "12.0, 2.0" in shown
