"""Writes the fused call of a planned attention: SDPA told what was recovered, or our Triton kernel."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from xfcompile.emit import HALF, Emitter
from xfcompile.evaluate import Unsupported
from xfcompile.example import example_of
from xfcompile.layout import stride_key, with_layout
from xfcompile.layout_seen import is_carried_on, layout_matters
from xfcompile.magnitude import ABSORBING, COARSE, absorbs
from xfcompile.operands import D
from xfcompile.order import computed_with
from xfcompile.plan import FEW_QUERIES, AttentionCandidate, Told, operand_dtype, swallows
from xfcompile.score import POSITION, H, I, J, Load, S
from xfcompile.site import AttentionSite, Miss
from xfcompile.spec import score_spec

MANY = 4096
"""How many queries there are taken to be where that is not known."""


def replace_attention(emitter: Emitter, candidate: AttentionCandidate) -> fx.Node:
    """Emit the call that the candidate's route asks for; the node that stands for its root."""
    site = candidate.site
    dtype = operand_dtype(site, candidate.q.value.dtype, candidate.k.value.dtype, candidate.v.value.dtype)
    if candidate.route.name == "triton":
        out = _triton(emitter, candidate, dtype)
    else:
        assert candidate.words is not None
        out = _sdpa(emitter, candidate, candidate.words, dtype)
    restored = emitter.restore(out, site, dtype)
    return with_layout(emitter, candidate.node, restored)


def _operands(emitter: Emitter, candidate: AttentionCandidate, dtype: torch.dtype, grouped: bool) -> list[fx.Node]:
    site = candidate.site
    placed = ((candidate.q, I, site.head_dim), (candidate.k, J, site.head_dim), (candidate.v, J, site.value_dim))
    nodes = []
    for p, row, dim in placed:
        x = emitter.operand(p, site, row, dim, grouped=grouped and row == J)
        nodes.append(emitter.call("to", x, dtype) if p.value.dtype != dtype else x)
    return nodes


ALIGNMENT = 16
"""Bytes to which the rows of SDPA's operands must be aligned on GPUs: where they are not, some of its kernels refuse
to run, and its choice among them does not look."""


def _dense(emitter: Emitter, mask: fx.Node) -> fx.Node:
    """The mask, copied if neighbouring keys are not neighbours in memory, which SDPA's kernels on GPUs refuse."""
    example = example_of(mask)
    if not isinstance(example, torch.Tensor) or example.device.type != "cuda" or example.stride(-1) == 1:
        return mask
    return emitter.call("clone", mask, memory_format=torch.contiguous_format)


def _aligned(emitter: Emitter, x: fx.Node) -> fx.Node:
    """The operand, copied if its rows do not begin at multiples of `ALIGNMENT`."""
    example = example_of(x)
    if not isinstance(example, torch.Tensor) or example.device.type != "cuda":
        return x
    size = example.element_size()
    steps = [*example.stride()[:-1], example.storage_offset()]
    if example.stride(-1) == 1 and not any(isinstance(n, int) and n * size % ALIGNMENT for n in steps):
        return x
    if not isinstance(example.shape[-1], int) or example.shape[-1] * size % ALIGNMENT:
        return x  # SDPA pads such head dims itself, into tensors of its own
    return emitter.call("clone", x, memory_format=torch.contiguous_format)


def _without_gaps(emitter: Emitter, out: fx.Node) -> fx.Node:
    """SDPA's result, copied where it may be a part of the padded one that a kernel gave: what is computed of attention
    that is written out has no gaps in memory, and programs may make views of it. Which kernel that is nobody knows
    before it runs."""
    example = example_of(out)
    if not isinstance(example, torch.Tensor) or example.device.type != "cuda" or example.dtype not in HALF:
        return out
    if isinstance(example.shape[-1], int) and example.shape[-1] * example.element_size() % ALIGNMENT == 0:
        return out
    return emitter.call("clone", out)


def _heads(candidate: AttentionCandidate) -> tuple[Any, Any]:
    """How many query heads share one head of k, and one of v."""
    site = candidate.site
    if len(site.lead) < 2:
        return 1, 1
    return tuple(
        dict(p.groups).get(H, 1 if any(H in axes for axes in p.dims) else site.sizes[-1])
        for p in (candidate.k, candidate.v)
    )


