"""Reads an FX graph: runs it in the abstract, in order, keeping for every tensor what its memory then holds.

A node is traced alone (`trace`), its ATen calls become `Value`s, and writes are followed: after `a.add_(b)` the node
`a` and every view of it hold other contents than before. Nothing in the graph is changed.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from xfcompile.example import example_of
from xfcompile.source import RewriteError, source_of
from xfcompile.trace import Call, Constant, External, Meta, Program, Ref, meta_of, number, signature, static_mode, trace
from xfcompile.values import Value, Values, computes


class Memory:
    """A storage: the tensors that live in it, oldest first."""

    def __init__(self, external: bool) -> None:
        self.cells: list[Cell] = []
        self.external = external


class Cell:
    """A tensor object: its contents now, where they lie, and how it is a view of another."""

    def __init__(self, value: Value, memory: Memory, base: Cell | None = None, derive: Any = None) -> None:
        self.memory = memory
        self.base = base
        self.derive: Callable[[Value], Value] | None = derive
        self.history: list[tuple[int, Value]] = [(-1, value)]
        memory.cells.append(self)

    @property
    def value(self) -> Value:
        return self.history[-1][1]

    def at(self, time: int) -> Value:
        """The contents just before node number `time` runs."""
        for when, value in reversed(self.history):
            if when < time:
                return value
        return self.history[0][1]

    def set(self, value: Value, time: int) -> None:
        if value is not self.value:
            self.history.append((time, value))


@dataclass
class Effects:
    """What running a node may do besides its result."""

    reads: set[Memory] = field(default_factory=set)
    writes: set[Memory] = field(default_factory=set)
    random: bool = False
    opaque: bool = False


@dataclass(frozen=True)
class Scope:
    """The modes that a node runs under: gradients on or off, the autocast regions around it, and whether SDPA's
    backends are chosen by the user (`torch.nn.attention.sdpa_kernel`)."""

    grad: bool | None = None
    autocast: tuple[Any, ...] = ()
    chosen: bool = False


_SCOPES = {"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_sdpa_kernel"}
_BACKENDS = {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "CUDNN_ATTENTION"}


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
        programs: dict[Any, Program | None] | None = None,
        outer: Sequence[Any] | None = None,
        repeated: frozenset[fx.GraphModule] | None = None,
        bodies: dict[fx.GraphModule, Reading] | None = None,
    ) -> None:
        self.gm = gm
        self.repeated = _repeated(gm) if repeated is None else repeated
        self.bodies: dict[fx.GraphModule, Reading] = {} if bodies is None else bodies
        self.values = values or Values()
        self.programs: dict[Any, Program | None] = {} if programs is None else programs
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
        self.inputs = list(example_inputs)
        self._outer = list(outer) if outer is not None else None
        self._memories: dict[Any, Memory] = {}
        examples = [x for n in gm.graph.nodes for x in pytree.tree_leaves(_example(n))]
        self.mode = next((x.fake_mode for x in examples if isinstance(x, torch._subclasses.FakeTensor)), None)
        self._now = 0
        self._scope = Scope()
        for self._now, node in enumerate(gm.graph.nodes):
            self.time[node] = self._now
            self.scope[node] = self._scope
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
        """A node, older than number `time`, whose tensor still holds `value` when node number `time` runs."""
        for node, cell in self.holders.get(value, ()):
            if self.time[node] < time and cell.at(time) is value:
                return node
        return None

    def memories(self, nodes: Iterable[fx.Node]) -> Iterator[Memory]:
        """The memory that the tensors of some nodes lie in."""
        for cell in self._cells_of(nodes):
            yield cell.memory

    def tensor_arguments(self, node: fx.Node) -> list[tuple[fx.Node | None, Cell]]:
        """The tensors that a node is given, in the order of its program's inputs, each with the node that holds it."""
        flat, _ = pytree.tree_flatten(_opened((node.args, node.kwargs)))
        found: list[tuple[fx.Node | None, Cell]] = []
        for x in flat:
            if isinstance(x, fx.Node):
                whole = self.cells.get(x)
                found += [(x if whole is c else None, c) for c in pytree.tree_leaves(whole) if isinstance(c, Cell)]
        return found

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
        elif getattr(node.target, "__name__", "") in _SCOPES:
            self._enter(node)
        else:
            self._call(node)
        for cell in pytree.tree_leaves(self.cells.get(node)):
            if isinstance(cell, Cell) and self.cells[node] is cell:
                self._hold(cell.value, node, cell)

    def _hold(self, value: Value, node: fx.Node, cell: Cell) -> None:
        self.holders.setdefault(value, []).append((node, cell))

    def _placeholder(self, node: fx.Node) -> None:
        index = sum(1 for n in self.cells if n.op == "placeholder")
        example = _example(node)
        if example is None and index < len(self.inputs):
            example = self.inputs[index]
        outer = self._outer[index] if self._outer is not None and index < len(self._outer) else None
        if isinstance(example, torch.Tensor):
            memory = self._memory(example)
            why = "learned" if isinstance(example, torch.nn.Parameter) or example.requires_grad else "input"
            known = outer if isinstance(outer, Value) else self.values.leaf(meta_of(example), why)
            self.cells[node] = Cell(known, memory)
        else:
            self._scalar(node, example)

    def _scalar(self, node: fx.Node, example: Any) -> None:
        self.cells[node] = number(example)
        if isinstance(self.cells[node], sympy.Basic):
            self.numbers.setdefault(self.cells[node], node)

    def _attribute(self, node: fx.Node) -> None:
        target = _attribute_of(self.gm, node)
        if isinstance(target, torch.Tensor):
            why = "learned" if isinstance(target, torch.nn.Parameter) else "input"
            self.cells[node] = Cell(self.values.leaf(meta_of(target), why), self._memory(target))
        else:
            self.cells[node] = target

    def _enter(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", "")
        autocast = self._scope.autocast
        if name == "_enter_autocast":
            self._scope = replace(self._scope, autocast=(*autocast, tuple(node.args)))
        elif name == "_exit_autocast":
            self._scope = replace(self._scope, autocast=autocast[:-1])
        elif name == "_sdpa_kernel":
            self._scope = replace(self._scope, chosen=not _all_backends(node))
        else:
            self._scope = replace(self._scope, grad=bool(node.args[0]))
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
        example = _example(node)
        if self.mode is not None and example is None and not any(True for _ in self._cells_of(node.all_input_nodes)):
            # It neither takes nor gives tensors, so it is there for what it does to the process: tracing would do that.
            effects.opaque = True
            self.cells[node] = None
            return
        if example is not None and not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(example)):
            effects.opaque = _may_write(node) or _is_random(node)
            self._scalar(node, example)
            return
        if node.op == "call_module":  # it may write to buffers of its own
            effects.opaque = any(True for _ in self.gm.get_submodule(str(node.target)).buffers())
        program = self._program(node)
        if program is None:
            self._opaque(node)
        else:
            self._run(node, program)

    def _cells_of(self, nodes: Iterable[fx.Node]) -> Iterator[Cell]:
        for n in nodes:
            for cell in pytree.tree_leaves(self.cells.get(n)):
                if isinstance(cell, Cell):
                    yield cell

    def _arguments(self, node: fx.Node) -> tuple[list[Any], pytree.TreeSpec]:
        """Flattened arguments, nodes replaced by cells and numbers."""
        flat, spec = pytree.tree_flatten(_opened((node.args, node.kwargs)))
        return [self.cells.get(x) if isinstance(x, fx.Node) else x for x in flat], spec

    def _program(self, node: fx.Node) -> Program | None:
        if _makes_sizes(node):
            return None
        fn = _callable(node, self.gm)
        flat, spec = pytree.tree_flatten(_opened((node.args, node.kwargs)))
        fakes = []
        for x in flat:
            if not isinstance(x, fx.Node):
                fakes.append(x)
                continue
            cell = self.cells.get(x)
            if isinstance(cell, Cell):
                fakes.append(self._fake(x, cell))
            elif isinstance(cell, (tuple, list)):
                fakes.append([self._fake(x, c) if isinstance(c, Cell) else c for c in cell])
            elif isinstance(cell, sympy.Basic):
                fakes.append(_example(x))
            else:
                fakes.append(cell)
        if any(f is _UNKNOWN for f in pytree.tree_leaves(fakes)):
            return None
        inner, inner_spec = pytree.tree_flatten(pytree.tree_unflatten(fakes, spec))
        key = (_identity(node), str(inner_spec), tuple(signature(x) for x in inner), self._scope.autocast)
        try:
            known = key in self.programs
        except TypeError:  # an unhashable argument: trace it every time
            return self._trace(fn, inner, inner_spec, node.op == "call_module")
        if not known:
            self.programs[key] = self._trace(fn, inner, inner_spec, node.op == "call_module")
        return self.programs[key]

    def _trace(self, fn: Callable[..., Any], flat: list[Any], spec: pytree.TreeSpec, module: bool) -> Program | None:
        if not self._scope.autocast:
            return trace(fn, flat, spec, self.mode, module=module)
        device, dtype, enabled = (*self._scope.autocast[-1], None, None)[:3]
        with torch.autocast(device, dtype=dtype, enabled=enabled is not False, cache_enabled=False):
            return trace(fn, flat, spec, self.mode, module=module)

    def _fake(self, node: fx.Node, cell: Cell) -> Any:
        """A fake tensor like the one that a cell stands for."""
        example = _example(node)
        m = cell.value.meta
        if isinstance(example, torch._subclasses.FakeTensor) and tuple(number(s) for s in example.shape) == m.shape:
            return example
        if not all(isinstance(n, int) for n in (*m.shape, *m.stride)) or len(m.stride) != len(m.shape):
            return _UNKNOWN
        with static_mode():
            return torch.empty_strided(m.shape, m.stride, dtype=m.dtype, device=m.device)

    def _run(self, node: fx.Node, program: Program) -> None:
        """Run a program over this graph's cells."""
        flat, _ = self._arguments(node)
        inputs = [c for x in flat for c in pytree.tree_leaves(x) if isinstance(c, Cell)]
        outputs: list[list[Cell | None]] = []
        made: list[Value] = []

        def note(op: torch._ops.OpOverload, value: Value) -> None:
            if value not in self.steps or computes(op):  # a view that gives back a known value does not compute it
                made.append(value)

        def cell_of(ref: Ref) -> Cell | None:
            return inputs[ref.index] if ref.item is None else outputs[ref.index][ref.item]

        def operand(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(operand(y) for y in x)
            if isinstance(x, Ref):
                cell = cell_of(x)
                assert cell is not None, "a result that is no tensor is no argument of what comes next in a node"
                return cell.value
            if isinstance(x, External):
                return self.values.leaf(x.meta, "a module's own")
            return self.values.constant(x) if isinstance(x, Constant) else x

        for call in program.calls:
            args = {k: operand(v) for k, v in call.args.items()}
            sizes = [m.shape if m is not None else () for m in call.outputs]
            written = [
                (p, ref)
                for p in call.op._schema.arguments
                if p.alias_info is not None and p.alias_info.is_write
                for ref in pytree.tree_leaves(call.args[p.name])
                if isinstance(ref, Ref)
            ]
            results: list[Cell | None] = []
            self.effects[node].random |= _random_call(call.op, args)
            if torch.Tag.inplace_view in call.op.tags and isinstance(call.args["self"], Ref) and call.outputs[0]:
                results = [self._reviewed(call, args, cell_of(call.args["self"]), sizes)]
            elif written:
                given_back = [_given_back(call, item, written) for item in range(len(call.outputs))]
                targets = [cell_of(ref) for _, ref in written]
                value = None
                if len(written) == 1 and given_back == [written[0][1]]:
                    assert targets[0] is not None
                    value = self.values.make(call.op, args, targets[0].value.meta, 0, sizes)
                    note(call.op, value)
                for target in targets:
                    assert target is not None
                    contents = self.values.leaf(target.value.meta, "written") if value is None else value
                    self._write(node, target, contents)
                for ref, meta, alias in zip(given_back, call.outputs, call.aliases, strict=True):
                    if ref is not None:
                        results.append(cell_of(ref))
                    elif meta is None:
                        results.append(None)
                    else:
                        origin = None if alias is None else cell_of(alias)
                        memory = Memory(external=False) if origin is None else origin.memory
                        results.append(Cell(self.values.leaf(meta, "made beside a write"), memory))
            else:
                for item, meta in enumerate(call.outputs):
                    if meta is None:
                        results.append(None)
                        continue
                    value = self.values.make(call.op, args, meta, item, sizes)
                    note(call.op, value)
                    results.append(self._result(call, args, value, item, meta, sizes, cell_of))
            outputs.append(results)
        self.program[node] = program
        for value in dict.fromkeys(made):
            self.steps.setdefault(value, node)
            self.makers.setdefault(value, []).append(node)
        self.inside[node] = made

        def result(x: Any) -> Any:
            if isinstance(x, Ref):
                return cell_of(x)
            if isinstance(x, Constant):
                return Cell(self.values.constant(x), Memory(external=False))
            return x

        self.cells[node] = pytree.tree_map(result, program.result)
        if not program.calls and isinstance(self.cells[node], Cell):
            self.inside[node] = []

    def _result(
        self, call: Any, args: Any, value: Value, item: int, meta: Meta, sizes: Any, cell_of: Callable[[Ref], Any]
    ) -> Cell:
        alias = call.aliases[item]
        if alias is None:
            return Cell(value, Memory(external=False))
        origin = cell_of(alias)
        direct = next(
            (k for k, v in call.args.items() if isinstance(v, Ref) and cell_of(v).memory is origin.memory), None
        )
        if direct is None:
            return Cell(value, origin.memory)
        base = cell_of(call.args[direct])

        def derive(contents: Value) -> Value:
            return self.values.make(call.op, {**args, direct: contents}, meta, item, sizes)

        return Cell(value, origin.memory, base, derive)

    def _reviewed(self, call: Any, args: Any, cell: Cell | None, sizes: Any) -> Cell:
        """`x.t_()` and the like: the tensor looks at its memory in another way, and nothing is written."""
        assert cell is not None
        self._set(cell, self.values.make(call.op, args, call.outputs[0], 0, sizes))
        cell.base = cell.derive = None
        return cell

    def _write(self, node: fx.Node, target: Cell, value: Value) -> None:
        """Give a tensor new contents, and with it all that share its memory."""
        memory = target.memory
        self.effects[node].writes.add(memory)
        self._set(target, value)
        cell, contents = target, value
        while cell.base is not None:
            inverse = self._inverse(cell, contents)
            contents = inverse if inverse is not None else self.values.leaf(cell.base.value.meta, "written")
            self._set(cell.base, contents)
            cell = cell.base
        root = cell
        fresh = {root: root.value, target: value}
        for other in memory.cells:
            if other in fresh:
                continue
            if other.base in fresh and other.derive is not None:
                fresh[other] = other.derive(fresh[other.base])
            else:
                fresh[other] = self.values.leaf(other.value.meta, "written")
            self._set(other, fresh[other])

    def _set(self, cell: Cell, value: Value) -> None:
        cell.set(value, self._now)
        for holder in [n for n, c in self.cells.items() if c is cell]:
            self._hold(value, holder, cell)

    def _inverse(self, cell: Cell, contents: Value) -> Value | None:
        """What a view's base holds after the whole view was written."""
        assert cell.base is not None
        before, base = cell.history[0][1], cell.base.history[0][1]
        if before is base:
            return contents
        if before.op == "permute" and before["self"] is base:
            order = tuple(sorted(range(base.ndim), key=lambda d: before["dims"][d]))
            return self.values.permute(contents, order, base.meta)
        numel = [sympy.prod(list(v.shape)) for v in (before, base)]
        if numel[0] == numel[1] and _reshape_of(before, base):
            return self.values.reshape(contents, base.meta)
        return None

    def _opaque(self, node: fx.Node) -> None:
        """A node that cannot be read: its results are leaves, and unless it is known to be pure it may write."""
        effects = self.effects[node]
        example = _example(node)
        if _may_write(node):
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
        operands = [c for c in operands if not isinstance(c, fx.GraphModule)]
        if _name(node) == "autograd_function_apply" and self._custom_gradient(node, bodies, operands):
            return
        checkpoint = _name(node) in (
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
            wrote = any(m.external for e in child.effects.values() for m in e.writes)
            if wrote or not checkpoint:
                for cell in list(self._cells_of(node.all_input_nodes)):
                    self._write(node, cell, self.values.leaf(cell.value.meta, "maybe written"))
        example = _example(node)

        def fresh(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return number(x)
            return Cell(self.values.leaf(meta_of(x), "higher-order"), self._memory(x))

        self.cells[node] = pytree.tree_map(fresh, example)

    def _inner(self, body: fx.GraphModule, outer: Sequence[Any] | None) -> Reading:
        values, programs, repeated, bodies = self.values, self.programs, self.repeated, self.bodies
        return Reading(body, values=values, programs=programs, outer=outer, repeated=repeated, bodies=bodies)

    def _custom_gradient(self, node: fx.Node, bodies: list[fx.GraphModule], operands: list[Any]) -> bool:
        """A `torch.autograd.Function` of one result that does nothing else: a value of its own, which knows what its
        forward and its backward compute. What is made of it has the gradient that its author wrote."""
        if not all(isinstance(c, Cell) for c in operands):
            return False
        given = [c.value for c in operands]
        forwards, backwards = bodies
        forward = self._inner(forwards, given)
        outs, saved = _pair(forward)
        if len(outs) != 1:
            return False
        example = _example(node)
        packed = isinstance(example, (tuple, list))
        meta = meta_of(example[0] if packed else example)
        grad = self.values.leaf(meta, "gradient")
        backward = self._inner(backwards, [grad, *saved])
        expected = sum(n.op == "placeholder" for n in backwards.graph.nodes)
        if expected != 1 + len(saved) or not (_is_pure(forward) and _is_pure(backward)):
            return False
        gradients = tuple(backward.value(n) for n in _outputs(backward))
        if len(gradients) != len(given) or None in gradients:
            return False
        args = {"args": tuple(given), "forward": outs[0], "grad": grad, "backward": gradients}
        value = self.values.intern("custom_gradient", args, meta)
        self.steps.setdefault(value, node)
        takers = [u for u in node.users if u.target is operator.getitem] if packed else [node]
        self.makers.setdefault(value, []).extend(takers)
        self.inside[node] = [value]
        self.effects[node].opaque = False
        self.children += [(node, forward), (node, backward)]
        cell = Cell(value, Memory(external=False))
        self.cells[node] = (cell,) if packed else cell
        return True


_UNKNOWN = object()


def _given_back(call: Call, item: int, written: list[tuple[Any, Ref]]) -> Ref | None:
    """The tensor that an operation writes and gives back as one of its results, as its schema says; None if it makes
    that, or has no result."""
    returns = call.op._schema.returns
    shared = returns[item].alias_info if len(returns) == len(call.outputs) else None
    names = set() if shared is None else shared.before_set
    return next((ref for parameter, ref in written if parameter.alias_info.before_set & names), None)


def _repeated(gm: fx.GraphModule) -> frozenset[fx.GraphModule]:
    """The bodies that are called more than once in a graph and in the bodies that it calls."""
    calls: Counter[fx.GraphModule] = Counter()
    todo = [gm]
    while todo:
        graph_module = todo.pop()
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                body = _attribute_of(graph_module, node)
                if isinstance(body, fx.GraphModule):
                    todo.extend([body] if not calls[body] else [])
                    calls[body] += len(node.users)
    return frozenset(body for body, times in calls.items() if times > 1)


def _attribute_of(gm: fx.GraphModule, node: fx.Node) -> Any:
    target: Any = gm
    for part in str(node.target).split("."):
        target = getattr(target, part)
    return target


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


class _Slice(NamedTuple):
    """A slice as a container, so that the nodes in it are seen."""

    start: Any
    stop: Any
    step: Any


def _opened(x: Any) -> Any:
    if isinstance(x, slice):
        return _Slice(_opened(x.start), _opened(x.stop), _opened(x.step))
    if isinstance(x, (list, tuple)) and not isinstance(x, _Slice):
        return tuple(_opened(y) for y in x) if isinstance(x, tuple) else [_opened(y) for y in x]
    return {k: _opened(y) for k, y in x.items()} if isinstance(x, dict) else x


def _closed(x: Any) -> Any:
    if isinstance(x, _Slice):
        return slice(*x)
    if isinstance(x, (list, tuple)):
        return type(x)(_closed(y) for y in x)
    return {k: _closed(y) for k, y in x.items()} if isinstance(x, dict) else x


def _example(node: fx.Node) -> Any:
    example = example_of(node)
    if example is not None:
        return example
    shape = node.meta.get("tensor_meta")  # of torch.fx's ShapeProp
    if isinstance(shape, TensorMetadata):
        with static_mode():
            return torch.empty_strided(tuple(shape.shape), shape.stride, dtype=shape.dtype)
    return None


def _reshape_of(before: Value, base: Value) -> bool:
    source = before["self"] if before.op == "reshape" else before
    origin = base["self"] if base.op == "reshape" else base
    return source is origin or source is base


@functools.lru_cache
def _of_data(size: sympy.Expr) -> set[sympy.Symbol]:
    """The symbols in a size that stand for what depends on data."""
    return set(free_unbacked_symbols(size))


def _makes_sizes(node: fx.Node) -> bool:
    """Whether a result's size depends on data, as `nonzero`'s: traced again, it would be another one."""

    def sizes(n: fx.Node) -> set[sympy.Symbol]:
        leaves = pytree.tree_leaves(_example(n))
        numbers = [m for x in leaves for m in (x.shape if isinstance(x, torch.Tensor) else (x,))]
        return set().union(*(_of_data(m.node.expr) for m in numbers if isinstance(m, torch.SymInt)))

    return not sizes(node) <= set().union(*map(sizes, node.all_input_nodes))


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _identity(node: fx.Node) -> Any:
    return (node.op, node.target if isinstance(node.target, str) else id(node.target))


def _callable(node: fx.Node, gm: fx.GraphModule) -> Callable[..., Any]:
    """What a node calls, as a function of arguments with opened slices."""
    if node.op == "call_method":
        method = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, method)(*_closed(args), **_closed(kwargs))
    target: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return lambda *args, **kwargs: target(*_closed(args), **_closed(kwargs))


def _all_backends(node: fx.Node) -> bool:
    """Whether `_sdpa_kernel(backends)` allows all of them, as at the end of a region."""
    backends = node.args[0]
    names = {str(b.args[0]) if isinstance(b, fx.Node) else getattr(b, "name", "") for b in backends}  # type: ignore
    return names >= _BACKENDS


def _may_write(node: fx.Node) -> bool:
    """Whether an operation that could not be traced may write to its inputs."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = _name(node)
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    module = getattr(node.target, "__module__", "") or ""
    known = (
        node.op == "call_method"
        or module.startswith(("torch.nn.functional", "torch._C", "_operator", "math"))
        or (getattr(torch, name, None) is node.target)
    )
    return not known or name.endswith("_") or (name.startswith("i") and module == "_operator") or name == "setitem"


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _random_call(op: torch._ops.OpOverload, args: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    return not ("train" in args and (args["train"] is False or args.get("p") == 0))
