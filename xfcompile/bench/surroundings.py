"""What a file of results says of where it was measured: hardware, versions, revision."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "diffusers", "timm", "liger_kernel")


def surroundings(device: str) -> dict[str, Any]:
    """Everything that a number needs beside it, but for the arguments."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
        "revision": revision(),
        "sources": sources(),
    }


def hardware(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device != "cuda":
        return {"device": f"CPU, {torch.get_num_threads()} threads", **found}
    about = torch.cuda.get_device_properties(0)
    return {
        "device": about.name, "capability": f"{about.major}.{about.minor}", "memory_gb": about.total_memory / 1e9,
        "cuda": torch.version.cuda, **found,
    }  # fmt: skip


def versions() -> dict[str, str]:
    import xfcompile

    found = {"python": platform.python_version(), "xfcompile": xfcompile.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, which the package's metadata may leave out
    return found


def revision() -> str | None:
    """The commit of the checkout that this package runs from, and whether it was changed since; None without one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # installed into an environment, which may lie in a repository of something else
        return None
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return f"{commit} with changes" if changed else commit


def sources() -> str:
    """A hash of this package's sources: what a copy without a repository is known by."""
    from xfcompile.identity import package_hash

    return package_hash(apart=())[:12]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
