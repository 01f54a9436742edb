"""Attention in plain PyTorch, compiled as fused calls: `torch.compile(model, backend="xformers")`."""

# First: what is written from here on may not be what is imported.
import xfcompile.unchanged  # noqa: F401 # isort: skip

import os

# The functions `rewrite`, `explain` and `verify` are bound here after the modules of the same names are imported:
# importing one of these modules later does not bind its name again.
try:
    from xfcompile.backend import rewrite, xformers
except OSError as error:  # PyTorch's, which makes the folder of its cache when it is imported
    if not (folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        raise
    raise ImportError(
        f"PyTorch's compiler cannot be imported ({error}): TORCHINDUCTOR_CACHE_DIR is {folder!r}, where nothing can be "
        "written; name another one, or unset it"
    ) from error
from xfcompile.checks import Check, Difference, VerificationError
from xfcompile.explain import explain
from xfcompile.extension import register_family, unregister_family
from xfcompile.family import Family
from xfcompile.options import Options
from xfcompile.report import Report, SiteReport, collect
from xfcompile.source import RewriteError
from xfcompile.verify import verify

__version__ = "0.1.0"
__all__ = [
    "Check",
    "Difference",
    "Family",
    "Options",
    "Report",
    "RewriteError",
    "SiteReport",
    "VerificationError",
    "collect",
    "explain",
    "register_family",
    "rewrite",
    "unregister_family",
    "verify",
    "xformers",
]
