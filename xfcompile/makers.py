"""Which nodes compute the root of a site, each of which is replaced, and why none of them may be."""

from __future__ import annotations

from typing import Any

from torch import fx

from xfcompile.family import Family, Site
from xfcompile.memory import Memory
from xfcompile.read import Reading
from xfcompile.site import Miss
from xfcompile.subclass import subclass_at


def makers_of(reading: Reading, family: Family[Any, Any], site: Site) -> list[fx.Node]:
    """The nodes that compute the root of a site, none of which has a part of it under other modes than the rest."""
    makers = [n for n in reading.makers.get(site.root, ()) if reading.value(n) is site.root]
    if not makers:
        raise Miss("it stands inside of a call that cannot be spelled out", site.root)
    makers = [n for n in makers if not reading.effects[n].writes & reading.effects[n].reads or is_unseen(reading, n)]
    if not makers:
        raise Miss("the result is written into a tensor that is there already", site.root)
    if any(_is_view(reading, node) and not is_unseen(reading, node) for node in makers):
        raise Miss("the result is a view of a tensor that is there already", site.root)
    steps = [reading.steps[v] for v in site.interior if v in reading.steps]
    of_other_classes = next(filter(None, map(subclass_at, (*makers, *steps))), None)
    if of_other_classes is not None:
        raise Miss(f"it computes with tensors of the class {of_other_classes}", site.root)
    if any(reading.scope[node].transforms for node in makers):
        raise Miss(
            "it stands in a transform of torch.func (grad, vmap, jvp), none of which our operators know", site.root
        )
    if any(reading.scope[node].inference for node in makers):
        raise Miss(
            "it stands in a region of inference mode, in which torch compiles no views that are added", site.root
        )
    scopes = {reading.scope[node] for node in steps}
    if any(scopes - {reading.scope[node]} for node in makers):
        raise Miss(f"the {family.title} crosses the border of an autocast, no_grad or inference region", site.root)
    return makers


def _is_view(reading: Reading, node: fx.Node) -> bool:
    """Whether a node's result lies in the memory of an older node's: a write to one of them changes the other. A tuple
    from which the result is only taken is no other."""
    memories, tuples = set(reading.memories([node])), [n for n in node.all_input_nodes if _is_tuple(reading, n)]
    older = (n for n, time in reading.time.items() if time < reading.time[node] and n not in tuples)
    return not memories.isdisjoint(reading.memories(older))


def _is_tuple(reading: Reading, node: fx.Node) -> bool:
    return isinstance(reading.cells.get(node), (tuple, list))


def is_unseen(reading: Reading, node: fx.Node) -> bool:
    """Whether a node writes its result into a tensor that nothing looks at any more but by this node: relu in place."""
    written = reading.effects[node].writes
    if not written or any(memory.external for memory in written):
        return False
    older = [n for n in holding(reading, written) if reading.time[n] < reading.time[node]]
    return all(reading.time.get(user, -1) <= reading.time[node] for n in older for user in n.users)


def holding(reading: Reading, memories: set[Memory]) -> list[fx.Node]:
    """The nodes whose tensors lie in some memories."""
    return [n for n in reading.time if not memories.isdisjoint(reading.memories([n]))]
