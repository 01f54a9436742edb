"""Spells out nodes that hold a whole site inside (`multi_head_attention_forward`) as their ATen calls."""

from __future__ import annotations

import logging
import operator
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from xfcompile.emit import Emitter
from xfcompile.liveness import live_nodes
from xfcompile.read import Reading
from xfcompile.search import Search
from xfcompile.site import Miss
from xfcompile.subclass import subclass_at
from xfcompile.trace import Constant, External, Program, Ref

log = logging.getLogger(__name__)


def unfold(reading: Reading, search: Search) -> bool:
    """Spell out such nodes, in place; whether there are any, so that the graph is to be read anew."""
    unfolded = False
    for _, child in reading.children:
        unfolded |= unfold(child, search)
    live = live_nodes(reading)
    sites = search.sites(reading)
    makers = {node for site in sites for node in reading.makers.get(site.root, ()) if node in live}
    nodes = [n for n in reading.time if n in makers and not any(reading.value(n) is s.root for s in sites)]
    nodes = [n for n in nodes if subclass_at(n) is None]
    for node in nodes:
        unfolded |= spell_out(reading, node)
    if nodes:
        reading.gm.graph.lint()
        reading.gm.recompile()
    return unfolded


def spell_out(reading: Reading, node: fx.Node) -> bool:
    """Put its ATen calls in a node's place; whether that can be done."""
    program = reading.program[node]
    picks = [u for u in node.users if u.target is operator.getitem and isinstance(u.args[1], int)]
    single = isinstance(program.result, Ref)
    if not single and len(picks) != len(node.users):
        return False
    inputs = [n for n, x in reading.tensor_arguments(node)]
    if any(n is None for n in inputs):
        return False
    if any(isinstance(x, External) for call in program.calls for x in pytree.tree_leaves(call.args)):
        return False  # a module's parameters, which no node holds
    graph = reading.gm.graph
    before = set(graph.nodes)
    try:
        result = _calls(Emitter(reading, node, {}), program, inputs)
    except Miss as miss:  # a size that no node holds
        log.debug("%s is not spelled out: %s", node, miss.reason)
        for added in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(added)
        return False
    if single:
        _put(node, result)
    else:
        for pick in picks:
            _put(pick, result[pick.args[1]])
            graph.erase_node(pick)
    if not node.users:
        graph.erase_node(node)
    return True


def _calls(emitter: Emitter, program: Program, inputs: list[Any]) -> Any:
    """The nodes of a program's calls, and its result, of nodes."""
    results: list[Any] = []

    def operand(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return [operand(y) for y in x]
        if isinstance(x, Ref):
            return inputs[x.index] if x.item is None else results[x.index][x.item]
        if isinstance(x, Constant):
            return emitter.call(torch.full, list(x.meta.shape), x.value, dtype=x.meta.dtype, device=x.meta.device)
        return emitter.size(x) if isinstance(x, sympy.Basic) else x

    for call in program.calls:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in call.op._schema.arguments:
            value = operand(call.args[parameter.name])
            if parameter.kwarg_only:
                kwargs[parameter.name] = value
            else:
                args.append(value)
        made = emitter.call(call.op, *args, **kwargs)
        returns = call.op._schema.returns
        many = len(call.outputs) > 1 or any(r.type.kind() == "ListType" for r in returns)
        results.append([emitter.call(operator.getitem, made, k) for k in range(len(call.outputs))] if many else [made])
    return operand(program.result)


def _put(node: fx.Node, result: Any) -> None:
    """Give a node's users its result: nodes, or a number or nothing, which no node holds."""
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: result if n is node else n)
