"""From a `ScoreSpec` to the text of a Triton module: a flash attention forward with the site's own score inside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from xfcompile.evaluate import Unsupported
from xfcompile.kernels.attention import blocks, cache, decode, template
from xfcompile.kernels.attention.names import Form, Forms, Names
from xfcompile.kernels.lines import returned, wrapped
from xfcompile.kernels.printing.extent import extent, guarded_loads, is_plain
from xfcompile.kernels.printing.printer import NAMES, Printer
from xfcompile.kernels.printing.rules import RULES
from xfcompile.kernels.printing.term import PRODUCT, Term
from xfcompile.score import H, I, J, Load, S, Where
from xfcompile.site import ScoreSpec


def canonical(spec: ScoreSpec) -> ScoreSpec:
    """The same spec with scalars named n0, n1 … (integers) and a0, a1 … (reals): its text is then its identity."""
    names = cache.canonical_names(spec.scalars)

    def rename(expr: sympy.Basic | None) -> sympy.Basic | None:
        return None if expr is None else sympy.sympify(expr).xreplace(names)

    band = replace(spec.band, lower=rename(spec.band.lower), upper=rename(spec.band.upper))
    return replace(
        spec,
        score=rename(spec.score),
        keep=rename(spec.keep),
        sink=rename(spec.sink),
        full=rename(spec.full),
        scalars=tuple(names.values()),
        band=band,
    )


UNIT = sympy.Symbol("UNIT", positive=True)
"""What kernels multiply scores by, known when they are compiled: `template.unit`."""


def times(factor: sympy.Expr, score: sympy.Expr) -> sympy.Expr:
    """factor * score, for a factor above 0, UNIT for one. Of a sum with s in it each term is multiplied: it merges with
    the constants there, and s is not added to as it is: triton would start the product of queries and keys from what
    is added, and round each step of it to that number's size. Other sums are multiplied as a whole: many terms, each
    with a constant that is rounded by itself, lose digits."""
    if isinstance(score, sympy.Add) and not any(term.as_independent(S)[1] == S for term in score.args):
        return factor * score
    if isinstance(score, (sympy.Add, sympy.Min, sympy.Max)):
        return score.func(*(times(factor, term) for term in score.args))
    if isinstance(score, Where):
        condition, a, b = score.args
        return Where(condition, times(factor, a), times(factor, b))
    coefficient, rest = score.as_coeff_Mul()
    if coefficient != 1 and coefficient.is_positive and rest != score:
        return times(factor * coefficient, rest)
    return factor * score


def row_loads(*exprs: sympy.Basic) -> list[Load]:
    """Loads that do not vary along keys, and are in range wherever they stand: read once, before the loop."""
    found: dict[Load, None] = {}
    for expr in exprs:
        for load, guarded in guarded_loads(expr):
            if not load.free_symbols & {S, J} and (is_plain(load) or not guarded):
                found[load] = None
    return list(found)


FIRST = sympy.Symbol("first", integer=True, nonnegative=True)
"""The first query row of a block."""


STEEP = 16.0
"""Slopes of ALiBi are at most 1."""


def of_first_row(spec: ScoreSpec) -> tuple[sympy.Expr, sympy.Expr]:
    """The score as of the first row of a block, and what other rows have more: where that is the same for all keys, it
    changes log-sum-exps only, and need not be added to each score. ALiBi's slope * (j - i) is such."""
    if spec.sink is not None or spec.full is not None:
        return spec.score, sympy.S.Zero
    terms, shift = [], sympy.S.Zero
    for term in sympy.Add.make_args(spec.score):
        flat = term if S in term.free_symbols else sympy.expand(term)
        slope = flat.coeff(I, 1)
        rest = sympy.expand(flat - slope * I)
        steep = slope.is_number and abs(slope) > STEEP  # log-sum-exps would be differences of large numbers
        if steep or slope == 0 or S in term.free_symbols or I in rest.free_symbols or {I, J} & slope.free_symbols:
            terms.append(term)
        else:
            terms.append(term.xreplace({I: FIRST}))
            shift += slope * (I - FIRST)
    return sympy.Add(*terms), shift


LARGEST_SCALE = 1e4
"""An exponent is a score less the largest, each rounded by itself: of scores beyond 2**24 the difference may come out
above 0 by so much that a weight is infinite, and the result NaN."""


@dataclass(frozen=True)
class Parts:
    """A score as scale * core + shift: a number above 0, what depends on s, and one number for all keys and rows. The
    shift is UNIT times as large."""

    scale: float
    core: sympy.Expr
    shift: sympy.Expr


def parts(spec: ScoreSpec, score: sympy.Expr) -> Parts | None:
    """The score taken apart; None where it is more than that."""
    terms = sympy.Add.make_args(sympy.sympify(score))
    cores = [term for term in terms if S in term.free_symbols]
    if spec.full is not None or len(cores) != 1:
        return None
    shift = sympy.Add(*(term for term in terms if term is not cores[0]))
    if shift.free_symbols & {H, I, J}:  # rows of several heads stand together in decoding
        return None
    if spec.far and not all(_is_even(term) for term in sympy.Add.make_args(shift)):
        return None  # what it is added to may not survive it, as it would in an exponent
    scale, core = cores[0].as_coeff_Mul()
    if scale < 0:
        scale, core = -scale, -core
    if core != S and template.wide(spec):  # twice what a mask has added is not finite
        return None
    return Parts(float(scale), core, times(UNIT, shift) if shift != 0 else sympy.S.Zero)


def _is_even(term: sympy.Expr) -> bool:
    """Whether a term is 0, or what an even tile has for all scores, which is no far number (`blocks.NEAR`)."""
    coefficient, rest = term.as_coeff_Mul()
    return term == 0 or (rest.is_Symbol and rest.name.startswith("even") and abs(coefficient) <= 1)


