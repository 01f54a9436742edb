"""What a call of our kernel is given, and where there is none: the reasons why a planned call is not written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from equivalence import Outcome, check, tensors
from torch import Tensor

import xfcompile
from xfcompile.evaluate import Unsupported
from xfcompile.kernels.attention import programs
from xfcompile.score import J, Load
from xfcompile.site import ScoreSpec

SHAPE = (2, 8, 4, 8)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def by_our_kernel(program: Any, *shapes: tuple[int, ...]) -> Outcome:
    return check(program, *tensors(*shapes), routes={"attention": "triton"}, family="attention")


def test_keys_and_values_are_shared_by_as_many_heads() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(4, 1))

    (site,) = by_our_kernel(program, SHAPE, (2, 4, 4, 8), (2, 2, 4, 8)).matched
    assert site.route == "inductor"
    assert "different numbers of heads" in str(site.reason)


def test_keys_of_one_head_may_have_values_of_each() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k.expand(SHAPE), v)

    (site,) = by_our_kernel(program, SHAPE, (2, 1, 4, 8), SHAPE).matched
    assert site.route == "triton"


def test_a_bias_is_what_it_was_when_it_was_added() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        bias = m.sin()
        scores = q @ k.mT + bias
        bias.mul_(100)
        return scores.softmax(-1) @ v

    (site,) = by_our_kernel(program, SHAPE, SHAPE, SHAPE, (4, 4)).matched
    assert site.route == "inductor"
    assert "changed before the product" in str(site.reason)


def test_what_the_kernel_has_no_text_for_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(spec: Any) -> str:
        raise Unsupported("a function of a test")

    monkeypatch.setattr("xfcompile.kernels.attention.prepare", prepare)
    (site,) = by_our_kernel(attention, SHAPE, SHAPE, SHAPE).matched
    assert (site.route, site.reason) == ("inductor", "a function of a test")


@pytest.mark.parametrize("shape", [(4, 8), (2, 4, 8)], ids=["no batch", "a batch"])
def test_without_heads_there_is_one_layout(shape: tuple[int, ...]) -> None:
    (site,) = by_our_kernel(lambda q, k, v: attention(q, k, v).as_strided((8,), (1,)), shape, shape, shape).matched
    assert site.route == "triton"


def test_no_heads_are_left_alone() -> None:
    (site,) = by_our_kernel(attention, *[(2, 0, 4, 8)] * 3).matched
    assert (site.route, site.reason) == ("inductor", "there are no heads")


OF_SIZES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "distances up to some": (lambda i, j, n, m: (j - i).clamp(-n + 2, n - 2) * 0.2, "sdpa"),
    "a distance of a size": (lambda i, j, n, m: (torch.arange(m)[n - 1] - 7).abs() * j * 0.2, "sdpa"),
    "a choice that a size makes": (lambda i, j, n, m: torch.where(torch.arange(m)[n - 1] < 7, j, i) * 0.2, "inductor"),
}


@pytest.mark.parametrize("name", OF_SIZES)
def test_a_bias_may_hold_functions_of_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    bias, route = OF_SIZES[name]

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        return (q @ k.mT + bias(torch.arange(n)[:, None], torch.arange(m), n, m)).softmax(-1) @ v

    outcome = check(program, *tensors((1, 2, 5, 8), (1, 2, 9, 8), (1, 2, 9, 8)), dynamic=True, family="attention")
    assert [site.route for site in outcome.matched] == [route], outcome.sites


@pytest.mark.parametrize("queries, dead", [(4, "nan"), (6, "mean")])
def test_rows_without_keys_are_looked_for_where_there_may_be_some(queries: int, dead: str) -> None:
    """Of four keys that a mask lets be seen as far as the bottom right, the first of six queries see none."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        late = torch.ones(queries, 4, dtype=torch.bool).triu(4 - queries + 1)
        return (q @ k.mT).masked_fill(late, torch.finfo(q.dtype).min).softmax(-1) @ v

    outcome = by_our_kernel(program, (2, 8, queries, 8), SHAPE, SHAPE)
    (key,) = {n.args[6] for gm in outcome.graphs for n in gm.graph.nodes if "attention" in str(n.target)}
    assert programs.program(key).spec.dead == dead


