"""Files of results: kept, gone on with, and those of older scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from entries import RUN, entry, results

from xfcompile.bench.job import Row
from xfcompile.bench.results import Results, Unusable, continued, load
from xfcompile.bench.summary import ratio

OLD = Path(__file__).parents[2] / "examples" / "results"


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    made = results(entry("a", inductor=4.0, xformers=1.0))
    made.not_run = [{"row": "b", "reason": "the budget was over"}]
    path = tmp_path / "new" / "a.json"
    made.save(path, {"goals": []})
    assert load(path) == made
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    assert json.loads(path.read_text())["runs"][0]["hardware"]["device"] == "NVIDIA H200"


def test_a_row_is_done_when_it_has_something_in_every_column() -> None:
    made = results(entry("a", inductor=4.0, xformers={"failed": "wrong"}), {**entry("b"), "skipped": "no library"})
    row = Row("a", "forward", (("S", 1024),))
    assert made.done(row, ["inductor", "xformers"])
    assert not made.done(row, ["inductor", "flex"])
    assert not made.done(Row("a", "forward", (("S", 4096),)), ["inductor"])
    assert made.done(Row("b", "forward", (("S", 1024),)), ["inductor"])
    assert not results({**entry("a", inductor=4.0), "disturbed": "another process ..."}).done(row, ["inductor"])


def test_a_row_that_is_measured_again_gives_way() -> None:
    made = results(entry("a", inductor=4.0))
    made.runs.append(RUN)
    made.add(entry("a", inductor=3.0, flex=1.0))
    (row,) = made.rows
    assert row["cells"]["inductor"]["ms"] == 3 and row["run"] == 1
    assert made.columns == ["inductor", "flex"]


def test_another_machine_or_benchmark_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results(entry("a", inductor=4.0)).save(path)
    assert continued(path, "attention", RUN).rows
    with pytest.raises(Unusable, match="results of 'attention', not of 'models'"):
        continued(path, "models", RUN)
    with pytest.raises(Unusable, match=r"device NVIDIA H200 there, A100 here"):
        continued(path, "attention", RUN | {"hardware": {"device": "A100"}})
    with pytest.raises(Unusable, match=r"torch 2\.11\.0 there, 2\.13\.0 here"):
        continued(path, "attention", RUN | {"versions": {"torch": "2.13.0", "triton": "3.6.0"}})


@pytest.mark.parametrize(
    "text,reason",
    [
        ("", "is not JSON"),
        ("[1]", "is no file of results"),
        ('{"rows": []}', "is no file of results"),
        ('{"format": 1, "rows": []}', "is it whole"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(Unusable, match=reason):
        load(path)
    with pytest.raises(Unusable, match="there is no file"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "name,benchmark,count",
    [
        ("programs_h200", "attention", 24),
        ("programs_train_h200", "attention", 24),
        ("models_h200", "models", 36),
        ("cpu", "models", 4),
        ("gated_h200", "gated-mlp", 17),
        ("bias_act_dropout_h200", "bias-act-dropout", 2),
        ("decode_h100", "decode", 9),
    ],
)
def test_results_of_older_scripts_are_read(name: str, benchmark: str, count: int) -> None:
    found = load(OLD / f"{name}.json")
    assert isinstance(found, Results) and found.benchmark == benchmark and len(found.rows) == count
    assert len({Row.of(row) for row in found.rows}) == count
    assert any(cell.get("ms") for row in found.rows for cell in row["cells"].values())


def test_older_numbers_stay_what_they_were() -> None:
    old = json.loads((OLD / "models_h200.json").read_text())["rows"]
    found = load(OLD / "models_h200.json").rows
    for before, now in zip(old, found, strict=True):
        assert ratio(now, "xformers", "inductor") == pytest.approx(before["speedup"])
    trained = load(OLD / "programs_train_h200.json")
    assert {row["mode"] for row in trained.rows} == {"forward+backward"}
