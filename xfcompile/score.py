"""The vocabulary of scores: one sympy expression says what stands between the dot product and the softmax.

A score is a function of `S` (the raw dot product q·k, in fp32), of the position `B, H, I, J` (batch, head, query, key),
of scalars (any other free symbol: symbolic sizes, a scale known only at run time) and of *loads*, `Load(n, *indices)`:
the element of operand `n` at computed indices. Casts between floating dtypes are the identity: scores are real numbers,
evaluated in fp32 by kernels.
"""

from __future__ import annotations

import sympy

S = sympy.Symbol("s", real=True)
B, H, I, J = sympy.symbols("b h i j", integer=True, nonnegative=True)
POSITION = (B, H, I, J)


class Load(sympy.Function):
    """`Load(n, *indices)`: one element of operand `n`; a real number, whatever the operand's dtype (bool is 0 or 1)."""

    is_real = True
    is_number = False  # an element of a 0-d tensor has no free symbols, and is no constant all the same

    @property
    def operand(self) -> int:
        return int(self.args[0])

    @property
    def indices(self) -> tuple[sympy.Expr, ...]:
        return self.args[1:]

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"t{self.operand}[{', '.join(printer._print(x) for x in self.indices)}]"

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.S.Zero


class Rounded(sympy.Function):
    """`Rounded(x, digits)`: x as a float of so many binary digits holds it: 11 (fp16), 8 (bf16) or 24 (fp32).

    Scores are real numbers, but where a large number is added to them it matters how little of them is left.
    """

    nargs = 2
    is_extended_real = True

    def _sympystr(self, printer: sympy.printing.StrPrinter) -> str:
        return f"{ROUNDED[int(self.args[1])]}({printer._print(self.args[0])})"


ROUNDED = {11: "float16", 8: "bfloat16", 24: "float32"}
"""The dtypes that `Rounded` knows, by their binary digits."""


class Where(sympy.Function):
    """`Where(condition, a, b)`: a where the condition holds, else b. Piecewise without its costly canonical forms."""

    nargs = 3

    @classmethod
    def eval(cls, condition: sympy.Basic, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        if condition == sympy.true or a == b:
            return a
        if condition == sympy.false:
            return b
        return None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        condition, a, b = self.args
        return Where(condition, a.diff(symbol), b.diff(symbol))

    def _eval_is_real(self) -> bool | None:
        return True if self.args[1].is_real and self.args[2].is_real else None

    def _eval_is_extended_real(self) -> bool | None:
        return True if self.args[1].is_extended_real and self.args[2].is_extended_real else None

    def _eval_is_integer(self) -> bool | None:
        return True if self.args[1].is_integer and self.args[2].is_integer else None
