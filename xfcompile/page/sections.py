"""The parts of a page: the strip of all sites, a card for each group of them, misses, and what Inductor gets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import sympy

from xfcompile.checks import Check
from xfcompile.meaning import AttentionMeaning, GatedMeaning, Meaning, PointwiseMeaning, Tensor
from xfcompile.page.board import board, glossary
from xfcompile.page.groups import Group, whereabouts
from xfcompile.page.listing import excerpt, highlighted
from xfcompile.page.markup import Markup, element, join
from xfcompile.page.picture import Picture, draw, legend, picture
from xfcompile.report import Report, SiteReport

ROUTES = {
    ("attention", "triton"): "one call of a Triton kernel generated for this score",
    ("attention", "sdpa"): "one call of scaled_dot_product_attention, told what was proved",
    ("bias-act-dropout", "triton"): "one Triton kernel for all that follows the product",
    ("bias-act-dropout", "epilogue"): "one Triton kernel for the product and all that follows",
}
"""What runs a site, by family and route."""

_FUSED = re.compile(r" = (torch\.ops\.xfcompile\.\w+|scaled_dot_product_attention)\(")

CALLS = 14
"""Kinds of calls that are named of those which Inductor gets."""


def state(site: SiteReport) -> str:
    """The colour that a site has everywhere: its route, with ours in one colour, or "miss"."""
    if not site.matched:
        return "miss"
    if site.route in ("sdpa", "inductor"):
        return site.route
    return "kernel"


def title(family: str) -> str:
    return {"gated_mlp": "gated MLP", "bias-act-dropout": "bias, activation, dropout"}.get(family, family)


def chip(text: str, kind: str) -> Markup:
    return element("span", text, class_=f"chip {kind}")


# -- the strip ----------------------------------------------------------------------------------------------------


def strip(order: Sequence[SiteReport], found: Sequence[Group]) -> Markup:
    """All sites in the order of the program, one row a family, each a link to its group."""
    anchors = {id(site): group.anchor for group in found for site in group.sites}
    families = list(dict.fromkeys(site.family for site in order))
    rows = []
    for family in families:
        mine = [site for site in order if site.family == family]
        cells = [
            element(
                "a",
                href=f"#{anchors[id(site)]}",
                class_=f"cell {state(site)}",
                title=": ".join(filter(None, [site.module, site.route or "not matched"])),
            )
            for site in mine
        ]
        counts = Counter(site.route if site.matched else "not matched" for site in mine)
        words = ", ".join(f"{n} {route}" for route, n in counts.items())
        rows.append(
            element(
                "div",
                element("div", element("b", f"{len(mine)} {title(family)}"), element("span", words), class_="family"),
                element("div", cells, class_="cells"),
                class_="strip-row",
            )
        )
    return element("div", rows, class_="strip")


# -- a card -------------------------------------------------------------------------------------------------------


def card(group: Group, shown: dict[str, str]) -> Markup:
    """One group of matched sites. shown: the kernels on the page already, by text, with the anchors of their groups."""
    site, about = group.first, group.about
    formulas = board(about.meaning) if about.meaning is not None else _plain(site.expression)
    left = [formulas, _glossary(group), _facts(site, about.meaning)]
    drawn = picture(about.meaning) if isinstance(about.meaning, AttentionMeaning) else None
    body = [element("div", left, class_="formulas")]
    if drawn is not None and (drawn.tiles > 1 or drawn.kept):
        body.append(_figure(drawn, f"hatch-{group.number}"))
    return element(
        "section",
        _head(group),
        element("div", body, class_="body"),
        _route(site),
        _place(group),
        _program(about.call),
        _kernels(group, shown),
        id=group.anchor,
        class_=f"card {state(site)}",
        data_family=site.family,
        data_sites=len(group.sites),
    )


def _head(group: Group) -> Markup:
    site = group.first
    times = element("span", f"{len(group.sites)} ×", class_="times") if len(group.sites) > 1 else None
    where = whereabouts(group.sites)
    return element(
        "header",
        element("h2", times, title(site.family)),
        chip(site.route or "not matched", state(site)),
        element("span", join([element("code", w) for w in where], ", "), class_="where") if where else None,
    )


def _plain(expression: str | None) -> Markup | None:
    return None if expression is None else element("pre", expression, class_="plain")


def _glossary(group: Group) -> Markup | None:
    """The tensors of the formulas, with layers as stars where each site has its own."""
    meaning = group.about.meaning
    words = glossary(meaning) if meaning is not None else []
    if not words:
        return None
    names = {_names(site) for site in group.sites}
    starred = {tuple(map(_starred, own)) for own in names}
    note = ", of the first" if len(starred) > 1 else ""
    each = len(names) > 1 and not note
    rows = [
        element("div", element("dt", name), element("dd", _starred(what) if each else what, note))
        for name, what in words
    ]
    return element("dl", rows, class_="glossary")


def _starred(text: str) -> str:
    """The numbers of layers as stars."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text)


