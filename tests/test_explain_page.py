"""The page: every site is on it, nothing of the user's is taken for HTML, and its pictures say what the mask does."""

from __future__ import annotations

import gc
import html
import pickle
import re
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import xfcompile
from xfcompile.activation import GATE, KEEP, UP, X, gelu, silu
from xfcompile.checks import Check, Difference
from xfcompile.meaning import About, AttentionMeaning, FormulaMeaning, GatedMeaning, Kernel, PointwiseMeaning
from xfcompile.meaning import Tensor as Named
from xfcompile.page import page
from xfcompile.page.board import board
from xfcompile.page.groups import groups, in_order, whereabouts
from xfcompile.page.listing import highlighted
from xfcompile.page.markup import Markup, element
from xfcompile.page.mathematics import Printer
from xfcompile.page.picture import VERDICTS, Picture, picture
from xfcompile.report import Report, SiteReport
from xfcompile.score import B, H, I, J, Load, S, Where
from xfcompile.site import Band
from xfcompile.source import Frame


class Page(HTMLParser):
    """A page's elements, with the text inside of each; checks that all are closed."""

    VOID = frozenset({"meta", "br", "rect", "path", "mspace"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {[self.found[n][0] for n in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self._open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for n in self._open:
            self.found[n][2].append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            (found, "".join(text))
            for name, found, text in self.found
            if name == tag and all(value in (found.get(key) or "").split() for key, value in named.items())
        ]


def attention(keep: Any = sympy.true, queries: Any = 512, keys: Any = 512, **changed: Any) -> AttentionMeaning:
    fields: dict[str, Any] = dict(
        score=S / 8, keep=sympy.sympify(keep), dead="zero", alive=True, sink=None, band=Band(), dropout=0.0,
        sizes=(2, 4), queries=sympy.sympify(queries), keys=sympy.sympify(keys), head_dim=64, value_dim=64,
        dtype="float32",
    )  # fmt: skip
    return AttentionMeaning(**{**fields, **changed})


def site(n: int, meaning: Any = None, **changed: Any) -> SiteReport:
    fields: dict[str, Any] = dict(
        family="attention", matched=True, route="sdpa", source="model.py:7", expression="s/8", mask="causal",
        module=f"layers.{n}.attention",
        about=About((0, 10 * n), (Frame("/there/is/no/model.py", 7, "forward", "return w @ v"),), meaning),
    )  # fmt: skip
    return SiteReport(**{**fields, **changed})


def text_of(markup: str) -> str:
    return html.unescape(re.sub("<[^>]*>", "", markup)).replace("\u2061", "").replace("\u00a0", " ")


# -- what is on it ------------------------------------------------------------------------------------------------


def test_every_site_is_on_the_page_and_layers_are_one_card() -> None:
    meaning = attention(J <= I)
    layers = [site(n, meaning) for n in range(32)]
    other = site(32, attention(sympy.true), mask="none")
    missed = site(33, matched=False, route=None, reason="softmax over the query axis", expression=None, mask=None)
    found = Page(page(Report(sites=[missed, other, *layers], graphs=1), "a model"))
    assert [a["href"] for a, _ in found.all("a", class_="cell")] == ["#site-1"] * 32 + ["#site-2", "#site-3"]
    cards = found.all("section", class_="card")
    assert [(a["id"], a["data-sites"]) for a, _ in cards] == [("site-1", "32"), ("site-2", "1"), ("site-3", "1")]
    assert "32 ×" in cards[0][1] and "layers.0–31.attention" in cards[0][1]
    assert "softmax over the query axis" in cards[2][1] and "return w @ v" in cards[2][1]
    assert "a model" in found.all("title")[0][1]


def test_sites_stand_in_the_order_of_the_program() -> None:
    first = Report(sites=[site(5), site(1)], graphs=1)
    report = Report()
    report.extend(first)
    report.extend(Report(sites=[site(0)], graphs=1))
    assert [s.about.place for s in in_order(report) if s.about] == [(0, 10), (0, 50), (1, 0)]
    assert [s.about.place for s in first.sites if s.about] == [(0, 50), (0, 10)], "what was collected is left as it is"


@pytest.mark.parametrize(
    "names, words",
    [
        (["layers.0.attn", "layers.1.attn", "layers.2.attn"], ["layers.0–2.attn"]),
        (["layers.0.attn", "layers.1.attn", "layers.3.attn"], ["layers.{0–1, 3}.attn"]),
        ([f"layers.{n}.attn" for n in range(0, 12, 2)], ["layers.{0, 2, …, 10}.attn"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.0–1", "a.1.b.0"]),
        (["block.0.layer.1.x", "block.1.layer.1.x"], ["block.0–1.layer.1.x"]),
        (["attention", "attention"], ["attention"]),
    ],
)
def test_where_a_group_stands(names: list[str], words: list[str]) -> None:
    assert whereabouts([replace(site(0), module=name) for name in names]) == words


def test_sites_that_mean_something_else_are_apart() -> None:
    a, b = site(0, attention(J <= I)), site(1, attention(J <= I, queries=256))
    assert len(groups([a, b])) == 2
    assert len(groups([a, site(1, attention(J <= I))])) == 1
    kernels = [replace(x, about=replace(x.about, kernels=(Kernel("k", str(n)),))) for n, x in enumerate([a, a])]
    assert len(groups(kernels)) == 2


def test_layers_with_parameters_of_their_own_are_one_group() -> None:
    def layer(n: int, *names: str) -> SiteReport:
        loads = tuple(Named(name, "float32", (8,), (f"a.{n}.w",)) for name in names)
        return site(n, attention(score=S + Load(0, J), loads=loads))

    report = Report(sites=[layer(0, "values"), layer(1, "values_1"), layer(2, "add")], graphs=1)
    assert [len(g.sites) for g in groups(in_order(report))] == [3]
    assert "made of a.0.w, of the first" in Page(page(report)).all("dl", class_="glossary")[0][1]
    report = Report(sites=[layer(n, "values") for n in range(3)], graphs=1)
    assert "made of a.*.w" in Page(page(report)).all("dl", class_="glossary")[0][1]


def test_a_kernel_is_shown_once() -> None:
    kernel = Kernel("attention, forward", "import triton\n\n\n@triton.jit\ndef f(x):\n    return x + 1  # why\n")
    sites = [site(n, attention(J <= I, queries=q)) for n, q in enumerate((256, 512))]
    sites = [replace(x, about=replace(x.about, kernels=(kernel,))) for x in sites]
    found = Page(page(Report(sites=sites, graphs=1)))
    assert len(found.all("details", class_="kernel")) == 1
    assert kernel.text in found.all("details", class_="kernel")[0][1]
    assert "the same as above" in found.all("p", class_="same")[0][1]


def test_nothing_is_loaded_and_nothing_runs() -> None:
    report = Report(sites=[site(0, attention(J <= I))], graphs=1)
    text = page(report)
    found = Page(text)
    assert not found.all("script") and not found.all("link") and not found.all("img") and not found.all("iframe")
    assert not re.search(r"https?:|@import|src=|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_checks_and_our_own_errors_are_shown() -> None:
    good, bad = Difference("out", 1e-7, 2e-7, 4e-7), Difference("grad of k", 1e-2, 1e-7, 1e-6)
    checks = [Check("attention", "sdpa", module="layers.0", differences=(good, bad)), Check("x", "y", reason="random")]
    report = Report(sites=[site(0)], graphs=1, checks=checks, failures=["replacing attention: KeyError: <k>"])
    found = Page(page(report))
    assert [text for _, text in found.all("td", class_="wrong")] == ["WRONG"]
    assert [text for _, text in found.all("td", class_="ok")] == ["ok"]
    text = "".join(text for _, text in found.all("body"))
    assert "not compared: random" in text and "KeyError: <k>" in text and "grad of k" in text


def test_a_report_without_sites_or_details_is_a_page_too() -> None:
    bare = SiteReport("attention", True, "sdpa", expression="s < 3 & x")
    for report in (Report(), Report(graphs=2), Report(sites=[bare], graphs=1)):
        assert report.summary() in Page(page(report)).all("p", class_="summary")[0][1]


# -- nothing of the user's is HTML --------------------------------------------------------------------------------

EVIL = "<script>alert('x')</script>\"&amp;"


def test_all_that_is_the_users_is_escaped() -> None:
    frame = Frame(f"/{EVIL}.py", 3, EVIL, f"x = '{EVIL}'  # {EVIL}")
    loads = (Named(EVIL, EVIL, (1, EVIL), (EVIL,)), Named("a.<b>", "bool", (3,)))
    symbol = sympy.Symbol(EVIL, integer=True)
    meaning = attention(Load(1, J) > symbol, score=S + Load(0, I) * symbol, loads=loads, dtype=EVIL, dead=EVIL)
    about = About((0, 1), (frame,), meaning, f"y = {EVIL}", (Kernel(EVIL, f"# {EVIL}\n'''{EVIL}'''\n"),))
    everything = dict(family=EVIL, source=EVIL, expression=EVIL, mask=EVIL, module=EVIL, tiles=EVIL, about=about)
    sites = [
        SiteReport(matched=True, route=EVIL, reason=EVIL, **everything),  # type: ignore[arg-type]
        SiteReport(matched=False, reason=EVIL, **everything),  # type: ignore[arg-type]
        SiteReport(matched=True, route="sdpa", **{**everything, "about": replace(about, meaning=None)}),  # type: ignore
        SiteReport(matched=True, **{**everything, "about": replace(about, meaning=FormulaMeaning(symbol))}),  # type: ignore
    ]
    report = Report(sites=sites, failures=[EVIL], graphs=1, checks=[Check(EVIL, EVIL, EVIL, EVIL, reason=EVIL)])
    report.calls[EVIL] += 1
    text = page(report, EVIL)
    found = Page(text)
    assert not found.all("script")
    assert "<script" not in text and "alert('x')</" not in text
    assert text.count("&lt;script&gt;") > 20
    assert EVIL in found.all("title")[0][1]


def test_a_compiled_program_with_evil_names_is_escaped() -> None:
    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>", nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = getattr(self, "<script>")(x)
            return (y @ x.mT).softmax(-1) @ x  # <script>alert(1)</script>

    holder = nn.ModuleDict({"<script>b": Evil()})

    def program(x: Tensor) -> Tensor:
        return holder["<script>b"](x)

    with torch.no_grad():
        report = xfcompile.explain(program, torch.randn(2, 16, 8))
    assert [s.route for s in report.sites] == ["sdpa"]
    assert not Page(page(report)).all("script")


def test_markup_escapes_by_construction() -> None:
    assert element("p", "<b>", Markup("<i/>"), ["&", 3, None], title='"<') == (
        '<p title="&quot;&lt;">&lt;b&gt;<i/>&amp;3</p>'
    )


@pytest.mark.parametrize("text", ["x = (", "def f(:\n", "'''", "a\n  b\n c", "<&>", "", "\tx", "f'{x!r:>{w}}' # c\n"])
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    assert text_of(highlighted(text)) == text


def test_this_file_comes_out_as_it_went_in() -> None:
    with open(__file__) as file:
        text = file.read()
    shown = highlighted(text)
    assert html.unescape(re.sub("</?span[^>]*>", "", shown)) == text
    assert '<span class="k">def</span>' in shown


# -- pictures -----------------------------------------------------------------------------------------------------


def by_hand(keeps: Callable[[int, int], bool], queries: int, keys: int, tile: int) -> list[list[int]]:
    """Verdicts, element by element in plain Python."""
    rows = []
    for m in range(0, queries, tile):
        row = []
        for n in range(0, keys, tile):
            cells = [keeps(i, j) for i in range(m, min(m + tile, queries)) for j in range(n, min(n + tile, keys))]
            row.append(0 if not any(cells) else 2 if all(cells) else 1)
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    "keep, keeps, queries, keys",
    [
        (sympy.true, lambda i, j: True, 197, 197),
        (J <= I, lambda i, j: j <= i, 512, 512),
        (J <= I, lambda i, j: j <= i, 130, 200),
        (J <= I + 70, lambda i, j: j <= i + 70, 130, 200),
        ((J <= I) & (J > I - 100), lambda i, j: i - 100 < j <= i, 300, 300),
        ((J <= I) | (J < 50), lambda i, j: j <= i or j < 50, 256, 256),
        (sympy.Abs(I - J) <= 20, lambda i, j: abs(i - j) <= 20, 200, 256),
        (J <= I + 4095, lambda i, j: j <= i + 4095, 1, 4096),
    ],
)
def test_tiles_are_what_the_mask_is_by_hand(
    keep: Any, keeps: Callable[[int, int], bool], queries: int, keys: int
) -> None:
    found = picture(attention(keep, queries, keys))
    assert found is not None and found.tile == 64 and not found.notes
    assert [list(row) for row in found.grid] == by_hand(keeps, queries, keys, 64)
    if keep != sympy.true:
        runs = [[j for a, b in row for j in range(a, b)] for row in found.kept]
        assert runs == [[j for j in range(keys) if keeps(i, j)] for i in range(queries)]


def test_the_page_draws_and_counts_these_tiles() -> None:
    meaning = attention((J <= I) & (J > I - 150), 300, 300)
    wanted = [x for row in by_hand(lambda i, j: i - 150 < j <= i, 300, 300, 64) for x in row]
    assert all(wanted.count(k) for k in range(3))
    found = Page(page(Report(sites=[site(0, meaning)], graphs=1)))
    drawn = {
        a["data-verdict"]: (int(a["data-count"] or 0), a["d"] or "")
        for a, _ in found.all("path")
        if "data-verdict" in a
    }
    assert {name: n for name, (n, _) in drawn.items()} == {VERDICTS[k]: wanted.count(k) for k in range(3)}
    assert all(d.count("M") == n for n, d in drawn.values())
    legend = found.all("figcaption")[0][1]
    assert f"{wanted.count(2)} run whole" in legend and f"{wanted.count(0)} never run" in legend
    assert "25 tiles of 64 × 64" in legend


@pytest.mark.parametrize("combine", [sympy.And, sympy.Or])
@pytest.mark.parametrize("lengths", [(0, 100, 256), (64, 192), (256,)])
def test_data_decide_where_it_says_so_and_nowhere_else(combine: Any, lengths: tuple[int, ...]) -> None:
    """Whatever the data are: tiles that are drawn as decided are so, and of the others none is whole nor skipped for
    all data."""
    keep = combine(J <= I, sympy.Ne(Load(0, B, J), 0))
    found = picture(attention(keep, 256, 256, loads=(Named("mask", "int64", (1, 256)),)))
    assert found is not None and found.count("data") > 0
    outcomes = []
    for length in (*lengths, 0, 256):
        alive = (lambda i, j, n=length: j <= i and j < n) if combine is sympy.And else (lambda i, j, n=length: j <= i or j < n)  # fmt: skip  # noqa: E501
        outcomes.append(by_hand(alive, 256, 256, 64))
    for m, row in enumerate(found.grid):
        for n, value in enumerate(row):
            seen = {outcome[m][n] for outcome in outcomes}
            if VERDICTS[value] == "data":
                assert len(seen) > 1
            else:
                assert seen == {value}


def test_what_is_assumed_is_said() -> None:
    size = sympy.Symbol("s77", integer=True, positive=True)
    found = picture(attention(J <= I, size, size, known=((size, 192),)))
    assert found is not None and found.notes == ("for s77 = 192, as in this run",)
    assert (found.queries, found.tiles, found.count("whole")) == (192, 9, 3)
    found = picture(attention(J <= I, size, size))
    assert found is not None and found.notes == ("for s77 = 512, an example",)
    found = picture(attention(J <= I + 32 * H, 128, 128))
    assert found is not None and found.notes == ("for the first head",)


def test_long_sequences_have_larger_tiles() -> None:
    found = picture(attention(J <= I, 16384, 16384))
    assert found is not None and found.tile == 128 and len(found.grid) == 128 and not found.kept
    assert found.count("masked") == 128 and found.count("skipped") == 128 * 127 // 2
    assert isinstance(found, Picture) and len(page(Report(sites=[site(0, attention(J <= I, 16384, 16384))]))) < 1e6


def test_a_mask_of_a_number_that_is_no_size_has_no_picture() -> None:
    assert picture(attention(sympy.Symbol("a", real=True) >= J)) is None


# -- formulas -----------------------------------------------------------------------------------------------------

T = Printer({0: "bias", 1: "pad"}, frozenset({1}))


@pytest.mark.parametrize(
    "formula, text",
    [
        (S / 8, "qi·kj8"),
        (0.125 * S, "qi·kj8"),
        (S * 0.17677669529663687, "qi·kj32"),
        (S * 0.3, "0.3·(qi·kj)"),
        (S + Load(0, 0, H, I, J), "qi·kj+biash,i,j"),
        (Load(0, J) - S, "−qi·kj+biasj"),
        (30 * sympy.tanh(S / 30), "30·tanh(qi·kj30)"),
        (sympy.Ne(Load(1, B, J), 0), "padb,j"),
        (sympy.Eq(Load(1, B, J), 0), "¬padb,j"),
        (sympy.Ne(Load(0, B, J), 0), "biasb,j≠0"),
        (I >= J, "j≤i"),
        (I - J < 96, "j≥i−95"),
        (I - J >= 0, "j≤i"),
        (sympy.Abs(I - J) <= 3, "|i−j|≤3"),
        ((J <= I) | (J < 5), "j≤i∨j≤4"),
        (Where(J <= I, S, -sympy.oo), "{qi·kjif j≤i−∞otherwise"),
        (sympy.exp(-S), "e−qi·kj"),
        (sympy.Float(-1e9), "−109"),
        (Load(0, sympy.floor(J / 2)), "bias[⌊j2⌋]"),
        (Load(0), "bias"),
        (sympy.Function("strange")(I), "strange(i)"),
    ],
)
def test_formulas_read_as_on_a_board(formula: Any, text: str) -> None:
    printed = T(formula)
    assert text_of(printed) == text
    Page(printed)


def test_an_attention_is_written_as_one_sum() -> None:
    assert text_of(board(attention(J <= I))) == "outi=∑j:j≤isoftmaxj(qi·kj8)vj"
    assert text_of(board(attention())) == "outi=∑jsoftmaxj(qi·kj8)vj"
    sinks = attention(sink=Load(0, 0, H), loads=(Named("sinks", "float32", (4,)),), dropout=0.1)
    assert text_of(board(sinks)) == "outi=∑jdropout0.1(softmaxj(qi·kj8‖sinksh))vj"


def test_known_activations_have_their_names() -> None:
    gated = GatedMeaning(silu(GATE) * UP, "separate", 4, 8, 16, None, (True, False), False, 0.0, "float32")
    assert text_of(board(gated)) == "g=xWg⊤+bg,u=xWu⊤out=SiLU(g)⊙u=g·u·σ(g)"
    other = replace(gated, formula=GATE * UP**2)
    assert "SiLU" not in text_of(board(other))
    pointwise = PointwiseMeaning(gelu(X, "none") * KEEP, True, True, (2, 8), 0.1, "float32")
    assert "m=0 with probability 0.1" in text_of(board(pointwise))
    assert "GELU(x)" in text_of(board(replace(pointwise, formula=gelu(X, "none"))))


# -- of real programs ---------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.bias = nn.Parameter(torch.randn(2, 128, 128))
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        scores = q @ q.mT * 8**-0.5 + self.bias
        place = torch.arange(x.shape[1])
        scores = scores.masked_fill(place[None, :] > place[:, None], float("-inf"))
        if self.window is not None:
            scores = scores.masked_fill(place[:, None] - place[None, :] > self.window, float("-inf"))
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        x = (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)
        return x + (F.silu(self.gate(x)) * self.up(x))[..., :16]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(None), Layer(40), Layer(None)])

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, padding)
        return (x @ x.mT).softmax(-2) @ x


def test_a_program_is_told_in_its_own_names_and_order() -> None:
    with torch.no_grad():
        report = xfcompile.explain(Model(), torch.randn(1, 128, 16), torch.zeros(1, 128, dtype=torch.bool))
    order = in_order(report)
    assert [s.family for s in order] == ["attention", "gated_mlp"] * 3 + ["attention"]
    assert [s.matched for s in order] == [True] * 6 + [False]
    about = order[0].about
    assert about is not None and isinstance(about.meaning, AttentionMeaning)
    assert [x.name for x in about.meaning.loads if x.dtype == "float32"] == ["layers.0.bias"]
    assert about.frames[-1].path == __file__ and about.frames[-1].code.startswith("x = (scores.softmax(-1) @ q)")
    assert about.call is not None and "scaled_dot_product_attention(" in about.call
    assert report.calls["linear"] == 6 and report.calls["scaled_dot_product_attention"] == 3
    found = Page(page(report))
    cards = found.all("section", class_="card")
    assert [a["data-sites"] for a, _ in cards] == ["2", "3", "1", "1"]
    assert "layers.{0, 2}" in cards[0][1] and "layers.*.bias" in cards[0][1] and "layers.1" in cards[2][1]
    assert "x = (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)" in cards[0][1]
    assert "return (x @ x.mT).softmax(-2) @ x" in cards[3][1]


def test_the_kernel_that_runs_is_the_one_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (20 * torch.tanh(q @ k.mT / 20)).softmax(-1) @ v

    from xfcompile.kernels.attention import programs

    before = set(programs.known)
    qkv = torch.randn(3, 1, 2, 16, 16)
    with torch.no_grad(), xfcompile.collect() as report:
        compiled = torch.compile(program, backend="xformers", options={"routes": {"attention": "triton"}})
        torch.testing.assert_close(compiled(*qkv), program(*qkv), rtol=1e-3, atol=1e-3)
    about = report.sites[0].about
    assert about is not None and [k.title for k in about.kernels] == ["attention, forward"]
    assert about.kernels[0].text in {p.source for p in programs.known.values()}
    assert not before or about.call is not None
    key = re.search("'([0-9a-f]{32})'", about.call or "")
    assert key is not None and programs.program(key[1]).source == about.kernels[0].text
    shown = Page(page(report)).all("details", class_="kernel")
    assert about.kernels[0].text in shown[0][1]


def reachable(root: object) -> list[object]:
    """All objects that one holds alive, but what belongs to modules and classes."""
    seen: dict[int, object] = {}
    todo = [root]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (type, types.ModuleType, types.FunctionType)):
            continue
        seen[id(x)] = x
        todo.extend(gc.get_referents(x))
    return list(seen.values())


def test_a_report_holds_no_tensor_and_no_graph() -> None:
    model = Model()
    inputs = torch.randn(1, 128, 16), torch.zeros(1, 128, dtype=torch.bool)
    kept = [weakref.ref(x) for x in (model, model.layers[0].bias, inputs[0])]
    with torch.no_grad(), xfcompile.collect() as report:
        torch.compile(model, backend=xfcompile.xformers)(*inputs)
    assert len(report.sites) == 7
    del model, inputs
    torch._dynamo.reset()
    gc.collect()
    assert [x() is None for x in kept] == [True] * 3
    assert not [x for x in reachable(report) if isinstance(x, (torch.Tensor, torch.SymInt, fx.Graph, fx.Node))]
    again = pickle.loads(pickle.dumps(report))
    assert page(again) == page(report)


def test_symbolic_sizes_are_those_of_the_run() -> None:
    def program(q: Tensor) -> Tensor:
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        return (q @ q.mT).masked_fill(later, float("-inf")).softmax(-1) @ q

    with torch.no_grad(), xfcompile.collect() as report:
        torch.compile(program, backend="xformers", dynamic=True)(torch.randn(2, 3, 150, 16))
    about = report.sites[0].about
    assert about is not None and isinstance(about.meaning, AttentionMeaning)
    found = picture(about.meaning)
    assert found is not None and found.queries == 150 and found.notes[0].endswith("= 150, as in this run")
    assert [list(row) for row in found.grid] == by_hand(lambda i, j: j <= i, 150, 150, 64)
