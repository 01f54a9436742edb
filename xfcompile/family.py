"""A family of subgraphs: all that the rewriting asks of one, as functions over values, nodes and sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import fx

from xfcompile.emit import Emitter
from xfcompile.example import example_of
from xfcompile.meaning import Kernel, Meaning
from xfcompile.read import Reading
from xfcompile.values import Value


class Site(Protocol):
    """What a pattern has found. A family's own sites say what they mean besides."""

    @property
    def root(self) -> Value:
        """The value that is replaced."""

    @property
    def interior(self) -> tuple[Value, ...]:
        """The values, with or without the root, that the replacement does not make."""


@dataclass(frozen=True)
class Route:
    """What runs a site, and why it was chosen (None: it is the usual choice).

    name: one of its family's routes; "inductor" leaves the site as it is.
    unchanged: it is the program's own call, which stays as it is.
    """

    name: str
    reason: str | None = None
    unchanged: bool = False

    @property
    def replaces(self) -> bool:
        """Whether something else is put in the site's place."""
        return self.name != "inductor" and not self.unchanged


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A site at one node of the graph. A family with more to say of it adds fields of its own.

    node: the node that computes the site's root.
    operands: the values that its replacement reads.
    costly: values of the interior that are not to be computed twice: if something else needs one of them, the site is
        left to Inductor.
    drawn: random values of the interior, in whose place the replacement draws its own: nothing else has to.
    """

    site: Site
    node: fx.Node
    operands: tuple[Value, ...]
    costly: tuple[Value, ...] = ()
    drawn: tuple[Value, ...] = ()
    route: Route = Route("inductor")


@dataclass(frozen=True)
class Setting:
    """What the choice of a route depends on besides the site.

    training: whether a gradient may flow into the site's result. recomputed: whether it stands in a checkpoint's body.
    routes: the routes that the user asks for, by family. cpp_wrapper: whether Inductor calls kernels from C++, which
    can't call operators that return lists of tensors, as some of our backwards do.
    """

    training: bool = False
    recomputed: bool = False
    routes: Mapping[str, str] = field(default_factory=dict)
    cpp_wrapper: bool = False

    @property
    def why_no_backward(self) -> str | None:
        """Why no operator that returns a list of gradients is to be called; None if one may be, or there are none."""
        return FROM_CPP if self.training and self.cpp_wrapper else None


FROM_CPP = "our backward returns a list of gradients, which Inductor's C++ wrapper can't call"


@dataclass(frozen=True)
class Words:
    """What the report says of a site: see `SiteReport`. meaning: the same for a page, which draws and typesets it."""

    expression: str | None = None
    mask: str | None = None
    tiles: str | None = None
    meaning: Meaning | None = None


S = TypeVar("S", bound=Site)
C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True)
class Family(Generic[S, C]):
    """A family. All but `replace` look at the graph as it was read; `replace` adds nodes and changes none.

    name: as in options and reports ("gated_mlp"). routes: all ways of running a site, "inductor" among them.
    anchors: among all values of a graph, those around which a site may stand.
    match: the sites around an anchor, given the values that take each value. None where nothing of the kind is near;
        `Miss` where the reason should be in the report.
    at_node: the site at a node that computes its root; `Miss` if it cannot be replaced there.
    plan: the candidate with its route, and all that `replace` has to know of that choice.
    replace: a node that holds what the candidate's node holds: same shape, dtype, and strides where these matter. An
        error, or a `Miss`, leaves the site to Inductor, and takes back the nodes that were added.
    words: what the report says of a candidate.
    costly: what `Candidate.costly` are, in a sentence: "... are used elsewhere too".
    timed_routes: those of `routes` by which a candidate is timed where tuning is asked for, if not by all.
    kernels: the generated modules that the nodes of a replacement call, which a page shows.
    """

    name: str
    routes: tuple[str, ...]
    anchors: Callable[[list[Value]], Iterable[Value]]
    match: Callable[[Value, dict[Value, list[Value]]], list[S]]
    at_node: Callable[[Reading, S, fx.Node], C]
    plan: Callable[[Reading, C, Setting], C]
    replace: Callable[[Emitter, C], fx.Node]
    words: Callable[[C], Words] = lambda candidate: Words()
    costly: str = "parts of it"
    timed_routes: Callable[[C], tuple[str, ...]] | None = None
    kernels: Callable[[Sequence[fx.Node]], tuple[Kernel, ...]] = lambda nodes: ()

    @property
    def title(self) -> str:
        """The name in a sentence."""
        return self.name.replace("_", " ")


def needs_grad(node: fx.Node, reading: Reading) -> bool:
    """Whether a gradient may flow into the node's result."""
    if not reading.scope[node].grad:
        return False
    example = example_of(node)
    if isinstance(example, torch.Tensor) and example.requires_grad:
        return True
    if "example_value" not in node.meta:  # an exported program, or what FX traced: only its inputs tell
        return reading.may_need_grad(node)
    learned = any(_requires_grad(n) for n in reading.time if n.op in ("placeholder", "get_attr"))
    return learned and (not isinstance(example, torch.Tensor) or example.grad_fn is not None)


def value_needs_grad(value: Value, reading: Reading) -> bool:
    """Whether a gradient may flow into a value, as far as the first node tells that holds it."""
    holders = reading.holders.get(value, [])
    return any(needs_grad(node, reading) for node, _ in holders[:1])


def _requires_grad(node: fx.Node) -> bool:
    example = example_of(node)
    return isinstance(example, torch.Tensor) and example.requires_grad