def _sdpa(emitter: Emitter, candidate: AttentionCandidate, words: Told, dtype: torch.dtype) -> fx.Node:
    site = candidate.site
    group_k, group_v = _heads(candidate)
    # Kernels that read grouped heads themselves take no mask tensor; with one, k and v are expanded.
    grouped = words.plain and group_k == group_v and group_k != 1
    q, k, v = _operands(emitter, candidate, dtype, grouped)
    q = emitter.whole_batch(q, site, candidate.q, heads=True)
    k = emitter.whole_batch(k, site, candidate.k, heads=not grouped)
    v = emitter.whole_batch(v, site, candidate.v, heads=not grouped)
    scale: Any = words.coefficient
    if all(x.is_integer for x in scale.free_symbols) and not scale.has(Load, *POSITION):
        scale = emitter.number(scale)
    else:  # a number that is known at run time would be compiled anew for each value
        q = emitter.call("to", emitter.call(operator.mul, q, emitter.tensor(scale, site)), dtype)
        scale = 1.0
    if isinstance(scale, float) and scale < 0:
        q, scale = emitter.call(operator.neg, q), -scale
    kwargs: dict[str, Any] = {"scale": scale}
    if site.dropout:
        kwargs["dropout_p"] = site.dropout
    if words.causal:
        kwargs["is_causal"] = True
    if grouped:
        kwargs["enable_gqa"] = True
    dead = _dead(emitter, site, words)
    mask = _mask(emitter, site, words, dead)
    if mask is not None and site.call is None and _far(words.rest, site):
        mask, absorbed = _near(emitter, mask, site, _coarse(candidate, words, dtype), _absorbing(words.rest, site))
        if swallows(site, words):
            q = emitter.call("masked_fill", q, _four(emitter, absorbed, words), 0.0)
    if mask is not None:
        if words.rest != 0:
            # GPUs take masks of the dtype of q alone; where a program adds one in fp32, rounded it is another.
            exact = site.call is None and dtype in HALF and site.root.meta.device.type == "cpu"
            mask = emitter.call("to", mask, torch.float32 if exact else dtype)
        kwargs["attn_mask"] = _dense(emitter, _four(emitter, mask, words))
    q, k, v = (_aligned(emitter, x) for x in (q, k, v))
    out = _without_gaps(emitter, emitter.call(F.scaled_dot_product_attention, q, k, v, **kwargs))
    return out if dead is None else _dead_rows(emitter, site, dead, v, out)


def _mask(emitter: Emitter, site: AttentionSite, words: Told, dead: fx.Node | None) -> fx.Node | None:
    """The mask tensor for SDPA, boolean where that says it all, else additive."""
    if words.plain:
        return None
    keep: Any = True
    if words.keep != sympy.true:
        keep = emitter.tensor(words.keep, site)
        if dead is not None:
            keep = emitter.call(torch.logical_or, keep, dead)
    # Kernels read masks that have a stride along the keys.
    constant = J not in words.rest.free_symbols | words.keep.free_symbols
    if words.rest == 0:
        return _along_keys(emitter, keep, site, torch.bool) if constant else keep
    if site.full is not None:
        mask = emitter.tensor(site.full.xreplace({S: sympy.S.Zero}), site)
    else:
        mask = emitter.tensor(words.rest, site)
        if keep is not True:
            mask = emitter.call(torch.where, keep, mask, -float("inf"))
    return _along_keys(emitter, mask, site, torch.float32) if constant else mask


def _along_keys(emitter: Emitter, mask: fx.Node, site: AttentionSite, dtype: torch.dtype) -> fx.Node:
    """A mask that is the same for all keys, once for each."""
    zeros = emitter.call(torch.zeros, emitter.size(site.keys), dtype=dtype, device=site.root.meta.device)
    return emitter.call(torch.logical_or if dtype == torch.bool else operator.add, mask, zeros)


def _four(emitter: Emitter, mask: fx.Node, words: Told) -> fx.Node:
    for _ in range(4 - len(_axes(words))):
        mask = emitter.call("unsqueeze", mask, 0)
    return mask


FAR = 64.0
"""A bias of a whole row beyond which log-sum-exp loses digits that eager, which stores weights, keeps."""


LITTLE = 8192.0
"""A number beside which bf16 leaves nothing of scores below 32: its neighbours are 64 apart."""


def _far(rest: sympy.Expr, site: AttentionSite) -> bool:
    """Whether a whole row may be biased by a number of great size, or by -inf."""
    loads = any(site.loads[load.operand].dtype.is_floating_point for load in rest.atoms(Load))
    positions = any(x in POSITION for x in computed_with(rest))
    return loads or positions or any(x <= -FAR for x in rest.atoms(sympy.Number))