# -- masks of parts ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concatenated": lambda a, b: torch.cat([a, b], -1),
    "a view, concatenated": lambda a, b: torch.cat([a.view(2, 5, 2).permute(0, 2, 1).flatten(1), b], -1),
    "with what sees all": lambda a, b: torch.cat([a.view(2, 5, 2).permute(0, 2, 1).flatten(1), torch.ones_like(b)], -1),
    "three parts": lambda a, b: torch.cat([b, a.view(2, 2, 5).mT.flatten(1), b], -1)[:, : a.shape[1] + b.shape[1]],
    "padded": lambda a, b: F.pad(a.view(2, 5, 2).permute(0, 2, 1).flatten(1), (b.shape[1], 0), value=True),
    "stacked": lambda a, b: torch.stack([a[:, :8].view(2, 4, 2).mT.flatten(1), b.repeat(1, 2)[:, :8]], -1).flatten(1),
}


@pytest.mark.parametrize("route", ["sdpa", "triton"])
@pytest.mark.parametrize("name", PARTS)
def test_of_a_mask_of_parts_none_is_read_beyond_its_end(name: str, route: str) -> None:
    """Each part is a tensor of its own, which has fewer elements than there are keys."""

    def boolean(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~PARTS[name](a, b)[:, None, None], -torch.inf).softmax(-1) @ v

    def added(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT + PARTS[name](a, b).to(q.dtype)[:, None, None]).softmax(-1) @ v

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, n, generator=generator) > 0.4 for n in (10, 6))
    a[:, 0] = b[:, 0] = True
    for program in (boolean, added):
        for grad in (False, True):
            x = tensors((2, 3, 7, 8), (2, 3, 16, 8), (2, 3, 16, 8), grad=grad)
            outcome = check(program, *x, a, b, grad=grad, routes={"attention": route})
            assert [(s.matched, s.route) for s in outcome.sites] == [(True, route)], outcome.reasons


def test_of_parts_of_any_length_none_is_read_beyond_its_end() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        mask = torch.cat([a, b], -1)[:, None, None]
        return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    for one, other in ((9, 4), (12, 7)):
        a, b = (torch.arange(2 * n).view(2, n) % 3 != 1 for n in (one, other))
        x = tensors((2, 3, 7, 8), (2, 3, one + other, 8), (2, 3, one + other, 8))
        outcome = check(program, *x, a, b, dynamic=True)
        assert [(s.matched, s.route) for s in outcome.sites] == [(True, "sdpa")], outcome.reasons


def test_kernels_are_told_of_a_part_no_index_beyond_its_end() -> None:
    """They read ahead, and for many tiles at once: under no condition."""
    found: list[ScoreSpec] = []

    def program(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        mask = torch.cat([a, b], -1)[:, None, None]
        return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def rewritten(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        xfcompile.rewrite(graph, inputs, {"routes": {"attention": "triton"}, "strict": True})
        keys = [x for node in graph.graph.nodes for x in node.args if "xfcompile.attention" in str(node.target)]
        found.extend(programs.program(key).spec for key in keys if isinstance(key, str))
        return graph

    x = tensors((2, 3, 7, 8), (2, 3, 16, 8), (2, 3, 16, 8))
    a, b = torch.ones(2, 10, dtype=torch.bool), torch.arange(12).view(2, 6) % 2 == 0
    ours = torch.compile(program, backend=rewritten)(*x, a, b)
    torch.testing.assert_close(ours, program(*x, a, b))
    (spec,) = found
    indices = {load.indices[-1] for load in spec.keep.atoms(Load)}
    assert indices == {sympy.Min(J, 9), J - 10}
