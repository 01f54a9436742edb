"""Writes the fused call of a planned site: SDPA told what was recovered, or our Triton kernel."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from xfcompile.emit import Emitter
from xfcompile.plan import Told, operand_dtype
from xfcompile.score import H, I, J, Load, S
from xfcompile.site import AttentionSite, Miss, Operand, ScoreSpec

if TYPE_CHECKING:
    from xfcompile.rewrite import Candidate

ABSORBED = {torch.float16: -65504.0}
"""The finite fill of a mask given to SDPA: far below any score, and scaled by log2(e) still finite."""


def replace_attention(emitter: Emitter, candidate: Candidate) -> fx.Node:
    """Emit the call that the candidate's route asks for; the node that stands for its root."""
    site = candidate.site
    dtype = operand_dtype(site, candidate.q.value.dtype, candidate.k.value.dtype, candidate.v.value.dtype)
    if candidate.route.name == "triton":
        out = _triton(emitter, candidate, dtype)
    else:
        assert candidate.words is not None
        out = _sdpa(emitter, candidate, candidate.words, dtype)
    restored = emitter.restore(out, site, dtype)
    return _with_layout(emitter, candidate.node, restored)


def _operands(emitter: Emitter, candidate: Candidate, dtype: torch.dtype, grouped: bool) -> list[fx.Node]:
    site = candidate.site
    placed = ((candidate.q, I), (candidate.k, J), (candidate.v, J))
    nodes = []
    for p, row in placed:
        x = emitter.operand(p, site, row, grouped=grouped and row == J)
        nodes.append(emitter.call("to", x, dtype) if p.value.dtype != dtype else x)
    return nodes


def _heads(candidate: Candidate) -> tuple[Any, Any]:
    """How many query heads share one head of k, and one of v."""
    site = candidate.site
    if len(site.lead) < 2:
        return 1, 1
    return tuple(  # type: ignore[return-value]
        dict(p.groups).get(H, 1 if any(H in axes for axes in p.dims) else site.sizes[-1]) for p in (candidate.k, candidate.v)
    )


def _sdpa(emitter: Emitter, candidate: Candidate, words: Told, dtype: torch.dtype) -> fx.Node:
    site = candidate.site
    group_k, group_v = _heads(candidate)
    # Kernels that read grouped heads themselves take no mask tensor; with one, k and v are expanded.
    grouped = words.plain and group_k == group_v and group_k != 1
    q, k, v = _operands(emitter, candidate, dtype, grouped)
    q = emitter.whole_batch(q, site, heads=True)
    k, v = (emitter.whole_batch(x, site, heads=not grouped) for x in (k, v))
    scale: Any = words.coefficient
    if scale.is_number or (scale.is_Symbol and not scale.is_integer):
        scale = emitter.number(scale)
    else:
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
    mask = _mask(emitter, site, words, dtype)
    if mask is not None:
        kwargs["attn_mask"] = mask
    out = emitter.call(F.scaled_dot_product_attention, q, k, v, **kwargs)
    return _dead_rows(emitter, site, words, out)


def _mask(emitter: Emitter, site: AttentionSite, words: Told, dtype: torch.dtype) -> fx.Node | None:
    """The mask tensor for SDPA, boolean where that says it all, else additive in the operands' dtype."""
    if words.plain:
        return None
    keep = words.keep
    if words.causal and words.rest != 0:
        raise Miss("SDPA takes a bias or is_causal, not both")
    if words.rest == 0 and (site.alive or site.dead != "mean"):
        mask = emitter.tensor(keep, site)
    else:
        rest = emitter.tensor(words.rest, site)
        if keep != sympy.true:
            fill = -float("inf") if site.dead != "mean" else ABSORBED.get(dtype, -1e30)
            rest = rest if isinstance(rest, fx.Node) else emitter.call(torch.scalar_tensor, float(rest), device=emitter._device(site), dtype=dtype)
            mask = emitter.call(torch.where, emitter.tensor(keep, site), rest, fill)
        else:
            mask = rest
        mask = emitter.call("to", mask, dtype)
    dims = len(_axes(words))
    for _ in range(4 - dims):
        mask = emitter.call("unsqueeze", mask, 0)
    return mask


def _axes(words: Told) -> tuple[sympy.Symbol, ...]:
    """The axes of the tensor that `Emitter.tensor` makes of the mask: from its first to the keys."""
    from xfcompile.score import POSITION

    symbols = words.rest.free_symbols | words.keep.free_symbols
    first = min((POSITION.index(a) for a in symbols if a in POSITION), default=3)
    return POSITION[first:]


def _dead_rows(emitter: Emitter, site: AttentionSite, words: Told, out: fx.Node) -> fx.Node:
    """Rows without keys: what the author's softmax gives there, where SDPA gives 0."""
    if site.alive or site.dead == "zero" or words.keep == sympy.true:
        return out
    if site.dead == "mean" and not (words.rest == 0 and False) and _dtype_absorbs(site):
        return out
    alive = emitter.call("any", emitter.tensor(words.keep, site), -1, True)
    dead = emitter.call(torch.logical_not, alive)
    if site.dead == "nan":
        return emitter.call("masked_fill", out, dead, float("nan"))
    raise Miss("rows without keys get the mean of all values, which SDPA in fp16 does not give", site.root)