def _coarse(candidate: AttentionCandidate, words: Told, dtype: torch.dtype) -> float:
    """From where on SDPA may leave of scores beside their bias what eager does: on CPUs it adds both in fp32."""
    site, limit = candidate.site, COARSE / torch.finfo(dtype).eps
    if dtype not in (torch.float32, torch.float64) or site.root.meta.device.type != "cpu" or candidate.training:
        return ABSORBING
    number = any(x.is_finite and abs(x) >= limit for x in words.rest.atoms(sympy.Number))
    return limit if number or absorbs(words.rest, site.loads) else ABSORBING


def _absorbing(rest: sympy.Expr, site: AttentionSite) -> float:
    """From where on nothing is left of scores beside their bias; in bf16 of scores below 32, whose biases are bf16."""
    dtypes = {site.product_dtype, *(site.loads[load.operand].dtype for load in rest.atoms(Load))}
    return LITTLE if dtypes == {torch.bfloat16} else ABSORBING


def _near(
    emitter: Emitter, mask: fx.Node, site: AttentionSite, coarse: float, absorbing: float
) -> tuple[fx.Node, fx.Node]:
    """The mask, each far row of it moved up to 0, which softmax does not see; NaN where it is -inf for a whole row, for
    there softmax gives NaN and SDPA 0 (which is right where the program takes 0 for NaN). And the rows that were so far
    away that nothing was left of their scores: beyond `absorbing`, or as low as a number that stands where keys are
    masked. Rows from `coarse` to `ABSORBING` stay where they are, and there is left of their scores what there is."""
    floor, zero = site.floor, site.dead == "zero"
    key = ("near", mask, floor, zero, coarse, absorbing)
    if key not in emitter.shared:
        top = emitter.call("amax", emitter.call("detach", mask), -1, True)
        distance = emitter.call(torch.abs, top)
        far = emitter.call(operator.gt, distance, FAR)
        absorbed = emitter.call(operator.ge, distance, absorbing)
        if coarse < ABSORBING:
            fine = emitter.call(torch.logical_or, emitter.call(operator.lt, distance, coarse), absorbed)
            far = emitter.call(torch.logical_and, far, fine)
        if zero:
            far = emitter.call(torch.logical_and, far, emitter.call(operator.gt, top, -float("inf")))
        emitter.shared[key] = emitter.call(operator.sub, mask, emitter.call(torch.where, far, top, 0.0))
        if floor is not None:
            low = emitter.call(operator.le, top, float(floor) + FAR)
            absorbed = emitter.call(torch.logical_or, absorbed, low)
        emitter.shared["absorbed", key] = absorbed
    return emitter.shared[key], emitter.shared["absorbed", key]


def _axes(words: Told) -> tuple[sympy.Symbol, ...]:
    """The axes of the tensor that `Emitter.tensor` makes of the mask: from its first to the keys."""
    symbols = words.rest.free_symbols | words.keep.free_symbols
    first = min((POSITION.index(a) for a in symbols if a in POSITION), default=3)
    return POSITION[first:]


def _dead(emitter: Emitter, site: AttentionSite, words: Told) -> fx.Node | None:
    """Which rows see no key, as a boolean node; None where there is no such row, or SDPA's 0 is what they get."""
    if site.alive or site.dead == "zero" or site.full is not None:
        return None
    key = ("dead", words.keep, site.loads, site.queries, site.keys, site.sizes, emitter.scope)
    if key not in emitter.shared:
        alive = emitter.call("any", emitter.tensor(words.keep, site), -1, True)
        emitter.shared[key] = emitter.call(torch.logical_not, alive)
    return emitter.shared[key]


def _dead_rows(emitter: Emitter, site: AttentionSite, dead: fx.Node, v: fx.Node, out: fx.Node) -> fx.Node:
    """Rows without keys get what the author's softmax gives there. SDPA ran them unmasked (`_mask`), so that no
    backend meets a row of -inf and gradients stay finite."""
    if site.dead == "nan":
        return emitter.call("masked_fill", out, dead, float("nan"))
    mean = emitter.call("mean", v, -2, True)
    return emitter.call(torch.where, dead, mean, out)


