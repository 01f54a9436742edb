"""Options: ours are validated, Inductor's pass through, and nothing is lost without a word."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from xfcompile import Options, families
from xfcompile.options import KEYS


def test_no_options_are_the_defaults() -> None:
    options, patches = Options.parse(None, None)
    assert options == Options(patterns=frozenset(families.routes()), routes={}, strict=False, verify=False)
    assert patches == {}


def test_ours_are_kept_and_inductors_pass_through() -> None:
    options, patches = Options.parse(
        None,
        {"patterns": ["attention"], "routes": {"attention": "sdpa"}, "strict": True, "max_autotune": True},
    )
    assert options == Options(frozenset({"attention"}), {"attention": "sdpa"}, True)
    assert patches == {"max_autotune": True}


@pytest.mark.parametrize("mode", sorted(torch._inductor.list_mode_options()))
def test_a_mode_means_what_it_means_to_inductor(mode: str) -> None:
    assert Options.parse(mode, None)[1] == torch._inductor.list_mode_options(mode)


def test_options_win_over_the_mode() -> None:
    patches = Options.parse("max-autotune", {"triton.cudagraphs": False})[1]
    assert patches == torch._inductor.list_mode_options("max-autotune") | {"triton.cudagraphs": False}


def test_a_dash_is_an_underscore_in_inductors_names() -> None:
    assert Options.parse(None, {"max-autotune": True})[1] == {"max_autotune": True}


def test_parsing_leaves_torchs_own_tables_alone() -> None:
    Options.parse("max-autotune", {"max_autotune": False})
    assert torch._inductor.list_mode_options("max-autotune")["max_autotune"] is True


def test_no_name_of_ours_hides_one_of_inductors() -> None:
    assert not set(KEYS) & set(torch._inductor.list_options())


@pytest.mark.parametrize(
    "mode, options, words",
    [
        ("max-autotun", None, ["'max-autotun'", "'max-autotune'", "'reduce-overhead'"]),
        (None, {"route": {}}, ["'route'", "did you mean 'routes'", "'patterns', 'routes', 'strict'"]),
        (
            None,
            {"max_autotun": True},
            ["'max_autotun'", "did you mean 'max_autotune'", "'patterns', 'routes', 'strict'"],
        ),
        (None, {"qqqq": 1}, ["'qqqq'", "'patterns', 'routes', 'strict'"]),
        (None, {3: 1}, ["unknown option 3"]),
        (None, ["strict"], ["options must be a dict", "['strict']"]),
        (None, {"max_autotune": 3}, ["'max_autotune'", "bool", "int (3)"]),
        (None, {"patterns": "attention"}, ["'patterns'", "['attention']", "not 'attention'"]),
        (None, {"patterns": 3}, ["'patterns'", "not 3"]),
        (None, {"patterns": ["atention"]}, ["'atention'", "did you mean 'attention'"]),
        (None, {"patterns": [["attention"]]}, ["unknown family ['attention']"]),
        (None, {"routes": "sdpa"}, ["'routes'", "{'attention': 'sdpa'}", "not 'sdpa'"]),
        (None, {"routes": {"atention": "sdpa"}}, ["'atention'", "did you mean 'attention'"]),
        (
            None,
            {"routes": {"attention": "tritn"}},
            ["'tritn'", "did you mean 'triton'", "'triton', 'sdpa', 'inductor'"],
        ),
        (None, {"routes": {"attention": None}}, ["no route None"]),
        (None, {"strict": 1}, ["'strict'", "True or False", "not 1"]),
    ],
)
def test_what_is_not_known_is_an_error_that_helps(mode: str | None, options: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Options.parse(mode, options)
    for word in words:
        assert word in str(error.value)


def test_the_bare_pass_takes_ours_only() -> None:
    assert Options.of(None) == Options()
    assert Options.of({"strict": True}) == Options(strict=True)
    assert Options.of(Options(strict=True)) == Options(strict=True)
    with pytest.raises(ValueError, match="unknown option 'epilogue_fusion'; the options are 'patterns'"):
        Options.of({"epilogue_fusion": True})
    with pytest.raises(ValueError, match=r"unknown option 'max_autotune' \(did you mean 'autotune'"):
        Options.of({"max_autotune": True})


def test_options_are_values() -> None:
    routes = {"attention": "sdpa"}
    options = Options(routes=routes)
    routes["attention"] = "triton"
    assert options.routes == {"attention": "sdpa"}
    assert hash(options) == hash(Options(routes={"attention": "sdpa"}))
    with pytest.raises(AttributeError):
        options.strict = True  # type: ignore[misc]


def test_the_fingerprint_tells_options_apart() -> None:
    variants = [
        Options(),
        Options(strict=True),
        Options(patterns=frozenset()),
        *(Options(routes={"attention": route}) for route in ("triton", "sdpa", "inductor")),
    ]
    assert len({options.fingerprint() for options in variants}) == len(variants)
