"""The strategies that write random programs, by the name of the family that they are about."""

from __future__ import annotations

from activated import activated
from blocks import blocks
from gated import gated
from hypothesis.strategies import SearchStrategy
from programs import programs
from writer import Program

STRATEGIES: dict[str, SearchStrategy[Program]] = {
    "attention": programs(),
    "gated_mlp": gated(),
    "bias-act-dropout": activated(),
    "blocks": blocks(),
}
