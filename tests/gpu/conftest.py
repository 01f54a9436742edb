"""Tests on GPUs share the cases of the interpreter's, and the programs of the reading's and of the fuzz."""

from __future__ import annotations

import sys
from pathlib import Path

# attention_cases; equivalence, test_far_masks; programs, outcome; forcing
for name in ("kernels", "reading", "fuzz", "models", "gpu"):
    sys.path.insert(0, str(Path(__file__).parents[1] / name))
