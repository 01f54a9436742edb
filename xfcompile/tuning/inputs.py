"""Tensors to time a site with: random ones, of its operands' dtypes, sizes and strides, and masks that are typical."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from xfcompile.example import example_of
from xfcompile.family import Site
from xfcompile.read import Reading
from xfcompile.score import I, J, Load
from xfcompile.site import AttentionSite, Miss
from xfcompile.values import Value

LIVE = 3, 4
"""Of the keys of a padded sequence, or of a cache, that many are live."""

DOCUMENTS = 4
"""So many documents are packed into a sequence."""


class Inputs:
    """The tensors of one site, each made once: by the nodes of the program that hold such.

    What the program computes from nothing (positions, a causal mask) is computed, and so is what it computes of
    integers and booleans; all other operands are made up. when: the time at which they are what they are. twins: the
    program's nodes as they were before anything was replaced. about: of symbolic sizes what they were taken for, and of
    masks how they were made.
    """

    def __init__(self, reading: Reading, site: Site, when: int, twins: Mapping[fx.Node, fx.Node]) -> None:
        self.reading, self.site, self.when, self.twins = reading, site, when, twins
        self.sizes: dict[str, int] = {}
        self.masks: dict[str, str] = {}
        self._made: dict[fx.Node, Any] = {}
        self._nothing: dict[fx.Node, bool] = {}
        self._back: dict[fx.Node, fx.Node] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def about(self) -> str:
        words = [f"at {name} = {n}" for name, n in sorted(self.sizes.items())]
        return ", ".join([*words, *dict.fromkeys(self.masks.values())])

    def of(self, node: fx.Node) -> Any:
        """What stands for a node's tensor, or number. Raises `Miss` where nothing can."""
        if node not in self._made:
            self._made[node] = self._of(node)
        return self._made[node]

    def _of(self, node: fx.Node) -> Any:
        example = example_of(node)
        if isinstance(example, (int, float, bool)):
            return example
        if isinstance(example, (torch.SymInt, torch.SymFloat)):
            return self._number(example)
        value = self.reading.value(node, self.when)
        if value is None:
            raise Miss("an operand is no tensor that could be made up", node)
        computed = node.op not in ("placeholder", "get_attr")
        if computed and (self._from_nothing(node) or (_is_whole(value) and self._load(value) is None)):
            if self.reading.value(node) is not value:
                raise Miss("an operand is written into after it is made", node)
            return self._computed(node)
        if isinstance(example, FakeTensor) and type(example) is FakeTensor:
            shape, stride = ([self._number(n) for n in x] for x in (example.shape, example.stride()))
            offset = self._number(example.storage_offset())
        else:
            shape, stride, offset = list(value.meta.shape), list(value.meta.stride), 0
        if len(stride) != len(shape) or not all(isinstance(n, int) for n in (*shape, *stride)):
            raise Miss("an operand's size is not known", node)
        return self._tensor(value, shape, stride, offset)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """What a node read when the program was."""
        origins = self._origins()
        return [origins[n] for n in self.twins[node].all_input_nodes]

    def _origins(self) -> dict[fx.Node, fx.Node]:
        if not self._back:
            self._back = {twin: node for node, twin in self.twins.items()}
        return self._back

    def _from_nothing(self, node: fx.Node) -> bool:
        """Whether a node depends on sizes alone."""
        if node not in self._nothing:
            example = example_of(node)
            number = isinstance(example, (int, float, torch.SymInt, torch.SymFloat))
            effects = self.reading.effects[node]
            inner = node.op in ("call_function", "call_method") and not (
                effects.random or effects.opaque or effects.writes
            )
            self._nothing[node] = number or (inner and all(self._from_nothing(n) for n in self._inputs(node)))
        return self._nothing[node]

    def _computed(self, node: fx.Node) -> Any:
        """What the program makes of the node's own inputs, which are made up, or computed too."""
        twin, origins = self.twins[node], self._origins()
        args, kwargs = fx.node.map_arg((twin.args, twin.kwargs), lambda n: self.of(origins[n]))
        if self.reading.effects[node].random or node.op not in ("call_function", "call_method"):
            raise Miss("an operand is made in a way that is not repeated", node)
        try:
            with torch.no_grad():
                if node.op == "call_method":
                    return getattr(args[0], str(twin.target))(*args[1:], **kwargs)
                assert callable(twin.target)
                return twin.target(*args, **kwargs)
        except Exception as error:
            raise Miss(f"an operand is not computed of what is made up: {error}", node) from error

    def _number(self, n: Any) -> Any:
        if isinstance(n, (torch.SymInt, torch.SymFloat)):
            hint = n.node.hint if n.node.has_hint() else None
            if hint is None:
                raise Miss("a size is known at run time only", self.site.root)
            if n.node.expr.is_Symbol:
                self.sizes[str(n.node.expr)] = hint
            return hint
        return n

    def _tensor(self, value: Value, shape: list[int], stride: list[int], offset: int) -> Tensor:
        dtype, device = value.dtype, value.meta.device
        if dtype.is_complex or device.type not in ("cpu", "cuda"):
            raise Miss(f"tensors of {dtype} on {device.type} are not made up", value)
        extent = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if 0 not in shape else 0
        shift = offset % max(1, 16 // dtype.itemsize)  # memory starts as far from a multiple of 16 bytes
        if dtype.is_floating_point:
            generator = self._generator(device)
            memory = torch.randn(extent + shift, generator=generator, device=device, dtype=torch.float32).to(dtype)
            return memory.as_strided(shape, stride, shift)
        memory = torch.zeros(extent + shift, device=device, dtype=dtype)
        made = memory.as_strided(shape, stride, shift)
        self._fill(made, value)
        return made

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        return self._generators[device]

    # -- masks ------------------------------------------------------------------------------------------------

    def _fill(self, made: Tensor, value: Value) -> None:
        """Integers are 0, which is the index of something wherever they are one, and booleans are true, but for those
        that a mask is made from."""
        load = self._load(value)
        if load is None:
            if made.dtype == torch.bool:
                made.fill_(True)
            return
        assert isinstance(self.site, AttentionSite)
        keep = self.site.keep
        positions = [load.indices.index(x) if x in load.indices else None for x in (I, J)]
        kept = _keeps(keep, load)
        if kept is not None:
            live = self._live(made, *positions)
            made.copy_(live if kept else ~live)
            return
        along = next((d for d in reversed(positions) if d is not None), None)
        if any(load in e.atoms(Load) for e in keep.atoms(sympy.Eq, sympy.Ne)):
            if along is not None:
                n = made.shape[along]
                made.copy_(_along(torch.arange(n, device=made.device) * DOCUMENTS // max(n, 1), made, along))
                self.masks["documents"] = f"{DOCUMENTS} documents"
            return
        keys = self._keys()
        if along is None:  # a length, or a position in a cache
            made.fill_(keys * LIVE[0] // LIVE[1])
            self.masks["live"] = f"{LIVE[0]}/{LIVE[1]} of the keys live"
        else:  # positions of queries, which are the last, or of keys
            first = max(0, keys - made.shape[along]) if J not in load.indices else 0
            made.copy_(_along(torch.arange(first, first + made.shape[along], device=made.device), made, along))

    def _load(self, value: Value) -> Load | None:
        """How a mask reads this tensor, if that is all that it is for: what an index is made from stays 0."""
        site = self.site
        if not isinstance(site, AttentionSite) or value not in site.loads:
            return None
        number = site.loads.index(value)
        formulas = [f for f in (site.keep, site.score, site.sink, site.full) if f is not None]
        loads = {load for f in formulas for load in f.atoms(Load)}
        inside = {inner for load in loads for index in load.indices for inner in index.atoms(Load)}
        mine = [load for load in loads if load.operand == number]
        if any(load in inside for load in mine):
            return None
        return min((load for load in mine if load in site.keep.atoms(Load)), key=str, default=None)

    def _live(self, made: Tensor, rows: int | None, columns: int | None) -> Tensor:
        """Causal where there is one for each score, else the first keys."""
        if rows is not None and columns is not None:
            self.masks["causal"] = "masks that are data as if they were causal"
            i, j = (torch.arange(made.shape[d], device=made.device) for d in (rows, columns))
            shift = made.shape[columns] - made.shape[rows]
            return _along(j, made, columns) <= _along(i, made, rows) + shift
        if columns is None:
            return torch.ones(made.shape, dtype=torch.bool, device=made.device)
        n = made.shape[columns]
        self.masks["live"] = f"{LIVE[0]}/{LIVE[1]} of the keys live"
        live = torch.arange(n, device=made.device) < max(1, n * LIVE[0] // LIVE[1])
        return _along(live, made, columns).expand(made.shape)

    def _keys(self) -> int:
        assert isinstance(self.site, AttentionSite)
        keys = sympy.sympify(self.site.keys)
        return int(keys.subs({s: self.sizes.get(str(s), 1) for s in keys.free_symbols}))


def _is_whole(value: Value) -> bool:
    """Whether it is of integers or booleans."""
    return not (value.dtype.is_floating_point or value.dtype.is_complex)


def _along(x: Tensor, like: Tensor, d: int) -> Tensor:
    """A vector as it broadcasts along dimension d of `like`."""
    return x.view([-1 if k == d else 1 for k in range(like.ndim)])


def _keeps(keep: Any, load: Load) -> bool | None:
    """Whether elements that are true (not 0) are those that are kept; None where that does not decide it."""
    for kept, other in ((True, sympy.S.Zero), (False, sympy.S.One)):
        if keep.xreplace({load: other}) == sympy.false:
            return kept
    return None
