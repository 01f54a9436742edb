"""All rules by which expressions are printed."""

from __future__ import annotations

from xfcompile.kernels.printing import arithmetic, conditions, integers
from xfcompile.kernels.printing.printer import Rules

# By class name: torch.utils._sympy has its own Min, Max, Mod … beside sympy's.
RULES = Rules(
    by_type=(*arithmetic.BY_TYPE, *conditions.BY_TYPE),
    by_name={**arithmetic.BY_NAME, **integers.BY_NAME},
    as_real=arithmetic.AS_REAL,
)
