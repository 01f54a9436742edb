"""Mask predicates: what the index ranges prove of them, and the names that they go by."""

from __future__ import annotations

from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from xfcompile.indexing import Ranges, nonnegative
from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Band


def prove(expr: Any, ranges: Ranges) -> Any:
    """An expression with every comparison that the ranges decide replaced by true or false."""
    if not isinstance(expr, sympy.Basic):
        return expr
    decided = {}
    for atom in expr.atoms(sympy.core.relational.Relational):
        verdict = _decide(atom, ranges)
        if verdict is not None:
            decided[atom] = verdict
    return plainly(expr.xreplace(decided) if decided else expr)


def plainly(expr: Any) -> Any:
    """The same with no `not` before an `and` or an `or`: then the terms of a conjunction are all in sight."""
    if isinstance(expr, (sympy.And, sympy.Or)):
        return expr.func(*(plainly(x) for x in expr.args))
    if isinstance(expr, sympy.Not) and isinstance(expr.args[0], (sympy.And, sympy.Or)):
        inner = expr.args[0]
        other = sympy.Or if isinstance(inner, sympy.And) else sympy.And
        return other(*(plainly(sympy.Not(x)) for x in inner.args))
    return expr


def _decide(atom: Any, ranges: Ranges) -> Any:
    a, b = atom.args
    if not (a.is_integer and b.is_integer):
        return None
    gap = sympy.expand(a - b)
    if isinstance(atom, sympy.Le):
        return _sign(-gap, gap - 1, ranges)
    if isinstance(atom, sympy.Lt):
        return _sign(-gap - 1, gap, ranges)
    if isinstance(atom, sympy.Ge):
        return _sign(gap, -gap - 1, ranges)
    if isinstance(atom, sympy.Gt):
        return _sign(gap - 1, -gap, ranges)
    apart = nonnegative(gap - 1, ranges) or nonnegative(-gap - 1, ranges)
    same = gap == 0 or (nonnegative(gap, ranges) and nonnegative(-gap, ranges))
    if isinstance(atom, sympy.Eq):
        return sympy.false if apart else sympy.true if same else None
    if isinstance(atom, sympy.Ne):
        return sympy.true if apart else sympy.false if same else None
    return None


def _sign(holds: sympy.Expr, fails: sympy.Expr, ranges: Ranges) -> Any:
    if nonnegative(holds, ranges):
        return sympy.true
    return sympy.false if nonnegative(fails, ranges) else None


def conjuncts(keep: Any) -> tuple[Any, ...]:
    """The terms of a conjunction."""
    return tuple(keep.args) if isinstance(keep, sympy.And) else () if keep == sympy.true else (keep,)


def band(keep: Any) -> Band:
    """Closed bounds on the keys: of the terms that are linear in j - i, and of what `and` and `or` make of them."""
    if keep == sympy.true:
        return Band()
    if isinstance(keep, sympy.And):
        parts = [band(term) for term in keep.args]
        lower = [p.lower for p in parts if p.lower is not None]
        upper = [p.upper for p in parts if p.upper is not None]
        return Band(
            sympy.Max(*lower) if lower else None, sympy.Min(*upper) if upper else None, all(p.exact for p in parts)
        )
    if isinstance(keep, sympy.Or):
        return _hull([band(term) for term in keep.args])
    bounds = _key_bound(keep)
    return Band() if bounds is None else Band(*bounds, exact=bounds != (None, None))


def _hull(parts: list[Band]) -> Band:
    """Bounds of what lies in any of several bands; exact only where all are bounded on the same one side."""
    lower, upper = ([getattr(p, side) for p in parts] for side in ("lower", "upper"))
    one_sided = all(x is None for x in lower) or all(x is None for x in upper)
    return Band(
        None if None in lower else sympy.Min(*lower),
        None if None in upper else sympy.Max(*upper),
        one_sided and all(p.exact for p in parts),
    )


