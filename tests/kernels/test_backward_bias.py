"""Gradients by a bias of each score: which kernel writes them, where no tile is visited, and that they are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import hopper_in_torch
import in_turns
import pytest
import sympy
import torch
from attention_cases import FLOAT, Case, Inputs, Sizes, inputs, named, normal
from backward_cases import check
from bias_cases import AXES, MASKS, biased
from dropout_cases import check as check_dropout
from hopper_cases import dense
from torch import Tensor

from xfcompile.kernels.attention import backward_call, launch_hopper_backward, lists_sizes, tiles
from xfcompile.kernels.attention.repeat import Blank, Launch
from xfcompile.score import B, H, I, J, Load
from xfcompile.site import Operand

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> list[str]:
    """The names of kernels; what they do not write is NaN."""
    names: list[str] = []
    call = Launch.__call__

    def counted(self: Launch, tensors: Sequence[Tensor], free: Sequence[Any] = ()) -> Any:
        names.append(self.kernel.fn.__name__.removeprefix("attention_"))
        return call(self, tensors, free)

    monkeypatch.setattr(Launch, "__call__", counted)
    monkeypatch.setattr(Blank, "__call__", poisoned(Blank.__call__))
    return names


def poisoned(blank: Callable[[Blank], Tensor]) -> Callable[[Blank], Tensor]:
    def filled(self: Blank) -> Tensor:
        x = blank(self)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    return filled


def with_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tiles there are; one of a list is several of a kernel's."""
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    monkeypatch.setattr(backward_call, "INTERPRETED", tiles.Tiles(16, 16, 4, 1))
    monkeypatch.setattr(lists_sizes, "INTERPRETED", tiles.Tiles(32, 32, 4, 1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("mask", MASKS)
def test_one_for_each_score_is_written_where_dq_is_computed(
    mask: str, axes: str, batch: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_lists(monkeypatch)
    case = biased(mask, axes)
    check(case, inputs(case, torch.float32, sizes=Sizes(batch, 2, 1, 50, 83, 16, 16)))
    alone = axes == "each" or (axes == "of heads" and batch == 1)
    assert "backward_dq" in launched and alone == (not any(name.startswith("backward_load") for name in launched))


@pytest.mark.parametrize("mask", ["plain", "causal", "padding_mean"])
def test_where_weights_are_dropped_out(mask: str, launched: list[str]) -> None:
    case = biased(mask, "each")
    check_dropout(case, inputs(case, torch.float32, sizes=Sizes(2, 2, 2, 45, 70, 16, 16)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["bias_bhij", "bias_hij", "bias_half"])
def test_dtypes_and_layouts(name: str, dtype: torch.dtype, launched: list[str]) -> None:
    """A bias [h, i, j] whose rows are its columns in memory among them; and of more than its scores are of."""
    case = named(name)
    check(case, inputs(case, dtype, "poisoned", Sizes(1, 2, 2, 50, 37, 24, 40)))
    assert not any(name.startswith("backward_load") for name in launched)


def test_it_is_multiplied_by_what_the_score_is_by_it(launched: list[str]) -> None:
    case = biased("causal", "each", factor=-3)
    check(case, inputs(case, torch.float32, sizes=Sizes(2, 2, 2, 45, 70, 16, 16)))
    capped = named("soft_cap")
    score = capped.spec.score.xreplace({capped.spec.score: sympy.tanh(capped.spec.score + Load(0, B, H, I, J))})
    spec = replace(capped.spec, score=score, operands=(Operand(FLOAT, 4),))
    inside = Case("a bias below a cap", spec, lambda z: [normal(z.batch, z.heads, z.lq, z.lk)])
    check(inside, inputs(inside, torch.float32, sizes=Sizes(2, 2, 2, 45, 70, 16, 16)))
    assert launched.count("backward_dq") == 2 and not any(name.startswith("backward_load") for name in launched)


def test_two_of_them_and_one_of_heads_beside(launched: list[str]) -> None:
    score = named("plain").spec.score + Load(0, B, H, I, J) + Load(1, 0, H, I, J) + 2 * Load(2, B, H, I, J)
    spec = replace(named("plain").spec, score=score, operands=(Operand(FLOAT, 4),) * 3)
    case = Case(
        "three biases",
        spec,
        lambda z: [normal(n, z.heads, z.lq, z.lk) for n in (z.batch, 1, z.batch)],
    )
    check(case, inputs(case, torch.float32, sizes=Sizes(2, 2, 2, 45, 70, 16, 16)))
    assert [name for name in launched if name.startswith("backward_load")] == ["backward_load1"]


# -- the kernel for Hopper -----------------------------------------------------------------------------------------


def on_hopper(case: Case, x: Inputs, patch: pytest.MonkeyPatch, changed: tuple[str, str] | None = None) -> list[str]:
    patch.setattr(Blank, "__call__", poisoned(Blank.__call__))
    ran = hopper_in_torch.backward(patch, changed)
    launch = Launch.__call__

    def counted(self: Launch, tensors: Sequence[Tensor], free: Sequence[Any] = ()) -> Any:
        if "_load" in self.kernel.fn.__name__:
            ran.append(self.kernel.fn.__name__)
        return launch(self, tensors, free)

    patch.setattr(Launch, "__call__", counted)
    check(case, x)
    return ran


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("axes", ["each", "of heads"])
@pytest.mark.parametrize("mask", ["plain", "causal", "documents", "padding_mean"])
def test_by_the_kernel_for_hopper(
    mask: str, axes: str, dim: int, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = biased(mask, axes, torch.float16)
    x = inputs(case, torch.float16, "contiguous", Sizes(2, 2, 1, 200, 136, dim, dim))
    ran = on_hopper(case, x, monkeypatch)
    assert [name for name in ran if "pair" not in name][:2] == ["prepare_rows", "attention_backward"]
    assert any("_load" in name for name in ran) == (axes != "each")


@pytest.mark.parametrize("shared", ["", "b"])
@pytest.mark.parametrize("masked", [-1e4, -torch.inf])
def test_a_bias_that_masks(masked: float, shared: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose scores may be far away, and rows without keys."""
    case = dense(torch.float16, shared, masked)
    x = inputs(case, torch.float16, "contiguous", Sizes(1 if shared else 2, 2, 2, 200, 264, 64, 64))
    ran = on_hopper(case, x, monkeypatch)
    assert "attention_backward" in ran and not any("_load" in name for name in ran)


def test_strides_that_tma_does_not_write(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 201 keys: the bias's own rows are 208 apart, those of its gradient are not."""
    case = biased("plain", "each", torch.float16)
    x = inputs(case, torch.float16, "contiguous", Sizes(2, 2, 2, 130, 201, 64, 64))
    wide = torch.zeros(2, 2, 130, 208, dtype=torch.float16)
    wide[..., :201] = x.operands[0]
    x = replace(x, operands=[wide[..., :201]])
    assert any("_load" in name for name in on_hopper(case, x, monkeypatch))


def test_what_is_bent_is_left_to_the_kernel_of_a_load(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = biased("soft_cap", "each", torch.float16)
    x = inputs(case, torch.float16, "contiguous", Sizes(1, 2, 2, 130, 136, 64, 64))
    assert any("_load" in name for name in on_hopper(case, x, monkeypatch))


MISTAKES = {
    "it is sent behind no fence": ("fence_async_shared()\n    if WRITE:", "if WRITE:", "nan > "),
    "its stage is given back before it was read": (
        "tma.store_wait(1 if LATER else 0)  #",
        "tma.store_wait(2 if LATER else 0)  #",
        "nan > ",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_the_text_are_found(mistake: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, told = MISTAKES[mistake]
    case = biased("plain", "each", torch.float16)
    lk = 200 + 8 * list(MISTAKES).index(mistake)  # of its own: launches are remembered by sizes
    x = inputs(case, torch.float16, "contiguous", Sizes(1, 1, 1, 400, lk, 64, 64))
    with pytest.raises((AssertionError, in_turns.Deadlock), match=told):
        on_hopper(case, x, monkeypatch, (right, wrong))


assert launch_hopper_backward.FEW_QUERIES == 256  # for shorter ones the other kernels are
