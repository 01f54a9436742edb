"""Which nodes of a graph still matter, when writes and side effects are counted."""

from __future__ import annotations

from collections.abc import Collection, Container

from torch import fx

from xfcompile.memory import Memory
from xfcompile.read import Reading


def live_nodes(
    reading: Reading,
    without: Container[fx.Node] = (),
    needed: Collection[fx.Node] = (),
    dispensable: Container[fx.Node] = (),
) -> set[fx.Node]:
    """The nodes that the outputs, any side effect or `needed` need, were the nodes `without` gone.

    dispensable: nodes that draw random numbers for a result that need not be drawn if nothing uses it.
    """
    live: set[fx.Node] = set()
    wanted: set[fx.Node] = set(needed)
    read_later: set[Memory] = set(reading.memories(needed))
    for node in reversed(list(reading.time)):
        if node in without:
            continue
        effects = reading.effects[node]
        writes = any(m.external or m in read_later for m in effects.writes)
        draws = effects.random and node not in dispensable
        if not (node.op in ("placeholder", "output") or node in wanted or writes or effects.opaque or draws):
            continue
        live.add(node)
        wanted.update(node.all_input_nodes)
        read_later |= effects.reads
    return live


def erase_orphans(live_before: set[fx.Node], live_after: set[fx.Node], graph: fx.Graph) -> int:
    """Erase the nodes that a rewrite has left without use; nodes that were dead before stay (they are the user's)."""
    erased = 0
    for node in reversed(list(graph.nodes)):
        if node in live_before and node not in live_after and not node.users:
            graph.erase_node(node)
            erased += 1
    return erased
