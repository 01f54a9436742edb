"""Lines of generated code, no longer than people read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

WIDTH = 116


def wrapped(prefix: str, items: Iterable[str], suffix: str = "") -> str:
    """`prefix(a, b, c)suffix`, on as many lines as it takes."""
    # Lines break between items only: spaces inside them are hidden meanwhile.
    text = ", ".join(item.replace(" ", "\0") for item in items) + ")" + suffix
    return "\n".join(_fill(text, f"{prefix}(", " " * (len(prefix) + 1))).replace("\0", " ")


def returned(text: str) -> list[str]:
    """`return text`, in parentheses where it takes several lines."""
    return [f"return {text}"] if len(text) < WIDTH - 12 else ["return (", *_fill(text, "    ", "    "), ")"]


def _fill(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def indented(text: str, depth: int = 1) -> str:
    return textwrap.indent(text.rstrip("\n"), "    " * depth)


def constexprs(names: Iterable[str]) -> list[str]:
    """Parameters of a Triton function that are known when it is compiled."""
    return [f"{name}: tl.constexpr" for name in names]
