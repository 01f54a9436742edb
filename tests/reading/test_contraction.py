"""Every spelling of a product is one einsum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from evaluate import captured

from xfcompile.contraction import Contraction, contraction
from xfcompile.read import Reading
from xfcompile.site import Miss
from xfcompile.values import Value

A, B = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)


def product(fn: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[Contraction | None, torch.Tensor]:
    gm = captured(fn, inputs)
    reading = Reading(gm)
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0][0]
    value = reading.value(output)
    assert isinstance(value, Value)
    return contraction(value), fn(*inputs)


SPELLINGS: dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor, torch.Tensor]] = {
    "matmul": (lambda a, b: torch.matmul(a, b), A, B.mT.contiguous()),
    "matmul of other ranks": (lambda a, b: a @ b, A, B[0, 0].mT.contiguous()),
    "matmul, lhs of lower rank": (lambda a, b: a @ b, A[0, 0], B.mT.contiguous()),
    "matmul that broadcasts": (lambda a, b: a @ b, A[:, :1], B.mT.contiguous()),
    "mm": (lambda a, b: torch.mm(a, b), A[0, 0], B[0, 0].mT.contiguous()),
    "bmm": (lambda a, b: torch.bmm(a, b), A[0], B[0].mT.contiguous()),
    "einsum": (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), A, B),
    "einsum, spaces": (lambda a, b: torch.einsum(" b h i d, b h j d -> b h i j", a, b), A, B),
    "einsum, ellipsis": (lambda a, b: torch.einsum("...id,...jd->...ij", a, b), A, B),
    "einsum, ellipsis of unequal ranks": (lambda a, b: torch.einsum("...id,...jd->...ij", a, b), A, B[0]),
    "einsum, ellipsis last": (lambda a, b: torch.einsum("bh...d,bhjd->bhj...", a, b), A, B),
    "einsum, implicit": (lambda a, b: torch.einsum("iz,jz", a, b), A[0, 0], B[0, 0]),
    "einsum, implicit, letters out of order": (lambda a, b: torch.einsum("zx,ax", a, b), A[0, 0], B[0, 0]),
    "einsum, implicit with ellipsis": (lambda a, b: torch.einsum("...iz,...jz", a, b), A, B),
    "einsum, permuted": (lambda a, b: torch.einsum("bhid,bhjd->jihb", a, b), A, B),
    "einsum, two axes contracted": (lambda a, b: torch.einsum("bhid,bhjd->bij", a, b), A, B),
    "einsum, capitals beside small": (lambda a, b: torch.einsum("bBdD,bBiD->bBdi", a, b), A, B),
}


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_labels_say_what_is_computed(name: str) -> None:
    fn, a, b = SPELLINGS[name]
    found, result = product(fn, a, b)
    assert found is not None
    # Digits label what '...' stands for; einsum itself knows letters only.
    letters = {c: chr(ord("m") + int(c)) for c in "0123456789" if c in found.lhs_labels + found.rhs_labels}
    terms = [
        "".join(letters.get(c, c) for c in labels) for labels in (found.lhs_labels, found.rhs_labels, found.out_labels)
    ]
    sizes = dict(zip(terms[0], a.shape, strict=True))
    grown = [
        s.expand([max(sizes.get(c, n), n) for c, n in zip(t, s.shape, strict=True)])
        for t, s in zip(terms[1:2], [b], strict=True)
    ]
    torch.testing.assert_close(torch.einsum(f"{terms[0]},{terms[1]}->{terms[2]}", a, grown[0]), result)


def test_what_is_summed() -> None:
    found, _ = product(lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), A, B)
    assert found is not None and found.summed == {"d"}
    assert found.swapped().lhs is found.rhs and found.swapped().summed == {"d"}


def test_a_diagonal_is_refused() -> None:
    with pytest.raises(Miss, match="diagonal"):
        product(lambda a, b: torch.einsum("bhii,bhid->bhid", a, b), torch.randn(2, 3, 4, 4), A)


@pytest.mark.parametrize(
    "fn",
    [lambda a, b: a + b, lambda a, b: a @ b[0, 0, 0], lambda a, b: torch.einsum("bhid,bhid,d->bhi", a, b, a[0, 0, 0])],
)
def test_no_product_of_two(fn: Callable[..., torch.Tensor]) -> None:
    found, _ = product(fn, A, A)
    assert found is None