def _key_bound(term: Any) -> tuple[sympy.Expr | None, sympy.Expr | None] | None:
    """lower <= j < upper, from one comparison; bounds must not fall as i grows."""
    gap = _nonnegative_form(term)
    if gap is None:
        return _window(term)
    slope = gap.coeff(J)
    rest = sympy.expand(gap - slope * J)
    if slope not in (1, -1) or J in rest.free_symbols or rest.free_symbols & {B, H} or rest.atoms(Load):
        return None
    if slope == -1:  # rest - j >= 0
        return (None, rest + 1) if _rises(rest) else None
    return (-rest, None) if _rises(-rest) else None


def _window(term: Any) -> tuple[sympy.Expr | None, sympy.Expr | None] | None:
    """|i - j| <= w, and chunks i // c == j // c."""
    if isinstance(term, (sympy.Le, sympy.Lt)) and isinstance(term.args[0], sympy.Abs):
        inner, width = sympy.expand(term.args[0].args[0]), term.args[1]
        strict = 1 if isinstance(term, sympy.Lt) else 0
        if width.free_symbols & {B, H, I, J} or width.atoms(Load):
            return None
        centre = inner + J if inner.coeff(J) == -1 else J - inner if inner.coeff(J) == 1 else None
        if centre is None or centre.free_symbols & {J, B, H} or centre.atoms(Load) or not _rises(centre):
            return None
        return centre - width + strict, centre + width + 1 - strict
    if isinstance(term, (sympy.Ge, sympy.Gt)) and isinstance(term.args[1], sympy.Abs):
        return _window(term.reversed)
    if isinstance(term, sympy.Eq) and all(isinstance(a, FloorDiv) for a in term.args):
        (x, c), (y, d) = (a.args for a in term.args)
        x, y = (y, x) if x == J else (x, y)
        if y == J and x == I and c == d and c.is_Integer:
            return c * FloorDiv(I, c), c * FloorDiv(I, c) + c
    return None


def _rises(expr: sympy.Expr) -> bool:
    """Whether an expression does not fall as i grows."""
    slope = expr.coeff(I)
    return bool(slope.is_nonnegative) and I not in sympy.expand(expr - slope * I).free_symbols


