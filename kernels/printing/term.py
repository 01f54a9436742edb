"""A piece of Triton's text, what it computes, and how tightly it binds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["bool", "int", "float"]

# Python's precedences: a term is put in parentheses where its own is lower than what its surroundings need.
COMPARE, OR, AND, SUM, PRODUCT, UNARY, ATOM = 1, 2, 3, 4, 5, 6, 7


@dataclass(frozen=True)
class Term:
    """Triton text, what it computes (`kind`), how tightly it binds, and whether it is a literal number."""

    text: str
    kind: Kind
    precedence: int = ATOM
    literal: bool = False

    def at(self, precedence: int) -> str:
        return self.text if self.precedence >= precedence else f"({self.text})"

    def as_float(self) -> Term:
        if self.kind == "float":
            return self
        if self.literal:
            return Term(f"{self.text}.0", "float", self.precedence, literal=True)
        return Term(f"tl.cast({self.text}, tl.float32)", "float")

    def as_number(self) -> Term:
        """What can be calculated with: a boolean as 0 or 1."""
        return Term(f"tl.cast({self.text}, tl.int32)", "int") if self.kind == "bool" else self


def kind_of(dtype: torch.dtype) -> Kind:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"
