"""Timings on disk: one private JSON file a site, device and version, which every process of the user finds again."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xfcompile.tuning.facts import Timings

log = logging.getLogger(__name__)

FORMAT = 1


def directory() -> Path:
    """In the folder of generated kernels, beside Inductor's own code."""
    from xfcompile.kernels.attention.cache import directory as generated

    return generated() / "timings"


@functools.cache
def _versions() -> tuple[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return torch.__version__, version("triton")
    except PackageNotFoundError:
        return torch.__version__, "none"


def device_name(device: torch.device) -> str:
    """The device by what its times depend on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch = getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"
        return f"{properties.name}, {arch}, {properties.multi_processor_count} multiprocessors"
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())


def identity(device: torch.device, site: str, asked: str) -> dict[str, Any]:
    """All that the timings of a site depend on. site: a hash of what it is. asked: the options."""
    from xfcompile.identity import package_hash

    made_with, triton = _versions()
    return {
        "format": FORMAT,
        "device": device_name(device),
        "torch": made_with,
        "triton": triton,
        "source": package_hash(),
        "options": asked,
        "site": site,
    }


def _path(about: Mapping[str, Any]) -> Path:
    return directory() / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]}.json"


def find(about: Mapping[str, Any]) -> Timings | None:
    """The timings that have been stored of this; a file that is damaged, or another user's, is as none."""
    path = _path(about)
    try:
        with open(path, "rb") as file:
            if hasattr(os, "getuid") and os.fstat(file.fileno()).st_uid != os.getuid():
                _warn(path, "it belongs to another user")
                return None
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _warn(path, f"it cannot be read ({error.strerror})")
        return None
    try:
        found = json.loads(text)
        if found["about"] != dict(about):
            raise ValueError("it is of something else")
        return Timings.of(found["timings"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _warn(path, f"{type(error).__name__}: {error}")
        return None


def refused(about: Mapping[str, Any], why: str) -> None:
    """Says that timings which were found cannot be what is asked for."""
    _warn(_path(about), why)


def store(about: Mapping[str, Any], timings: Timings) -> None:
    """Writes them whole or not at all, for this user alone; where that can't be done they are not kept."""
    path = _path(about)
    text = json.dumps({"about": dict(about), "timings": timings.to_dict()}, indent=1)
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # which only this user can read
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.info("timings are not kept: %s", error)


@functools.cache
def _warned() -> list[bool]:
    return []


def _warn(path: Path, why: str) -> None:
    """Once in a process: one damaged file is seldom alone."""
    log.debug("timings at %s are not used: %s", path, why)
    if not _warned():
        _warned().append(True)
        warnings.warn(f"xfcompile: timings at {path} are not used, and made anew: {why}", RuntimeWarning, stacklevel=2)