def _dtype_absorbs(site: AttentionSite) -> bool:
    return site.q[-1].value.dtype != torch.float16 and site.product_dtype != torch.float16


def _triton(emitter: Emitter, candidate: Candidate, dtype: torch.dtype) -> fx.Node:
    from xfcompile.kernels.attention import prepare

    site = candidate.site
    q, k, v = _operands(emitter, candidate, dtype, grouped=True)
    group_k, group_v = _heads(candidate)
    if group_k != group_v:
        k, v = (emitter.whole_batch(x, site, heads=True) if g != 1 else x for x, g in ((k, group_k), (v, group_v)))
        raise_if = [g for g in (group_k, group_v) if g not in (1, site.sizes[-1])]
        if raise_if:
            raise Miss("keys and values have different numbers of heads", site.root)
    q = emitter.whole_batch(q, site, heads=True)
    k, v = (emitter.whole_batch(x, site, heads=False) for x in (k, v))
    spec, operands, ints, floats = score_spec(emitter, candidate)
    key = prepare(spec)
    made = emitter.call(torch.ops.xfcompile.attention.default, q, k, v, operands, ints, floats, key)
    return emitter.call(operator.getitem, made, 0)


def score_spec(emitter: Emitter, candidate: Candidate) -> tuple[ScoreSpec, list[fx.Node], list[Any], list[Any]]:
    """The site as its kernel needs it, with the nodes of its operands and the numbers of its scalars."""
    site = candidate.site
    formulas = [candidate.score, site.keep, site.sink if site.sink is not None else sympy.S.Zero]
    formulas += [x for x in (site.band.lower, site.band.upper) if x is not None]
    used = sorted({load.operand for f in formulas for load in f.atoms(Load)})
    renumbered = {n: k for k, n in enumerate(used)}

    def renumber(f: Any) -> Any:
        if f is None:
            return None
        return f.replace(lambda x: isinstance(x, Load), lambda x: Load(renumbered[x.operand], *x.indices))

    operands = []
    for n in used:
        node = emitter.holder(site.loads[n])
        if node is None:
            raise Miss("a term of the score is changed before the product with values", site.loads[n])
        operands.append(node)
    position = {S, *_positions()}
    scalars = sorted({s for f in formulas for s in f.free_symbols} - position, key=str)
    ints = [emitter.size(s) for s in scalars if s.is_integer]
    floats = [emitter.number(s) for s in scalars if not s.is_integer]
    spec = ScoreSpec(
        score=renumber(candidate.score),
        keep=renumber(site.keep),
        dead=site.dead if site.dead != "unknown" else "zero",
        operands=tuple(Operand(site.loads[n].dtype, site.loads[n].ndim) for n in used),
        scalars=tuple(scalars),
        sink=renumber(site.sink),
        band=site.band,
    )
    return spec, operands, ints, floats


def _positions() -> tuple[sympy.Symbol, ...]:
    from xfcompile.score import POSITION

    return POSITION


# -- memory layout ------------------------------------------------------------------------------------------------

_LAYOUT_BLIND_VIEWS = frozenset("transpose permute unsqueeze squeeze select getitem chunk split unbind expand t mT".split())
_LAYOUT_SENSITIVE = frozenset(
    "view view_as as_strided stride is_contiguous data_ptr storage_offset untyped_storage output set_ resize_ unfold "
    "view_as_complex view_as_real".split()
)


def _with_layout(emitter: Emitter, root: fx.Node, new: fx.Node) -> fx.Node:
    """Give the result the strides of the replaced node where a user could tell the difference."""
    if not _layout_matters(root, set()):
        return new
    example = root.meta.get("example_value", root.meta.get("val"))
    if not isinstance(example, torch.Tensor):
        return emitter.call("contiguous", new)
    order = sorted(range(example.dim()), key=lambda d: _stride_key(example, d), reverse=True)
    if order == list(range(example.dim())):
        return emitter.call("contiguous", new)
    dense = emitter.call("contiguous", emitter.call("permute", new, *order))
    return emitter.call("permute", dense, *(order.index(d) for d in range(example.dim())))


def _stride_key(x: torch.Tensor, d: int) -> Any:
    stride = x.stride(d)
    hint = stride.node.hint if isinstance(stride, torch.SymInt) else stride
    return (hint if hint is not None else 0, -d)


def _layout_matters(node: fx.Node, seen: set[fx.Node]) -> bool:
    for user in node.users:
        if user in seen:
            continue
        seen.add(user)
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", str(user.target))
        name = name.split(".")[0]
        if user.op == "output" or name in _LAYOUT_SENSITIVE:
            return True
        if any(isinstance(a, fx.Node) and a.op == "get_attr" for a in user.all_input_nodes):
            return True
        follows = name in _LAYOUT_BLIND_VIEWS or (name.endswith("_") and not name.endswith("__"))
        if follows and _layout_matters(user, seen):
            return True
    return False
