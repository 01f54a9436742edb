"""What a reading knows of a node beside what it gives: whether it may write or draw, and whose tensors it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from xfcompile.read import Reading
from xfcompile.source import RewriteError
from xfcompile.trace import Meta
from xfcompile.values import Values, _slice_start


def reading_of(fn: Callable[..., Any], *inputs: Tensor) -> Reading:
    """Of the graph as torch.fx captures it, without examples of anything but the inputs."""
    return Reading(fx.symbolic_trace(fn), inputs)


def node_of(reading: Reading, name: str) -> fx.Node:
    return next(n for n in reading.time if n.name == name)


def effects_of(fn: Callable[..., Any], *inputs: Tensor) -> Any:
    """Those of the node before the output."""
    reading = reading_of(fn, *inputs)
    return reading.effects[list(reading.time)[-2]]


DENSE = torch.ones(4, 4)
SPARSE = torch.eye(4).to_sparse()
"""What stands for it in a trace has no strides, so that what is done with it is not read."""


def test_an_error_says_at_which_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("of a test")

    monkeypatch.setattr("xfcompile.programs.trace", fails)
    monkeypatch.setattr("xfcompile.programs._OF_PYTORCH", {})
    with pytest.raises(RewriteError, match="reading sin at"):
        reading_of(lambda x: x.sin(), DENSE)


def test_what_is_not_strided_is_not_read() -> None:
    reading = reading_of(lambda x, y: x @ y, SPARSE, DENSE)
    assert node_of(reading, "matmul") not in reading.program
    read = reading_of(lambda x, y: x @ y, DENSE, DENSE)
    assert node_of(read, "matmul") in read.program


WRITES: dict[str, tuple[Callable[[Tensor, Tensor], Any], bool]] = {
    "a function": (lambda x, y: F.relu(x), False),
    "a function that is told to write": (lambda x, y: F.relu(x, inplace=True), True),
    "a function that is told not to": (lambda x, y: F.relu(x, inplace=False), False),
    "an operation": (lambda x, y: torch.mul(x, y), False),
    "an operation with a place for its result": (lambda x, y: torch.mul(x, y, out=y), True),
    "a method that writes": (lambda x, y: x.mul_(y), True),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_not_read_may_write_where_it_is_told_to(name: str) -> None:
    fn, writes = WRITES[name]
    assert bool(effects_of(fn, SPARSE, DENSE).writes) == writes


def test_a_tensor_out_of_a_list_has_no_node() -> None:
    reading = reading_of(lambda x, y: torch.cat(torch.chunk(x, 2)) + y, DENSE, DENSE)
    holders = [node for node, _ in reading.tensor_arguments(node_of(reading, "cat"))]
    assert holders == [None, None]
    assert [n.name for n, _ in reading.tensor_arguments(node_of(reading, "add")) if n is not None] == ["cat", "y"]


def test_an_operator_that_gives_a_number_has_an_effect_where_it_draws_it() -> None:
    class Sizes(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0] * 2, -1)

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Sizes(), (torch.ones(4, 4),), dynamic_shapes={"x": {0: batch}})
    reading = Reading(program.graph_module)
    sizes = [n for n in reading.time if n.target is torch.ops.aten.sym_size.int]
    assert sizes
    assert not any(reading.effects[n].opaque for n in sizes)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: torch.unique(x),
    "what a mask keeps": lambda x: x[x > 0],
    "what a mask selects": lambda x: torch.masked_select(x, x > 0),
    "counts": lambda x: torch.bincount((x > 0).int().flatten()),
}


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
@pytest.mark.parametrize("name", MADE)
def test_a_size_that_depends_on_data_is_not_made_again(name: str) -> None:
    """Another symbol would be added to the program's own, and the value would not have the size that the tensor has."""
    sizes: list[int] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        examples = (n.meta.get("example_value") for n in gm.graph.nodes)
        env = next(x.fake_mode.shape_env for x in examples if isinstance(x, Tensor))
        before = len(env.var_to_range)
        reading = Reading(gm, inputs)
        assert any(n.name == "sin" for n in reading.program)
        sizes.append(len(env.var_to_range) - before)
        return gm

    torch._dynamo.reset()
    torch.compile(lambda x: MADE[name](x).sin(), backend=backend, fullgraph=True, dynamic=True)(torch.randn(4, 6))
    assert sizes == [0]


def test_where_a_slice_begins_is_not_known_where_its_length_does_not_tell() -> None:
    size, n, m = sympy.Symbol("size", positive=True, integer=True), *sympy.symbols("n m", integer=True)
    assert _slice_start(n, n + 2, size, 2, 1) is None, "two elements, from the front or from behind"
    assert _slice_start(n, None, size, size - n, 1) == n
    assert _slice_start(n, None, size, -n, 1) == size + n
    assert _slice_start(n, None, size, m, 1) is None


def test_a_part_that_begins_where_a_tensor_says_is_no_slice() -> None:
    values = Values()

    def meta(*shape: int) -> Meta:
        return Meta(shape, (), torch.int64, torch.device("cpu"))

    args = {"self": values.leaf(meta(4)), "dim": 0, "start": values.leaf(meta()), "length": 2}
    assert values.make(torch.ops.aten.narrow.Tensor, args, meta(2), 0, ()).op == "narrow"