def _nonnegative_form(term: Any) -> sympy.Expr | None:
    """The integer expression that is >= 0 exactly where a comparison holds."""
    if not isinstance(term, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    a, b = term.args
    if not (a.is_integer and b.is_integer) or a.has(sympy.Abs) or b.has(sympy.Abs):
        return None
    if isinstance(term, (sympy.Le, sympy.Lt)):
        a, b = b, a
    strict = isinstance(term, (sympy.Lt, sympy.Gt))
    return sympy.expand(a - b - (1 if strict else 0))


def is_causal(keep: Any) -> bool:
    """j <= i and nothing else."""
    gap = _nonnegative_form(keep)
    return gap is not None and sympy.expand(gap - (I - J)) == 0


def has_live_key(keep: Any, ranges: Ranges) -> bool:
    """Whether every row is proved to see at least one key: the first, the one at its own position, or the last."""
    keys = ranges[J]
    witnesses: list[sympy.Expr] = [sympy.S.Zero, keys - 1]
    if nonnegative(keys - ranges[I], ranges):
        witnesses += [I, I + keys - ranges[I]]
    return any(prove(sympy.sympify(keep).xreplace({J: w}), ranges) == sympy.true for w in witnesses)


def describe(keep: Any, ranges: Ranges) -> str:
    """A mask in the field's words: "causal", "causal & window(256)", "key padding" ..."""
    if keep == sympy.true:
        return "none"
    if keep == sympy.false:
        return "nothing"
    words = [_word(term, ranges) for term in conjuncts(keep)]
    lower = [w for w in words if w.startswith("after ")]
    if lower and "causal" in words:
        words = [f"window({w[6:]})" if w in lower else w for w in words]
    order = sorted(dict.fromkeys(words), key=lambda w: (w != "causal", w))
    return " & ".join(order)


def _pattern(term: Any) -> str | None:
    """What repeats: every so many keys, or nearness in the rows and columns of a grid."""
    if isinstance(term, (sympy.Le, sympy.Lt)) and isinstance(term.args[0], sympy.Abs) and term.args[1].is_Integer:
        width = term.args[1] - (1 if isinstance(term, sympy.Lt) else 0)
        found = _alike(term.args[0].args[0])
        return None if found is None else f"{found} ±{width}"
    if not isinstance(term, sympy.Eq):
        return None
    difference = sympy.expand(term.args[0] - term.args[1])
    same = _alike(difference)
    if same is not None:
        return f"same {same}"
    for quotient in difference.atoms(FloorDiv):
        x, n = quotient.args
        if n.is_Integer and x in (I - J, J - I) and sympy.expand(difference - (x - n * quotient)) == 0:
            return f"dilated({n})"
    return None


def _alike(difference: sympy.Expr) -> str | None:
    """ "rows of 8": of a grid of so many columns, for i // 8 - j // 8; "columns of 8", for i % 8 - j % 8."""
    for kinds, word in (((FloorDiv,), "rows"), ((Mod, PythonMod, sympy.Mod), "columns")):
        for part in difference.atoms(*kinds):
            n, other = part.args[1], part.xreplace({I: J, J: I})
            if part.args[0] in (I, J) and sympy.expand(difference - part + other) == 0:
                return f"{word} of {n}"
    return None


def _limited(term: Any) -> bool:
    """Whether a comparison holds the key, and nothing else of the position, to data that are the same for all keys."""
    if not isinstance(term, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return False
    loads = term.atoms(Load)
    outside = term.xreplace({load: sympy.Dummy() for load in loads}).free_symbols
    inside = set().union(*(load.free_symbols for load in loads))
    return bool(loads) and J in outside and not ({I, J} & inside or I in outside)


def _word(term: Any, ranges: Ranges) -> str:
    gap = _nonnegative_form(term)
    if gap is not None and not gap.atoms(Load):
        offset = sympy.expand(gap - (I - J))
        if not offset.free_symbols & {I, J, B, H}:
            if offset == 0:
                return "causal"
            if sympy.expand(offset - (ranges[J] - ranges[I])) == 0:
                return "causal (bottom-right)"
            return f"causal (offset {offset})"
        width = sympy.expand(gap + (I - J))
        if not width.free_symbols & {I, J, B, H}:
            return f"after {width + 1}"
        if gap.free_symbols & {I, J} == {J} and J not in sympy.expand(gap + J).free_symbols:
            return f"prefix({sympy.expand(gap + J) + 1})"
    if isinstance(term, sympy.Or):
        return "(" + " | ".join("prefix from data" if _limited(t) else describe(t, ranges) for t in term.args) + ")"
    bounds = _key_bound(term)
    if bounds is not None and None not in bounds:
        if isinstance(term, sympy.Eq):
            return f"chunks({term.args[0].args[1]})"
        return f"window(±{sympy.expand(bounds[1] - I - 1)})"
    pattern = _pattern(term)
    if pattern is not None:
        return pattern
    loads = term.atoms(Load) if isinstance(term, sympy.Basic) else set()
    symbols = term.free_symbols & {B, H, I, J}
    if loads and isinstance(term, sympy.Eq) and len(loads) == 2 and symbols >= {I, J}:
        return "documents"
    if loads and gap is not None:
        return "limit from data"
    if loads and J in symbols and I not in symbols:
        return "key padding"
    if any({I, J} <= load.free_symbols for load in loads):
        return "dense mask"
    if loads and I in symbols and J in symbols:
        return "positions from data"
    if loads:
        return "mask from data"
    return str(term)
