"""A formula of one element is the element: random tensor programs of indices, masks and views, read and run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from evaluate import captured, evaluate, number
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xfcompile.elementwise.constants import as_number
from xfcompile.elementwise.elements import Elements
from xfcompile.elementwise.rules import RULES
from xfcompile.read import Reading
from xfcompile.score import Load
from xfcompile.trace import Meta
from xfcompile.values import Values

SIZES = (2, 3, 4)
AXES = sympy.symbols("a b c", integer=True, nonnegative=True)


def assert_formula(fn: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Any:
    """The formula of each element of fn's result has that element's value; returns the formula."""
    gm = captured(fn, inputs)
    reading = Reading(gm)
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0][0]
    leaves = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]  # of what is used
    result = fn(*[x.clone() for x in inputs])
    inputs = inputs[: len(placeholders)]
    for node, x in zip(placeholders, inputs, strict=True):
        leaves[reading.value(node, 0)] = x
    end = len(reading.time)
    value = reading.value(output, end)
    assert value is not None
    axes = AXES[: result.ndim]
    ranges = {a: sympy.Integer(n) for a, n in zip(axes, result.shape, strict=True)}
    elements = Elements(RULES, ranges)
    formula = as_number(elements.at(value, tuple(axes)))
    loads = [result if v is value else _tensor_of(gm, reading, v, inputs, leaves) for v in elements.loads]
    for position in torch.cartesian_prod(*[torch.arange(n) for n in result.shape]).reshape(-1, result.ndim).tolist():
        told = number(formula, dict(zip(axes, position, strict=True)), loads)
        truth = float(result[tuple(position)])
        assert told == truth or math.isclose(told, truth, rel_tol=1e-5, abs_tol=1e-6), (formula, position, told, truth)
    return formula


def _tensor_of(gm: torch.fx.GraphModule, reading: Reading, value: Any, inputs: Any, leaves: Any) -> torch.Tensor:
    """A loaded value: what the node that holds it computes."""
    if value in leaves:
        return leaves[value]
    found: list[torch.Tensor] = []

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            made = super().run_node(n)
            if not found and reading.value(n) is value:
                found.append(made.clone())
            return made

    Watching(gm).run(*[x.clone() for x in inputs])
    return found[0] if found else evaluate(value, leaves)


FIXED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tril": lambda x: torch.ones(3, 4).tril(1),
    "triu of bool": lambda x: torch.ones(3, 4, dtype=torch.bool).triu(-1),
    "triu of -inf": lambda x: torch.full((3, 4), float("-inf")).triu(1),
    "diff": lambda x: torch.diff(torch.arange(5)[None], prepend=torch.zeros(1, 1, dtype=torch.long), dim=-1),
    "cumsum of ones": lambda x: torch.ones(2, 3, dtype=torch.long).cumsum(-1),
    "cumsum of comparisons": lambda x: (
        torch.diff(torch.arange(6)[None], prepend=torch.arange(1)[None] - 1) != 1
    ).cumsum(-1),
    "cat": lambda x: torch.cat([torch.arange(3)[None], torch.full((1, 2), 7)], dim=-1),
    "cat of inputs": lambda x: torch.cat([x[0], x[1] * 2], dim=0),
    "pad": lambda x: torch.nn.functional.pad(torch.ones(2, 3), (1, 2, 0, 1), value=5.0),
    "pad of an input": lambda x: torch.nn.functional.pad(x[0], (1, 0), value=-1.0),
    "gather by arange": lambda x: x[0][torch.arange(3)[:, None], torch.arange(4)[None, :]],
    "gather backwards": lambda x: x[0][:, torch.arange(4).flip(0)],
    "negative gather": lambda x: x[0][:, torch.arange(4) - 4],
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0]) * 0 + torch.arange(2)),
    "flip": lambda x: (torch.arange(12).view(3, 4)).flip(-1),
    "roll": lambda x: torch.arange(4).roll(1),
    "repeat": lambda x: torch.arange(4).repeat(3, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "stack": lambda x: torch.stack([torch.arange(3), torch.arange(3) * 2], 0)[1],
    "floor division": lambda x: torch.arange(-4, 8) // 3,
    "remainder": lambda x: torch.arange(-4, 8) % 3,
    "truncating division": lambda x: torch.div(torch.arange(-4, 8), 3, rounding_mode="trunc"),
    "fmod": lambda x: torch.fmod(torch.arange(-4, 8), 3),
    "arange with steps": lambda x: torch.arange(2, 14, 3),
    "arange of floats": lambda x: torch.arange(0.5, 3.0),
    "min and max": lambda x: torch.minimum(torch.arange(6), torch.tensor(3)) + torch.arange(6).clamp(2, 4),
    "cast to bool and back": lambda x: (torch.arange(4) - 2).bool().int(),
    "cast to integers": lambda x: (x * 3).long(),
    "where of where": lambda x: torch.where(torch.arange(4) > 1, torch.where(torch.arange(4) > 2, 5, 6), 7),
    "not of a number": lambda x: torch.logical_not(torch.arange(4) % 2),
    "xor": lambda x: (torch.arange(4) > 1) ^ (torch.arange(4) < 3),
    "invert integers": lambda x: ~torch.arange(4),
    "eye": lambda x: torch.eye(3, 4),
    "new_zeros filled": lambda x: x.new_zeros(3, 4).fill_(2.5),
    "masked fill": lambda x: x.masked_fill(torch.arange(4) > 2, -1.0),
    "written rows": lambda x: torch.zeros(3, 4).index_fill_(0, torch.tensor([1]), 3.0),
    "set by slices": lambda x: _set_slices(),
    "relative positions": lambda x: (torch.arange(4)[None, :] - torch.arange(3)[:, None]).abs(),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "unfolded": lambda x: x[0].unfold(1, 2, 1)[:, 0],
    "strided": lambda x: x.as_strided((2, 2), (1, 3)),
    "diagonal": lambda x: x[0, :3, :3].diagonal(),
    "t_": lambda x: torch.arange(12).view(3, 4).clone().t_(),
    "chunked": lambda x: x.chunk(2, -1)[1],
    "tensor_split": lambda x: x.tensor_split(3, dim=1)[2],
    "bucketed": lambda x: torch.bucketize(torch.arange(6), torch.tensor([1, 3])),
    "a scalar of the input": lambda x: x[0, 0, 0] + torch.arange(3),
    "powers": lambda x: torch.pow(torch.tensor(0.5), torch.arange(1, 5)),
    "expanded": lambda x: x[0, 0].expand(3, 4),
    "moved": lambda x: x.movedim(0, -1),
    "multiplied masks": lambda x: (torch.arange(4) > 0).float() * (torch.arange(4) < 3).float(),
    "rounded positions, compared": lambda x: torch.arange(255, 260, dtype=torch.bfloat16) == 256,
    "rounded positions, and others": lambda x: torch.arange(2047, 2052).half()[:, None] >= torch.arange(2047, 2052),
    "positions, compared with rounded ones": lambda x: (
        torch.arange(2047.0, 2052.0)[:, None] >= torch.arange(2047, 2052).half()
    ),
    "positions, rounded to be compared": lambda x: torch.arange(2047, 2052) > torch.tensor(2048.0).half(),
    "positions, rounded to be added to": lambda x: torch.arange(2047, 2051) + torch.full((4,), -4.0).half() == 2045,
    "a rounded sum, compared": lambda x: torch.arange(4).bfloat16() + 256 == 256,
    "a difference of rounded positions": lambda x: (lambda i: i[:, None] - i == 0)(torch.arange(255, 260).bfloat16()),
    "whole numbers, rounded and compared": lambda x: (lambda n: n == n.mT)(
        ((x[0, 0] * 3).int() + 260).expand(4, 4).bfloat16()
    ),
    "fractions, rounded and compared": lambda x: x[0, 0].expand(4, 4).half() == -1.1259765625,
    "rounded positions, whole again": lambda x: torch.arange(255, 260).bfloat16().int(),
    "rounded positions, truncated": lambda x: torch.arange(255, 260).bfloat16() // 257,
    "the rest of rounded positions": lambda x: torch.arange(255, 260).bfloat16() % 257,
    "rounded positions that are none": lambda x: torch.logical_not(torch.arange(255, 260).bfloat16() - 257),
    "rounded positions and a boolean": lambda x: torch.logical_and(
        torch.arange(255, 260).bfloat16() - 257, torch.arange(5) < 4
    ),
    "rounded positions as booleans": lambda x: (torch.arange(255, 260).bfloat16() - 257).bool(),
    "bytes below zero": lambda x: torch.arange(4, dtype=torch.uint8) - 2,
    "bytes out of range": lambda x: torch.arange(4, dtype=torch.int8) * 100,
    "positions as bytes": lambda x: torch.arange(-2, 2).to(torch.uint8),
    "a mask of bytes": lambda x: (torch.arange(4) > 2).byte() - 1,
    "data as bytes": lambda x: (x[0] * 300).int().to(torch.uint8),
    "bytes, compared with a number that is none": lambda x: torch.arange(4).byte() >= 256,
    "bytes, compared with another one": lambda x: torch.arange(4).byte() > torch.tensor(256),
    "signed bytes, compared with a number that is none": lambda x: torch.arange(4).to(torch.int8) <= 255,
    "bytes, divided by a number that is none": lambda x: torch.arange(4).byte() // 257,
    "the rest of bytes, divided by a number that is none": lambda x: torch.arange(4).byte() % 257,
    "bytes, clamped by a number that is none": lambda x: torch.arange(4).byte().clamp(min=-1),
    "the larger of bytes and a number that is none": lambda x: torch.maximum(torch.arange(4).byte(), torch.tensor(257)),
    "whole numbers of 32 bits out of range": lambda x: (torch.arange(4) + 2**31 - 2).int(),
    "a product of 32 bits out of range": lambda x: (torch.arange(4, dtype=torch.int32) + 40000) * 60000,
    "a product of 64 bits out of range": lambda x: torch.arange(4) * 2**62,
    "a multiple of what was out of range": lambda x: torch.arange(4) * 2**62 * 2 >= 0,
    "data out of range": lambda x: (x[0] * 3).long() * 3_000_000_000_000_000_000,
    "positions of more digits than float32 has": lambda x: (torch.arange(4) + 2**24 - 1).float() == 2**24,
    "data of more digits than float32 has": lambda x: ((x[0, 0] * 3).long() + 2**24).float() == 2**24,
    "the rest of positions of more digits than float64 has": lambda x: (torch.arange(4) + 2**53 - 1).double() % 3,
    "a complex constant": lambda x: torch.full((3,), 1, dtype=torch.complex64).abs(),
    "bits": lambda x: torch.arange(8) & 3,
    "fractions that are equal": lambda x: torch.arange(4) * 0.1 == 0.3,
    "repeat_interleave of all": lambda x: x[0].repeat_interleave(2),
    "repeat_interleave by a tensor": lambda x: x.repeat_interleave(torch.tensor([1, 2, 1]), dim=1, output_size=4),
    "cat of nothing": lambda x: torch.cat([x[0][:, :0], x[1][:, :0]], dim=-1),
    "stack, seen whole": lambda x: torch.stack([torch.arange(3), torch.arange(3) * 2], 0),
    "diff twice": lambda x: torch.diff(torch.arange(6) % 4, n=2),
    "diff with an end": lambda x: torch.diff(torch.arange(5), append=torch.tensor([7, 9])),
    "diff of a mask": lambda x: torch.diff(torch.arange(5) < 3),
    "gather by data": lambda x: x[0][:, x[0, 0, :2].abs().long()],
    "gather apart": lambda x: torch.arange(24).view(SIZES)[torch.arange(2), :, torch.arange(2)],
    "index_select of one": lambda x: x.index_select(1, torch.tensor(1)),
    "index_select by data": lambda x: x.index_select(2, x[0, 0, :2].abs().long()),
    "minimum of masks": lambda x: (1 - (torch.arange(4) > 0).float()) * torch.finfo(torch.float32).min,
}


def _set_slices() -> torch.Tensor:
    """BEiT's table."""
    table = torch.zeros(3, 4, dtype=torch.long)
    table[1:, 1:] = torch.arange(6).view(2, 3)
    table[0, 0:] = 7
    table[0:, 0] = 8
    return table