def _names(site: SiteReport) -> tuple[str, ...]:
    """What the tensors of a site's formulas are called."""
    meaning = site.about.meaning if site.about is not None else None
    tensors: tuple[Tensor, ...] = ()
    if isinstance(meaning, AttentionMeaning):
        tensors = meaning.loads
    elif isinstance(meaning, PointwiseMeaning):
        tensors = (*meaning.vectors, *meaning.tensors)
    return tuple(", ".join([x.name or "", *x.made_of]) for x in tensors)


def _facts(site: SiteReport, meaning: Meaning | None) -> Markup:
    facts: list[tuple[str, str | Markup]] = []
    if isinstance(meaning, AttentionMeaning):
        names = ("batch", "heads")[-len(meaning.sizes) :] if len(meaning.sizes) <= 2 else ("",) * len(meaning.sizes)
        lead = " × ".join(f"{name} {n}".strip() for name, n in zip(names, meaning.sizes, strict=True))
        dims = str(meaning.head_dim)
        if meaning.value_dim != meaning.head_dim:
            dims += f" (values {meaning.value_dim})"
        sizes = f"{meaning.queries} queries × {meaning.keys} keys of {dims}"
        facts.append(("sizes", ", ".join(filter(None, [lead, sizes, meaning.dtype]))))
        facts.append(("mask", site.mask or "none"))
        if site.tiles:
            facts.append(("proved", site.tiles))
        if site.mask not in (None, "none") and not meaning.alive:
            dead = {"nan": "NaN", "zero": "0", "mean": "the mean of the values"}.get(meaning.dead, meaning.dead)
            facts.append(("a row without keys", f"may occur, and gets {dead}"))
        elif meaning.keep != sympy.true:
            facts.append(("every row", "is proved to see a key"))
    elif isinstance(meaning, GatedMeaning):
        experts = f"{meaning.experts} experts, " if meaning.experts is not None else ""
        facts.append(("sizes", f"{experts}{meaning.rows} rows, {meaning.inner} → {meaning.features}, {meaning.dtype}"))
        facts.append(("weights", meaning.layout))
    elif isinstance(meaning, PointwiseMeaning):
        facts.append(("result", f"[{', '.join(map(str, meaning.shape))}], {meaning.dtype}"))
    if site.expression and meaning is not None:
        facts.append(("as text", element("code", site.expression)))
    return element("dl", [element("div", element("dt", k), element("dd", v)) for k, v in facts], class_="facts")


def _figure(found: Picture, name: str) -> Markup:
    entries = [
        element("li", element("i", class_=f"swatch {verdict}"), element("b", count), " ", words)
        for verdict, count, words in legend(found)
    ]
    caption = f"{found.tiles} {'tile' if found.tiles == 1 else 'tiles'} of {found.tile} × {found.tile}"
    return element(
        "figure",
        element("div", "keys →", class_="axis"),
        draw(found, name),
        element(
            "figcaption", element("ul", entries), element("p", "; ".join([caption, *found.notes])), class_="legend"
        ),
        class_="mask",
    )


def _reason(site: SiteReport) -> str | None:
    """Why this route; that it is Inductor's is said already."""
    return site.reason and site.reason.removeprefix("left to Inductor: ")


def _route(site: SiteReport) -> Markup:
    runs = ROUTES.get((site.family, site.route or ""))
    reason = _reason(site)
    if site.route == "inductor":
        return element("p", element("b", "Left to Inductor"), f" — {reason}" if reason else None, class_="route")
    return element(
        "p", element("b", "Runs as "), runs or site.route, f" — {reason or 'the usual choice'}", class_="route"
    )


def _place(group: Group) -> Markup | None:
    frames = group.about.frames
    if not frames:
        return element("p", element("code", group.first.source), class_="trail") if group.first.source else None
    trail = [
        element("li", element("code", str(frame)), f" {frame.function}" if frame.function else None)
        for frame in frames[-3:]
    ]
    return element("div", element("ol", trail, class_="trail"), excerpt(frames[-1]), class_="place")


