"""What stands between a softmax and its product with values: casts, views, dropout, and masks that set weights to 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from xfcompile.contraction import CONTRACTIONS, Contraction, contraction
from xfcompile.elementwise.constants import as_boolean, as_number, literal
from xfcompile.elementwise.elements import Elements
from xfcompile.elementwise.positions import Index, broadcast
from xfcompile.operands import Walk
from xfcompile.score import Where
from xfcompile.site import Miss
from xfcompile.values import Value, depends

_CARRIES = frozenset({"to", "dropout", "reshape", "permute", "expand", "slice", "detach", "nan_to_num"})
_MASKS = {"where": ("self", "other"), "mul": ("self", "other")}
"""What may set weights to 0 once more, and by which names it takes them."""


def products(anchor: Value, users: dict[Value, list[Value]]) -> Iterator[Contraction]:
    """The products that the softmax's weights go into, through casts, dropout, views, and masks of the weights."""
    todo = [anchor]
    while todo:
        value = todo.pop()
        for user in users.get(value, ()):
            if (user.op in _CARRIES and user["self"] is value) or mask_of(user, value) is not None:
                todo.append(user)
            if user.op not in CONTRACTIONS:
                continue
            found = contraction(user)
            if found is None:
                continue
            if found.lhs is value and found.rhs is not value:
                yield found
            elif found.rhs is value and found.lhs is not value:
                yield found.swapped()


def mask_of(user: Value, weights: Value) -> Value | None:
    """What says which weights are left, if that is what `user` does with them: the condition of a choice, or a mask of
    booleans, as numbers perhaps, that they are multiplied by."""
    if user.op not in _MASKS:
        return None
    one, other = (user[name] for name in _MASKS[user.op])
    if (one is weights) == (other is weights):
        return None
    if user.op == "where":
        return user["condition"]
    mask = source = other if one is weights else one
    while isinstance(source, Value) and source.op in ("to", "reshape", "permute", "expand"):
        source = source["self"]
    return mask if isinstance(source, Value) and source.dtype == torch.bool else None


@dataclass(frozen=True)
class Masking:
    """A mask of weights (see `mask_of`), at an element of them. multiplied: by it, which leaves NaN what is NaN."""

    value: Value
    weights: Value
    mask: Value
    index: Index

    @property
    def multiplied(self) -> bool:
        return self.value.op == "mul"

    def keep(self, elements: Elements) -> Any:
        """Where weights are left."""

        def at(x: Value) -> Any:
            return elements.at(x, broadcast(self.index, self.value.shape, x.shape))

        if self.multiplied:
            found = at(self.mask)
            number = as_number(found) if self.mask.dtype != torch.bool else Where(as_boolean(found), 1, 0)
            if number == Where(sympy.true, 1, 0):
                return sympy.true
            if isinstance(number, Where) and set(number.args[1:]) == {sympy.S.Zero, sympy.S.One}:
                return number.args[0] if number.args[1] == 1 else sympy.Not(number.args[0])
            raise Miss("the weights are multiplied by what is not 0 or 1", self.value)
        first = self.value["self"] is self.weights
        filled = self.value["other" if first else "self"]
        if (as_number(at(filled)) if isinstance(filled, Value) else literal(filled)) != 0:
            raise Miss("weights are replaced, and not by 0", self.value)
        condition = as_boolean(at(self.mask))
        return condition if first else sympy.Not(condition)


def back_to(anchor: Value, weights: Value, at: Index, walk: Walk) -> tuple[Index, float, bool, list[Masking]]:
    """The index into the softmax of an element of the weights, the dropout on the way, whether NaN becomes 0, and the
    masks on the way."""
    value, index, dropout, zeroed = weights, at, 0.0, False
    maskings: list[Masking] = []
    known: dict[Value, bool] = {}
    while value is not anchor:
        if value.op == "dropout":
            if dropout:
                raise Miss("the weights are dropped out twice", value)
            dropout = float(value["p"])
            value = value["self"]
        elif value.op == "to" and value.dtype.is_floating_point:
            value = value["self"]
        elif value.op == "nan_to_num" and value.args.get("nan") in (None, 0):  # weights are never infinite
            value, zeroed = value["self"], True
        elif (masked := _masked(value, anchor, known)) is not None:
            weights, mask = masked
            if _clears_nan(value, weights, mask):
                value, index, zeroed = weights, broadcast(index, value.shape, weights.shape), True
                continue
            if depends(mask, anchor, known):
                raise Miss("weights are masked by what depends on them", value)
            maskings.append(Masking(value, weights, mask, index))
            value, index = weights, broadcast(index, value.shape, weights.shape)
        else:
            step = walk.back(value, index)
            if step is None:
                raise Miss(f"{value.op} stands between the softmax and the values", value)
            value, index = step
    return index, dropout, zeroed, maskings


def _clears_nan(value: Value, weights: Value, mask: Value) -> bool:
    """Whether a choice has 0 in place of NaN, as `nan_to_num` does: where(isnan(w), 0, w)."""
    if value.op != "where":
        return False
    first = value["self"] is weights
    mask, negated = (mask["self"], True) if mask.op == "not" else (mask, False)
    if mask.op == "isnan":
        tested, says_nan = mask["self"], True
    elif mask.op in ("ne", "eq") and mask["self"] is mask["other"]:
        tested, says_nan = mask["self"], mask.op == "ne"
    else:
        return False
    return tested is weights and (says_nan != negated) != first and _is_zero(value["other" if first else "self"])


def _is_zero(x: Any) -> bool:
    while isinstance(x, Value) and x.op in ("to", "reshape", "permute", "expand"):
        x = x["self"]
    if isinstance(x, Value):
        return x.op == "full" and literal(x["fill"]) == 0
    return bool(literal(x) == 0)


def _masked(value: Value, anchor: Value, known: dict[Value, bool]) -> tuple[Value, Value] | None:
    """Which weights `value` sets to 0 somewhere, if that is what it does, and by what mask."""
    for name in _MASKS.get(value.op, ()):
        weights = value[name]
        mask = mask_of(value, weights) if isinstance(weights, Value) else None
        if mask is not None and depends(weights, anchor, known):
            return weights, mask
    return None


def emptied(root: Value, predicate: Any, left: Any, alive: bool, lower: bool) -> bool:
    """Whether a row that sees no key has its weights set to 0. predicate: where keys are kept. left: where weights are
    left. lower: whether a key that is kept may score as low as one that is not.

    Raises `Miss` where weights are set to 0 that were not: those of a row do not add up to 1 then.
    """
    if left == sympy.true:
        return False
    if _says(predicate, left):
        if lower:
            raise Miss("weights are masked that may not be 0: keys that are kept may score as low as masked ones", root)
        if alive or left == predicate:
            return True
        raise Miss("a row may see no key, and some of its weights are left", root)
    raise Miss("weights are masked where their scores were not: those of a row do not add up to 1", root)


def left_of_dead(root: Value, dead: str, chosen: Any, predicate: Any) -> str:
    """What a row that sees no key yields, whose weights are 0 then, or times 0. dead: what it would yield else."""
    if dead in ("mean", "zero") or chosen == predicate:
        return "zero"
    if dead == "nan" and chosen == sympy.true:
        return dead  # NaN times 0
    raise Miss("a row may see no key, and which of its weights are NaN is not known", root)


def _says(predicate: Any, other: Any) -> bool:
    """Whether one predicate says the other, as far as its terms show."""
    return bool(
        other in (predicate, sympy.true) or set(sympy.And.make_args(other)) <= set(sympy.And.make_args(predicate))
    )
