"""A report as one self-contained page: inline style and pictures, no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import torch

from xfcompile.page.groups import groups, in_order
from xfcompile.page.markup import Markup, element, join
from xfcompile.page.sections import card, checked, failed, left, misses, strip
from xfcompile.page.style import STYLE
from xfcompile.report import Report


def page(report: Report, title: str = "xfcompile") -> str:
    """The whole document. title: what was explained, the name of a script, say."""
    order = in_order(report)
    found = groups(order)
    matched, missed = [g for g in found if g.first.matched], [g for g in found if not g.first.matched]
    shown: dict[str, str] = {}
    body = [
        element(
            "div",
            element("p", "read by xfcompile", class_="over"),
            element("h1", title),
            element("p", report.summary(), class_="summary"),
            class_="title",
        ),
        failed(report),
        strip(order, found) if order else None,
        *[card(group, shown) for group in matched],
        misses(missed),
        left(report, matched),
        checked(report.checks),
        element("footer", _versions()),
    ]
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} — xfcompile"),
        element("style", Markup(STYLE)),
    ]
    document = element("html", element("head", head), element("body", element("main", body)), lang="en")
    return f"<!doctype html>\n{document}\n"


def _versions() -> Markup:
    import xfcompile

    return join([f"xfcompile {xfcompile.__version__}, torch {torch.__version__}"])


__all__ = ["page"]
