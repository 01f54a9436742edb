"""What runs on a Hopper GPU by default, planned without one: what was measured to be faster, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from xfcompile import gated_routes, rewrite
from xfcompile.activation import GATE, UP
from xfcompile.families import bias_act_dropout
from xfcompile.kernels.attention import tiles
from xfcompile.measured import Fact

L = F.linear


def swiglu(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(L(x, w)) * L(x, v)


def packed(x: Tensor, w: Tensor) -> Tensor:
    gate, up = L(x, w).chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def in_turns(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = L(x, w, b).unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up


def transposed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(x @ w) * (x @ v)


def experts(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(x @ w.mT) * (x @ v.mT)


def activated(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(L(x, w, b))


def biased(y: Tensor, b: Tensor) -> Tensor:
    return F.gelu(y.sin() + b)


def from_columns(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(x @ w + b)


def with_residual(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.gelu(L(x, w, b)) + r


@pytest.fixture(autouse=True)
def a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("another GPU is here")
    monkeypatch.setattr(tiles, "capability", lambda index: (9, 0))


class Planned(Exception):
    """Enough was seen: without the GPU the program does not run."""


def planned(
    fn: Callable[..., Tensor], *shapes: tuple[int, ...], dtype: torch.dtype, dynamic: Sequence[tuple[int, int]] = ()
) -> list[tuple[str | None, str | None]]:
    """The routes of a program's sites, and why. dynamic: which axes of which inputs may have any size."""
    found: list[tuple[str | None, str | None]] = []

    def backend(gm: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        found.extend((s.route, s.reason) for s in rewrite(gm, examples, {"strict": True}).sites if s.matched)
        raise Planned

    with FakeTensorMode():
        inputs = [torch.empty(s, device="cuda", dtype=dtype) for s in shapes]
        for n, axis in dynamic:
            torch._dynamo.mark_dynamic(inputs[n], axis)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Planned"):
            torch.compile(fn, backend=backend)(*inputs)
    return found


X, MANY, W, WIDE = (4096, 512), (16384, 512), (1024, 512), (2048, 512)
ROUTES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], dict[str, Any], str]] = {
    "swiglu": (swiglu, (X, W, W), {}, "triton"),
    "rows of a batch": (swiglu, ((2, 512, 512), W, W), {}, "triton"),
    "packed": (packed, (X, WIDE), {}, "triton"),
    "fp16": (swiglu, (X, W, W), {"dtype": torch.float16}, "triton"),
    "fp32": (swiglu, (X, W, W), {"dtype": torch.float32}, "inductor"),
    "few rows": (swiglu, ((1023, 512), W, W), {}, "inductor"),
    "rows that change": (swiglu, (X, W, W), {"dynamic": [(0, 0)]}, "inductor"),
    "features that are no multiple of 8": (swiglu, (X, (1001, 512), (1001, 512)), {}, "inductor"),
    "inputs that are no multiple of 8": (swiglu, ((4096, 516), (1024, 516), (1024, 516)), {}, "inductor"),
    "few features": (swiglu, (X, (504, 512), (504, 512)), {}, "inductor"),
    "few inputs": (swiglu, ((4096, 504), (1024, 504), (1024, 504)), {}, "inductor"),
    "weights that are transposed": (transposed, (X, (512, 1024), (512, 1024)), {}, "inductor"),
    "experts": (experts, ((4, *X), (4, *W), (4, *W)), {}, "inductor"),
    "biases in turns": (in_turns, (X, WIDE, (2048,)), {}, "inductor"),
    "gelu": (activated, (X, W, (1024,)), {}, "epilogue"),
    "gelu, a batch": (activated, ((4, 1024, 512), W, (1024,)), {}, "epilogue"),
    "gelu, few rows": (activated, ((4095, 512), W, (1024,)), {}, "inductor"),
    "gelu, rows that change": (activated, (X, W, (1024,)), {"dynamic": [(0, 0)]}, "inductor"),
    "gelu, inputs that change": (activated, (X, W, (1024,)), {"dynamic": [(0, 1), (1, 1)]}, "inductor"),
    "gelu, few features": (activated, (X, (504, 512), (504,)), {}, "inductor"),
    "gelu, few inputs": (activated, ((4096, 256), (1024, 256), (1024,)), {}, "inductor"),
    "gelu, odd features": (activated, (X, (1001, 512), (1001,)), {}, "inductor"),
    "gelu and a residual": (with_residual, (X, W, (1024,), (4096, 1024)), {}, "inductor"),
    "gelu of what no linear makes": (biased, (X, (512,)), {}, "inductor"),
    "gelu, a weight that is transposed": (from_columns, (X, (512, 1024), (1024,)), {}, "inductor"),
    "gelu, fp32": (activated, (X, W, (1024,)), {"dtype": torch.float32}, "inductor"),
}