@pytest.mark.parametrize("name", list(FIXED))
def test_an_element_of(name: str) -> None:
    assert_formula(FIXED[name], torch.randn(SIZES, generator=torch.Generator().manual_seed(0)))


LOADED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a long formula": lambda x: sum((torch.arange(8) * k % (k + 5) for k in range(1, 13)), torch.zeros(8)),
    "many rows": lambda x: sum((x[0, k, :, None] + x[1, k] for k in range(3)), torch.zeros(4)),
    "differences of floats": lambda x: torch.diff(torch.arange(5.0)),
    "sums of data": lambda x: x[0][:, :1].expand(3, 4).cumsum(-1),
    "squares": lambda x: torch.arange(4) ** 2,
    "a logarithm": lambda x: torch.log(x[0, 0, :1].abs().expand(4)),
    "a logarithm of what is below 0": lambda x: torch.log(torch.where(torch.arange(4) > 1, 1.0, -1.0)),
}


def read(fn: Callable[[torch.Tensor], torch.Tensor], size: sympy.Expr | None = None) -> tuple[Any, list[bool]]:
    """The formula of an element of a result, and of each loaded tensor whether it is that. size: of each axis."""
    gm = captured(fn, [torch.randn(SIZES)])
    reading = Reading(gm)
    value = reading.value(next(n for n in gm.graph.nodes if n.op == "output").args[0][0])
    assert value is not None
    axes = AXES[: value.ndim]
    elements = Elements(
        RULES, {a: sympy.Integer(n) if size is None else size for a, n in zip(axes, value.shape, strict=True)}
    )
    return elements.at(value, axes), [v is value for v in elements.loads]


