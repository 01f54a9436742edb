"""Whether a file can be written, asked before the work whose results it is for."""

from __future__ import annotations

import os
from pathlib import Path


def why_not(path: Path) -> str | None:
    """Why a file cannot be written; None if it can, and then its folder is there."""
    if path.is_dir():
        return f"{path} is a folder: give the name of a file"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"the folder {path.parent} cannot be made ({error.strerror}): give another one"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"{path} may not be written: give another name"
    return None
