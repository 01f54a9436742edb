"""Sites that are alike but for the layer that they stand in, as one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from xfcompile.meaning import About, AttentionMeaning, PointwiseMeaning, Tensor
from xfcompile.report import Report, SiteReport


@dataclass(frozen=True)
class Group:
    """Sites in the order of the program. number: of the group, from 1."""

    number: int
    sites: tuple[SiteReport, ...]

    @property
    def first(self) -> SiteReport:
        return self.sites[0]

    @property
    def about(self) -> About:
        return self.first.about or About()

    @property
    def anchor(self) -> str:
        return f"site-{self.number}"


def in_order(report: Report) -> list[SiteReport]:
    """The sites in the order of the program; those that do not say where they stand come last."""
    return sorted(report.sites, key=lambda site: (site.about is None, site.about.place if site.about else ()))


def groups(sites: Sequence[SiteReport]) -> list[Group]:
    """Groups in the order of their first sites."""
    found: dict[Any, list[SiteReport]] = {}
    for site in sites:
        found.setdefault(_likeness(site), []).append(site)
    return [Group(n, tuple(members)) for n, members in enumerate(found.values(), 1)]


def _likeness(site: SiteReport) -> Any:
    about = site.about
    if about is None:
        return site.kind
    meaning = about.meaning
    # Each layer has parameters of its own: of what a formula loads from, dtypes and shapes count, and names do not.
    if isinstance(meaning, AttentionMeaning):
        meaning = replace(meaning, loads=_nameless(meaning.loads))
    elif isinstance(meaning, PointwiseMeaning):
        meaning = replace(meaning, vectors=_nameless(meaning.vectors), tensors=_nameless(meaning.tensors))
    return site.kind, meaning, about.kernels, about.frames[-1:]


def _nameless(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(Tensor(None, x.dtype, x.shape) for x in tensors)


def whereabouts(sites: Sequence[SiteReport]) -> list[str]:
    """The modules of some sites, runs of layers as ranges: "layers.0-31.self_attn"."""
    names = list(dict.fromkeys(site.module for site in sites if site.module))
    split: dict[tuple[Any, ...], list[int]] = {}
    for name in names:
        parts = re.split(r"(\d+)", name)
        numbers = list(range(1, len(parts), 2))
        if not numbers:
            split[(name,)] = []
            continue
        # The last number that varies is the layer's: all before it tells stages apart.
        varying = [k for k in numbers if len({_part(other, k) for other in names}) > 1]
        at = varying[-1] if varying else numbers[0]
        split.setdefault((*parts[:at], None, *parts[at + 1 :]), []).append(int(parts[at]))
    return ["".join(_ranges(found) if part is None else str(part) for part in key) for key, found in split.items()]


def _part(name: str, k: int) -> str | None:
    parts = re.split(r"(\d+)", name)
    return parts[k] if k < len(parts) else None


def _ranges(numbers: Sequence[int]) -> str:
    """ "0-3, 5" """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    apart = {b[0] - a[0] for a, b in itertools.pairwise(runs)}
    if len(runs) > 3 and len(apart) == 1 and all(a == b for a, b in runs):  # every other layer, say
        return f"{{{runs[0][0]}, {runs[1][0]}, …, {runs[-1][0]}}}"
    words = [str(a) if a == b else f"{a}–{b}" for a, b in runs]
    return words[0] if len(words) == 1 else "{" + ", ".join(words) + "}"
