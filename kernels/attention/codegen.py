"""From a `ScoreSpec` to the text of a Triton module: a flash attention forward with the site's own score inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import sympy

from xfcompile.kernels.attention import decode, template
from xfcompile.kernels.attention.printer import LOG2E, NAMES, PRODUCT, Printer, Term, extent, is_plain
from xfcompile.kernels.attention.reach import reach
from xfcompile.score import I, J, Load, S, Where
from xfcompile.site import ScoreSpec


def canonical(spec: ScoreSpec) -> ScoreSpec:
    """The same spec with scalars named n0, n1 … (integers) and a0, a1 … (reals): its text is then its identity."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    for x in spec.scalars:
        stem = "n" if x.is_integer else "a"
        number = sum(new.name.startswith(stem) for new in names.values())
        assumptions = {"integer": True} if x.is_integer else {"real": True}
        # What is known of signs is kept: it makes divisions and scales cheaper.
        assumptions |= {fact: True for fact in ("positive", "nonnegative") if getattr(x, f"is_{fact}")}
        names[x] = sympy.Symbol(f"{stem}{number}", **assumptions)

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


def constant_scale(score: sympy.Expr) -> sympy.Expr | None:
    """c > 0 where the score is c·s: its product with log2(e) then joins the exponent's multiply-add."""
    scale = sympy.sympify(score).coeff(S)
    return scale if score == scale * S and scale.is_number and scale.is_positive else None


def in_base(spec: ScoreSpec, score: sympy.Expr) -> sympy.Expr:
    """The score for exponents of base 2, or of base 4, in which finfo.min stays finite."""
    return times(LOG2E / 2 if template.wide(spec) else LOG2E, score)


def times(factor: sympy.Expr, score: sympy.Expr) -> sympy.Expr:
    """factor * score, for a factor above 0. Of a sum with s in it each term is multiplied: it merges with the constants
    there, and s is not added to as it is: triton would start the product of queries and keys from what is added, and
    round each step of it to that number's size. Other sums are multiplied as a whole: many terms, each with a constant
    that is rounded by itself, lose digits."""
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
        for load, guarded in _loads(expr, False):
            if not load.free_symbols & {S, J} and (is_plain(load) or not guarded):
                found[load] = None
    return list(found)


def _loads(expr: sympy.Basic, guarded: bool) -> Iterator[tuple[Load, bool]]:
    guards = isinstance(expr, (Where, sympy.And, sympy.Or, sympy.Piecewise, sympy.ITE))
    for arg in expr.args:
        yield from _loads(arg, guarded or guards)
    if isinstance(expr, Load):
        yield expr, guarded


def generate(spec: ScoreSpec) -> str:
    """The module's text. `spec` must be canonical; raises Unsupported for what has no Triton form."""
    scale = constant_scale(spec.score)
    loads = row_loads(*([] if scale is not None else [spec.score]), spec.keep)
    scope = NAMES | {x: x.name for x in spec.scalars}
    names = template.Names.of(spec, len(loads))
    helpers: set[str] = set()

    # What a row has for the whole loop is read once, by the kernel itself.
    clamped = set() if template.wide(spec) else template.far_loads(spec)
    prologue = Printer(spec.operands, scope, clamped=clamped)
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
        printer = Printer(spec.operands, scope, hoisted, clamped)
        term = printer.float(expr) if name in ("score", "full_score", "sink") else printer.print(expr)
        helpers.update(printer.helpers)
        value = term.text
        if name in ("score", "full_score") and extent(expr) != {I, J}:
            value = f"tl.full(s.shape, 0.0, tl.float32) + {term.at(PRODUCT)}"
        body = "".join(f"    {line}\n" for line in [*printer.lines, *template.returned(value)])
        return f"@triton.jit\n{template.wrapped(f'def {name}', arguments, ':')}\n{body}"

    site = ["b", "h", "i", "j", *names.inside, *names.flag_parameters]
    functions = []
    for name, score in (("score", spec.score if scale is None else None), ("full_score", spec.full)):
        if score is not None:
            functions.append(function(name, ["s", *site], in_base(spec, score), hoisted))
    if spec.keep != sympy.true:
        functions.append(function("keep", site, spec.keep, hoisted))
    for side, bound in (("lower", spec.band.lower), ("upper", spec.band.upper)):
        if bound is not None:
            functions.append(function(side, ["i", *names.scalars], bound, {}))
    if spec.sink is not None:
        arguments = ["b", "h", "i", *names.outside, *names.flag_parameters]
        functions.append(function("sink", arguments, in_base(spec, spec.sink), {}))
    scan_lines: list[str] = []
    found = reach(spec)
    if found is not None:
        rows = Printer(spec.operands, {**scope, I: "row"})
        ends: dict[sympy.Basic, Term] = {}
        for side, symbols in found.sides.items():
            term = rows.number(side)
            scan_lines += [*rows.lines, *template.extremes(symbols, term.text)]
            rows.lines.clear()
            ends |= {symbol: Term(symbol.name, term.kind) for symbol in symbols}
        helpers |= rows.helpers
        arguments = ["b", "h", "j", *names.outside, *(symbol.name for symbol in ends)]
        functions.append(function("reachable", [*arguments, *names.flag_parameters], found.keys, ends))
        scan_lines += template.scan([*arguments, *names.flags])
    text = template.module(spec, scale, names, row_lines, scan_lines, functions, helpers)
    return text + decode.kernels(spec, names, row_lines)