def _triton(emitter: Emitter, candidate: AttentionCandidate, dtype: torch.dtype) -> fx.Node:
    from xfcompile.kernels.attention import prepare

    site = candidate.site
    q, k, v = _operands(emitter, candidate, dtype, grouped=True)
    group_k, group_v = _heads(candidate)
    if group_k != group_v:
        if any(g not in (1, site.sizes[-1]) for g in (group_k, group_v)):
            raise Miss("keys and values have different numbers of heads", site.root)
    q = emitter.whole_batch(q, site, candidate.q, heads=True)
    k = emitter.whole_batch(k, site, candidate.k, heads=group_k != group_v)
    v = emitter.whole_batch(v, site, candidate.v, heads=group_k != group_v)
    spec, operands, ints = score_spec(emitter, candidate)
    try:
        key = prepare(spec)
    except Unsupported as error:
        raise Miss(str(error), site.root) from error
    loaded: tuple[Any, Any, Any] = (operands, ints, [])
    tiles = _tiles(emitter, candidate, dtype, q, loaded, key)
    more: dict[str, Any] = {"heads_first": True} if _heads_first(candidate) else {}
    if site.dropout:
        more["seed"], more["stream"] = emitter.seed(site.root.meta.device)
    by_key = _tiles(emitter, candidate, dtype, q, loaded, key, by_key=True) if candidate.training else ()
    if by_key:
        more["tiles_by_key"] = by_key[0]
    made = emitter.call(torch.ops.xfcompile.attention.default, q, k, v, operands, ints, [], key, *tiles, **more)
    return emitter.call(operator.getitem, made, 0)


def _tiles(
    emitter: Emitter,
    candidate: AttentionCandidate,
    dtype: torch.dtype,
    like: fx.Node,
    loaded: tuple[Any, Any, Any],
    key: str,
    by_key: bool = False,
) -> tuple[Any, ...]:
    """The lists of the tiles under the site's mask, made once for all attentions under it, and the sizes of the tiles;
    nothing where the kernel needs none, or makes them by itself."""
    from xfcompile.kernels.attention import FEW_TILES, always_listed, mask_arguments, mask_of, tile_sizes

    site, mask = candidate.site, mask_of(key)
    queries = sympy.sympify(site.queries)
    device = site.root.meta.device
    if mask is None or (queries.is_Integer and queries < FEW_QUERIES):
        return ()
    many = int(queries) if queries.is_Integer else MANY
    dims = int(site.head_dim), int(site.value_dim)
    block_m, block_n = tile_sizes(key, device, dtype, *dims, many)
    keys = sympy.sympify(site.keys)
    if keys.is_Integer and keys <= FEW_TILES * block_n:
        # A backward does without lists then: it is given none where there are none by keys.
        if by_key or not always_listed(key, device, dtype, *dims):
            return ()
    operands, ints, floats = mask_arguments(key, *loaded)
    batch = sympy.prod(site.sizes[:-1]) if len(site.lead) >= 2 else site.sizes[0] if site.lead else sympy.S.One
    heads = site.sizes[-1] if len(site.lead) >= 2 else sympy.S.One
    sizes = (batch, heads, site.queries, site.keys)
    name = ("tiles", mask, tuple(operands), tuple(ints), tuple(floats), sizes, block_m, block_n, device, by_key)
    if name not in emitter.shared:
        shape = [emitter.size(n) for n in sizes]
        op = torch.ops.xfcompile.attention_tiles.default
        more = {"by_key": True} if by_key else {}
        emitter.shared[name] = emitter.call(op, like, operands, ints, floats, shape, block_m, block_n, mask, **more)
    return emitter.shared[name], block_m, block_n


def _heads_first(candidate: AttentionCandidate) -> bool:
    """Whether a user could tell the layout of the result, and each head's rows are neighbours in it."""
    site, root = candidate.site, candidate.node
    where = {a: d for d, run in enumerate(site.layout) for a in run}
    if len(site.lead) < 2 or not (layout_matters(root) or is_carried_on(root, _rows_first(site))):
        return False
    example = example_of(root)
    if where[H] == where[I]:
        run = site.layout[where[H]]
        return run.index(site.lead[-1]) < run.index(I)
    if not isinstance(example, torch.Tensor):
        return where[H] < where[I]
    return stride_key(example, where[H]) > stride_key(example, where[I])


def _rows_first(site: AttentionSite) -> list[int]:
    """The dimensions of the root in the order in which they lie in memory where the kernel is asked for nothing."""
    rank = {a: n for n, a in enumerate((*site.lead[:-1], I, site.lead[-1], D))}
    return sorted(range(len(site.layout)), key=lambda d: rank[site.layout[d][0]] if site.layout[d] else -1)
