"""What a site computes, as one would write it on a board."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy

from xfcompile import activation
from xfcompile.activation import GATE, KEEP, UP, X
from xfcompile.masks import conjuncts
from xfcompile.meaning import AttentionMeaning, GatedMeaning, Meaning, PointwiseMeaning, Tensor
from xfcompile.page.markup import Markup, element, join
from xfcompile.page.mathematics import (
    Printer,
    comma,
    display,
    fenced,
    lines,
    mi,
    mn,
    mo,
    mspace,
    mtext,
    row,
    sub,
)
from xfcompile.score import Load

LONG = 28
"""Characters of a formula that still stands inside of another; a longer one has a line of its own."""

WIDE = 56
"""Characters of a line; the terms of a longer sum stand below each other."""

LONGEST_NAME = 26


def board(meaning: Meaning) -> Markup:
    """The formulas of a site, in display style."""
    if isinstance(meaning, AttentionMeaning):
        return _attention(meaning)
    if isinstance(meaning, GatedMeaning):
        return _gated(meaning)
    if isinstance(meaning, PointwiseMeaning):
        return _pointwise(meaning)
    return _shown([_equation(mi("out"), Printer()(meaning.formula))])


def glossary(meaning: Meaning) -> list[tuple[str, str]]:
    """The tensors that the formulas speak of: a name, and what it is."""
    if isinstance(meaning, AttentionMeaning):
        names = load_names(meaning.loads)
        return [(names[n], _described(x)) for n, x in enumerate(meaning.loads)]
    if isinstance(meaning, PointwiseMeaning):
        found = [(f"v{n}", _described(x)) for n, x in enumerate(meaning.vectors)]
        return found + [(f"r{n}", _described(x)) for n, x in enumerate(meaning.tensors)]
    return []


def _described(x: Tensor) -> str:
    shape = ", ".join(map(str, x.shape))
    what = f"{x.dtype} [{shape}]"
    if x.name is not None and "." in x.name:
        what += f", {x.name}"
    return what + (f", made of {', '.join(x.made_of)}" if x.made_of else "")


def load_names(loads: Sequence[Tensor]) -> dict[int, str]:
    """Short names of operands, all different: what the program calls them, or t0, t1 ..."""
    names: dict[int, str] = {}
    for n, x in enumerate(loads):
        # A parameter's name says more than that of a variable on the way.
        source = x.made_of[0] if len(x.made_of) == 1 else x.name
        name = None if source is None else _short(source)
        names[n] = name if name is not None and name not in names.values() else f"t{n}"
    return names


def _short(name: str) -> str | None:
    """The last part of a path that says anything: of "block.0.relative_attention_bias.weight" the one before."""
    parts = [p for p in name.split(".") if not p.isdigit() and p not in ("weight", "self")]
    if not parts or len(parts[-1]) > LONGEST_NAME or not parts[-1].isidentifier():
        return None
    return parts[-1]


def _length(text: str) -> int:
    """How many characters a formula shows."""
    count, inside = 0, False
    for c in text:
        inside = c == "<" or (inside and c != ">")
        count += not inside and c != ">"
    return count


def _shown(equations: Sequence[Markup]) -> Markup:
    return join([element("div", display(equation), class_="equation") for equation in equations])


def _equation(left: str, *right: str) -> Markup:
    return row(left, mo("="), *right)


def _sum_or_lines(printer: Printer, left: str, expr: Any) -> Markup:
    """left = expr, a long sum with a line for each term."""
    terms = printer.terms(expr)
    if len(terms) < 2 or sum(map(_length, terms)) <= WIDE:
        return _equation(left, printer(expr))
    rows = [[row(left, mo("=")) if k == 0 else "", term] for k, term in enumerate(terms)]
    return lines(rows, columnalign="right left", class_="aligned")


# -- attention ----------------------------------------------------------------------------------------------------


def _attention(meaning: AttentionMeaning) -> Markup:
    flags = frozenset(n for n, x in enumerate(meaning.loads) if x.dtype == "bool")
    printer = Printer(load_names(meaning.loads), flags)
    equations: list[Markup] = []
    score = printer(meaning.score)
    own_score = row(sub(mi("s"), row(mi("i"), mi("j"))))
    inner = score if _length(score) <= LONG else own_score
    terms = sorted(conjuncts(meaning.keep), key=lambda term: bool(term.atoms(Load)))  # positions first
    kept = [printer(term) for term in terms]
    short = sum(map(_length, kept)) <= LONG and len(kept) <= 2
    if not kept:
        under: Markup = mi("j")
    elif short:
        under = row(mi("j"), mo(":"), comma(kept))
    else:
        under = row(mi("j"), mo("∈"), sub(mi("K"), mi("i")))
    weights = row(sub(mi("softmax"), mi("j")), mo("\u2061"), fenced(row(inner, *_sink(meaning, printer))))
    if meaning.dropout:
        weights = row(sub(mi("dropout"), mn(f"{meaning.dropout:g}")), mo("\u2061"), fenced(weights))
    total = element("munder", mo("∑", largeop="true", movablelimits="false"), under)
    equations.append(_equation(sub(mi("out"), mi("i")), total, weights, sub(mi("v"), mi("j"))))
    if inner is own_score:
        equations.append(_sum_or_lines(printer, own_score, meaning.score))
    if kept and not short:
        first = row(sub(mi("K"), mi("i")), mo("="))
        opening = row(mo("{"), mi("j"), mo(":"))
        rows = [[first if k == 0 else "", row(opening if k == 0 else mo("∧"), term)] for k, term in enumerate(kept)]
        rows[-1][1] = row(rows[-1][1], mo("}"))
        equations.append(lines(rows, columnalign="right left", class_="aligned"))
    return _shown(equations)


def _sink(meaning: AttentionMeaning, printer: Printer) -> list[Markup]:
    """An extra logit, beside the scores."""
    return [] if meaning.sink is None else [mspace(), mo("‖"), mspace(), printer(meaning.sink)]


# -- pointwise ----------------------------------------------------------------------------------------------------


KNOWN: tuple[tuple[str, Callable[[sympy.Expr], sympy.Expr]], ...] = (
    ("SiLU", activation.silu),
    ("GELU", lambda x: activation.gelu(x, "none")),
    ("GELU tanh", lambda x: activation.gelu(x, "tanh")),
    ("ReLU", activation.relu),
    ("ReLU²", lambda x: activation.relu(x) ** 2),
    ("ReLU6", lambda x: activation.hardtanh(x, 0, 6)),
    ("σ", activation.Sigmoid),
    ("tanh", sympy.tanh),
    ("SELU", activation.selu),
    ("ELU", activation.elu),
    ("mish", activation.mish),
    ("hardswish", activation.hardswish),
    ("hardsigmoid", activation.hardsigmoid),
)
"""Activations by the names that the field has for them."""


def _named(formula: sympy.Expr, x: sympy.Symbol, others: sympy.Expr) -> str | None:
    """The activation f of which a formula is f(x) times `others`."""
    return next((name for name, function in KNOWN if function(x) * others == formula), None)


def _applied(name: str, x: Markup) -> Markup:
    name, _, kind = name.partition(" ")
    function = sub(mi(name), mi(kind)) if kind else mi(name)
    return row(function, mo("\u2061"), fenced(x))


def _gated(meaning: GatedMeaning) -> Markup:
    def projection(name: str, bias: bool) -> Markup:
        weight = element("msubsup", mi("W"), mi(name), mo("⊤"))
        return _equation(mi(name), mi("x"), weight, *([mo("+"), sub(mi("b"), mi(name))] if bias else []))

    gate, up = meaning.biases
    both = row(projection("g", gate), mo(","), mspace(), mspace(), projection("u", up))
    printer, name = Printer(), _named(meaning.formula, GATE, UP)
    product = printer(meaning.formula)
    if name is not None:
        product = row(_applied(name, mi("g")), mo("⊙"), mi("u"), mo("="), product)
    if meaning.dropout:
        product = row(sub(mi("dropout"), mn(f"{meaning.dropout:g}")), mo("\u2061"), fenced(product))
    if meaning.down:
        product = row(fenced(product), element("msubsup", mi("W"), mi("down"), mo("⊤")))
    return _shown([both, _equation(mi("out"), product)])


def _pointwise(meaning: PointwiseMeaning) -> Markup:
    equations = []
    if meaning.product or meaning.bias:
        linear = [mi("a"), element("msup", mi("W"), mo("⊤"))] if meaning.product else [mi("a")]
        equations.append(_equation(mi("x"), *linear, *([mo("+"), mi("b")] if meaning.bias else [])))
    name = _named(meaning.formula, X, sympy.S.One)
    printer = Printer()
    equations.append(
        _equation(mi("out"), _applied(name, mi("x")), mo("="), printer(meaning.formula))
        if name is not None and name != "tanh"
        else _sum_or_lines(printer, mi("out"), meaning.formula)
    )
    if KEEP in meaning.formula.free_symbols:
        p = mn(f"{meaning.dropout:g}")
        words = [mi("m"), mo("="), mn("0"), mtext(" with probability "), p, mtext(", else "), mn("1"), mo("/")]
        equations.append(row(*words, fenced(row(mn("1"), mo("−"), p))))
    return _shown(equations)
