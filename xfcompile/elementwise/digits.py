"""Which whole numbers the dtypes of an operation hold: a formula knows none but exact ones."""

from __future__ import annotations

import sympy
import torch

from xfcompile.elementwise.constants import rounded
from xfcompile.values import Value


def narrows(v: Value) -> bool:
    """Whether an operation gives whole numbers, before it does what it does, a floating dtype of few digits."""
    dtypes = {x.dtype for x in v.inputs() if x.dtype != torch.bool}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    return bool(floating) and floating != dtypes and all(dtype.itemsize <= 2 for dtype in floating)


def holds(dtype: torch.dtype, *numbers: sympy.Expr) -> bool:
    """Whether a dtype of whole numbers has these: what uint8 has of 256, which a comparison with it takes, is 0."""
    return dtype.is_floating_point or all(rounded(x, dtype) == x for x in numbers if x.is_Integer)


def operating(v: Value) -> torch.dtype:
    """The dtype in which an operation takes its two operands."""
    a, b = (
        torch.empty((1,) * min(x.ndim, 1), dtype=x.dtype, device="meta") if isinstance(x, Value)
        else x if isinstance(x, (int, float)) else 1
        for x in (v["self"], v["other"])
    )  # fmt: skip
    dtype: torch.dtype = torch.result_type(a, b)
    return dtype