@pytest.mark.parametrize("name", list(LOADED))
def test_what_costs_more_to_compute_is_loaded(name: str) -> None:
    formula, loads = read(LOADED[name])
    assert isinstance(formula, Load) and loads == [True]


COMPUTED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "positions, of any length": lambda x: torch.arange(4) + 1,
    "positions of many digits, of any length": lambda x: torch.arange(4.0) + 1,
    "a mask of bytes": lambda x: (torch.arange(4) > 2).byte(),
    "positions of few digits, of any length": lambda x: (torch.arange(4) + 255).float() > 256,
    "positions beside fractions": lambda x: torch.arange(4) > torch.full((4,), 1.5),
    "few rounded positions": lambda x: torch.arange(4).half() > 2,
}


def test_positions_of_more_digits_than_a_dtype_has_are_loaded_whatever_the_length() -> None:
    size = sympy.Symbol("n", integer=True, positive=True)
    assert read(lambda x: (torch.arange(4) + 2**24 - 1).float() == 2**24, size)[1] == [True]


@pytest.mark.parametrize("name", list(COMPUTED))
def test_what_needs_no_tensor_is_not_loaded(name: str) -> None:
    size = sympy.Symbol("n", integer=True, positive=True) if "any length" in name else None
    assert read(COMPUTED[name], size)[1] == []


