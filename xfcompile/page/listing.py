"""Python source as HTML, coloured by its tokens."""

from __future__ import annotations

import io
import keyword
import linecache
import token
import tokenize
from functools import lru_cache

from xfcompile.page.markup import Markup, element, escape, join
from xfcompile.source import Frame


@lru_cache(maxsize=64)
def highlighted(text: str) -> Markup:
    """The text with a span for each keyword, string, comment, number and decorator; plain where it is no Python."""
    lines = text.splitlines(keepends=True)
    parts: list[Markup] = []
    at = (1, 0)

    def between(start: tuple[int, int], end: tuple[int, int]) -> str:
        if start[0] > len(lines):
            return ""
        if start[0] == end[0]:
            return lines[start[0] - 1][start[1] : end[1]]
        middle = lines[start[0] : end[0] - 1]
        last = lines[end[0] - 1][: end[1]] if end[0] <= len(lines) else ""
        return "".join([lines[start[0] - 1][start[1] :], *middle, last])

    try:
        for found in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = _kind(found)
            if kind is None:
                continue
            parts += [escape(between(at, found.start)), element("span", found.string, class_=kind)]
            at = found.end
    except (tokenize.TokenError, SyntaxError, IndentationError):
        return escape(text)
    parts.append(escape(between(at, (len(lines) + 1, 0))))
    return join(parts)


def _kind(found: tokenize.TokenInfo) -> str | None:
    if found.type == token.NAME and keyword.iskeyword(found.string):
        return "k"
    if found.type == token.OP and found.string == "@":
        return "d" if not found.line[: found.start[1]].strip() else None
    return {token.STRING: "s", token.COMMENT: "c", token.NUMBER: "n"}.get(found.type)


AROUND = 2
"""Lines that are shown before and after one of the user's."""


def excerpt(frame: Frame) -> Markup | None:
    """The user's line between its neighbours; alone where the file is not there any more, or is another by now."""
    if not frame.code:
        return None
    around = range(max(1, frame.line - AROUND), frame.line + AROUND + 1)
    lines = {n: linecache.getline(frame.path, n).rstrip() for n in around}
    if lines[frame.line].strip() != frame.code:
        lines = {frame.line: frame.code}
    while not lines[max(lines)]:  # blank lines at the end say nothing
        del lines[max(lines)]
    while not lines[min(lines)]:
        del lines[min(lines)]
    indent = min((len(line) - len(line.lstrip()) for line in lines.values() if line.strip()), default=0)
    shown = []
    for n, line in lines.items():
        number = element("span", f"{n:>5}", class_="line")
        class_ = "here" if n == frame.line else None
        shown.append(element("span", number, " ", _inline(line[indent:]), "\n", class_=class_))
    return element("pre", element("code", *shown), class_="source")


def _inline(line: str) -> Markup:
    """One line, which need not be a whole statement."""
    return highlighted(line) if line.strip() else Markup("")
