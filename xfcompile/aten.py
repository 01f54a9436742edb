"""Keeps an exported program exported: what is added to a graph of ATen operators is spelt in ATen operators too."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xfcompile.emit import Emitter
from xfcompile.read import Reading
from xfcompile.site import Miss
from xfcompile.unfold import spell_out

_ROUNDS = 3
"""What a node is spelt in may have to be spelt out itself: a constant tensor is made by `torch.full`, say."""


def is_exported(graph: fx.Graph) -> bool:
    """Whether a graph is of the kind that torch.export makes: it calls nothing but operators."""
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    return any(isinstance(n.target, torch._ops.OpOverload) for n in calls) and all(map(_is_operator, calls))


def _is_operator(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    # Arithmetic of sizes is written with Python's operators, and picks results apart.
    scalar = node.target is operator.getitem or not isinstance(node.meta.get("val"), torch.Tensor)
    return isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator) or (
        scalar and getattr(node.target, "__module__", "") in ("_operator", "math", "torch")
    )


def output_names(graph: fx.Graph) -> list[str | None]:
    return [x.name if isinstance(x, fx.Node) else None for x in _outputs(graph)]


def export_again(reading: Reading, added: Sequence[fx.Node], names: Sequence[str | None]) -> None:
    """Spell out what was added to an exported graph, and give the results the names that they had, for the program's
    signature speaks of them."""
    graph, fresh = reading.gm.graph, set(added)
    for _ in range(_ROUNDS):
        known = set(graph.nodes)
        foreign = [n for n in graph.nodes if n in fresh and not _is_operator(n)]
        if not foreign:
            break
        again = Reading(reading.gm, reading.inputs, programs=reading.programs)
        for node in reversed(foreign):  # so that what a node reads is what was read of it
            _as_operators(again, node)
        fresh |= set(graph.nodes) - known
    left = [n for n in graph.nodes if n in fresh and n.op != "get_attr" and not _is_operator(n)]
    if left:
        raise Miss(f"{left[0].format_node()} cannot be written with operators")
    used = {n.name for n in graph.nodes}
    for result, name in zip(_outputs(graph), names, strict=True):
        if isinstance(result, fx.Node) and name is not None and name not in used:
            result.name = name


def _as_operators(reading: Reading, node: fx.Node) -> None:
    if node.op == "call_method" and node.target == "size":
        made = Emitter(reading, node, {}).call(torch.ops.aten.sym_size.int, *node.args)
        node.replace_all_uses_with(made)
        node.graph.erase_node(node)
    elif node in reading.program:
        spell_out(reading, node)


def _outputs(graph: fx.Graph) -> list[Any]:
    (output,) = graph.find_nodes(op="output")
    return pytree.tree_leaves(output.args)
