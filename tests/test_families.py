"""Families side by side: a toy one, x * sigmoid(x), beside attention in one graph."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

import xfcompile
from xfcompile import Options, Report
from xfcompile.emit import Emitter
from xfcompile.family import Candidate, Family, Route, Setting, Words
from xfcompile.read import Reading
from xfcompile.site import Miss
from xfcompile.values import Value

families = importlib.import_module("xfcompile.families")


@dataclass(frozen=True)
class SwishSite:
    root: Value
    x: Value
    interior: tuple[Value, ...]


def anchors(values: list[Value]) -> Iterator[Value]:
    return (value for value in values if value.op == "sigmoid")


def match(anchor: Value, users: dict[Value, list[Value]]) -> list[SwishSite]:
    x = anchor["self"]
    products = [u for u in users.get(anchor, ()) if u.op == "mul" and {u["self"], u["other"]} == {x, anchor}]
    if not products:
        raise Miss("the sigmoid is not multiplied with what it is of", anchor)
    return [SwishSite(root, x, (anchor, root)) for root in products]


def at_node(reading: Reading, site: SwishSite, node: fx.Node) -> Candidate:
    Emitter(reading, node, {}).held(site.x)
    return Candidate(site=site, node=node, operands=(site.x,), costly=site.interior[:1])


def plan(reading: Reading, candidate: Candidate, setting: Setting) -> Candidate:
    return replace(candidate, route=Route(setting.routes.get("swish_toy", "silu")))


def swap(emitter: Emitter, candidate: Candidate) -> fx.Node:
    return emitter.call(F.silu, emitter.held(candidate.site.x))  # type: ignore[attr-defined]


SWISH: Family[Any, Any] = Family(
    "swish_toy", ("silu", "inductor"), anchors, match, at_node, plan, swap, lambda _: Words("x*sigmoid(x)"), "the gates"
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Family[Any, Any]], None]:
    """The toy is one of the families; or another one is, that a test gives."""

    def add(family: Family[Any, Any]) -> None:
        monkeypatch.setattr(families, "FAMILIES", (families.ATTENTION, family))

    add(SWISH)
    return add


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def tensors(n: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*(shape or (2, 3, 8, 8)), generator=generator) for _ in range(n)]


def compiled(fn: Callable[..., Any], *inputs: Tensor, grad: bool = False, **options: Any) -> tuple[Report, str]:
    """What was found in a program, and the graph that came of it, after it was compared with eager."""
    code: list[str] = []
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, examples: Any) -> Any:
        reports.append(xfcompile.rewrite(gm, examples, {"strict": True, **options}))
        code.append("\n".join(m.code for m in gm.modules() if isinstance(m, fx.GraphModule)))
        return torch._dynamo.lookup_backend("aot_eager")(gm, examples)

    def run(called: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor | None]]:
        mine = [x.detach().clone().requires_grad_(grad) for x in inputs]
        out = called(*mine)
        outs = list(out) if isinstance(out, tuple) else [out]
        if grad:
            torch.autograd.backward(outs, [torch.ones_like(x) for x in outs])
        return outs + [x.detach() for x in mine], [x.grad for x in mine]

    torch.testing.assert_close(run(torch.compile(fn, backend=backend, fullgraph=True)), run(fn))
    assert len(reports) == 1
    return reports[0], code[0]


def routes(report: Report) -> list[tuple[str, str | None]]:
    return [(s.family, s.route) for s in report.sites]


def chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What one family replaces is an operand of the other's: a query, the input of a projection, and a result."""
    return swish(attention(swish(q), swish(k) @ v, v))


@pytest.mark.parametrize("grad", [False, True])
def test_each_family_takes_what_the_other_has_replaced(grad: bool) -> None:
    report, code = compiled(chain, *tensors(3), grad=grad)
    assert routes(report) == [("attention", "sdpa"), *[("swish_toy", "silu")] * 3]
    assert code.count("scaled_dot_product_attention(") == 1
    assert code.count("silu(") == 3
    assert "sigmoid" not in code and "softmax" not in code
    assert report.summary() == "1 attention site: 1 matched (1 sdpa); 3 swish_toy sites: 3 matched (3 silu)"
    assert [s.expression for s in report.sites][1:] == ["x*sigmoid(x)"] * 3


def test_an_operand_changed_in_place_after_it_was_replaced_is_the_changed_one() -> None:
    def changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v)
        out.mul_(2)
        return swish(out)

    report, _ = compiled(changed, *tensors(3))
    assert routes(report) == [("attention", "sdpa"), ("swish_toy", "silu")]


def test_an_attention_of_a_result_changed_in_place_is_of_the_changed_one() -> None:
    def changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v)
        out.mul_(2)
        return attention(out, k, v)

    report, code = compiled(changed, *tensors(3))
    assert routes(report) == [("attention", "sdpa")] * 2
    assert "mul_" in code


