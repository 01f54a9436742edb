"""Tests on GPUs share the cases of the interpreter's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # attention_cases
