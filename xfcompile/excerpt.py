"""Takes a replaced site out of its program: what the program computed there, and what replaces it, each alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xfcompile.family import needs_grad
from xfcompile.memory import Cell, Memory
from xfcompile.read import Reading
from xfcompile.site import Miss
from xfcompile.values import Value


@dataclass(frozen=True)
class Excerpt:
    """A part of a program as a graph of its own.

    gm: its inputs are `slots`, its one output the result. slots: the position of each input among the operands, and
    whether the graph writes into it.
    """

    gm: fx.GraphModule
    slots: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class Excerpts:
    """A site and its replacement as functions of the same operands.

    operands: nodes of the program. differentiated: of which of them, by position, gradients are wanted: those that the
    replacement reads and that need one. random: whether the original draws random numbers.
    """

    operands: tuple[fx.Node, ...]
    differentiated: tuple[int, ...]
    original: Excerpt
    replacement: Excerpt
    random: bool


def excerpts(
    reading: Reading,
    twins: Mapping[fx.Node, fx.Node],
    root: fx.Node,
    new: fx.Node,
    inserted: Collection[fx.Node],
    old: Mapping[fx.Node, fx.Node],
) -> Excerpts:
    """The site whose result `root` computed in the program that was read.

    twins: a copy of the program from before anything was replaced, node by node. new: what stands for `root` now.
    inserted: all nodes added to the program. old: for each node that stands for one of the program, that one.
    Raises `Miss` where the original needs contents of memory that are gone by then.
    """
    operands: dict[fx.Node, int] = {}
    replacement, read = _replacement(reading, new, inserted, old, operands)
    original, members = _original(reading, twins, root, read, operands)
    when = reading.time[root]
    floating = [n for n in read if _floating(reading.value(n, when)) and needs_grad(n, reading)]
    return Excerpts(
        operands=tuple(operands),
        differentiated=tuple(operands[n] for n in floating) if needs_grad(root, reading) else (),
        original=original,
        replacement=replacement,
        random=any(_draws(reading, node) for node in members),
    )


def _replacement(
    reading: Reading,
    new: fx.Node,
    inserted: Collection[fx.Node],
    old: Mapping[fx.Node, fx.Node],
    operands: dict[fx.Node, int],
) -> tuple[Excerpt, list[fx.Node]]:
    """What was added for a site, and the nodes of the program that it reads."""

    def added(node: fx.Node) -> bool:
        return node in inserted and (node is new or node not in old)

    members, todo = set[fx.Node](), [new]
    while todo:
        node = todo.pop()
        if node not in members and added(node):
            members.add(node)
            todo += node.all_input_nodes
    ordered = [n for n in reading.gm.graph.nodes if n in members]
    sources = {n: old.get(n, n) for m in ordered for n in m.all_input_nodes if n not in members}
    if not ordered:
        sources = {new: new}
    taken = _copied(reading.gm, ordered, new, sources, lambda node: False, operands)
    return taken, list(dict.fromkeys(sources.values()))


def _original(
    reading: Reading,
    twins: Mapping[fx.Node, fx.Node],
    root: fx.Node,
    read: Iterable[fx.Node],
    operands: dict[fx.Node, int],
) -> tuple[Excerpt, set[fx.Node]]:
    """The program from what the replacement reads to the root, with the nodes that this takes.

    What of it does not come from there (a mask made from positions) is followed to its source, but not beyond integers
    and booleans: these are what they are in any precision.
    """
    when = reading.time[root]
    origins = {twin: node for node, twin in twins.items()}
    known: dict[Value, fx.Node] = {}
    for node in read:
        value = reading.value(node, when)
        if value is not None:
            known.setdefault(value, node)

    def source(node: fx.Node, time: int) -> fx.Node | None:
        """A node that holds at the root what `node` held at a time, if the excerpt is to begin there."""
        cell = reading.cells.get(node)
        if not isinstance(cell, Cell):
            module = cell is None or isinstance(cell, (torch.nn.Module, tuple, list, dict))
            return node if node.op == "placeholder" or not module else None
        value = cell.at(time)
        if value in known:
            return known[value]
        unchanged = cell.at(when) is value
        if unchanged and not _floating(value):
            return node
        if node.op in ("placeholder", "get_attr"):
            if unchanged:
                return node
            raise Miss("what it reads is changed before its end", node)
        return None

    def inputs(node: fx.Node) -> list[fx.Node]:
        return [origins[n] for n in twins[node].all_input_nodes]

    members: set[fx.Node] = set()
    pending = {root}
    for node in reversed([n for n, time in reading.time.items() if time <= when]):
        written = reading.effects[node].writes
        if node not in pending and written.isdisjoint(reading.memories(pending) if written else ()):
            continue
        pending.discard(node)
        members.add(node)
        pending.update(n for n in inputs(node) if source(n, reading.time[node]) is None)
    ordered = [n for n in reading.time if n in members]
    sources: dict[fx.Node, fx.Node] = {}
    for node in ordered:
        for n in inputs(node):
            begins = source(n, reading.time[node]) if n not in members else None
            if begins is not None:
                sources.setdefault(n, begins)
    overwritten: set[Memory] = {memory for node in ordered for memory in reading.effects[node].writes}

    def written_into(twin: fx.Node) -> bool:
        return not overwritten.isdisjoint(reading.memories([origins[twin]]))

    begin = {twins[n]: b for n, b in sources.items()}
    gm = twins[root].graph.owning_module or reading.gm
    taken = _copied(gm, [twins[n] for n in ordered], twins[root], begin, written_into, operands)
    return taken, members


def _copied(
    gm: fx.GraphModule,
    ordered: Iterable[fx.Node],
    result: fx.Node,
    sources: Mapping[fx.Node, fx.Node],
    written: Callable[[fx.Node], bool],
    operands: dict[fx.Node, int],
) -> Excerpt:
    """A graph of some nodes; what they read besides is an input of it, and is held by the program's node `sources`."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    slots = []
    for node, begins in sources.items():
        made[node] = graph.placeholder(node.name)
        slots.append((operands.setdefault(begins, len(operands)), written(node)))
    for node in ordered:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = {}
    graph.output(made[result])
    return Excerpt(fx.GraphModule(gm, graph), tuple(slots))


def _floating(value: Value | None) -> bool:
    return value is not None and value.dtype.is_floating_point


def _draws(reading: Reading, node: fx.Node) -> bool:
    """Whether a node draws random numbers; SDPA is said to do so even where it drops nothing."""
    if not reading.effects[node].random or node not in reading.program:
        return reading.effects[node].random
    return any(_call_draws(call.op, call.args) for call in reading.program[node].calls)


def _call_draws(op: torch._ops.OpOverload, args: Mapping[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    return args.get("train") is not False and args.get("p") != 0 and args.get("dropout_p") != 0
