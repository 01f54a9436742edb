"""What `torch.compile(model, backend="xformers")` loads for the name, before Dynamo has traced anything.

The processes that compile kernels, Inductor's and ours (`ahead.py`), take seconds to start, and so does importing
Inductor's compiler. Both begin here, so that they are ready when the first graph comes.
"""

from __future__ import annotations

import importlib

from xfcompile import ahead
from xfcompile.backend import xformers

__all__ = ["xformers"]

ahead.start_processes()
importlib.import_module("torch._inductor.compile_fx")
