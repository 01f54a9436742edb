"""Makes the generator and the comparison with eager importable."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "reading"):
    sys.path.insert(0, str(folder))