@pytest.mark.parametrize("name", ROUTES)
def test_the_usual_route_on_hopper(name: str) -> None:
    fn, shapes, about, route = ROUTES[name]
    found = planned(fn, *shapes, **{"dtype": torch.bfloat16, **about})
    assert [r for r, _ in found] == [route], found
    assert all(reason != "asked for" for _, reason in found)


def test_what_runs_in_training() -> None:
    gated = {
        place[2:] for place, fact in gated_routes.USUAL.items() if place[1] == "training" and fact.value == "triton"
    }
    linear = {fact.value.route for (_, _, training), fact in bias_act_dropout.USUAL.items() if training}
    assert gated == {("separate", "many rows")}
    assert linear == {"inductor", "triton"}
    assert all(
        kind in ("activated, dropped", "added, dropped")
        for (_, kind, _), fact in bias_act_dropout.USUAL.items()
        if fact.value.route == "triton"
    )


@pytest.mark.parametrize(
    ("layout", "rows", "dtype", "dropout", "route"),
    [
        ("separate", 8192, torch.bfloat16, 0.0, "triton"), ("separate", 1024, torch.float16, 0.0, "triton"),
        ("separate", 1023, torch.bfloat16, 0.0, "inductor"), ("separate", 1, torch.bfloat16, 0.0, "inductor"),
        ("separate", 8192, torch.float32, 0.0, "inductor"), ("separate", 8192, torch.bfloat16, 0.1, "inductor"),
        ("gate first", 8192, torch.bfloat16, 0.0, "inductor"),
    ],
)  # fmt: skip
def test_gated_mlps_in_training(layout: str, rows: int, dtype: torch.dtype, dropout: float, route: str) -> None:
    """Decided from the site alone: there are no gradients of pretended tensors on a GPU."""
    pretended = SimpleNamespace(dtype=dtype, meta=SimpleNamespace(device=torch.device("cuda", 0)))
    site: Any = SimpleNamespace(
        experts=None, dtype=dtype, layout=layout, root=pretended, rows=sympy.Integer(rows), inner=sympy.Integer(512),
        features=sympy.Integer(2048), dropout=dropout, formula=GATE * UP, weights=(SimpleNamespace(order=(0, 1)),),
    )  # fmt: skip
    assert gated_routes.choose(site, training=True, forced=None).name == route


# -- few rows ------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_rows_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for weights in ("separate", "packed"):
        for rows in ("one row", "few rows", "dozens of rows"):
            monkeypatch.setitem(gated_routes.USUAL, ("sm_90", "inference", weights, rows), Fact("triton"))


@pytest.mark.usefixtures("few_rows_are_ours")
@pytest.mark.parametrize(
    ("rows", "about", "route"),
    [
        (1, {}, "triton"), (16, {}, "triton"), (64, {}, "triton"), (65, {}, "inductor"), (1024, {}, "triton"),
        (16, {"dtype": torch.float32}, "inductor"), (16, {"dynamic": [(0, 0)]}, "triton"),
        (65, {"dynamic": [(0, 0)]}, "inductor"), (4096, {"dynamic": [(0, 0)]}, "inductor"),
        (16, {"dynamic": [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]}, "triton"),
    ],
)  # fmt: skip
def test_few_rows_once_they_are_ours(rows: int, about: dict[str, Any], route: str) -> None:
    found = planned(swiglu, (rows, 512), W, W, **{"dtype": torch.bfloat16, **about})
    assert [r for r, _ in found] == [route], found


