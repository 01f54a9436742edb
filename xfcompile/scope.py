"""The modes that a node of a graph runs under, as the nodes before it have set them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

_SCOPES = {"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_sdpa_kernel"}
_BACKENDS = {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "CUDNN_ATTENTION"}


@dataclass(frozen=True)
class Scope:
    """The modes that a node runs under: gradients on or off, the autocast regions around it, and whether SDPA's
    backends are chosen by the user (`torch.nn.attention.sdpa_kernel`)."""

    grad: bool | None = None
    autocast: tuple[Any, ...] = ()
    chosen: bool = False


def sets_a_mode(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in _SCOPES


def after(node: fx.Node, scope: Scope) -> Scope:
    """The modes behind a node that sets one."""
    name = getattr(node.target, "__name__", "")
    autocast = scope.autocast
    if name == "_enter_autocast":
        return replace(scope, autocast=(*autocast, tuple(node.args)))
    if name == "_exit_autocast":
        return replace(scope, autocast=autocast[:-1])
    if name == "_sdpa_kernel":
        return replace(scope, chosen=not _all_backends(node))
    return replace(scope, grad=bool(node.args[0]))


def _all_backends(node: fx.Node) -> bool:
    """Whether `_sdpa_kernel(backends)` allows all of them, as at the end of a region."""
    backends = node.args[0]
    names = {str(b.args[0]) if isinstance(b, fx.Node) else getattr(b, "name", "") for b in backends}  # type: ignore
    return names >= _BACKENDS
