"""Reads an FX graph: runs it in the abstract, in order, keeping for every tensor what its memory then holds.

A node is traced alone (`trace`), its ATen calls become `Value`s, and writes are followed: after `a.add_(b)` the node
`a` and every view of it hold other contents than before. Nothing in the graph is changed.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from xfcompile.called import attribute_of, is_random, may_write, name_of, opened
from xfcompile.example import example_or_shape, is_transformed
from xfcompile.interpret import Run
from xfcompile.memory import Cell, Memory, write
from xfcompile.programs import Programs
from xfcompile.scope import Scope, after, sets_a_mode
from xfcompile.source import RewriteError, source_of
from xfcompile.trace import Program, meta_of, number
from xfcompile.values import Value, Values


@dataclass
class Effects:
    """What running a node may do besides its result."""

    reads: set[Memory] = field(default_factory=set)
    writes: set[Memory] = field(default_factory=set)
    random: bool = False
    opaque: bool = False


class Reading:
    """The reading of one graph. `outer` maps its placeholders to the values that a calling graph passes.

    repeated: the bodies that are called more than once in the outermost graph; found here if this is that one.
    bodies: the readings of those that are read already: each is read, and a child, once.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any] = (),
        *,
        values: Values | None = None,
        programs: Programs | None = None,
        outer: Sequence[Any] | None = None,
        repeated: frozenset[fx.GraphModule] | None = None,
        bodies: dict[fx.GraphModule, Reading] | None = None,
        scope: Scope | None = None,
    ) -> None:
        self.gm = gm
        self.repeated = _repeated(gm) if repeated is None else repeated
        self.bodies: dict[fx.GraphModule, Reading] = {} if bodies is None else bodies
        self.values = values or Values()
        self.programs = programs or Programs()
        self.cells: dict[fx.Node, Any] = {}
        self.time: dict[fx.Node, int] = {}
        self.scope: dict[fx.Node, Scope] = {}
        self.effects: dict[fx.Node, Effects] = {}
        self.numbers: dict[Any, fx.Node] = {}
        self.steps: dict[Value, fx.Node] = {}
        """For each value that an operation made, the node whose reading made it first."""
        self.makers: dict[Value, list[fx.Node]] = {}
        """For each value, every node whose reading made it (equal computations are one value)."""
        self.program: dict[fx.Node, Program] = {}
        self.inside: dict[fx.Node, list[Value]] = {}
        """For each node, the values that its reading made, its own result and any on the way."""
        self.children: list[tuple[fx.Node, Reading]] = []
        self.holders: dict[Value, list[tuple[fx.Node, Cell]]] = {}
        self.known: dict[Any, Any] = {}
        """What was found out of its values and is asked for again, by what it is and of what."""
        self.inputs = list(example_inputs)
        self._outer = list(outer) if outer is not None else None
        self._memories: dict[Any, Memory] = {}
        examples = [x for n in gm.graph.nodes for x in pytree.tree_leaves(example_or_shape(n))]
        self.mode = next((x.fake_mode for x in examples if isinstance(x, torch._subclasses.FakeTensor)), None)
        self._now = 0
        self._grad_at: list[bool] = []
        self._without_grad: dict[Cell, Cell] = {}
        """The tensors that were made where gradients are off, each as what stands outside sees it."""
        self._learned: dict[Value, bool] = {}
        self.around = self._scope = scope or Scope(grad=torch.is_grad_enabled())
        """The modes that it is called in."""
        self._is_inner = scope is not None
        self.modes_differ = False
        """Whether it is called in others, too."""
        for self._now, node in enumerate(gm.graph.nodes):
            self.time[node] = self._now
            self.scope[node] = self._scope
            self._grad_at.append(self._scope.grad)
            self.effects[node] = Effects()
            try:
                self._read(node)
            except RewriteError:
                raise  # of an inner graph, whose node says more
            except Exception as error:
                raise RewriteError(f"reading {node.name} at {source_of(node) or '?'}", error) from error

    # -- what is asked of a reading -------------------------------------------------------------------------

    def value(self, node: fx.Node, time: int | None = None) -> Value | None:
        """What a node's tensor holds, just before node number `time` (default: right after the node itself). None of
        what is no tensor, or no node."""
        cell = self.cells.get(node)
        if not isinstance(cell, Cell):
            return None
        return cell.at(self.time[node] + 1 if time is None else time)

    def holder(self, value: Value, time: int) -> fx.Node | None:
        """A node, older than number `time`, whose tensor still holds `value` when node number `time` runs, and, where
        gradients are on then, passes them on; and that is a tensor outside of transforms of `torch.func`, too."""
        grad = self._grad_at[time]
        for node, cell in self.holders.get(value, ()):
            lost = (grad and cell in self._without_grad) or is_transformed(node)
            if self.time[node] < time and cell.at(time) is value and not lost:
                return node
        return None

    def memories(self, nodes: Iterable[fx.Node]) -> Iterator[Memory]:
        """The memory that the tensors of some nodes lie in."""
        for cell in self._cells_of(nodes):
            yield cell.memory

    def tensor_arguments(self, node: fx.Node) -> list[tuple[fx.Node | None, Cell]]:
        """The tensors that a node is given, in the order of its program's inputs, each with the node that holds it."""
        flat, _ = pytree.tree_flatten(opened((node.args, node.kwargs)))
        found: list[tuple[fx.Node | None, Cell]] = []
        for x in flat:
            if isinstance(x, fx.Node):
                whole = self.cells.get(x)
                found += [(x if whole is c else None, c) for c in pytree.tree_leaves(whole) if isinstance(c, Cell)]
        return found

    def may_need_grad(self, node: fx.Node) -> bool:
        """Whether a node's result is computed from a parameter, or from an input that needs a gradient. Of the inputs
        of an inner graph nothing is known."""
        value = self.value(node)
        return value is None or (value.dtype.is_floating_point and (self._is_inner or self._may_need_grad(value)))

    def number_node(self, expr: Any) -> fx.Node | None:
        """The node that holds a symbolic size or number."""
        return self.numbers.get(expr)

    # -- reading --------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "get_attr":
            self._attribute(node)
        elif node.op == "output":
            self.effects[node].reads = {c.memory for c in self._cells_of(node.all_input_nodes)}
        elif sets_a_mode(node):
            self._enter(node)
        else:
            self._call(node)
        if not self._scope.grad and node.op not in ("placeholder", "get_attr", "output"):
            given = set(self._cells_of(node.all_input_nodes))
            self._leave(c for c in pytree.tree_leaves(self.cells.get(node)) if isinstance(c, Cell) and c not in given)
        for cell in pytree.tree_leaves(self.cells.get(node)):
            if isinstance(cell, Cell) and self.cells[node] is cell:
                self._hold(cell.value, node, cell)

    def _leave(self, made: Iterable[Cell]) -> None:
        """Tensors that are made where gradients are off are detached for all that stands where they are on."""
        for cell in made:
            if cell not in self._without_grad and self._may_need_grad(cell.value):
                detach = functools.partial(self.values.detach, meta=cell.value.meta)
                self._without_grad[cell] = Cell(detach(cell.value), cell.memory, cell, detach)

    def _may_need_grad(self, value: Value) -> bool:
        """Whether a value is computed from a tensor of which it is not known that it needs no gradient."""
        todo = [value]
        while todo:
            top = todo[-1]
            pending = [v for v in top.inputs() if v not in self._learned]
            if pending:
                todo.extend(pending)
                continue
            inner = (top["why"] != "input") if top.op == "leaf" else any(self._learned[v] for v in top.inputs())
            self._learned[todo.pop()] = inner and top.dtype.is_floating_point
        return self._learned[value]

    def _seen(self, cell: Cell) -> Cell:
        """A tensor as the node that is read sees it."""
        if not self._scope.grad or cell not in self._without_grad:
            return cell
        detached = self._without_grad[cell]
        for holder in [n for n, c in self.cells.items() if c is cell]:
            if (holder, detached) not in self.holders.get(detached.value, ()):
                self._hold(detached.value, holder, detached)
        return detached

    def _hold(self, value: Value, node: fx.Node, cell: Cell) -> None:
        self.holders.setdefault(value, []).append((node, cell))

    def _placeholder(self, node: fx.Node) -> None:
        index = sum(1 for n in self.cells if n.op == "placeholder")
        example = example_or_shape(node)
        if example is None and index < len(self.inputs):
            example = self.inputs[index]
        outer = self._outer[index] if self._outer is not None and index < len(self._outer) else None
        if isinstance(example, torch.Tensor):
            self.cells[node] = self._given(example, outer)
        elif isinstance(example, (list, tuple)):  # compiled autograd passes a list
            self.cells[node] = [self._given(x) if isinstance(x, torch.Tensor) else number(x) for x in example]
        else:
            self._scalar(node, example)

    def _given(self, example: torch.Tensor, outer: Any = None) -> Cell:
        why = "learned" if isinstance(example, torch.nn.Parameter) or example.requires_grad else "input"
        known = outer if isinstance(outer, Value) else self.values.leaf(meta_of(example), why)
        return Cell(known, self._memory(example))

    def _scalar(self, node: fx.Node, example: Any) -> None:
        self.cells[node] = number(example)
        if isinstance(self.cells[node], sympy.Basic):
            self.numbers.setdefault(self.cells[node], node)

    def _attribute(self, node: fx.Node) -> None:
        target = attribute_of(self.gm, node)
        if isinstance(target, torch.Tensor):
            why = "learned" if isinstance(target, torch.nn.Parameter) else "input"
            self.cells[node] = Cell(self.values.leaf(meta_of(target), why), self._memory(target))
        else:
            self.cells[node] = target

    def _enter(self, node: fx.Node) -> None:
        self._scope = after(node, self._scope)
        self.effects[node].opaque = True
        self.cells[node] = None

    def _memory(self, t: torch.Tensor) -> Memory:
        key = t.untyped_storage()._cdata if t.layout is torch.strided else id(t)
        return self._memories.setdefault(key, Memory(external=True))

    def _call(self, node: fx.Node) -> None:
        effects = self.effects[node]
        effects.reads = {c.memory for c in self._cells_of(node.all_input_nodes)}
        if node.target is operator.getitem and isinstance(self.cells.get(node.args[0]), (tuple, list)):  # type: ignore[arg-type]
            self.cells[node] = self.cells[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        inputs = [self.cells.get(n) for n in node.all_input_nodes]
        bodies = [body for body in inputs if isinstance(body, fx.GraphModule)]
        if bodies:
            self._higher_order(node, bodies)
            return
        example = example_or_shape(node)
        if self.mode is not None and example is None and not any(True for _ in self._cells_of(node.all_input_nodes)):
            # It neither takes nor gives tensors, so it is there for what it does to the process: tracing would do that.
            effects.opaque = True
            self.cells[node] = None
            return
        if example is not None and not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(example)):
            effects.opaque = may_write(node) or is_random(node)
            self._scalar(node, example)
            return
        if node.op == "call_module":  # it may write to buffers of its own
            effects.opaque = any(True for _ in self.gm.get_submodule(str(node.target)).buffers())
        program = self.programs.of(node, self.gm, self.cells, self._scope, self.mode)
        if program is None:
            self._opaque(node)
        else:
            self._run(node, program)

    def _cells_of(self, nodes: Iterable[fx.Node]) -> Iterator[Cell]:
        for n in nodes:
            held = self.cells.get(n)
            if isinstance(held, Cell):  # as most are
                yield held
            elif held is not None:
                yield from (cell for cell in pytree.tree_leaves(held) if isinstance(cell, Cell))

    def _arguments(self, node: fx.Node) -> tuple[list[Any], pytree.TreeSpec]:
        """Flattened arguments, nodes replaced by cells and numbers."""
        flat, spec = pytree.tree_flatten(opened((node.args, node.kwargs)))
        return [self.cells.get(x) if isinstance(x, fx.Node) else x for x in flat], spec

    def _run(self, node: fx.Node, program: Program) -> None:
        """Run a program over this graph's cells."""
        flat, _ = self._arguments(node)
        inputs = [self._seen(c) for x in flat for c in pytree.tree_leaves(x) if isinstance(c, Cell)]
        run = Run(program, inputs, self.values, self.steps, self._set, functools.partial(self._write, node))
        self.effects[node].random |= run.random
        self.program[node] = program
        for value in dict.fromkeys(run.made):
            self.steps.setdefault(value, node)
            self.makers.setdefault(value, []).append(node)
        self.cells[node] = run.result
        self.inside[node] = run.made

    def _write(self, node: fx.Node, target: Cell, value: Value) -> None:
        self.effects[node].writes.add(target.memory)
        write(target, value, self.values, self._set)

    def _set(self, cell: Cell, value: Value) -> None:
        cell.set(value, self._now)
        for holder in [n for n, c in self.cells.items() if c is cell]:
            self._hold(value, holder, cell)

    def _opaque(self, node: fx.Node) -> None:
        """A node that cannot be read: its results are leaves, and unless it is known to be pure it may write."""
        effects = self.effects[node]
        example = example_or_shape(node)
        if may_write(node):
            effects.opaque = True
            for cell in list(self._cells_of(node.all_input_nodes)):
                self._write(node, cell, self.values.leaf(cell.value.meta, "maybe written"))
        effects.random = True

        def fresh(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return number(x)
            memory = self._memory(x) if isinstance(x, torch._subclasses.FakeTensor) else Memory(external=False)
            return Cell(self.values.leaf(meta_of(x), "opaque"), memory)

        self.cells[node] = pytree.tree_map(fresh, example)

    def _higher_order(self, node: fx.Node, bodies: list[fx.GraphModule]) -> None:
        """A higher-order operation: read its bodies as graphs of their own; it may write what they write."""
        effects = self.effects[node]
        effects.opaque = True
        operands = [self.cells.get(a) for a in node.args if isinstance(a, fx.Node)]
        operands = [self._seen(c) if isinstance(c, Cell) else c for c in operands if not isinstance(c, fx.GraphModule)]
        if name_of(node) == "autograd_function_apply" and self._custom_gradient(node, bodies, operands):
            return
        checkpoint = name_of(node) in (
            "tag_activation_checkpoint",
            "wrap_activation_checkpoint",
            "wrap",
            "invoke_subgraph",
        )
        for body in bodies:
            placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
            # What one call passes to a body is not what another does: a body that is called twice knows nothing of it.
            alone = len(bodies) == 1 and body not in self.repeated
            known = checkpoint and alone and len(placeholders) == len(operands)
            outer = [c.value if isinstance(c, Cell) else c for c in operands] if known else None
            child = self.bodies.get(body)
            if child is None:
                child = self._inner(body, outer)
                self.children.append((node, child))
                if body in self.repeated:
                    self.bodies[body] = child
            child.modes_differ |= child.around != self._scope
            wrote = any(m.external for e in child.effects.values() for m in e.writes)
            if wrote or not checkpoint:
                for cell in list(self._cells_of(node.all_input_nodes)):
                    self._write(node, cell, self.values.leaf(cell.value.meta, "maybe written"))
        example = example_or_shape(node)

        def fresh(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return number(x)
            return Cell(self.values.leaf(meta_of(x), "higher-order"), self._memory(x))

        self.cells[node] = pytree.tree_map(fresh, example)

    def _inner(self, body: fx.GraphModule, outer: Sequence[Any] | None) -> Reading:
        about: dict[str, Any] = {"repeated": self.repeated, "bodies": self.bodies, "scope": self._scope}
        return Reading(body, values=self.values, programs=self.programs, outer=outer, **about)

    def _custom_gradient(self, node: fx.Node, bodies: list[fx.GraphModule], operands: list[Any]) -> bool:
        """A `torch.autograd.Function` of one result that does nothing else: a value of its own, which knows what its
        forward and its backward compute. What is made of it has the gradient that its author wrote. (Before torch 2.13
        what is computed on the way to the result follows it, which nothing takes, and whose gradients are not read.)"""
        if not all(isinstance(c, Cell) for c in operands):
            return False
        given = [c.value for c in operands]
        forwards, backwards = bodies
        forward = self._inner(forwards, given)
        outs, saved = _pair(forward)
        example = example_or_shape(node)
        packed = isinstance(example, (tuple, list))
        takers = [u for u in node.users if u.target is operator.getitem] if packed else [node]
        placeholders = [n for n in backwards.graph.nodes if n.op == "placeholder"]
        if not outs or len(placeholders) != len(outs) + len(saved):
            return False
        others_taken = len(takers) != len(node.users) or any(u.args[1] != 0 for u in takers)
        if len(outs) > 1 and (others_taken or any(n.users for n in placeholders[1 : len(outs)])):
            return False
        meta = meta_of(example[0] if packed else example)
        grad = self.values.leaf(meta, "gradient")
        backward = self._inner(backwards, [grad, *outs[1:], *saved])
        if not (_is_pure(forward) and _is_pure(backward)):
            return False
        gradients = tuple(backward.value(n) for n in _outputs(backward))
        if len(gradients) != len(given) or None in gradients:
            return False
        args = {"args": tuple(given), "forward": outs[0], "grad": grad, "backward": gradients}
        value = self.values.intern("custom_gradient", args, meta)
        self.steps.setdefault(value, node)
        self.makers.setdefault(value, []).extend(takers)
        self.inside[node] = [value]
        self.effects[node].opaque = False
        self.children += [(node, forward), (node, backward)]
        cell = Cell(value, Memory(external=False))
        self.cells[node] = (cell,) if packed else cell
        return True


def _repeated(gm: fx.GraphModule) -> frozenset[fx.GraphModule]:
    """The bodies that are called more than once in a graph and in the bodies that it calls."""
    calls: Counter[fx.GraphModule] = Counter()
    todo = [gm]
    while todo:
        graph_module = todo.pop()
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                body = attribute_of(graph_module, node)
                if isinstance(body, fx.GraphModule):
                    todo.extend([body] if not calls[body] else [])
                    calls[body] += len(node.users)
    return frozenset(body for body, times in calls.items() if times > 1)


def _outputs(reading: Reading) -> tuple[Any, ...]:
    """What a graph returns."""
    (output,) = (n for n in reading.time if n.op == "output")
    returned = output.args[0]
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _pair(reading: Reading) -> tuple[list[Value | None], list[Value | None]]:
    """The values of a graph that returns two tuples, results and what is saved; nothing where it is another one."""
    returned = _outputs(reading)
    if len(returned) != 2 or not all(isinstance(x, (tuple, list)) for x in returned):
        return [], []
    results, saved = ([reading.value(n) for n in part] for part in returned)
    return results, saved


def _is_pure(reading: Reading) -> bool:
    """Whether a graph writes to nothing, draws nothing, and does nothing to the process that it does not take back."""
    for node, effects in reading.effects.items():
        opaque = effects.opaque and getattr(node.target, "__name__", "") != "_set_grad_enabled"
        if effects.writes or effects.random or opaque:
            return False
    return not reading.children
