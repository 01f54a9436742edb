"""Ops are called at little cost: past torch's kernel for autograd where nothing needs it, and past the dispatcher where
Inductor generates the call. Whoever wants to see a call still does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from xfcompile import direct
from xfcompile.kernels.attention import attention, prepare
from xfcompile.kernels.registration import Site, register
from xfcompile.score import S
from xfcompile.site import ScoreSpec

LIBRARY = torch.library.Library("xfcompile", "FRAGMENT")
CALLS: list[Tensor] = []


def _kernel(x: Tensor, factor: float = 2.0) -> Tensor:
    CALLS.append(x)
    return x * factor


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor = inputs[1]


@pytest.fixture(scope="module")
def scaled() -> Callable[..., Tensor]:
    LIBRARY.define("scaled_for_tests(Tensor x, float factor=2.) -> Tensor")
    gradients = (lambda ctx, dout: (dout * ctx.factor, None), _setup)
    register(LIBRARY, "scaled_for_tests", _kernel, _kernel, lambda x, factor=2.0: torch.empty_like(x), gradients)
    return torch.ops.xfcompile.scaled_for_tests  # type: ignore[no-any-return]


SITES: list[Any] = []


def lengthened(x: Tensor, length: int, site: Any = None) -> Tensor:
    SITES.append(site)
    return x.new_full((length, *x.shape), 3.0)


@pytest.fixture(scope="module")
def longer() -> Callable[..., Tensor]:
    LIBRARY.define("lengthened_for_tests(Tensor x, SymInt length) -> Tensor")
    fake = lambda x, length: x.new_empty((length, *x.shape))  # noqa: E731
    register(LIBRARY, "lengthened_for_tests", lengthened, lengthened, fake)
    direct.lower()
    return torch.ops.xfcompile.lengthened_for_tests  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()
    SITES.clear()


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def test_a_call_that_needs_no_gradient_has_the_very_tensors(scaled: Callable[..., Tensor]) -> None:
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        out = scaled(x, 3.0)
    assert len(CALLS) == 1 and CALLS[0] is x
    assert torch.equal(out, torch.full((3,), 3.0)) and not out.requires_grad


def test_gradients_are_those_that_are_registered(scaled: Callable[..., Tensor]) -> None:
    x = torch.ones(3, requires_grad=True)
    out = scaled(x, 3.0)
    assert out.requires_grad
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((3,), 3.0))
    assert not scaled(x.detach()).requires_grad


def test_modes_and_fakes_see_the_call(scaled: Callable[..., Tensor]) -> None:
    x = torch.ones(3)
    with torch.no_grad(), Seen() as seen:
        scaled(x)
    assert torch.ops.xfcompile.scaled_for_tests.default in seen.ops
    CALLS.clear()
    with torch.no_grad(), FakeTensorMode() as mode:
        out = scaled(mode.from_tensor(x))
    assert not CALLS and type(out).__name__ == "FakeTensor"


def test_what_lies_between_autograd_and_the_device_is_done(scaled: Callable[..., Tensor]) -> None:
    x = torch.arange(3.0)
    with torch.no_grad():
        assert torch.equal(scaled(torch._neg_view(x)), -2 * x)
        assert not CALLS[0].is_neg()
        assert torch.equal(torch.func.functionalize(scaled)(x), 2 * x)
        CALLS.clear()
        assert torch.equal(torch.vmap(scaled)(x[:, None]), 2 * x[:, None])
        assert not any(torch._C._functorch.is_batchedtensor(y) for y in CALLS)


def test_inference_mode(scaled: Callable[..., Tensor]) -> None:
    with torch.inference_mode():
        assert torch.equal(scaled(torch.ones(2)), torch.full((2,), 2.0))


# -- generated code ------------------------------------------------------------------------------------------------


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def tensors(length: int = 5, requires_grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, 2, length, 8, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    key = prepare(ScoreSpec(S / math.sqrt(8)))
    direct.lower()
    return lambda q, k, v: attention(q, k, v, [], [], [], key)[0] * 2


def test_generated_code_calls_functions(program: Callable[..., Tensor]) -> None:
    x = tensors()
    (out, grads), codes = run_and_get_code(_trained, torch.compile(program, backend="xformers"), x)
    for name in ("attention", "attention_backward"):
        assert sum(f"= xfcompile_{name}_cpu(" in code for code in codes) == 1
    assert not any("= torch.ops.xfcompile" in code for code in codes)
    wanted, right = _trained(lambda *x: eager(*x) * 2, tensors())
    for a, b in zip([out, *grads], [wanted, *right], strict=True):
        torch.testing.assert_close(a, b)


def _trained(program: Callable[..., Tensor], x: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = program(*x)
    return out, torch.autograd.grad(out.square().sum(), x)


def test_lengths_that_change_and_calls_in_a_branch(program: Callable[..., Tensor]) -> None:
    @torch.compile(dynamic=True, backend="xformers")
    def branched(flag: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(flag, lambda q, k, v: program(q, k, v).contiguous(), lambda q, k, v: q * 3, (q, k, v))  # type: ignore

    generated: list[str] = []
    for length in (5, 7):
        x = tensors(length, requires_grad=False)
        with torch.no_grad():
            out, codes = run_and_get_code(branched, torch.tensor(True), *x)
            torch.testing.assert_close(out, eager(*x) * 2)
            torch.testing.assert_close(branched(torch.tensor(False), *x), x[0] * 3)
        generated = [*generated, *codes]
    assert any("= xfcompile_attention_cpu(" in code for code in generated)
    assert not any("= torch.ops.xfcompile" in code for code in generated)


def test_each_call_has_a_place_for_what_follows_from_layouts(longer: Callable[..., Tensor]) -> None:
    run = torch.compile(lambda x, y: longer(x, 2).sum() + longer(y, 2).sum(), backend="xformers")
    with torch.no_grad():
        for _ in range(2):
            assert run(torch.ones(3), torch.ones(4)) == 42.0
    one, other, *again = SITES
    assert isinstance(one, Site) and isinstance(other, Site) and one is not other
    assert again[0] is one and again[1] is other


@pytest.mark.parametrize("changes", ["a size", "a number"])
def test_calls_whose_sizes_change_have_none(longer: Callable[..., Tensor], changes: str) -> None:
    if changes == "a size":
        run = torch.compile(lambda x, n: longer(x, 2).sum(), backend="xformers", dynamic=True)
    else:
        run = torch.compile(lambda x, n: longer(x[:3], n.shape[0]).sum(), backend="xformers")
    with torch.no_grad():
        for size in (4, 5, 6):
            x, n = torch.ones(size if changes == "a size" else 3), torch.ones(size)
            if changes == "a number":
                torch._dynamo.mark_dynamic(n, 0)
            assert run(x, n) == 3 * (2 * size if changes == "a size" else 3 * size)
    assert SITES == [None, None, None]


def test_what_inductor_compiles_without_us_calls_the_op(program: Callable[..., Tensor]) -> None:
    x = tensors(6, requires_grad=False)
    with torch.no_grad():
        out, codes = run_and_get_code(torch.compile(program), *x)
    torch.testing.assert_close(out, eager(*x) * 2)
    assert any("= torch.ops.xfcompile.attention" in code for code in codes)


def test_an_inductor_with_other_internals_calls_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(target: Any) -> None:
        raise AttributeError("make_fallback")

    monkeypatch.setattr(direct, "_known", set())
    monkeypatch.setattr(direct, "_lower", missing)
    direct.lower()
    assert "attention" in direct._known
