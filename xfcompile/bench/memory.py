"""The memory that a call takes, and what frees it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def peak_gb(call: Callable[[], Any], device: str) -> float | None:
    """GB that a call allocates at most, beyond what is allocated before it (weights, inputs); None on a CPU."""
    if device != "cuda":
        return None
    release(device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def release(device: str) -> None:
    """Free what nothing refers to any more, for allocations of any size."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
