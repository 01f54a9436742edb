"""Sums of positions times one number. Sympy multiplies 0.37 * (j - i) out, and of far positions digits are lost."""

from __future__ import annotations

from collections import defaultdict

import sympy

EXACT = 1e-12
"""How near a quotient of two numbers of a program (doubles) is to the whole number that it was, relatively."""


def summands(total: sympy.Add) -> list[sympy.Expr]:
    """The terms of a sum. Those that are whole multiples of one number are one product, which is not evaluated:
    0.37 * (j - i - 100) is rounded once, as in the program, and each of its three terms by itself."""
    found: defaultdict[sympy.Expr, list[tuple[sympy.Expr, sympy.Expr, sympy.Expr]]] = defaultdict(list)
    for term in total.args:
        number, rest = term.as_coeff_Mul()
        position, others = sympy.S.One, rest
        if rest.is_number:
            number, others = term, sympy.S.One
        else:
            for x in sympy.Mul.make_args(rest):
                if x.is_Symbol and x.is_integer:
                    position, others = x, rest / x
        if not others.free_symbols or all(x.is_Symbol for x in sympy.Mul.make_args(others)):
            found[others].append((number, position, term))
    gathered: dict[sympy.Expr, sympy.Expr] = {}
    for others, terms in found.items():
        steps = [abs(number) for number, position, _ in terms if position != 1 and not number.is_integer]
        if not steps:
            continue
        step = min(steps)
        ratios = {term: (number / step, position) for number, position, term in terms}
        multiples = {term: _whole(x) * position for term, (x, position) in ratios.items() if _is_whole(x)}
        if len(multiples) > 1 and others.is_positive:
            factors = () if others == 1 else sympy.Mul.make_args(others)
            product = sympy.Mul(step, *factors, sympy.Add(*multiples.values()), evaluate=False)
            gathered |= dict.fromkeys(multiples, product)
    return list(dict.fromkeys(gathered.get(term, term) for term in total.args))


def _whole(ratio: sympy.Expr) -> sympy.Integer:
    return sympy.Integer(round(float(ratio)))


def _is_whole(ratio: sympy.Expr) -> bool:
    x = float(ratio)
    return abs(x) < 2**53 and round(x) != 0 and abs(x - round(x)) <= EXACT * abs(x)
