"""Runs values and formulas for real: what was read, as tensors, to be compared with what the program computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from xfcompile.read import Reading
from xfcompile.score import Load, S, Where
from xfcompile.values import Value


def captured(fn: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The graph that Dynamo makes of a function."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=False)(*[x.clone() for x in inputs])
    return found[0]


class Unknown(Exception):
    """A value that the reading does not follow."""


_COMPUTED: dict[str, Callable[..., Any]] = {
    "permute": lambda a: a["self"].permute(a["dims"]),
    "slice": lambda a: a["self"][(slice(None),) * a["dim"] + (slice(a["start"], None, a["step"]),)],
    "select": lambda a: a["self"].select(a["dim"], a["index"]),
    "add": lambda a: torch.add(a["self"], a["other"], alpha=a.get("alpha", 1)),
    "sub": lambda a: torch.sub(a["self"], a["other"], alpha=a.get("alpha", 1)),
    "mul": lambda a: torch.mul(a["self"], a["other"]),
    "div": lambda a: torch.div(a["self"], a["other"], rounding_mode=a.get("rounding_mode")),
    "where": lambda a: torch.where(a["condition"], a["self"], a["other"]),
    "neg": lambda a: -a["self"],
    "relu": lambda a: a["self"].relu(),
    "matmul": lambda a: a["self"] @ a["other"],
    "gt": lambda a: a["self"] > a["other"],
}


def evaluate(value: Value, leaves: dict[Value, torch.Tensor]) -> torch.Tensor:
    """The tensor that a value stands for; `Unknown` if something in it is not followed."""

    def operand(x: Any) -> Any:
        return evaluate(x, leaves) if isinstance(x, Value) else x

    if value in leaves:
        return leaves[value]
    if value.op in ("leaf", "empty"):
        raise Unknown(value.args.get("why", "empty"))
    args = {name: operand(x) for name, x in value.args.items()}
    shape = [int(n) for n in value.shape]
    if value.op == "reshape":
        return args["self"].reshape(shape)
    if value.op == "expand":
        return args["self"].expand(shape)
    if value.op == "to":
        return args["self"].to(value.dtype)
    if value.op == "full":
        return torch.full(shape, args["fill"], dtype=value.dtype)
    if value.op not in _COMPUTED:
        raise Unknown(value.op)
    made = _COMPUTED[value.op](args)
    if value.op == "slice":
        made = made[tuple(slice(0, n) for n in shape)]
    return made


def compare(fn: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Read a program and run it beside: after every node, each tensor holds what the reading says that it holds.

    Returns how many contents were compared, and how many the reading does not follow.
    """
    gm = captured(fn, inputs)
    reading = Reading(gm)
    leaves: dict[Value, torch.Tensor] = {}
    env: dict[fx.Node, Any] = {}
    values = iter([x.clone() for x in inputs])
    known = unknown = 0
    interpreter = fx.Interpreter(gm)
    interpreter.env = env
    for node in gm.graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            env[node] = next(values)
            first = reading.value(node, 0)
            assert first is not None
            leaves[first] = env[node].clone()
        else:
            env[node] = interpreter.run_node(node)
        for other in env:
            held = reading.value(other, reading.time[node] + 1)
            if held is None or not isinstance(env[other], torch.Tensor):
                continue
            try:
                told = evaluate(held, leaves)
            except Unknown:
                unknown += 1
                continue
            assert torch.equal(told, env[other]), f"after {node.format_node()}: {other} does not hold {held}"
            known += 1
    return known, unknown


def number(expr: Any, at: dict[sympy.Symbol, int], loads: Sequence[torch.Tensor]) -> float:
    """A formula at one position."""
    if isinstance(expr, Load):
        index = tuple(int(number(x, at, loads)) for x in expr.indices)
        element = loads[expr.operand]
        assert all(0 <= k < n for k, n in zip(index, element.shape, strict=True)), f"{expr} is out of bounds at {at}"
        return float(element[index])
    if isinstance(expr, Where):
        return number(expr.args[1] if number(expr.args[0], at, loads) else expr.args[2], at, loads)
    if expr in (sympy.true, sympy.false):
        return float(bool(expr))
    if expr == -sympy.oo:
        return float("-inf")
    if expr == sympy.oo:
        return float("inf")
    if expr.is_Symbol:
        return at[expr]
    if not expr.args:
        return float(expr)
    args = [number(x, at, loads) for x in expr.args]
    if isinstance(expr, sympy.And):
        return float(all(args))
    if isinstance(expr, sympy.Or):
        return float(any(args))
    if isinstance(expr, sympy.Not):
        return float(not args[0])
    if isinstance(expr, sympy.Xor):
        return float(sum(bool(x) for x in args) % 2)
    if isinstance(expr, FloorDiv):
        return args[0] // args[1]
    if isinstance(expr, Mod):
        return args[0] % args[1]
    if isinstance(expr, sympy.core.relational.Relational):
        return float(bool(expr.func(*[sympy.Float(x) if x % 1 else sympy.Integer(int(x)) for x in args])))
    if isinstance(expr, sympy.Add):
        return sum(args)
    if isinstance(expr, sympy.Mul):
        total = 1.0
        for x in args:
            total *= x
        return total
    if isinstance(expr, sympy.Pow):
        return args[0] ** args[1]
    return float(expr.func(*args))


__all__ = ["S", "Unknown", "captured", "compare", "evaluate", "number"]
