"""The report: every site is kept, layers are shown together, and the table fits."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from xfcompile.report import Report, SiteReport, collect, publish

SITE = SiteReport(
    family="attention",
    matched=True,
    route="sdpa",
    source="modeling_bert.py:133",
    expression="0.125*s",
    mask="key padding",
)
MISS = SiteReport(family="attention", matched=False, reason="softmax over the query axis", source="mine.py:7")


def layers(n: int) -> Report:
    return Report(sites=[replace(SITE, module=f"encoder.layer.{k}.attention") for k in range(n)], graphs=1)


@pytest.mark.parametrize(
    "sites, summary",
    [
        ([], "no sites in 2 graphs"),
        ([SITE], "1 attention site: 1 matched (1 sdpa)"),
        ([SITE] * 24, "24 attention sites: 24 matched (24 sdpa)"),
        ([SITE, MISS], "2 attention sites: 1 matched (1 sdpa), 1 not matched"),
        ([MISS], "1 attention site: 0 matched, 1 not matched"),
        ([SITE, SITE, replace(SITE, route="inductor")], "3 attention sites: 3 matched (2 sdpa, 1 inductor)"),
        (
            [SITE, replace(SITE, family="gated_mlp", route="triton")],
            "1 attention site: 1 matched (1 sdpa); 1 gated_mlp site: 1 matched (1 triton)",
        ),
    ],
)
def test_the_summary_counts(sites: list[SiteReport], summary: str) -> None:
    assert Report(sites=sites, graphs=2).summary() == summary


def test_layers_are_one_row_and_separate_sites() -> None:
    report = layers(24)
    text = report.render(100)
    assert len(report.sites) == 24
    assert text.count("modeling_bert.py:133") == 1
    assert "   24   attention" in text
    assert "encoder.layer.*." in text


def test_sites_that_differ_in_more_than_the_layer_have_rows_of_their_own() -> None:
    report = layers(3)
    report.add(replace(SITE, module="encoder.layer.3.attention", mask="causal"))
    text = report.render(100)
    assert text.count("modeling_bert.py:133") == 2
    assert "mask: causal" in text


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_table_fits_and_tells_all(width: int) -> None:
    long = replace(
        SITE, expression=" + ".join(f"t{k}[b, h, i, j]" for k in range(200)), source="a_rather_long_name.py:12345"
    )
    report = Report(sites=[SITE, MISS, long], graphs=1)
    text = report.render(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert len(text.splitlines()) < 40
    flat = "".join(text.split())
    for part in ("sdpa", "0.125*s", "keypadding", "notmatched:", "...", report.summary()):
        assert "".join(part.split()) in flat
    assert report.sites[2].expression == long.expression
    assert str(report)


def test_a_formula_with_brackets_is_not_taken_for_markup() -> None:
    assert "t0[b, h]" in Report(sites=[replace(SITE, expression="s + t0[b, h]")]).render(80)
    assert "[red]" in Report(sites=[replace(SITE, reason="x[red]")]).render(80)


def test_our_own_errors_are_shown() -> None:
    report = Report(graphs=1)
    report.failed("replacing attention at mine.py:3", KeyError("k"))
    assert report.failures == ["replacing attention at mine.py:3: KeyError: 'k'"]
    assert "KeyError: 'k'" in report.render(120)


def test_the_dict_is_json() -> None:
    report = Report(sites=[SITE, MISS], failures=["x"], graphs=2)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["summary"] == report.summary()
    assert found["graphs"] == 2
    assert found["failures"] == ["x"]
    assert [SiteReport(**site) for site in found["sites"]] == report.sites


def test_collectors_nest() -> None:
    with collect() as outer:
        publish(layers(1))
        with collect() as inner:
            publish(layers(2))
    publish(layers(4))
    assert (len(outer.sites), outer.graphs) == (3, 2)
    assert (len(inner.sites), inner.graphs) == (2, 1)


def test_a_collector_is_of_its_thread() -> None:
    with collect() as report:
        thread = threading.Thread(target=publish, args=(layers(1),))
        thread.start()
        thread.join()
    assert report.sites == []
