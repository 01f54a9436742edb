"""How exact the arithmetic of a kernel has to be, by the dtype of its inputs and by what the user allows."""

from __future__ import annotations

import torch
from torch import Tensor

from xfcompile.site import ScoreSpec


def speed(spec: ScoreSpec, q: Tensor) -> int:
    """Which tanh is exact enough: see the template's."""
    if q.dtype.itemsize != 2:
        return 0
    return 2 if spec.coarse and q.dtype == torch.bfloat16 and q.is_cuda and torch.version.hip is None else 1


def precision(dtype: torch.dtype) -> str:
    """What `tl.dot` may round fp32 to: what the user allowed matrix products to."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
