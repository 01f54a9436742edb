"""All rules by which an element of a value is read, by the value's operation."""

from __future__ import annotations

from collections.abc import Mapping

from xfcompile.elementwise import arithmetic, casts, gathering, logic, pieces, rows, sequences, views
from xfcompile.elementwise.elements import Rule

RULES: Mapping[str, Rule] = {
    rule: read
    for theme in (arithmetic, logic, casts, rows, views, pieces, gathering, sequences)
    for rule, read in theme.RULES.items()
}
