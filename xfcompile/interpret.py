"""Runs the program of a node in the abstract: over what tensors hold and where it lies, and not over tensors."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xfcompile.memory import Cell, Memory
from xfcompile.trace import Call, Constant, External, Meta, Program, Ref
from xfcompile.values import Value, Values, computes


class Run:
    """One run of a program. result: what it gives, cells in the place of tensors. made: the values that it computes.

    inputs: the cells of the program's tensors. known: the values that some node has computed before.
    put, write: give a cell other contents, alone or with all that shares its memory.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Cell],
        values: Values,
        known: Container[Value],
        put: Callable[[Cell, Value], None],
        write: Callable[[Cell, Value], None],
    ) -> None:
        self.inputs = inputs
        self.values = values
        self.known = known
        self.put = put
        self.write = write
        self.outputs: list[list[Cell | None]] = []
        self.made: list[Value] = []
        self.random = False
        for call in program.calls:
            self.outputs.append(self._call(call))
        self.result = pytree.tree_map(self._given, program.result)

    def _call(self, call: Call) -> list[Cell | None]:
        args = {k: self._operand(v) for k, v in call.args.items()}
        sizes = [m.shape if m is not None else () for m in call.outputs]
        written = _written(call)
        self.random |= _random_call(call.op, args)
        if torch.Tag.inplace_view in call.op.tags and isinstance(call.args["self"], Ref) and call.outputs[0]:
            return [self._reviewed(call, args, self._cell(call.args["self"]), sizes)]
        if written:
            return self._in_place(call, args, written, sizes)
        results: list[Cell | None] = []
        for item, meta in enumerate(call.outputs):
            if meta is None:
                results.append(None)
            else:
                results.append(self._result(call, args, item, meta, sizes))
        return results

    def _cell(self, ref: Ref) -> Cell:
        cell = self.inputs[ref.index] if ref.item is None else self.outputs[ref.index][ref.item]
        assert cell is not None, "a result that is no tensor is no argument of what comes next in a node"
        return cell

    def _operand(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(self._operand(y) for y in x)
        if isinstance(x, Ref):
            return self._cell(x).value
        if isinstance(x, External):
            return self.values.leaf(x.meta, "a module's own")
        return self.values.constant(x) if isinstance(x, Constant) else x

    def _given(self, x: Any) -> Any:
        if isinstance(x, Ref):
            return self.inputs[x.index] if x.item is None else self.outputs[x.index][x.item]
        if isinstance(x, Constant):
            return Cell(self.values.constant(x), Memory(external=False))
        return x

    def _note(self, op: torch._ops.OpOverload, value: Value) -> None:
        if value not in self.known or computes(op):  # a view that gives back a known value does not compute it
            self.made.append(value)

    def _result(self, call: Call, args: Any, item: int, meta: Meta, sizes: Any) -> Cell:
        value = self.values.make(call.op, args, meta, item, sizes)
        self._note(call.op, value)
        alias = call.aliases[item]
        if alias is None:
            return Cell(value, Memory(external=False))
        origin = self._cell(alias)
        direct = next(
            (k for k, v in call.args.items() if isinstance(v, Ref) and self._cell(v).memory is origin.memory), None
        )
        if direct is None:
            return Cell(value, origin.memory)
        base = self._cell(call.args[direct])

        def derive(contents: Value) -> Value:
            return self.values.make(call.op, {**args, direct: contents}, meta, item, sizes)

        return Cell(value, origin.memory, base, derive)

    def _reviewed(self, call: Call, args: Any, cell: Cell, sizes: Any) -> Cell:
        """`x.t_()` and the like: the tensor looks at its memory in another way, and nothing is written."""
        meta = call.outputs[0]
        assert meta is not None
        self.put(cell, self.values.make(call.op, args, meta, 0, sizes))
        cell.base = cell.derive = None
        return cell

    def _in_place(self, call: Call, args: Any, written: list[tuple[Any, Ref]], sizes: Any) -> list[Cell | None]:
        """An operation that writes to some of its tensors, and gives back these or others."""
        given_back = [_given_back(call, item, written) for item in range(len(call.outputs))]
        targets = [self._cell(ref) for _, ref in written]
        value = None
        if len(written) == 1 and given_back == [written[0][1]]:
            value = self.values.make(call.op, args, targets[0].value.meta, 0, sizes)
            self._note(call.op, value)
        for target in targets:
            contents = self.values.leaf(target.value.meta, "written") if value is None else value
            self.write(target, contents)
        results: list[Cell | None] = []
        for ref, meta, alias in zip(given_back, call.outputs, call.aliases, strict=True):
            if ref is not None:
                results.append(self._cell(ref))
            elif meta is None:
                results.append(None)
            else:
                memory = Memory(external=False) if alias is None else self._cell(alias).memory
                results.append(Cell(self.values.leaf(meta, "made beside a write"), memory))
        return results


def _written(call: Call) -> list[tuple[Any, Ref]]:
    """The tensors that an operation writes to, as its schema says, each with the parameter that it is given as."""
    return [
        (p, ref)
        for p in call.op._schema.arguments
        if p.alias_info is not None and p.alias_info.is_write
        for ref in pytree.tree_leaves(call.args[p.name])
        if isinstance(ref, Ref)
    ]


def _given_back(call: Call, item: int, written: list[tuple[Any, Ref]]) -> Ref | None:
    """The tensor that an operation writes and gives back as one of its results, as its schema says; None if it makes
    that, or has no result."""
    returns = call.op._schema.returns
    shared = returns[item].alias_info if len(returns) == len(call.outputs) else None
    names = set() if shared is None else shared.before_set
    return next((ref for parameter, ref in written if parameter.alias_info.before_set & names), None)


def _random_call(op: torch._ops.OpOverload, args: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    return not ("train" in args and (args["train"] is False or args.get("p") == 0))
