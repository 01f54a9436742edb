"""Finds the guards of a source file, and breaks them one at a time: what is refused then is not refused any more.

A guard is one of
- "if": an `if` that does nothing but refuse (raise, return a constant, continue, break); of an `or`, each part is one;
- "raise": a `raise` of a `Miss` that is not the only statement of an `if`;
- "none": a choice of which one side is None or False: `x if proved else None`;
- "and": one part of the conjunction that a function of type bool returns.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

FILES = tuple(
    "patterns/attention.py patterns/gated_mlp.py patterns/bias_act_dropout.py patterns/pointwise.py "
    "xfcompile/read.py xfcompile/interpret.py xfcompile/memory.py xfcompile/example.py xfcompile/called.py "
    "xfcompile/scope.py xfcompile/programs.py "
    "xfcompile/operands.py xfcompile/masks.py xfcompile/masking.py xfcompile/liveness.py "
    "xfcompile/elementwise/elements.py xfcompile/elementwise/constants.py xfcompile/elementwise/digits.py "
    "xfcompile/elementwise/arithmetic.py xfcompile/elementwise/logic.py xfcompile/elementwise/casts.py "
    "xfcompile/elementwise/rows.py xfcompile/elementwise/views.py xfcompile/elementwise/positions.py "
    "xfcompile/elementwise/pieces.py xfcompile/elementwise/gathering.py xfcompile/elementwise/sequences.py "
    "xfcompile/magnitude.py xfcompile/activation.py xfcompile/projections.py xfcompile/rewrite.py xfcompile/makers.py "
    "xfcompile/replace.py xfcompile/contraction.py xfcompile/indexing.py xfcompile/emit.py xfcompile/trace.py "
    "xfcompile/unfold.py xfcompile/plan.py xfcompile/layout.py xfcompile/layout_seen.py xfcompile/gated_routes.py "
    "xfcompile/diagonal.py xfcompile/query_key.py "
    "xfcompile/values.py xfcompile/families/attention.py xfcompile/families/gated_mlp.py "
    "xfcompile/families/bias_act_dropout.py".split()
)
"""The files whose guards decide what is matched and how it is replaced."""

RECORDER = "__guard_fired__"

REFUSALS = ("Miss", "Near", "RewriteError", "Unsupported")


@dataclass(frozen=True)
class Guard:
    """file, the function that it stands in, and its text; `nth` tells equal texts of a function apart.

    `name` does not change where lines are added elsewhere.
    """

    file: str
    function: str
    kind: str
    text: str
    nth: int
    line: int

    @property
    def name(self) -> str:
        more = f" #{self.nth + 1}" if self.nth else ""
        return f"{self.file}:{self.function}: {self.kind} {self.text}{more}"


def source(file: str) -> str:
    return (ROOT / file).read_text()


def guards(file: str) -> list[Guard]:
    """The guards of a file, in the order in which they stand there."""
    return [guard for guard, _ in _found(ast.parse(source(file)), file)]


def broken(file: str, name: str, text: str | None = None) -> str:
    """The file's source (or `text`, a copy of it) with one guard broken."""
    tree = ast.parse(source(file) if text is None else text)
    for guard, node in _found(tree, file):
        if guard.name == name:
            return ast.unparse(ast.fix_missing_locations(_Change({node: _breaking(guard, node)}).visit(tree)))
    raise KeyError(name)


