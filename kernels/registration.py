"""How an op is registered with torch: its kernels, its gradients, and calls that need none, spared the way to these."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Gradients = tuple[Callable[..., Any], Callable[..., None] | None]
"""A backward and a setup_context, as `torch.library.register_autograd` takes them."""


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {}
"""Of each op the functions that are registered for "cuda" and "cpu"."""


class Site:
    """A call of such a function in generated code whose tensors are laid out alike each time.

    found: what the function comes to by their layouts, which it need not look at again. Functions that take it have a
    parameter `site`.
    """

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: Any = None

    def keep(self, found: Any, dtype: torch.dtype) -> None:
        """Keeps what a call with inputs of this dtype has come to; not of fp32, how it is multiplied may change."""
        if dtype is not torch.float32:
            self.found = found


def register(
    library: torch.library.Library,
    op: str,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    gradients: Gradients | None = None,
) -> None:
    """Registers `xfcompile::<op>`, which `library` defines.

    Compiled code calls ops with gradients disabled, and yet torch's kernel for autograd, which is Python, stands before
    that of the device, and costs as much as the rest of the way there. With gradients disabled, and nothing between
    autograd and the device that wants to see the call (a mode, a subclass, functorch, a bit of a tensor), the kernel is
    called directly.
    """
    kernels = {"CUDA": cuda, "CPU": cpu}
    KERNELS[op] = {device.lower(): kernel for device, kernel in kernels.items()}
    for device, kernel in kernels.items():
        library.impl(op, kernel, device)
    torch.library.register_fake(f"xfcompile::{op}", fake, lib=library)
    if gradients is None:
        return
    backward, setup = gradients
    torch.library.register_autograd(f"xfcompile::{op}", backward, setup_context=setup, lib=library)
    try:
        from torch._library.autograd import Info, make_autograd_impl

        usual = make_autograd_impl(getattr(torch.ops.xfcompile, op).default, Info(backward, setup))
        below = torch._C._after_autograd_keyset
    except (ImportError, AttributeError, TypeError) as error:  # private to torch: what is registered does without
        log.debug("calls of %s go through torch's kernel for autograd: %s", op, error)
        return
    for device, kernel in kernels.items():
        library.impl(op, _without(kernel, usual, below, device), f"Autograd{device}", with_keyset=True)


def _without(
    kernel: Callable[..., Any], usual: Callable[..., Any], below: torch._C.DispatchKeySet, device: str
) -> Callable[..., Any]:
    plain: dict[int, bool] = {}  # of sets of dispatch keys, whether the device's comes next
    own = getattr(torch._C.DispatchKey, device)

    def call(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            return usual(keys, *arguments)
        number = keys.raw_repr()
        if number not in plain:
            plain[number] = (keys & below).highestPriorityTypeId() == own
        return kernel(*arguments) if plain[number] else usual(keys, *arguments)

    return call


class _Followed(torch.autograd.Function):
    """Its first argument, as something made of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *of: Tensor | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("what is made of it is refused first")


def followed(dout: Tensor, *of: Tensor | None) -> Tensor:
    """The gradient of a result, for an op's backward that is given products in place of what they were made `of`. Where
    gradients of gradients are kept track of, it takes part in that for all of these, so that `refused` hears of one
    that is wanted: products that were saved do not."""
    return _Followed.apply(dout, *of) if torch.is_grad_enabled() else dout


def refused(op: str, family: str) -> Gradients:
    """Makes a gradient of what `xfcompile::<op>_backward` returns, a second derivative, an error that says what to do:
    none of our ops has one. family: whose routes a user would set."""

    def second(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"xfcompile::{op} has no second derivative: a gradient of its gradients was asked for (double backward); "
            f'leave it to Inductor there (options={{"routes": {{"{family}": "inductor"}}}})'
        )

    return second, None
