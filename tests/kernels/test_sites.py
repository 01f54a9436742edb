"""A call in generated code asks for the layouts of its tensors once, and computes with those that it is given."""

from __future__ import annotations

import dataclasses
from typing import Any

import gated_cases
import pytest
import torch
from attention_cases import Inputs, Sizes, inputs, named
from backward_cases import floating
from torch import Tensor

from xfcompile import activation
from xfcompile.activation import X
from xfcompile.kernels.attention import fit, forward_call, launch, launch_backward, lists, prepare, programs
from xfcompile.kernels.attention.backward_layout import Needs
from xfcompile.kernels.bias_act_dropout import calls as bias_calls
from xfcompile.kernels.bias_act_dropout import op as bias_op
from xfcompile.kernels.bias_act_dropout import text_of
from xfcompile.kernels.gated_mlp import launch as gated_launch
from xfcompile.kernels.gated_mlp import op as gated_op
from xfcompile.kernels.registration import Site

SIZES = Sizes(2, 2, 1, 40, 72, 16, 16)
CASE = named("bias_bhij")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> list[str]:
    """What looks at layouts."""
    found: list[str] = []
    for module, name in ((launch, "layout_of"), (launch_backward, "layout_of")):
        original = getattr(module, name)

        def noting(*given: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(*given)

        monkeypatch.setattr(module, name, noting)
    return found


def given(dtype: torch.dtype = torch.float16) -> list[Inputs]:
    x = inputs(CASE, dtype, sizes=SIZES)
    return [x, dataclasses.replace(x, q=x.q.flip(2), v=x.v * 2, operands=[-y for y in x.operands])]


def forward(x: Inputs, site: Site | None = None) -> tuple[Tensor, Tensor]:
    return launch.run(x.q, x.k, x.v, x.operands, x.ints, x.floats, prepare(CASE.spec), site=site)


def test_attention_asks_once(asked: list[str]) -> None:
    site, (one, other) = Site(), given()
    wanted = [forward(x) for x in (one, other)]
    asked.clear()
    for x, right in ((one, wanted[0]), (other, wanted[1]), (one, wanted[0])):
        assert all(map(torch.equal, forward(x, site), right))
    assert asked == ["layout_of"]
    assert not torch.equal(wanted[0][0], wanted[1][0])


def test_tensors_that_start_elsewhere_are_looked_at(asked: list[str]) -> None:
    site, (x, _) = Site(), given()
    right = forward(x, site)
    memory = torch.empty(x.q.numel() + 1, dtype=x.q.dtype)
    q = memory[1:].view(x.q.shape).copy_(x.q)
    assert q.data_ptr() % 16 and q.stride() == x.q.stride()
    asked.clear()
    assert all(map(torch.equal, forward(dataclasses.replace(x, q=q), site), right))
    assert all(map(torch.equal, forward(x, site), right))
    assert asked == ["layout_of"]


def test_how_fp32_is_multiplied_is_asked_each_time(asked: list[str]) -> None:
    site, (x, _) = Site(), given(torch.float32)
    for _ in range(2):
        forward(x, site)
    assert asked == ["layout_of"] * 2 and site.found is None


def test_a_kernel_that_fails_later_gives_way(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    site, (x, other) = Site(), given()
    forward(x, site)
    told: list[Any] = []
    monkeypatch.setattr(fit, "give_way", lambda *about: told.append(about))

    def fails(*arguments: Any) -> Any:
        raise fit.NoTilesFit("too little memory")

    site.found = fails
    exact = forward_call.by_definition(CASE.spec, False)(other.q, other.k, other.v, other.operands, [], None)
    for _ in range(2):
        assert all(map(torch.equal, forward(other, site), exact))
    assert len(told) == 1


def test_gradients_ask_once(asked: list[str]) -> None:
    site, key = Site(), prepare(CASE.spec)
    made = []
    for x in given():
        out, lse = forward(x)
        needs = Needs(True, True, True, tuple(floating(x)))
        for place in (None, site):
            asked.clear()
            dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
            *own, rest = launch_backward.run(
                dout, x.q, x.k, x.v, out, lse, x.operands, x.ints, x.floats, key, needs, site=place
            )
            made.append([*own, *rest])
    assert asked == []
    for right, found in ((made[0], made[1]), (made[2], made[3])):
        assert all(map(torch.equal, right, found))
    assert not torch.equal(made[0][0], made[2][0])


def test_lists_ask_once(interpreter: None) -> None:
    key = programs.mask_of(prepare(named("documents").spec))
    assert key is not None
    shape, site = [1, 1, 70, 70], Site()
    like, first = torch.empty(1, 1, 70, 16), torch.arange(70)[None] // 30
    operands = [[x] * len(lists.program(key).mask.operands) for x in (first, torch.zeros_like(first))]

    def run(x: list[Tensor], site: Site | None = None) -> list[list[int]]:
        """Of each row the numbers of tiles, and the tiles; what lies between is anything."""
        rows = lists.run(like, x, [], [], shape, 32, 32, key, site=site).flatten(0, 2).tolist()
        return [row[: 3 + row[1]] + row[len(row) - row[2] :] for row in rows]

    wanted = [run(x) for x in operands]
    run(operands[0], site)
    lists.program(key).launches.clear()
    assert [run(x, site) for x in operands] == wanted and not lists.program(key).launches
    assert wanted[0] != wanted[1]


GATED = gated_cases.Case(rows=20, features=12, inner=24)


def test_gated_mlps_ask_once(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = GATED.but(dtype=torch.float16, inner=32, layout="separate")
    asked: list[Any] = []
    original = gated_launch.layout_of
    monkeypatch.setattr(gated_launch, "layout_of", lambda x: asked.append(x) or original(x))
    given = gated_cases.inputs(case)
    x, weight = given.x, given.weights[0]
    key = gated_cases.key_of("silu")
    site = Site()

    def run(x: Tensor, site: Site | None = None) -> Tensor:
        return gated_op._gated_mlp(x, *rest, key, "separate", "dual", False, x.dtype, site=site)[0]

    rest = (weight, weight.flip(0), None, None)
    wanted = [run(x), run(-x)]
    asked.clear()
    found = [run(x, site), run(-x, site), run(x, site)]
    assert len(asked) == 6  # of one call
    assert all(map(torch.equal, found, [*wanted, wanted[0]])) and not torch.equal(*wanted)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    assert torch.equal(run(memory[1:].view(x.shape).copy_(x), site), wanted[0])
    assert len(asked) == 12


def test_activations_ask_once(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = bias_calls.layout_of
    monkeypatch.setattr(bias_calls, "layout_of", lambda x: asked.append(x) or original(x))
    gelu = text_of(activation.gelu(X, "none"))
    generator = torch.Generator().manual_seed(0)
    x, bias, weight = (torch.randn(*n, generator=generator).half() for n in ((4, 6, 16), (16,), (16, 16)))
    sites = [Site(), Site()]

    def run(x: Tensor, known: bool) -> list[Tensor]:
        about = (bias, [], [], None, 0, gelu, 0.0, x.dtype)
        one, other = sites if known else (None, None)
        return [bias_op._forward(x, *about, False, site=one), bias_op._linear(x, weight, *about, False, site=other)[0]]

    wanted = [run(x, False), run(-x, False)]
    run(x, True)
    assert sites[0].found is None and sites[1].found is None, "on CPUs, whether Triton interprets may change"
    monkeypatch.setattr(bias_calls, "setting", lambda x: False)
    run(x, True)
    asked.clear()
    for y, right in ((-x, wanted[1]), (x, wanted[0])):
        assert all(map(torch.equal, run(y, True), right))
    assert asked == []
