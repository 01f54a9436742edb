"""Facts of tables that choose: a value, and what it was measured with, so that it can be measured again."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

SM_80, SM_90, SM_100, GFX942, CPU = "sm_80", "sm_90", "sm_100", "gfx942", "cpu"
HARDWARE = (SM_80, SM_90, SM_100, GFX942, CPU)
"""Classes of hardware: Ampere, Ada and whatever NVIDIA GPU has no more shared memory than these; Hopper; data center
Blackwell; AMD's; and CPUs, where Triton runs in its interpreter only."""


@dataclass(frozen=True)
class Measured:
    """A measurement. script: in this repository. date: of the results. on: the device and the versions. results: the
    file that has them, where it is kept."""

    script: str
    date: str
    on: str
    results: str | None = None


@dataclass(frozen=True)
class Fact(Generic[T]):
    """What is chosen. measured: None where it is taken over from a neighbour in its table, or from elsewhere."""

    value: T
    measured: Measured | None = None


def hardware(major: int, hip: bool) -> str:
    """The class of a GPU. major: of its compute capability, where it is NVIDIA's."""
    if hip:
        return GFX942
    return {9: SM_90, 10: SM_100}.get(major, SM_80)


def hardware_of(device: torch.device) -> str:
    """The class of a device, for tables of routes. A CUDA device that is not there, as tests and cross-compilation have
    them, is taken for what most was measured on; other devices go by their own names, which no table has."""
    if device.type != "cuda":
        return device.type
    if not torch.cuda.is_available():
        return SM_90
    return hardware(torch.cuda.get_device_capability(device)[0], torch.version.hip is not None)


@functools.cache
def multiprocessors(index: int | None) -> int:
    """How many a GPU has."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
