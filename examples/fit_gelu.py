"""Fits what `kernels/pointwise.py` computes gelu of in 16 bits, and prints its numbers (seconds on a CPU).

For a >= 0, q(a) is the normal distribution's lower half, ndtr(-a), and h(a) = q(a) - a density(a) is gelu's derivative
at -a; those at a follow by symmetry.

- log2 q(a) = -1 + a P(a), which is smooth: one exponential and a polynomial. An error of it is a relative one of q; it
  may be as large as leaves the result for x = a alone, whose share q is, and FINEST of q.
- h(a) = exp(-a**2 / 2) (P(1 / (1 + p a)) + k a), as Abramowitz & Stegun have q in 26.2.17.

Both are fitted for the least of the largest weighted error, by Lawson's weights: those of a least-squares fit are
multiplied by its errors, again and again.
"""

from __future__ import annotations

import mpmath as mp
import numpy as np

END = 5.6
"""gelu(-END) is half of fp16's least number."""
FINEST = 2.0**-14
DEGREE = 8
POLE = 0.38
"""p, the best of 0.30, 0.31 ... 0.50."""


def minimax(f: np.ndarray, basis: np.ndarray, weight: np.ndarray, rounds: int = 400) -> tuple[float, np.ndarray]:
    """The largest weighted error, and the coefficients of the basis that make it least."""
    w = np.full(len(f), 1 / len(f))
    best: tuple[float, np.ndarray] = np.inf, np.zeros(basis.shape[1])
    for _ in range(rounds):
        root = np.sqrt(w) * weight
        c, *_ = np.linalg.lstsq(basis * root[:, None], f * root, rcond=None)
        error = np.abs(weight * (f - basis @ c))
        best = min(best, (float(error.max()), c), key=lambda found: found[0])
        w *= error + 1e-30
        w /= w.sum()
    return best


def main() -> None:
    mp.mp.dps = 40
    x = (1 - np.cos(np.linspace(0, np.pi, 1201))) / 2 * END
    exact = [mp.ncdf(-mp.mpf(float(a))) for a in x]
    q, log2_q = np.array([float(y) for y in exact]), np.array([float(mp.log(y, 2)) for y in exact])
    h = np.array([float(y - a * mp.npdf(mp.mpf(float(a)))) for a, y in zip(x, exact, strict=True)])

    powers = np.stack([x**k for k in range(1, DEGREE + 1)], 1)
    unit = 1e-7
    for _ in range(10):  # the error where it is least, in which those elsewhere are measured
        allowed = np.minimum(unit * np.maximum(1, (1 - q) / q / 2), FINEST)
        worst, c = minimax(log2_q + 1, powers, np.log(2) / allowed)
        unit *= worst
    print(f"log2 q: off by {unit:.2g} of 1, {FINEST:.2g} of q\n  {', '.join(map(repr, c.tolist()))}")
    far = np.linspace(0, 1000, 100_001)
    falls = bool((np.diff(sum(ck * far ** (k + 1) for k, ck in enumerate(c))) < 0).all())
    print(f"  falls all the way: {falls}")

    t, e = 1 / (1 + POLE * x), np.exp(-x * x / 2)
    allowed = np.minimum(1, np.maximum(8 * np.abs(h), 3e-3))
    worst, c = minimax(h / e, np.stack([*(t**k for k in range(5)), x], 1), e / allowed)
    print(f"h: off by {worst:.2g} of 1, {8 * worst:.2g} of h\n  {', '.join(map(repr, c.tolist()))}")


if __name__ == "__main__":
    main()
