"""The refusal of second derivatives, which none of our ops has."""

from __future__ import annotations

from typing import Any

import torch


def refuse(library: torch.library.Library, op: str, family: str) -> None:
    """Makes a gradient of what `xfcompile::<op>_backward` returns an error that says what to do.

    library: where that op is defined. family: whose routes a user would set.
    """

    def second(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"xfcompile::{op} has no second derivative: a gradient of its gradients was asked for (double backward); "
            f'leave it to Inductor there (options={{"routes": {{"{family}": "inductor"}}}})'
        )

    torch.library.register_autograd(f"xfcompile::{op}_backward", second, lib=library)
