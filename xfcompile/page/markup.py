"""HTML that escapes by construction: what is not made here is text."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | None | Iterable["str | int | None"]

_EMPTY = frozenset({"br", "meta", "rect", "path", "mspace"})


def element(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """`<name attributes>children</name>`. Strings are escaped unless they are `Markup`; None is nothing.

    Attributes: an underscore stands for a hyphen, and one at the end for nothing (`class_`, `data_count`). True is an
    attribute without a value; None and False are none.
    """
    words = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _EMPTY:
        return Markup(f"<{name}{words}/>")
    return Markup(f"<{name}{words}>{join(children)}</{name}>")


def join(children: Iterable[Child], between: str = "") -> Markup:
    """Children one after another."""
    return Markup(escape(between).join(_text(child) for child in children))


def escape(text: str) -> Markup:
    return text if isinstance(text, Markup) else Markup(html.escape(text, quote=True))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, str):
        return escape(child)
    if isinstance(child, Iterable):
        return join(child)
    return escape(str(child))


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value), quote=True)}"'
