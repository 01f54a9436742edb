"""The modes that a node of a graph runs under, as the nodes before it have set them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

_SCOPES = {
    "_enter_autocast",
    "_exit_autocast",
    "_set_grad_enabled",
    "_enter_inference_mode",
    "_exit_inference_mode",
    "_sdpa_kernel",
}
_TRANSFORMED = ("_increment_nesting", "_decrement_nesting")  # _grad_.., _vmap_.., _jvp_.., _func_..
_BACKENDS = {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "CUDNN_ATTENTION"}


@dataclass(frozen=True)
class Scope:
    """The modes that a node runs under: gradients on or off, the autocast regions around it, whether SDPA's backends
    are chosen by the user (`torch.nn.attention.sdpa_kernel`), the regions of inference mode around it, each with what
    gradients were before, and how many transforms of `torch.func` are under way."""

    grad: bool = True
    autocast: tuple[Any, ...] = ()
    chosen: bool = False
    inference: tuple[bool, ...] = ()
    transforms: int = 0


def sets_a_mode(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name in _SCOPES or name.endswith(_TRANSFORMED)


def after(node: fx.Node, scope: Scope) -> Scope:
    """The modes behind a node that sets one."""
    name = getattr(node.target, "__name__", "")
    autocast = scope.autocast
    if name == "_enter_autocast":
        return replace(scope, autocast=(*autocast, tuple(node.args)))
    if name == "_exit_autocast":
        return replace(scope, autocast=autocast[:-1])
    if name == "_enter_inference_mode":
        return replace(scope, grad=not node.args[0], inference=(*scope.inference, scope.grad))
    if name == "_exit_inference_mode":
        return replace(scope, grad=scope.inference[-1], inference=scope.inference[:-1])
    if name.endswith(_TRANSFORMED):
        return replace(scope, transforms=scope.transforms + (1 if name.endswith(_TRANSFORMED[0]) else -1))
    if name == "_sdpa_kernel":
        return replace(scope, chosen=not _all_backends(node))
    return replace(scope, grad=bool(node.args[0]))


def _all_backends(node: fx.Node) -> bool:
    """Whether `_sdpa_kernel(backends)` allows all of them, as at the end of a region."""
    backends = node.args[0]
    names = {str(b.args[0]) if isinstance(b, fx.Node) else getattr(b, "name", "") for b in backends}  # type: ignore
    return names >= _BACKENDS