def test_an_operand_that_is_gone_leaves_the_site() -> None:
    def gone(x: Tensor) -> Tensor:
        y = x + 1
        gate, same = y.sigmoid(), y.clone()
        y.mul_(2)
        same.mul_(3)
        return (same / 3) * 0 + gate * (x + 1)

    report, _ = compiled(gone, *tensors(1))
    assert routes(report) == [("swish_toy", "silu")]  # x + 1 is there again

    def lost(x: Tensor) -> Tensor:
        y = x + 1
        product = torch.stack([y, y.sigmoid()])
        y.zero_()
        return product[0] * product[1]

    report, code = compiled(lost, *tensors(1))
    assert "silu" not in code


def test_patterns_switches_each_family_off() -> None:
    for name, off, on in [("attention", "silu(", "scaled_dot"), ("swish_toy", "scaled_dot", "silu(")]:
        report, code = compiled(chain, *tensors(3), patterns=[name])
        assert {s.family for s in report.sites} == {name}
        assert off not in code and on in code
    report, code = compiled(chain, *tensors(3), patterns=[])
    assert report.sites == [] and "silu(" not in code and "scaled_dot" not in code


def test_options_know_every_family() -> None:
    assert Options() == Options(patterns=frozenset({"attention", "swish_toy"}))
    report, _ = compiled(chain, *tensors(3), routes={"swish_toy": "inductor"})
    assert routes(report) == [("attention", "sdpa"), *[("swish_toy", "inductor")] * 3]
    with pytest.raises(ValueError, match=r"unknown family 'swish'.*the families are 'attention', 'swish_toy'"):
        Options(patterns=frozenset({"swish"}))
    with pytest.raises(ValueError, match="swish_toy has no route 'sdpa'; its routes are 'silu', 'inductor'"):
        Options(routes={"swish_toy": "sdpa"})


def test_a_replacement_that_fails_leaves_its_site_and_no_other(toy: Callable[[Family[Any, Any]], None]) -> None:
    def half(emitter: Emitter, candidate: Candidate) -> fx.Node:
        if candidate.node.meta["example_value"].shape[-1] == 8:
            emitter.call(torch.neg, swap(emitter, candidate))
            raise KeyError("spoilt")
        return swap(emitter, candidate)

    toy(replace(SWISH, replace=half))

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return swish(swish(attention(q, k, v))[..., :5])

    with pytest.warns(RuntimeWarning, match="replacing swish toy at test_families.py:[0-9]+: KeyError: 'spoilt'"):
        report, code = compiled(program, *tensors(3), strict=False)
    assert routes(report) == [("attention", "sdpa"), ("swish_toy", "inductor"), ("swish_toy", "silu")]
    assert report.sites[1].reason == "an error of xfcompile: KeyError: 'spoilt'"
    assert len(report.failures) == 1 and "spoilt" in report.failures[0]
    assert code.count("sigmoid(") == 1 and code.count("silu(") == 1 and "neg" not in code


def claiming(*ops: str) -> Family[Any, Any]:
    """A family that wants every negation, with the values of some operations below it as its interior."""

    def sites(anchor: Value, users: dict[Value, list[Value]]) -> list[SwishSite]:
        below, todo = [], [anchor]
        while todo:
            value = todo.pop()
            below += [value] if value.op in ops else []
            todo += value.inputs()
        return [SwishSite(anchor, anchor["self"], (*below, anchor))]

    def negated(emitter: Emitter, candidate: Candidate) -> fx.Node:
        return emitter.call(torch.mul, emitter.held(candidate.site.x), -1)  # type: ignore[attr-defined]

    return replace(
        SWISH,
        anchors=lambda values: (v for v in values if v.op == "neg"),
        match=sites,
        replace=negated,
        at_node=lambda reading, site, node: Candidate(site=site, node=node, operands=(site.x,)),
    )


@pytest.mark.parametrize("part", ["matmul", "softmax"])
def test_no_site_holds_a_part_of_a_replaced_attention(part: str, toy: Callable[[Family[Any, Any]], None]) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return -attention(q, k, v)

    toy(claiming(part))
    report, _ = compiled(program, *tensors(3))
    assert routes(report) == [("attention", "sdpa"), ("swish_toy", "inductor")]
    assert report.sites[1].reason == "a part of it belongs to the attention that is replaced"
    report, _ = compiled(program, *tensors(3), routes={"attention": "inductor"})
    assert routes(report) == [("attention", "inductor"), ("swish_toy", "silu")]
    toy(claiming())
    report, _ = compiled(program, *tensors(3))
    assert routes(report) == [("attention", "sdpa"), ("swish_toy", "silu")]


