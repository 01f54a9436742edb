"""From a formula of gate and up to the text of a Triton module: its own functions, and the kernels that call them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import sympy

from xfcompile.activation import GATE, UP, Sigmoid, separate
from xfcompile.evaluate import Unsupported
from xfcompile.kernels import philox
from xfcompile.kernels.attention.template import HELPERS
from xfcompile.kernels.gated_mlp import template
from xfcompile.kernels.printing.conditions import RELATIONS
from xfcompile.score import Where
from xfcompile.written import formula_of

SIGMOID = '''\
@triton.jit
def sigmoid(x):
    """exp(-x) may be infinite, of which the reciprocal is 0."""
    return 1.0 / (1.0 + tl.exp(-x))
'''


@dataclass
class Body:
    """The statements of a function that computes expressions in fp32, what several have in common once.

    helpers: gathers the names of the functions that the text calls.
    """

    lines: list[str] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)

    def text(self, x: sympy.Basic) -> str:
        """An expression; every operation is in parentheses, so that none depends on precedences."""
        if isinstance(x, sympy.Symbol):
            return str(x)
        if x.is_number:
            return repr(float(x)) if x >= 0 else f"({float(x)!r})"
        if isinstance(x, sympy.Add):
            return f"({' + '.join(self.text(a) for a in _numbers_last(x.args))})"
        if isinstance(x, sympy.Mul):
            return self._product(x)
        if isinstance(x, sympy.Pow):
            return self._power(x)
        if isinstance(x, Where):
            return f"tl.where({', '.join(self.text(a) for a in x.args)})"
        if type(x) in RELATIONS:
            return f"({self.text(x.args[0])} {RELATIONS[type(x)]} {self.text(x.args[1])})"
        if isinstance(x, Sigmoid):
            self.helpers.add("sigmoid")
            return f"sigmoid({self.text(x.args[0])})"
        if isinstance(x, sympy.tanh):
            self.helpers.add("tanh")
            argument = self.text(x.args[0])
            return f"tanh({argument}, {argument} * 2.8853900817779268, 0)"
        if isinstance(x, sympy.sign):
            argument = self.text(x.args[0])
            return f"tl.where({argument} > 0, 1.0, tl.where({argument} < 0, -1.0, {argument} * 0.0))"
        names = {sympy.erf: "tl.erf", sympy.exp: "tl.exp", sympy.Abs: "tl.abs"}
        if type(x) in names:
            return f"{names[type(x)]}({self.text(x.args[0])})"
        raise Unsupported(f"the kernel has no Triton form for {type(x).__name__} in {x}")

    def _product(self, x: sympy.Expr) -> str:
        if x.args[0] == -1:
            return f"(-{self.text(sympy.Mul(*x.args[1:]))})"
        # What is of gate alone first: gate * sigmoid(gate) is 0 where gate * up may be infinite.
        factors = sorted(x.args, key=lambda a: (not a.is_number, UP in a.free_symbols, GATE not in a.free_symbols))
        return f"({' * '.join(self.text(a) for a in factors)})"

    def _power(self, x: sympy.Expr) -> str:
        base, exponent = x.args
        if not exponent.is_Integer or not -4 <= exponent <= 4:
            raise Unsupported(f"the kernel has no Triton form for {x}")
        text = self.text(base)
        whole = f"({' * '.join([text] * abs(int(exponent)))})"
        return whole if exponent > 0 else f"(1.0 / {whole})"

    def compute(self, *expressions: sympy.Expr) -> list[str]:
        """Adds statements, and returns the text of the results."""
        names = sympy.numbered_symbols("x", real=True)
        common, results = sympy.cse(expressions, symbols=names, optimizations=[], order="none")
        for name, x in common:
            self.lines.append(f"{name} = {self.text(x)}")
        return [self.text(x) for x in results]


def _numbers_last(args: tuple[sympy.Basic, ...]) -> list[sympy.Basic]:
    return sorted(args, key=lambda a: bool(a.is_number))


def _function(name: str, doc: str, body: Body, results: list[str]) -> str:
    """A Triton function; constants become blocks."""
    blocks = [f"tl.full(gate.shape, {x}, tl.float32)" if _is_number(x) else x for x in results]
    lines = [f'"""{doc}"""', *body.lines, f"return {', '.join(blocks)}"]
    return f"@triton.jit\ndef {name}(gate, up):\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


def _is_number(text: str) -> bool:
    try:
        float(text.strip("()"))
    except ValueError:
        return False
    return True


def activation(formula: sympy.Expr, helpers: set[str]) -> str:
    """The product, of gate and up in fp32."""
    body = Body(helpers=helpers)
    apart = separate(formula)
    if apart is None:
        results = body.compute(formula)
    else:
        of_gate, of_up = body.compute(*apart)
        results = [f"({of_gate}) * ({of_up})" if apart[1] != 1 else of_gate]
    return _function("activation", "The product.", body, results)


def gradients(formula: sympy.Expr, helpers: set[str]) -> str:
    """The product, and its derivatives by gate and up."""
    body = Body(helpers=helpers)
    apart = separate(formula)
    if apart is None:
        results = body.compute(formula, sympy.diff(formula, GATE), sympy.diff(formula, UP))
    else:
        a, b = apart
        texts = body.compute(a, b, sympy.diff(a, GATE), sympy.diff(b, UP))
        body.lines += [f"{name} = {text}" for name, text in zip(("a", "b", "da", "db"), texts, strict=True)]
        results = ["a * b", "da * b", "a * db"]
    return _function("gradients", "The product, and its derivatives by gate and up.", body, results)


def generate(formula: sympy.Expr) -> str:
    """The module's text; raises Unsupported for what has no Triton form."""
    unknown = formula.free_symbols - {GATE, UP}
    if unknown:
        raise Unsupported(f"the kernel knows no {', '.join(sorted(map(str, unknown)))}: they are numbers of a run")
    helpers: set[str] = set()
    own = [activation(formula, helpers), gradients(formula, helpers)]
    texts = {"sigmoid": SIGMOID, "tanh": HELPERS["tanh"]}
    parts = [texts[name] for name in sorted(helpers)] + own + [philox.TEXT, template.KERNELS]
    head = f'"""Gated MLP, the product is {formula}; generated by xfcompile."""\n\n'
    head += f"import triton\nimport triton.language as tl\n\nFORMULA = {sympy.srepr(formula)!r}\n"
    return head + "\n\n" + "\n\n".join(part.strip("\n") + "\n" for part in parts)


def parse(text: str) -> sympy.Expr:
    """The formula that a generated module carries."""
    return formula_of(text, {"Where": Where, "Sigmoid": Sigmoid})
