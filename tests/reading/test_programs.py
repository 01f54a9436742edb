"""What is PyTorch's own is traced once in a process, and again where something that it depends on is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from xfcompile import programs
from xfcompile.read import Reading


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_OF_PYTORCH", {})


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    trace = programs._trace

    def counted(fn: Any, *about: Any) -> Any:
        found.append(fn)
        return trace(fn, *about)

    monkeypatch.setattr(programs, "_trace", counted)
    return found


def graph(fn: Callable[..., Any], *x: Tensor) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
        found.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*x)
    return found[0]


def program(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.softmax(x @ y.transpose(0, 1), -1).add(torch.arange(5)).sum(0)


def read(fn: Callable[..., Any] = program, rows: int = 4) -> Reading:
    return Reading(graph(fn, torch.randn(rows, 3), torch.randn(5, 3)))


def meaning(reading: Reading) -> list[str]:
    return [f"{node.op} {value!r}" for node in reading.gm.graph.nodes if (value := reading.value(node)) is not None]


def test_a_second_graph_traces_nothing_anew(traced: list[Any]) -> None:
    first = meaning(read())
    assert len(traced) >= 5
    traced.clear()
    assert meaning(read()) == first
    assert not traced
    assert meaning(read(rows=6)) != first  # other sizes: all but what has none of them
    assert 0 < len(traced) < 6


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("other", [default_dtype, deterministic, Mode, lambda: torch.device("meta")])
def test_under_other_settings_all_is_traced_anew(other: Callable[[], Any], traced: list[Any]) -> None:
    gm = graph(program, torch.randn(4, 3), torch.randn(5, 3))
    first = meaning(Reading(gm))
    count = len(traced)
    with other():
        Reading(gm)
    assert len(traced) == 2 * count
    assert meaning(Reading(gm)) == first, "what was found there is kept here"
    assert len(traced) == 2 * count


def test_autocast_is_another_setting(traced: list[Any]) -> None:
    def cast(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return program(x, y)

    plain, half = meaning(read()), meaning(read(cast))
    assert plain != half and any("bfloat16" in line for line in half)
    assert meaning(read()) == plain and meaning(read(cast)) == half


@torch._dynamo.allow_in_graph
def of_a_user(x: Tensor) -> Tensor:
    return x * FACTOR[0]


FACTOR = [2.0]


def test_what_is_not_pytorchs_is_traced_for_each_graph() -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        return of_a_user(x) + y.sum()

    def factor() -> Any:
        reading = read(call)
        (node,) = (n for n in reading.gm.graph.nodes if n.target is of_a_user)
        value = reading.value(node)
        assert value is not None
        return value["other"]

    assert factor() == 2.0
    FACTOR[0] = 3.0
    assert factor() == 3.0


def test_symbolic_sizes_belong_to_their_graph(traced: list[Any]) -> None:
    def dynamic() -> fx.GraphModule:
        x = torch.randn(4, 3)
        torch._dynamo.mark_dynamic(x, 0)
        return graph(lambda x, y: (x * 2).sum(0) + y.sum(0), x, torch.randn(5, 3))

    Reading(dynamic())
    count = len(traced)
    Reading(dynamic())
    assert len(traced) - count == 2  # the product and its sum; what has no rows is known


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MOST", 4)
    for rows in range(2, 12):
        read(rows=rows)
    assert len(programs._OF_PYTORCH) <= 4