def test_what_lies_inside_of_an_attention_is_a_site_only_if_that_is_left(
    toy: Callable[[Family[Any, Any]], None],
) -> None:
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (-(q @ k.mT)).softmax(-1) @ v

    def shown(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = -(q @ k.mT)
        return scores.softmax(-1) @ v, scores

    toy(claiming())
    assert routes(compiled(inside, *tensors(3))[0]) == [("attention", "sdpa")]
    report, _ = compiled(shown, *tensors(3))
    assert routes(report) == [("attention", "sdpa"), ("swish_toy", "inductor")]
    assert report.sites[1].reason == "a part of it belongs to the attention that is replaced"
    for program in (inside, shown):
        report, _ = compiled(program, *tensors(3), routes={"attention": "inductor"})
        assert routes(report) == [("attention", "inductor"), ("swish_toy", "silu")]
        assert routes(compiled(program, *tensors(3), patterns=["swish_toy"])[0]) == [("swish_toy", "silu")]


def test_one_result_is_replaced_once(toy: Callable[[Family[Any, Any]], None]) -> None:
    toy(replace(SWISH, match=lambda anchor, users: match(anchor, users) * 2))
    report, code = compiled(swish, *tensors(1))
    assert routes(report) == [("swish_toy", "silu"), ("swish_toy", "inductor")]
    assert code.count("silu(") == 1


def test_what_something_else_needs_is_not_computed_twice() -> None:
    def shown(x: Tensor) -> tuple[Tensor, Tensor]:
        gate = x.sigmoid()
        return x * gate, gate

    report, code = compiled(shown, *tensors(1))
    assert [(s.route, s.reason) for s in report.sites] == [("inductor", "the gates are used elsewhere too")]
    assert "silu" not in code


def test_weights_that_another_family_takes_are_used_elsewhere() -> None:
    def gated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, swish(weights)

    report, code = compiled(gated, *tensors(3))
    assert routes(report) == [("attention", "inductor"), ("swish_toy", "silu")]
    assert code.count("softmax") == 1


def test_weights_that_are_an_operand_of_another_attention_are_used_elsewhere() -> None:
    def nested(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, (q @ weights.mT).softmax(-1) @ v

    report, code = compiled(nested, *tensors(3))
    # The product of q with the weights is an attention too.
    assert routes(report) == [("attention", "inductor"), ("attention", "inductor"), ("attention", "sdpa")]
    assert code.count("softmax") == 1


def test_a_result_written_later_is_right_with_gradients() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = swish(swish(q) + attention(q, k, v))
        y.add_(1)
        return y * v

    report, code = compiled(written, *tensors(3), grad=True)
    assert routes(report) == [("attention", "sdpa"), ("swish_toy", "silu"), ("swish_toy", "silu")]
    assert code.count(".clone()") == 1


def test_a_result_that_is_written_into_another_tensor_stays() -> None:
    def into(x: Tensor) -> Tensor:
        y = x + 1
        y.mul_(y.sigmoid())
        return y

    report, code = compiled(into, *tensors(1))
    assert "written into a tensor that is there already" in str(report.sites[0].reason)
    assert "silu" not in code


def test_a_result_that_is_a_view_of_what_the_program_has_stays(toy: Callable[[Family[Any, Any]], None]) -> None:
    def viewed(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        z = y.flatten()
        y.mul_(2)
        return z * 3, y

    def copied(emitter: Emitter, candidate: Candidate) -> fx.Node:
        return emitter.call(torch.reshape, emitter.call("clone", swap(emitter, candidate)), [-1])

    toy(replace(claiming(), anchors=lambda values: (v for v in values if v.op == "reshape"), replace=copied))
    report, _ = compiled(viewed, *tensors(1))
    assert [s.reason for s in report.sites] == ["the result is a view of a tensor that is there already"]


def test_no_site_crosses_the_border_of_a_region() -> None:
    def entering(x: Tensor) -> Tensor:
        gate = x.sigmoid()
        with torch.no_grad():
            y = x * gate
        return x + y

    def leaving(x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = x.sigmoid()
        return x * gate

    border = "the swish toy crosses the border of an autocast, no_grad or inference region"
    for crossing, why in ((entering, border), (leaving, "the sigmoid is not multiplied with what it is of")):
        report, code = compiled(crossing, *tensors(1), grad=True)
        assert [s.reason for s in report.sites] == [why]
        assert "silu" not in code


def test_both_are_found_in_a_checkpoint() -> None:
    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(chain, q, k, v, use_reentrant=False)

    report, _ = compiled(checkpointed, *tensors(3), grad=True)
    assert routes(report) == [("attention", "sdpa"), *[("swish_toy", "silu")] * 3]


def test_a_mask_made_once_stands_before_all_that_need_it() -> None:
    def crossed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keep = (k[0, 0, :, 0] > -2) & (torch.arange(8) != 3)
        first = (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1)
        second = (k @ q.mT).masked_fill(~keep, float("-inf")).softmax(-1)
        late = second @ v
        return first @ v, late

    report, code = compiled(crossed, *tensors(3))
    assert routes(report) == [("attention", "sdpa"), ("attention", "sdpa")]
    assert code.count("scaled_dot_product_attention(") == 2
