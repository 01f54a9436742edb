"""Exponentials of a kernel for Hopper, some of them by a polynomial.

A multiprocessor has 16 units for special functions, and 128 that multiply and add. Where a score takes a tanh and an
exponential, the former are what its kernel waits for; powers of two of which some come of ten instructions of the
latter are done earlier (Zadouri et al., FlashAttention-4, 2026, have it for Blackwell).
"""

from __future__ import annotations

import struct
import textwrap

PACK = 8
"""Numbers of a thread that are exponentiated together."""

LEAST = -127.0
"""Powers below are 0, as those of `ex2.approx.ftz` are."""

COEFFICIENTS = (0.6931241932597003, 0.24024098615742262, 0.05590642594240539, 0.009582853235505315)
"""Of 2**f - 1 for f in -1/2 ... 1/2, by powers of f: within 2.8e-6 of 2**f (examples/fit_exp2.py). Weights are rounded
to 16 bits, which is 170 times as much."""

NEAREST = 1.5 * 2**23 + 127
"""A number that is added to this is rounded to an integer, which stands in the last bits, an exponent's bias added."""


def text(eighths: int, bounded: bool) -> str:
    """The function `exp2` of a module: so many of eight by the polynomial, in turns with the others. bounded: nothing
    that it is given is less than `LEAST`, but for a rounding."""
    by_polynomial = {n * PACK // eighths for n in range(eighths)}
    body = "\n".join(_polynomial(n, bounded) if n in by_polynomial else _special(n) for n in range(PACK))
    bounds = f"between {LEAST:g} and 128" if bounded else "less than 128"
    lines = "\n".join(["{", body, "}"])
    constraints = ",".join(["=f"] * PACK + ["f"] * PACK)
    return "\n".join(
        [
            "@gluon.jit",
            "def exp2(x):",
            f'    """Of {PACK} of a thread\'s numbers, which are {bounds}, {eighths} by a polynomial."""',
            '    return gl.inline_asm_elementwise("""',
            textwrap.indent(lines, "        "),
            f'        """, "{constraints}",',
            f"        [x], dtype=gl.float32, is_pure=True, pack={PACK})",
            "",
        ]
    )


def _special(n: int) -> str:
    return f"ex2.approx.ftz.f32 ${n}, ${n + PACK};"


def _polynomial(n: int, bounded: bool) -> str:
    """2**x = 2**i 2**f for the integer i that is nearest to x. NaN stays what it is."""
    given = f"${n + PACK}"
    x, i, f, p, scale = (f"{name}{n}" for name in ("x", "i", "f", "p", "scale"))
    *rest, last = COEFFICIENTS
    steps = [f"fma.rn.f32 {p}, {f}, {p}, {_float(c)};" for c in (*reversed(rest), 1.0)]
    return "\n".join(
        [
            f".reg .f32 {x}, {i}, {f}, {p};",
            f".reg .b32 {scale};",
            f"mov.f32 {x}, {given};" if bounded else f"max.NaN.f32 {x}, {given}, {_float(LEAST)};",
            f"add.rn.f32 {i}, {x}, {_float(NEAREST)};",
            f"mov.b32 {scale}, {i};",
            f"shl.b32 {scale}, {scale}, 23;",
            f"sub.rn.f32 {i}, {i}, {_float(NEAREST)};",
            f"sub.rn.f32 {f}, {x}, {i};",
            f"mov.f32 {p}, {_float(last)};",
            *steps,
            f"mov.b32 {i}, {scale};",
            f"mul.rn.f32 ${n}, {p}, {i};",
        ]
    )


def _float(x: float) -> str:
    """A number of PTX."""
    return f"0f{struct.pack('>f', x).hex().upper()}"
