"""The families of subgraphs that are recognised."""

from __future__ import annotations

from typing import Any

from xfcompile import extension
from xfcompile.families.attention import ATTENTION
from xfcompile.families.bias_act_dropout import BIAS_ACT_DROPOUT
from xfcompile.families.gated_mlp import GATED_MLP
from xfcompile.family import Family

FAMILIES: tuple[Family[Any, Any], ...] = (ATTENTION, GATED_MLP, BIAS_ACT_DROPOUT)
"""In the order in which they are replaced: what one has replaced, and what lay inside of it, is no part of a site of a
later one. Its result may be an operand of theirs, and theirs of it."""


def known() -> tuple[Family[Any, Any], ...]:
    """Ours, and then those of other packages."""
    return (*FAMILIES, *extension.registered())


def routes() -> dict[str, tuple[str, ...]]:
    """The names of the families, and the ways in which each can be run."""
    return {family.name: family.routes for family in known()}
