"""Puts this folder on the path of its own tests, and keeps Hugging Face's libraries off the network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # breaking, entries
os.environ.setdefault("HF_HUB_OFFLINE", "1")