def test_bytes_are_loaded_from_where_they_are() -> None:
    formula, loads = read(lambda x: x[0, 0].byte().expand(3, 4))
    assert formula == Load(0, AXES[1]) and loads == [False]


def test_what_a_mask_picks_is_loaded() -> None:
    """How many that is says the data."""

    def meta(dtype: torch.dtype, *shape: Any) -> Meta:
        return Meta(shape, (), dtype, torch.device("cpu"))

    values = Values()
    tensor, mask = (values.leaf(meta(dtype, 3, 4)) for dtype in (torch.float32, torch.bool))
    value = values.intern("index", {"self": tensor, "indices": (mask,)}, meta(torch.float32, sympy.Symbol("u0")))
    assert Elements(RULES, {}).at(value, AXES[:1]) == Load(0, AXES[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mask_of_few_digits_is_a_mask_still(dtype: torch.dtype) -> None:
    """transformers' own: 1 - mask, in the model's dtype, is compared with 0, which rounding does not change."""
    formula = assert_formula(lambda x: (1.0 - x.int().expand(4, 3).to(dtype)).bool(), torch.tensor([0.0, 1.0, 257.0]))
    assert [load.indices for load in formula.atoms(Load)] == [(AXES[1],)], (
        "the data itself, and not all that is made of it"
    )


def test_indices_stay_indices() -> None:
    formula = assert_formula(lambda x: torch.arange(4)[None, :] <= torch.arange(3)[:, None], torch.zeros(1))
    a, b, _ = AXES
    assert formula.args[0] == sympy.Le(b, a)


STEPS: list[Callable[[torch.Tensor, int], torch.Tensor]] = [
    lambda x, n: x + n,
    lambda x, n: x * (n - 2),
    lambda x, n: x - torch.arange(x.shape[-1]),
    lambda x, n: x + torch.arange(x.shape[0]).view(-1, *[1] * (x.ndim - 1)),
    lambda x, n: x.transpose(0, -1),
    lambda x, n: x.reshape(-1, 2, x.numel() // 2 if n % 2 else 2).squeeze() if x.numel() == 4 else x.reshape(x.shape),
    lambda x, n: x.reshape(2, -1, 3) if x.numel() % 6 == 0 else x,
    lambda x, n: x.flatten(0, 1) if x.ndim > 1 else x,
    lambda x, n: x.flatten().unflatten(0, (3, -1)) if x.numel() % 3 == 0 else x,
    lambda x, n: x[1:] if x.shape[0] > 1 else x,
    lambda x, n: x[..., ::2],
    lambda x, n: x.select(-1, n % x.shape[-1]) if x.ndim > 1 else x,
    lambda x, n: x.unsqueeze(0).expand(2, *x.shape) if x.ndim < 3 else x,
    lambda x, n: x.flip(0),
    lambda x, n: x // (n + 1),
    lambda x, n: x % (n + 1),
    lambda x, n: torch.where(x > n, x, -x),
    lambda x, n: x.masked_fill(x < n, 0),
    lambda x, n: (x > n).to(x.dtype) + x,
    lambda x, n: x.clamp(min=n),
    lambda x, n: x.abs(),
    lambda x, n: torch.cat([x, x + 1], dim=0),
    lambda x, n: x.repeat_interleave(2, dim=0),
    lambda x, n: x.tril(n - 1) if x.ndim > 1 else x,
    lambda x, n: x.triu(1 - n) if x.ndim > 1 else x,
    lambda x, n: torch.maximum(x, torch.full_like(x, n)),
    lambda x, n: x.clone().mul_(n),
]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 4)), min_size=2, max_size=5), st.booleans())
def test_an_element_of_a_random_program(steps: list[tuple[int, int]], data: bool) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = x if data else torch.arange(24).view(SIZES)
        for which, n in steps:
            y = STEPS[which](y, n)
            if y.numel() > 200:
                break
        return y.clone() if y.ndim else y[None].clone()

    x = torch.randint(-5, 6, SIZES, generator=torch.Generator().manual_seed(0))
    result = program(x)
    if result.ndim <= 3 and result.numel():
        assert_formula(program, x)