def form(found: Parts | None) -> Form:
    if found is None:
        return Form()
    return Form(found.scale, found.core != S, found.shift != 0)


@dataclass(frozen=True)
class Pieces:
    """What a kernel is put together from: the site's own functions, and how a step calls them.

    score: as the steps compute it; evens: what of it even tiles load once. row_lines: read what a row has for the whole
    loop. functions, helpers: the text of the site's functions, and the names of those in HELPERS that they call.
    """

    score: sympy.Expr
    evens: tuple[Load, ...]
    names: Names
    forms: Forms
    row_lines: tuple[str, ...]
    functions: tuple[str, ...]
    helpers: frozenset[str]


def generate(spec: ScoreSpec) -> str:
    """The module's text. `spec` must be canonical; raises Unsupported for what has no Triton form."""
    made = pieces(spec)
    text = template.module(spec, made.forms, made.names, made.row_lines, made.functions, made.helpers)
    return text if spec.dropout else text + decode.kernels(spec, made.forms, made.names, made.row_lines)


def pieces(spec: ScoreSpec) -> Pieces:
    """The pieces of a canonical spec's kernel; raises Unsupported for what has no Triton form."""
    for term in sympy.Add.make_args(sympy.sympify(spec.score)):
        if S in term.free_symbols and not abs(term.as_coeff_Mul()[0]) <= LARGEST_SCALE:
            raise Unsupported(f"a score is {term}, beside which fp32 has no digits for a difference")
    found = blocks.summary(spec)
    evens = blocks.even_loads(spec) if found is not None else ()
    even_names = {load: sympy.Symbol(f"even{n}", real=True) for n, load in enumerate(evens)}
    score, row_shift = of_first_row(spec)
    even_score = score.xreplace(even_names)
    usual, even = parts(spec, score), parts(spec, even_score)
    loads = row_loads(*([score] if usual is None else [usual.core, usual.shift]), spec.keep)
    scope = NAMES | {x: x.name for x in (*spec.scalars, *even_names.values(), FIRST, UNIT)}
    names = Names.of(spec, len(loads), len(evens), row_shift != 0)
    helpers: set[str] = set()

    # What a row has for the whole loop is read once, by the kernel itself.
    clamped = set() if template.wide(spec) else template.far_loads(spec)
    prologue = Printer(RULES, spec.operands, scope, clamped=clamped)
    row_lines = []
    for n, load in enumerate(loads):
        term = prologue.print(load)
        *before, last = prologue.lines
        row_lines += [*before, f"row{n} = {last.split(' = ', 1)[1]}"]
        prologue.lines.clear()
        prologue.hoisted[load] = replace(term, text=f"row{n}")
    helpers |= prologue.helpers
    hoisted = prologue.hoisted

    def function(name: str, arguments: list[str], expr: sympy.Basic, hoisted: dict[sympy.Basic, Term]) -> str:
        printer = Printer(RULES, spec.operands, scope, hoisted, clamped)
        real = name in ("sink", "row_shift") or name.endswith(("score", "core", "shift"))
        term = printer.float(expr) if real else printer.print(expr)
        helpers.update(printer.helpers)
        value = term.text
        if name.endswith(("score", "core")) and extent(expr) != {I, J}:
            value = f"tl.full(s.shape, 0.0, tl.float32) + {term.at(PRODUCT)}"
        body = "".join(f"    {line}\n" for line in [*printer.lines, *returned(value)])
        return f"@triton.jit\n{wrapped(f'def {name}', arguments, ':')}\n{body}"

    site = ["b", "h", "i", "j", *names.inside, *names.flag_parameters]
    functions: list[str] = []

    def score_functions(prefix: str, score: sympy.Expr, found: Parts | None, arguments: list[str]) -> None:
        if found is None:
            functions.append(function(f"{prefix}score", ["s", *arguments], times(UNIT, score), hoisted))
            return
        if found.core != S:
            functions.append(function(f"{prefix}core", ["s", *arguments], found.core, hoisted))
        if found.shift != 0:
            functions.append(function(f"{prefix}shift", arguments, found.shift, hoisted))

    score_functions("", score, usual, site)
    if row_shift != 0:
        arguments = ["b", "h", "i", "first", *names.outside, *names.flag_parameters]
        functions.append(function("row_shift", arguments, row_shift, {}))
    if spec.full is not None:
        functions.append(function("full_score", ["s", *site], times(UNIT, spec.full), hoisted))
    if spec.keep != sympy.true:
        functions.append(function("keep", site, spec.keep, hoisted))
    for side, bound in (("lower", spec.band.lower), ("upper", spec.band.upper)):
        if bound is not None:
            functions.append(function(side, ["i", *names.scalars], bound, {}))
    if spec.sink is not None:
        arguments = ["b", "h", "i", *names.outside, *names.flag_parameters]
        functions.append(function("sink", arguments, times(UNIT, spec.sink), {}))
    if not evens:
        forms = Forms(form(usual), row_shift=row_shift != 0)
        return Pieces(score, (), names, forms, tuple(row_lines), tuple(functions), frozenset(helpers))

    score_functions("even_", even_score, even, [*site, *(x.name for x in even_names.values())])
    corner = Printer(RULES, spec.operands, {**scope, I: "first", J: "ahead"}, clamped=clamped)
    values = tuple(corner.print(load).text for load in even_names)
    helpers |= corner.helpers
    forms = Forms(form(usual), form(even), tuple(corner.lines), values, row_shift != 0)
    return Pieces(score, evens, names, forms, tuple(row_lines), tuple(functions), frozenset(helpers))
