"""What `torch.compile(model, backend="xformers")` loads for the name, before Dynamo has traced anything.

Importing Inductor's compiler takes seconds and starts the processes that compile kernels, ours too (`ahead.py`):
torch.compile does so here for Inductor itself, and these are ready when the first graph comes. Whoever hands over the
function `xfcompile.xformers` has them start with the first graph.
"""

from __future__ import annotations

import torch._inductor.compile_fx  # noqa: F401

from xfcompile.backend import xformers

__all__ = ["xformers"]
