"""Whether the package's sources are still those that this process has imported.

Code that was compiled by older sources than the ones on disk must not be stored under the name of these: after an
upgrade, or an edit, of a package that a process is using.
"""

from __future__ import annotations

import os
import time

BEGAN = time.time()
"""`xfcompile/__init__.py` imports this module first."""

COARSE = 0.1
"""Seconds that clocks of file systems are behind."""


def unchanged() -> bool:
    """Whether no source was written, or put in another's place, since this process began to import them."""
    root = os.path.dirname(os.path.abspath(__file__))
    for folder, _, files in os.walk(root, followlinks=True):
        for name in files:
            if name.endswith(".py"):
                try:
                    about = os.stat(os.path.join(folder, name))
                except OSError:  # it is being put in another's place
                    return False
                # Not the former alone: installers and rsync keep the times of contents.
                if max(about.st_mtime, about.st_ctime) > BEGAN - COARSE:
                    return False
    return True
