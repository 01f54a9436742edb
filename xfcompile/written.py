"""Reads what `sympy.srepr` has written, and nothing else: a formula that came with a program is not run as code."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import sympy

CONSTANTS = {"oo", "nan", "zoo", "pi", "E", "I", "true", "false"}

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
"""What a symbol may be called: formulas are printed into the text of kernels."""


def formula_of(text: str, functions: Mapping[str, Any]) -> sympy.Basic:
    """The formula that a text stands for. functions: what it may call besides sympy's own, by name; what is no kind of
    expression among them is left out.

    Raises ValueError for any other text.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"no formula: {text[:80]!r} ({type(error).__name__})") from error
    found = _read(tree, {**functions, **vars(sympy)})
    if not isinstance(found, sympy.Basic):
        raise ValueError(f"no formula: {text[:80]!r}")
    return found


def _read(tree: ast.expr, scope: Mapping[str, Any]) -> Any:
    match tree:
        case ast.Constant(value=bool() | int() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int()) | ast.Name() as positive):
            return -_read(positive, scope)
        case ast.Name(id=name) if name in CONSTANTS:
            return scope[name]
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
            if not NAME.fullmatch(name):
                raise ValueError(f"no name of a symbol: {name[:80]!r}")
            return sympy.Symbol(name, **_keywords(keywords))
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))], keywords=keywords):
            return sympy.Float(digits, **_keywords(keywords))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            kind = scope.get(name)
            if isinstance(kind, type) and issubclass(kind, sympy.Basic):
                return kind(*(_read(arg, scope) for arg in args))
    raise ValueError(f"no part of a formula: {ast.unparse(tree)[:80]!r}")


def _keywords(keywords: list[ast.keyword]) -> dict[str, Any]:
    found = {k.arg: k.value.value for k in keywords if k.arg is not None and isinstance(k.value, ast.Constant)}
    if len(found) != len(keywords) or not all(isinstance(value, int) for value in found.values()):
        raise ValueError("no part of a formula: a keyword that is no number and no assumption")
    return found