def _program(call: str | None) -> Markup | None:
    if call is None:
        return None
    calls = call.splitlines()
    fused = next((line for line in reversed(calls) if _FUSED.search(line)), calls[-1])
    summary = element("summary", "What stands in its place", element("code", _short(fused)))
    return element("details", summary, element("pre", element("code", highlighted(call))))


def _short(line: str) -> str:
    """A call without what its result is called."""
    text = line.partition(" = ")[2]
    return text if len(text) <= 150 else f"{text[:147]}..."


def _kernels(group: Group, shown: dict[str, str]) -> list[Markup]:
    made = []
    for kernel in group.about.kernels:
        other = shown.setdefault(kernel.text, group.anchor)
        if other != group.anchor:
            link = element("a", "above", href=f"#{other}")
            made.append(element("p", f"Generated kernel ({kernel.title}): the same as ", link, ".", class_="same"))
            continue
        lines = kernel.text.count("\n")
        summary = element("summary", f"Generated kernel: {kernel.title}", element("span", f"{lines} lines"))
        source = element("pre", element("code", highlighted(kernel.text)))
        made.append(element("details", summary, source, class_="kernel"))
    return made


# -- what else there is -------------------------------------------------------------------------------------------


def misses(found: Sequence[Group]) -> Markup | None:
    """What was not matched, with its reason and the user's line."""
    if not found:
        return None
    items = [
        element(
            "section",
            element(
                "header",
                element("h3", f"{len(group.sites)} × " if len(group.sites) > 1 else None, group.first.reason),
                chip(title(group.first.family), "miss"),
            ),
            element("p", join([element("code", w) for w in whereabouts(group.sites)], ", ")) if group.sites else None,
            _place(group),
            id=group.anchor,
            class_="card miss",
            data_family=group.first.family,
            data_sites=len(group.sites),
        )
        for group in found
    ]
    return join([element("h1", "Near misses", id="misses"), *items])


def left(report: Report, found: Sequence[Group]) -> Markup | None:
    """What Inductor gets: sites whose route it is, and all else that the graphs consist of."""
    mine = [group for group in found if group.first.route == "inductor"]
    if not mine and not report.calls:
        return None
    links = [
        element(
            "li",
            element("a", f"{len(g.sites)} {title(g.first.family)}", href=f"#{g.anchor}"),
            f": {_reason(g.first)}" if g.first.reason else None,
        )
        for g in mine
    ]
    total = sum(report.calls.values())
    most = report.calls.most_common(CALLS)
    rest = total - sum(n for _, n in most)
    chips = [element("li", element("code", name), " ", element("b", n)) for name, n in most]
    if rest:
        chips.append(element("li", "others ", element("b", rest)))
    graphs = "1 graph" if report.graphs == 1 else f"{report.graphs} graphs"
    return join(
        [
            element("h1", "Left to Inductor", id="inductor"),
            element("ul", links, class_="left") if links else None,
            element("p", f"What it is given, {total} calls in {graphs}:") if total else None,
            element("ul", chips, class_="calls") if total else None,
        ]
    )


def checked(checks: Sequence[Check]) -> Markup | None:
    """What `verify` found."""
    if not checks:
        return None
    rows = []
    for check in checks:
        where = join([title(check.family), " ", element("code", check.module or check.source or "")])
        if check.reason is not None or not check.differences:
            rows.append(element("tr", element("td", where), element("td", f"not compared: {check.reason}", colspan=5)))
            continue
        for k, d in enumerate(check.differences):
            numbers = [element("td", f"{x:.2g}") for x in (d.error, d.eager, d.bound)]
            verdict = element("td", "ok" if d.ok else "WRONG", class_="ok" if d.ok else "wrong")
            rows.append(
                element("tr", element("td", where if k == 0 else None), element("td", d.what), numbers, verdict)
            )
    head = [element("th", x) for x in ("site", "result", "error", "eager's", "allowed", "")]
    table = element("table", element("thead", element("tr", head)), element("tbody", rows))
    return join([element("h1", "Verified against fp64"), element("div", table, class_="scroll")])


def failed(report: Report) -> Markup | None:
    """Errors of our own."""
    if not report.failures:
        return None
    items = [element("li", x) for x in report.failures]
    return join([element("h1", "Errors in xfcompile, left to Inductor"), element("ul", items, class_="failures")])
