"""Spells out nodes that hold a whole site inside (`multi_head_attention_forward`) as their ATen calls."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from xfcompile.emit import Emitter
from xfcompile.liveness import live_nodes
from xfcompile.read import Reading
from xfcompile.search import Search
from xfcompile.subclass import subclass_at
from xfcompile.trace import Constant, Ref


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
    program = reading.program.get(node)
    if program is None:  # a call with bodies of its own, which is read by these
        return False
    picks = [u for u in node.users if u.target is operator.getitem and isinstance(u.args[1], int)]
    single = isinstance(program.result, Ref)
    if not single and len(picks) != len(node.users):
        return False
    emitter = Emitter(reading, node, {})
    inputs = [n for n, x in reading.tensor_arguments(node)]
    if any(n is None for n in inputs):
        return False
    results: list[Any] = []

    def operand(x: Any) -> Any:
        if isinstance(x, tuple):
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
        many = len(call.outputs) > 1 or call.op._schema.returns[0].type.kind() == "ListType"
        results.append([emitter.call(operator.getitem, made, k) for k in range(len(call.outputs))] if many else [made])
    if single:
        node.replace_all_uses_with(operand(program.result))
    else:
        for pick in picks:
            chosen = program.result[pick.args[1]]
            if chosen is None:
                continue
            pick.replace_all_uses_with(operand(chosen))
            reading.gm.graph.erase_node(pick)
    if not node.users:
        reading.gm.graph.erase_node(node)
    return True
