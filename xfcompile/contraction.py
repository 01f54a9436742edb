"""Matrix products by meaning: every spelling becomes an einsum with one label a dimension."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from xfcompile.site import Miss
from xfcompile.values import Value

CONTRACTIONS = frozenset({"matmul", "einsum"})


@dataclass(frozen=True)
class Contraction:
    """out[out_labels] = sum over shared, absent labels of lhs[lhs_labels] * rhs[rhs_labels]."""

    value: Value
    lhs: Value
    rhs: Value
    lhs_labels: str
    rhs_labels: str
    out_labels: str

    @cached_property
    def summed(self) -> frozenset[str]:
        return frozenset(self.lhs_labels + self.rhs_labels) - frozenset(self.out_labels)

    def swapped(self) -> Contraction:
        return Contraction(self.value, self.rhs, self.lhs, self.rhs_labels, self.lhs_labels, self.out_labels)


def contraction(value: Value) -> Contraction | None:
    """The product that a value is; None if it is none; `Miss` if it is one that has no two operands to tell apart."""
    if value.op == "matmul":
        return _matmul(value)
    if value.op == "einsum":
        return _einsum(value)
    return None


def _matmul(value: Value) -> Contraction | None:
    lhs, rhs = value["self"], value["other"]
    if lhs.ndim < 2 or rhs.ndim < 2:
        return None
    batch = "".join(chr(ord("A") + k) for k in range(value.ndim - 2))
    return Contraction(
        value,
        lhs,
        rhs,
        batch[len(batch) - (lhs.ndim - 2) :] + "xd",
        batch[len(batch) - (rhs.ndim - 2) :] + "dy",
        batch + "xy",
    )


def _einsum(value: Value) -> Contraction | None:
    tensors = value["tensors"]
    if len(tensors) != 2:
        return None
    equation = value["equation"].replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if "." in equation:
        terms, out = _ellipsis(terms, out, tensors, bool(arrow))
    if not arrow:
        letters = "".join(terms)
        free = sorted(c for c in set(letters) if letters.count(c) == 1 and not c.isdigit())
        out = "".join(sorted({c for c in letters if c.isdigit()})) + "".join(free)
    if any(len(set(t)) != len(t) for t in (*terms, out)):
        raise Miss(f"einsum {value['equation']!r} takes a diagonal", value)
    return Contraction(value, tensors[0], tensors[1], terms[0], terms[1], out)


def _ellipsis(terms: list[str], out: str, tensors: tuple[Value, ...], arrow: bool) -> tuple[list[str], str]:
    """Replace '...' by labels of their own (digits), aligned at the right."""
    widths = [t.ndim - (len(term) - 3) if "..." in term else 0 for term, t in zip(terms, tensors, strict=True)]
    digits = "0123456789"[: max(widths)]
    terms = [term.replace("...", digits[len(digits) - w :]) for term, w in zip(terms, widths, strict=True)]
    return terms, out.replace("...", digits) if arrow else out