def recording(file: str) -> str:
    """The file's source, in which every guard calls `RECORDER` (a builtin) with its name when it refuses."""
    tree = ast.parse(source(file))
    changes: dict[ast.AST, ast.AST] = {}
    for guard, node in _found(tree, file):
        call = ast.Call(ast.Name(RECORDER, ast.Load()), [ast.Constant(guard.name)], [])
        if guard.kind == "raise":
            changes[node] = ast.If(ast.Constant(True), [ast.Expr(call), node], [])
            continue
        # (kept := test) and fired() ...: a value that is true where the test is, with the call made only there.
        test = _refusing(guard, node)
        fired = ast.BoolOp(ast.Or(), [call, ast.Constant(True)])
        if guard.kind == "if":
            changes[node] = ast.BoolOp(ast.And(), [test, fired])
        elif guard.kind == "and":
            changes[node] = ast.BoolOp(ast.Or(), [node, ast.BoolOp(ast.And(), [call, ast.Constant(False)])])  # type: ignore[list-item]
        else:
            assert isinstance(node, ast.IfExp)
            if _nothing(node.body):
                changed = ast.BoolOp(ast.And(), [test, fired])
            else:
                changed = ast.BoolOp(ast.Or(), [node.test, ast.BoolOp(ast.And(), [call, ast.Constant(False)])])
            changes[node.test] = changed
    return ast.unparse(ast.fix_missing_locations(_Change(changes).visit(tree)))


def _refusing(guard: Guard, node: ast.AST) -> ast.expr:
    if guard.kind == "none":
        assert isinstance(node, ast.IfExp)
        return node.test
    assert isinstance(node, ast.expr)
    return node


def _breaking(guard: Guard, node: ast.AST) -> ast.AST:
    if guard.kind == "raise":
        return ast.Pass()
    if guard.kind == "if":
        return ast.Constant(False)
    if guard.kind == "and":
        return ast.Constant(True)
    assert isinstance(node, ast.IfExp)
    return node.orelse if _nothing(node.body) else node.body


class _Change(ast.NodeTransformer):
    def __init__(self, changes: dict[ast.AST, ast.AST]) -> None:
        self.changes = changes

    def visit(self, node: ast.AST) -> ast.AST:
        instead = self.changes.pop(node, None)
        return self.generic_visit(node) if instead is None else self.visit(instead)


def _found(tree: ast.Module, file: str) -> Iterator[tuple[Guard, ast.AST]]:
    seen: dict[tuple[str, str, str], int] = {}
    for function, kind, node, text in _in(tree, "", False):
        key = (function, kind, text)
        nth = seen[key] = seen.get(key, -1) + 1
        yield Guard(file, function, kind, text, nth, getattr(node, "lineno", 0)), node


def _in(node: ast.AST, function: str, says: bool) -> Iterator[tuple[str, str, ast.AST, str]]:
    """(function, kind, node, text) of each guard under a node. says: whether the function is of type bool."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}" if function else node.name
        says = isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name) and node.returns.id == "bool"
    if isinstance(node, ast.If) and _refuses(node.body):
        parts = (
            node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or) else [node.test]
        )
        for part in parts:
            if not isinstance(part, ast.Constant):
                yield function, "if", part, ast.unparse(part)
        for child in (*parts, *node.orelse):
            yield from _in(child, function, says)
        return
    if isinstance(node, ast.Raise) and _is_refusal(node):
        yield function, "raise", node, ast.unparse(node)
    if isinstance(node, ast.IfExp) and _nothing(node.body) != _nothing(node.orelse):
        yield function, "none", node, ast.unparse(node)
    if isinstance(node, ast.Return) and says:
        value = node.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "bool" and value.args:
            value = value.args[0]
        if isinstance(value, ast.BoolOp) and isinstance(value.op, ast.And):
            for part in value.values:
                yield function, "and", part, ast.unparse(part)
    for child in ast.iter_child_nodes(node):
        yield from _in(child, function, says)


def _refuses(body: list[ast.stmt]) -> bool:
    (only, *rest) = body
    if rest:
        return False
    if isinstance(only, ast.Raise):
        return _is_refusal(only)
    if isinstance(only, ast.Return):
        return only.value is None or isinstance(only.value, ast.Constant)
    return isinstance(only, (ast.Continue, ast.Break))


def _is_refusal(node: ast.Raise) -> bool:
    text = ast.unparse(node.exc) if node.exc is not None else ""
    return text.startswith((*REFUSALS, "reasons["))


def _nothing(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or node.value is False)
