"""An attention as its kernel needs it: its score over what is loaded, and the nodes that are loaded from."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from xfcompile.diagonal import POINTWISE, vector
from xfcompile.emit import Emitter, is_learned_half
from xfcompile.kernels.printing.extent import guarded_loads
from xfcompile.magnitude import absorbs, adds_coarse, is_coarse
from xfcompile.masking import as_rounded
from xfcompile.plan import AttentionCandidate
from xfcompile.score import POSITION, I, J, Load, S
from xfcompile.site import AttentionSite, Dead, Miss, Operand, ScoreSpec
from xfcompile.values import Value


def _as_rounded(score: sympy.Expr, site: AttentionSite) -> sympy.Expr:
    def far(load: Load) -> bool:
        return is_coarse(site.loads[load.operand], site.added_in)

    return as_rounded(score, site.added_in, far, site.order)


def score_spec(emitter: Emitter, candidate: AttentionCandidate) -> tuple[ScoreSpec, list[fx.Node], list[Any]]:
    """The site as its kernel needs it, with the nodes of its operands and the sizes that its scalars are."""
    site = candidate.site
    score, full = candidate.score, site.full
    if full is not None:
        full = full.xreplace({S: candidate.q.factor * candidate.k.factor * S})
        coarse = any(adds_coarse(full, dtype) for dtype in (site.added_in, site.order.summed) if dtype is not None)
        full = _as_rounded(full, site) if coarse else full
    if site.rounding is not None:
        score = _as_rounded(score, site)
    far = full is not None or any(absorbs(f, site.loads, finite=True) for f in (score, site.sink))
    vectors, made = _vectors(emitter, site, candidate.score)
    score, full = (None if f is None else f.xreplace(vectors) for f in (score, full))
    beyond = _beyond(emitter, site, [score, site.keep, *(x for x in (site.sink, full) if x is not None)])
    score, keep, sink, full = (None if f is None else f.xreplace(beyond) for f in (score, site.keep, site.sink, full))
    formulas = [score, keep, *(x for x in (sink, full) if x is not None)]
    formulas += [x for x in (site.band.lower, site.band.upper) if x is not None]
    used = sorted({load.operand for f in formulas for load in f.atoms(Load)})
    renumbered = {n: k for k, n in enumerate(used)}

    loads = [load for f in formulas for load in f.atoms(Load)]
    operands = [
        made[n] if n in made else _coalesced(emitter, candidate, n, [x for x in loads if x.operand == n]) for n in used
    ]
    position = {S, *POSITION}
    scalars = sorted({s for f in formulas for s in f.free_symbols} - position, key=str)
    ints = [emitter.size(s) for s in scalars if s.is_integer]
    # Real numbers are handed over as tensors: of one that is an argument of a call of ours, torch would compile each
    # value anew (its pass that makes tensors of numbers knows arithmetic only).
    reals = {s: Load(len(operands) + n) for n, s in enumerate(s for s in scalars if not s.is_integer)}
    operands += [_as_tensor(emitter, site, s) for s in reals]

    def renumber(f: Any) -> Any:
        if f is None:
            return None
        f = f.replace(lambda x: isinstance(x, Load), lambda x: Load(renumbered[x.operand], *x.indices))
        return f.xreplace(reals)

    spec = ScoreSpec(
        score=renumber(score),
        keep=renumber(keep),
        dead=_rows_without_keys(site),
        operands=(
            *(Operand(site.loads[n % len(site.loads)].dtype, 4 if n in made else site.loads[n].ndim) for n in used),
            *(Operand(torch.float32, 0) for _ in reals),
        ),
        scalars=tuple(s for s in scalars if s.is_integer),
        sink=renumber(sink),
        band=site.band,
        far=far,
        full=renumber(full),
        floor=site.floor,
        coarse=site.product_dtype == torch.bfloat16,
        dropout=site.dropout,
        leaks=candidate.training and site.leaks,
    )
    return spec, operands, ints


def _beyond(emitter: Emitter, site: AttentionSite, formulas: list[sympy.Basic]) -> dict[Load, Load]:
    """Loads from tensors with fewer elements than a position has places, as parts of what is concatenated are, and the
    same held to what there is: a kernel takes a position for an index that is in range wherever it reads."""
    held: dict[Load, Load] = {}
    for load, guarded in (found for formula in formulas for found in guarded_loads(formula)):
        if not guarded or load.operand >= len(site.loads):
            continue
        indices = []
        for index, size in zip(load.indices, site.loads[load.operand].shape, strict=True):
            short = index in POSITION and not (sympy.sympify(size) - emitter.full_size(index, site)).is_nonnegative
            indices.append(sympy.Min(index, sympy.sympify(size) - 1) if short else index)
        if tuple(indices) != tuple(load.indices):
            held[load] = Load(load.operand, *indices)
    return held


def _rows_without_keys(site: AttentionSite) -> Dead:
    """What a kernel gives rows without keys. Where every row is proved to see one it does not look for any: the mean of
    all values would take a launch forward and, of dv, a few backward."""
    if site.alive and site.dead == "mean":
        return "nan"
    return "zero" if site.dead == "unknown" else site.dead


def _as_tensor(emitter: Emitter, site: AttentionSite, number: sympy.Symbol) -> fx.Node:
    """A number that is known at run time, as a tensor of no dimensions."""
    key = ("as a tensor", number)
    if key not in emitter.shared:
        one = emitter.call(torch.ones, (), dtype=torch.float32, device=site.root.meta.device)
        emitter.shared[key] = emitter.call(operator.mul, one, emitter.number(number))
    return emitter.shared[key]


def _vectors(emitter: Emitter, site: AttentionSite, score: sympy.Expr) -> tuple[dict[Load, Load], dict[int, fx.Node]]:
    """Loads of a score that become loads from vectors, and these: operand n + len(site.loads) is the vector of n."""
    instead: dict[Load, Load] = {}
    made: dict[int, fx.Node] = {}
    for load in sorted(score.atoms(Load), key=str):
        found = vector(emitter, site, load)
        number = load.operand + len(site.loads)
        if found is not None and number not in made:
            made[number], at = found
            instead[load] = Load(number, *at.indices)
    return instead, made


def _coalesced(emitter: Emitter, candidate: AttentionCandidate, n: int, loads: list[Load]) -> fx.Node:
    """The operand, with neighbouring keys next to each other in memory: a view of a table [i, j, h] is copied once."""
    site = candidate.site
    value = site.loads[n]
    node = emitter.holder(value)
    if node is None:
        raise Miss("a term of the score is changed before the product with values", value)
    if value.meta.device != site.root.meta.device:
        return emitter.call("to", node, site.root.meta.device)
    dense = any({I, J} <= load.free_symbols for load in loads)
    table = _of_table(emitter, value) if dense and candidate.training else None
    if table is not None:
        return table
    stride = value.meta.stride
    if not dense or not stride or stride[-1] == 1 or any(load.indices[-1] != J for load in loads):
        return node
    key = ("coalesced", value)
    if key not in emitter.shared:
        emitter.shared[key] = emitter.call("contiguous", node)
    return emitter.shared[key]


def _of_table(emitter: Emitter, value: Value) -> fx.Node | None:
    """A bias whose rows are those of a learned table of 16 bits, in another order (Swin's relative positions), and of
    each of its numbers something else perhaps (Swin V2's), computed anew from a read of the table that adds its
    gradients up in fp32; None for all others.

    Inductor adds them in the table's dtype, one after the other: 0.38 ms for 144 x 144 places of 529 rows, where all
    that the attention kernels take is 0.37 (H200, examples/results/profiles_h200.json).
    """
    key = ("rows of a table", value)
    if key in emitter.shared:
        return emitter.shared[key]
    steps = []
    while value.op in ("reshape", "permute") or _is_of_one(value):
        steps.append(value)
        (value,) = value.inputs()
    if value.op == "index":
        table, at = value["self"], list(value["indices"])
    elif value.op == "embedding" and value.args.get("padding_idx", -1) in (None, -1):
        table, at = value["weight"], [value["indices"]]
    else:
        return None
    if value.args.get("scale_grad_by_freq") or any(x is not None and x.dtype == torch.bool for x in at):
        return None
    held, places = emitter.holder(table), [x if x is None else emitter.holder(x) for x in at]
    if held is None or not is_learned_half(held) or places.count(None) != at.count(None):
        return None
    made = emitter.indexed(held, places)
    for step in reversed(steps):
        if step.op == "permute":
            made = emitter.call("permute", made, *step["dims"])
        elif step.op == "reshape":
            made = emitter.call("reshape", made, *(emitter.size(n) for n in step.shape))
        else:
            given = {name: made if isinstance(x, Value) else x for name, x in step.args.items()}
            made = POINTWISE[step.op](emitter, step, given)
    emitter.shared[key] = emitter.call("contiguous", made)
    return emitter.shared[key]


_NUMBERS = frozenset(("self", "other", "min", "max", "exponent", "dtype", "alpha"))
"""What `POINTWISE` is given of operations on one tensor."""


def _is_of_one(value: Value) -> bool:
    """Whether each number of a value is computed of one of another value of its shape, and of constants."""
    if value.op not in POINTWISE or not value.args.keys() <= _NUMBERS or value.args.get("alpha", 1) != 1:
        return False
    sources = list(value.inputs())
    constants = all(isinstance(x, (Value, int, float, torch.dtype)) or x is None for x in value.args.values())
    return constants and len(sources) == 1 and sources[0].shape == value.shape