@pytest.mark.parametrize("ours", ["one row", "few rows"])
def test_rows_that_change_are_compiled_for_few_and_for_any(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of sequences, both of which may have any length: what counts is how many rows they are together."""
    for rows in ("one row", "few rows", "dozens of rows"):
        usual = Fact("triton" if rows == ours else "inductor")
        monkeypatch.setitem(gated_routes.USUAL, ("sm_90", "inference", "separate", rows), usual)
    found: list[str | None] = []

    def backend(gm: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        program = copy.deepcopy(gm)
        found.extend(s.route for s in rewrite(gm, examples, {"strict": True}).sites if s.matched)
        return program.forward

    with FakeTensorMode():
        weights = [torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in (W, W)]
        compiled = torch.compile(swiglu, backend=backend, dynamic=True)
        for sizes in ((2, 8), (3, 4), (5, 2)):
            compiled(torch.empty(*sizes, 512, device="cuda", dtype=torch.bfloat16), *weights)
        few = ["triton"] if ours == "few rows" else ["inductor"]
        assert found == few
        for sizes in ((2, 9), (40, 3), (3, 700)):
            compiled(torch.empty(*sizes, 512, device="cuda", dtype=torch.bfloat16), *weights)
        assert found == (["triton", "inductor"] if ours == "few rows" else few)


@pytest.mark.usefixtures("few_rows_are_ours")
def test_exported_programs_are_not_held_to_few_rows() -> None:
    class Gated(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
            return swiglu(x, w, v)

    with FakeTensorMode():
        inputs = tuple(torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in ((16, 512), W, W))
        program = torch.export.export(Gated(), inputs, dynamic_shapes=({0: torch.export.Dim("rows")}, None, None))
        (site,) = rewrite(program.graph_module, inputs, {"strict": True}).sites
    assert (site.route, site.reason) == ("inductor", gated_routes.CHANGING)
    (rows,) = program.range_constraints.values()
    assert rows.upper > 10**6


# -- dropout -------------------------------------------------------------------------------------------------------


def dropped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.dropout(F.gelu(L(x, w, b)), 0.1)


def dropped_alone(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.dropout(L(x, w, b), 0.1)


def added_to_dropped(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return r + F.dropout(L(x, w, b), 0.1)


def two_added_to_dropped(x: Tensor, w: Tensor, b: Tensor, r: Tensor, z: Tensor) -> Tensor:
    return r + F.dropout(L(x, w, b), 0.1) + z


def dropped_and_added(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.dropout(F.gelu(L(x, w, b)), 0.1) + r


DROPPED: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], dict[str, Any], str]] = {
    "dropped": (dropped, (X, W, (1024,)), {}, "triton"),
    "no dropout": (activated, (X, W, (1024,)), {}, "epilogue"),
    "few rows": (dropped, ((4095, 512), W, (1024,)), {}, "inductor"),
    "few features": (dropped, (X, (504, 512), (504,)), {}, "inductor"),
    "rows that change": (dropped, (X, W, (1024,)), {"dynamic": [(0, 0)]}, "inductor"),
    "fp32": (dropped, (X, W, (1024,)), {"dtype": torch.float32}, "inductor"),
    "nothing is activated": (dropped_alone, (MANY, W, (1024,)), {}, "inductor"),
    "a residual": (dropped_and_added, (X, W, (1024,), (4096, 1024)), {}, "inductor"),
    "a residual of many rows": (dropped_and_added, (MANY, W, (1024,), (16384, 1024)), {}, "inductor"),
    "added to a residual": (added_to_dropped, (MANY, W, (1024,), (16384, 1024)), {}, "triton"),
    "few rows added": (added_to_dropped, (X, W, (1024,), (4096, 1024)), {}, "inductor"),
    "rows added to one": (added_to_dropped, (MANY, W, (1024,), (1, 1024)), {}, "inductor"),
    "added twice": (two_added_to_dropped, (MANY, W, (1024,), (16384, 1024), (16384, 1024)), {}, "inductor"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_the_usual_route_in_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing needs a gradient here, for which fake tensors would want a GPU: the table says the same without one."""
    fn, shapes, about, route = DROPPED[name]
    table = bias_act_dropout.USUAL
    for kind in ("activated, dropped", "added, dropped"):
        monkeypatch.setitem(table, ("sm_90", kind, False), table["sm_90", kind, True])
    found = planned(fn, *shapes, **{"dtype": torch.bfloat16, **about})
    assert [r for r, _ in found] == [route], found


@pytest.mark.parametrize(("fn", "shapes"), [(swiglu, (X, W, W)), (activated, (X, W, (1024,)))])
def test_without_gluon_it_is_left_to_inductor(
    fn: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xfcompile.kernels.gemm import launch

    def kernel(epilogue: object) -> None:
        raise ImportError("no module named gluon")

    launch.missing.cache_clear()
    monkeypatch.setattr(launch, "kernel", kernel)
    try:
        found = planned(fn, *shapes, dtype=torch.bfloat16)
    finally:
        launch.missing.cache_clear()
    assert [r for r, _ in found] == ["inductor"]
    assert "no such Gluon (ImportError: no module named gluon)" in str(found[0][1])
