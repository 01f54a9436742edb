"""Where no tiles fit a device, an op computes by other means, warns once, and reports say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gated_cases
import pytest
import torch
from attention_cases import CASES, inputs
from backward_cases import floating
from torch import Tensor

import xfcompile
from xfcompile import activation
from xfcompile.activation import X
from xfcompile.kernels.attention import (
    attention,
    fit,
    launch_backward,
    launch_blocks,
    lists,
    prepare,
    programs,
    reference,
)
from xfcompile.kernels.attention.arguments import mask_arguments
from xfcompile.kernels.attention.backward_layout import Needs
from xfcompile.kernels.attention.tiles import Tiles
from xfcompile.kernels.bias_act_dropout import calls as bias_calls
from xfcompile.kernels.bias_act_dropout import launch_linear, linear_act_dropout, supports, text_of
from xfcompile.kernels.gated_mlp import gated_mlp, launch_triton
from xfcompile.kernels.gated_mlp import programs as gated_programs

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(autouse=True)
def _nothing_said() -> Iterator[None]:
    fit.say.cache_clear()
    yield
    fit.say.cache_clear()
    for program in (*programs.known.values(), *gated_programs.known.values()):
        program.calls.clear()


def too_little(*args: Any, **kwargs: Any) -> Any:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300_000, 100_000, "shared memory")


def unfit(*args: Any, **kwargs: Any) -> Any:
    raise fit.NoTilesFit("no tile size of attention fits this")


def told(run: Callable[[], Any]) -> tuple[Any, list[str], list[str]]:
    """What was computed, the warnings, and what reports say."""
    with xfcompile.collect() as report, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = run()
    return out, [str(w.message) for w in seen if "xfcompile" in str(w.message)], report.failures


def case(name: str) -> Any:
    return next(c for c in CASES if c.name == name)


def test_tiles_that_do_not_fit_are_an_error_of_their_own() -> None:
    q = torch.empty(1, 1, 64, 64)
    with pytest.raises(fit.NoTilesFit, match="head dims 64 and 32 in"):
        fit.launch(too_little, fit.Candidates([Tiles(64, 64, 4, 3)], [Tiles(16, 16, 4, 1)]), q, 32)


@pytest.mark.parametrize("name", ["causal", "bottom_right", "documents", "sink"])
def test_attention_whose_tiles_do_not_fit_is_its_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [c for c in CASES if c.name == name] or [c for c in CASES if c.name.startswith(name)]
    x = inputs(found[0], torch.float32)
    spec = found[0].spec
    tried = []
    monkeypatch.setattr(launch_blocks.Blocks, "__call__", lambda *a: tried.append(a) or unfit())

    def run() -> tuple[Tensor, Tensor]:
        return attention(x.q, x.k, x.v, x.operands, x.ints, x.floats, prepare(spec))  # type: ignore[no-any-return]

    first, said, reported = told(run)
    again, more, _ = told(run)
    assert len(said) == 1 and "no tile size" in said[0] and "definition" in said[0]
    assert reported == [said[0].removeprefix("xfcompile: ")]
    assert not more
    assert len(tried) == 1  # from then on nothing is launched in vain
    right = reference.attention(spec, x.q, x.k, x.v, x.operands, x.ints, x.floats, torch.float64)
    for made in (first, again):
        for ours, exact in zip(made, right, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_gradients_whose_tiles_do_not_fit_are_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = case("bias_bhij")
    x = inputs(chosen, torch.float32)
    key = prepare(chosen.spec)
    out, lse = attention(x.q, x.k, x.v, x.operands, x.ints, x.floats, key)
    dout = torch.ones_like(out)
    needs = Needs(True, True, True, tuple(floating(x)))
    arguments = (dout, x.q, x.k, x.v, out, lse, x.operands, x.ints, x.floats, key, needs)
    usual = launch_backward.run(*arguments)
    monkeypatch.setattr(launch_backward, "_fill", unfit)
    made, said, reported = told(lambda: launch_backward.run(*arguments))
    assert len(said) == 1 and "gradients" in said[0] and len(reported) == 1
    for ours, theirs in zip([*made[:3], *made[3]], [*usual[:3], *usual[3]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("save", [False, True])
def test_a_gated_mlp_whose_tiles_do_not_fit_is_products_and_a_kernel(
    save: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = gated_cases.inputs(gated_cases.Case(layout="gate first", biased=True))
    key = gated_cases.key_of("silu")

    def run() -> tuple[Tensor, Tensor]:
        about = (key, "gate first", "dual", save, torch.float32)
        return gated_mlp(given.x, *given.weights, *given.biases, *about)  # type: ignore[no-any-return]

    usual = run()
    gated_programs.program(key).calls.clear()
    tried = []
    monkeypatch.setattr(launch_triton, "Launch", lambda *a, **k: tried.append(a) or too_little)
    made, said, reported = told(run)
    assert tried
    assert len(said) == 1 and "PyTorch's products" in said[0] and len(reported) == 1
    for ours, theirs in zip(made, usual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [False, True])
def test_a_linear_whose_tiles_do_not_fit_is_a_product_and_a_kernel(save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(n, generator=generator) for n in ((3, 7, 20), (24, 20), (24,)))
    formula = text_of(activation.gelu(X, "none"))

    def run() -> tuple[Tensor, Tensor]:
        call = (bias, [], [], None, 0, formula, 0.0, torch.float32, save)
        return linear_act_dropout(x, weight, *call)  # type: ignore[no-any-return]

    usual = run()
    bias_calls.known.clear()
    monkeypatch.setattr(launch_linear, "launch_of", lambda *about: too_little)
    made, said, reported = told(run)
    _, more, _ = told(run)
    assert len(said) == 1 and "do not fit" in said[0] and len(reported) == 1 and not more
    for ours, theirs in zip(made, usual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_lists_by_keys_are_checked_too() -> None:
    chosen = case("documents")
    x = inputs(chosen, torch.float32)
    key = prepare(chosen.spec)
    mask = programs.mask_of(key)
    assert mask is not None
    values = mask_arguments(key, x.operands, x.ints, x.floats)
    shape = (*x.q.shape[:3], x.k.shape[2])
    tiles, by_key = (lists.run(x.q, *values, shape, 32, 32, mask, by_key=flag) for flag in (False, True))

    def run(**more: Any) -> Any:
        return attention(x.q, x.k, x.v, x.operands, x.ints, x.floats, key, tiles, 32, 32, **more)

    run(tiles_by_key=by_key)
    for program in programs.known.values():
        program.calls.clear()
    with pytest.raises(ValueError, match="by keys"):
        run(tiles_by_key=tiles.new_zeros((1, 1, 1, 4)))
    with pytest.raises(ValueError, match="by keys"):
        run(tiles_by_key=by_key.long())


def test_bias_activation_dropout_asks_for_the_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfcompile.kernels.attention import tiles

    monkeypatch.setattr(tiles, "capability", lambda index: (7, 5))
    assert "8.0" in (supports(torch.device("cuda", 0), [torch.float16]) or "")
    monkeypatch.setattr(tiles, "capability", lambda index: (8, 0))
    assert supports(torch.device("cuda", 0), [torch.float16]) is None
    assert "fp16, bf16 and fp32" in (supports(torch.device("cuda", 0), [torch.float16, torch.float64]) or "")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "interpreter" in (supports(torch.device("cpu"), [torch.float32]) or "")
