"""One gated MLP, however it is spelled: every program of the table is matched, read alike, and gives eager's."""

from __future__ import annotations

import pytest
from equivalence import tensors
from gated_programs import ROUTES, SPELLINGS, Spelling, check


def read(s: Spelling, *, grad: bool, **about: object) -> None:
    inputs = tensors(*s.shapes, dtype=s.dtype, grad=grad)
    outcome = check(s.fn, *inputs, grad=grad, dynamic=s.dynamic, routes=ROUTES, **about)  # type: ignore[arg-type]
    sites = [site for site in outcome.sites if site.family == "gated_mlp"]
    assert [site.matched for site in sites] == [True] * s.sites, outcome.reasons
    assert [site.route for site in sites] == ["triton"] * s.sites, outcome.sites
    if s.formula is not None:
        assert {site.expression for site in sites} == {f"{s.formula}, {s.layout}"}


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_matched_and_equal_to_eager(name: str) -> None:
    read(SPELLINGS[name], grad=False)


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_gradients_equal_to_eager(name: str) -> None:
    read(SPELLINGS[name], grad=True)
