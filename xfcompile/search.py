"""Where the patterns of all families match in a reading, looked for once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xfcompile.family import Family, Site
from xfcompile.read import Reading
from xfcompile.site import Miss
from xfcompile.values import Value

log = logging.getLogger(__name__)


@dataclass
class Found:
    """The sites of one family in a reading, the anchors around which there is none, and those at which the family's own
    code failed (None: where it looked for anchors)."""

    anchors: list[Value] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    misses: list[tuple[Value, Miss]] = field(default_factory=list)
    failures: list[tuple[Value | None, Exception]] = field(default_factory=list)


class Search:
    """Looks for the sites of some families, and keeps what was found in each reading."""

    def __init__(self, families: Sequence[Family[Any, Any]]) -> None:
        self.families = families
        self._known: dict[Reading, dict[str, Found]] = {}

    def found(self, reading: Reading, family: Family[Any, Any]) -> Found:
        if reading not in self._known:
            values = list(reading.steps)
            users: dict[Value, list[Value]] = {}
            for value in values:
                for source in dict.fromkeys(value.inputs()):
                    users.setdefault(source, []).append(value)
            self._known[reading] = {f.name: _found(f, values, users) for f in self.families}
        return self._known[reading][family.name]

    def sites(self, reading: Reading) -> list[Site]:
        """The sites of all families."""
        return [site for family in self.families for site in self.found(reading, family).sites]


def _found(family: Family[Any, Any], values: list[Value], users: dict[Value, list[Value]]) -> Found:
    found = Found()
    try:
        found.anchors = list(family.anchors(values))
    except Exception as error:
        found.failures.append((None, error))
        return found
    for anchor in found.anchors:
        try:
            found.sites += family.match(anchor, users)
        except Miss as miss:
            log.debug("no %s at %s: %s", family.title, anchor, miss.reason)
            found.misses.append((anchor, miss))
        except Exception as error:
            found.failures.append((anchor, error))
    return found
