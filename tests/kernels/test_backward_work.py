"""What a backward does not do: it visits no tile that the forward leaves out, and makes nothing that nobody wants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Inputs, Sizes, inputs, named
from torch import Tensor

from xfcompile.kernels.attention import launch, launch_backward, prepare, reference
from xfcompile.kernels.attention.backward_layout import Needs
from xfcompile.kernels.attention.repeat import Launch

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

TILE = 32  # at most as large as any that the interpreter is given
SIZES = Sizes(batch=1, heads=1, kv_heads=1, lq=200, lk=200, dq=8, dv=8)


def kept(case: Case, x: Inputs) -> Tensor:
    """[Lq, Lk], of the one batch and head."""
    shape = (1, 1, SIZES.lq, SIZES.lk)
    evaluate = reference.evaluator(case.spec, shape, x.operands, x.ints, x.floats, torch.float64, x.q.device)
    return torch.as_tensor(evaluate(case.spec.keep)).bool().expand(shape)[0, 0]


def dead(keep: Tensor, first: int, last: int, axis: int) -> Tensor:
    """Which positions along `axis` lie in tiles of which those from `first` to `last` along the other keep nothing."""
    any_kept = keep.narrow(1 - axis, first, last - first).any(1 - axis)
    tiles = torch.nn.functional.pad(any_kept, (0, -len(any_kept) % TILE)).unflatten(0, (-1, TILE)).any(1)
    return ~tiles.repeat_interleave(TILE)[: len(any_kept)]


CASES = ["causal", "window", "chunks", "documents", "near_in_documents", "some_documents"]


def case_of(name: str) -> Case:
    if name != "some_documents":
        return named(name)
    other = named("documents")
    return replace(other, operands=lambda z: [(torch.arange(z.lk) // 64 % 2).expand(z.batch, -1).contiguous()])


@pytest.mark.parametrize("name", CASES)
def test_tiles_that_the_forward_leaves_out_are_left_out_of_every_gradient(name: str) -> None:
    """What no query of a block may see is NaN, for dq; and what may see no key of a block, for dk and dv: a weight of 0
    would not hide it."""
    case = case_of(name)
    x = inputs(case, torch.float32, sizes=SIZES)
    keep = kept(case, x)
    dout = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, lse = launch.run(x.q, x.k, x.v, x.operands, x.ints, x.floats, prepare(case.spec))

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        more = (x.operands, x.ints, x.floats, prepare(case.spec), Needs(True, True, True))
        return launch_backward.run(dout, q, k, v, out, lse, *more)[:3]

    dq, dk, dv = run(x.q, x.k, x.v, dout, out, lse)
    found = 0
    for first in range(0, SIZES.lq, 2 * TILE):
        last = min(first + TILE, SIZES.lq)
        keys = dead(keep, first, last, 1)
        k, v = (y.masked_fill(keys[:, None], torch.nan) for y in (x.k, x.v))
        assert torch.equal(run(x.q, k, v, dout, out, lse)[0][:, :, first:last], dq[:, :, first:last])
        rows = dead(keep, first, last, 0)
        q, of_out, of_dout = (y.masked_fill(rows[:, None], torch.nan) for y in (x.q, out, dout))
        made = run(q, x.k, x.v, of_dout, of_out, lse)
        for ours, right in zip(made[1:], (dk, dv), strict=True):
            assert torch.equal(ours[:, :, first:last], right[:, :, first:last])
        found += int(keys.sum() + rows.sum())
    assert found > SIZES.lq // 2, "next to no tile is left out"


@pytest.mark.parametrize(
    ("batch", "wanted", "launched"),
    [
        (2, (True, True, True, ()), ["dq", "dkdv"]),
        (2, (True, False, False, ()), ["dq"]),
        (2, (False, True, False, ()), ["dq", "dkdv"]),
        (2, (False, False, True, ()), ["dq", "dkdv"]),
        (2, (True, False, False, (0,)), ["dq", "load0"]),
        (2, (False, False, False, (0,)), ["dq", "load0"]),
        (1, (True, False, False, (0,)), ["dq"]),
        (1, (False, False, False, (0,)), ["dq"]),
        (1, (False, True, True, ()), ["dq", "dkdv"]),
    ],
    ids=str,
)
def test_kernels_of_gradients_that_nobody_wants_are_not_launched(
    batch: int, wanted: tuple[bool, bool, bool, tuple[int, ...]], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That for dq finds delta first, which all others read: where dq is not wanted it has no loop over keys, if it does
    not write what a bias has of each score."""
    case = named("bias_hij")
    x = inputs(case, torch.float32, sizes=Sizes(batch, heads=2, kv_heads=2, lq=40, lk=40, dq=8, dv=8))
    kernels: list[tuple[str, dict[str, object]]] = []
    call = Launch.__call__

    def counted(self: Launch, *args: object) -> object:
        name = self.kernel.fn.__name__.removeprefix("attention_backward_")
        kernels.append((name, dict(self.constants)))
        return call(self, *args)  # type: ignore[arg-type]

    with torch.no_grad():
        out, lse = launch.run(x.q, x.k, x.v, x.operands, x.ints, x.floats, prepare(case.spec))
        monkeypatch.setattr(Launch, "__call__", counted)
        more = (x.operands, x.ints, x.floats, prepare(case.spec), Needs(*wanted))
        made = launch_backward.run(torch.randn(x.q.shape), x.q, x.k, x.v, out, lse, *more)
    assert [name for name, _ in kernels] == launched
    constants = dict(kernels)
    writes = bool(wanted[3]) and batch == 1
    assert constants["dq"]["NEED_DQ"] == wanted[0] and constants["dq"]["LOOP"] == (wanted[0] or writes)
    assert constants["dq"].get("WRITE0", False) == writes
    if "dkdv" in constants:
        assert (constants["dkdv"]["NEED_DK"], constants["dkdv"]["NEED_DV"]) == wanted[1:3]
    sizes = [bool(y.numel()) for y in (*made[:3], *made[3])]
    assert sizes == [*wanted[:3], wanted[3] == (0,)], "memory of what nobody wants"
