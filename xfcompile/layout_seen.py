"""Whether a program sees how a result lies in memory: by asking for its strides, or in what it computes of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xfcompile.example import example_of
from xfcompile.trace import static_mode
from xfcompile.unseen import unseen

log = logging.getLogger(__name__)

_LAYOUT_BLIND_VIEWS = frozenset(
    "transpose permute unsqueeze squeeze select getitem chunk split unbind expand t mT".split()
)
_LAYOUT_SENSITIVE = frozenset(
    "view view_as as_strided stride is_contiguous data_ptr storage_offset untyped_storage output set_ resize_ unfold "
    "view_as_complex view_as_real".split()
)


def layout_matters(node: fx.Node, seen: set[fx.Node] | None = None) -> bool:
    """Whether something sees the strides of a node's result, or of a view of it."""
    seen = set() if seen is None else seen
    for user in node.users:
        if user in seen:
            continue
        seen.add(user)
        name = _name(user)
        if user.op == "output" or name in _LAYOUT_SENSITIVE:
            return True
        if _has_body(user):
            return True
        follows = name in _LAYOUT_BLIND_VIEWS or (name.endswith("_") and not name.endswith("__"))
        if follows and layout_matters(user, seen):
            return True
    return False


def _name(node: fx.Node) -> str:
    target = node.target
    return (target if isinstance(target, str) else getattr(target, "__name__", str(target))).split(".")[0]


def _has_body(node: fx.Node) -> bool:
    """Whether a node calls a graph, in which a layout may be seen."""
    return any(a.op == "get_attr" for a in node.all_input_nodes)


def is_carried_on(root: fx.Node, order: Sequence[int]) -> bool:
    """Whether something sees it where a node's result lies dense in memory in another order of its dimensions, for what
    is computed of it element by element lies as it does. Users are run in the abstract, until what they give lies as it
    did before."""
    example = example_of(root)
    if not isinstance(example, torch.Tensor):
        return False
    try:
        given = _fixed(example)
        other = _ordered(given, order)
        return not _lie_alike(given, other) and _reaches(root, other)
    except Exception as error:  # what cannot be run cannot be told
        log.debug("how %s lies in memory may be seen: %s", root, error)
        return True


def _reaches(root: fx.Node, other: torch.Tensor) -> bool:
    lying: dict[fx.Node, Any] = {root: other}
    waiting, node = set(root.users), root
    while waiting:
        node = node.next
        if node not in waiting:
            continue
        waiting.remove(node)
        if node.op == "output" or _name(node) in _LAYOUT_SENSITIVE - {"view", "view_as"} or _has_body(node):
            return True
        before = pytree.tree_map(_fixed, example_of(node))
        after = _run(node, lying)
        pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
        if all(_lie_alike(x, y) for x, y in pairs):
            continue
        lying[node] = after
        waiting |= set(node.users)
    return False


def _run(node: fx.Node, lying: dict[fx.Node, Any]) -> Any:
    def given(n: fx.Node) -> Any:
        return lying[n] if n in lying else pytree.tree_map(_fixed, example_of(n))

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
    with static_mode(), unseen(), torch.no_grad():
        if node.op == "call_method":
            assert isinstance(node.target, str)
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        assert node.op == "call_function" and callable(node.target), node.op
        return node.target(*args, **kwargs)


def _fixed(x: Any) -> Any:
    """An example, its sizes the numbers that they were when the program was traced."""
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        if x.node.hint is None:
            raise ValueError(f"nobody knows how many {x} are")
        return x.node.hint
    if not isinstance(x, torch.Tensor):
        return x
    with static_mode():
        sizes, strides = ([_fixed(n) for n in numbers] for numbers in (x.shape, x.stride()))
        return torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)


def _ordered(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """A tensor like x, dense in that order."""
    strides, dense = [0] * x.dim(), 1
    for d in reversed(order):
        strides[d], dense = dense, dense * max(x.shape[d], 1)
    with static_mode():
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _lie_alike(x: Any, y: Any) -> bool:
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor)
    if x.shape != y.shape:
        return False
    return x.numel() == 0 or all(a == b for a, b, n in zip(x.stride(), y.stride(), x.shape, strict=True) if n != 1)
