"""The masks of windows, which are the same for each image, are loaded as they are made, and not repeated for all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import xfcompile

IMAGES, WINDOWS, HEADS, N, D = 3, 4, 2, 6, 8
SHAPE = (IMAGES * WINDOWS, HEADS, N, D)

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def transformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Swin: the mask of each window, one image after the other."""
    whole = mask.unsqueeze(1).unsqueeze(0).expand(q.shape[0] // WINDOWS, -1, -1, -1, -1).reshape(-1, 1, N, N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=whole)


def timm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Swin: and for each head."""
    whole = mask.view(1, WINDOWS, 1, N, N).expand(q.shape[0] // WINDOWS, -1, HEADS, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=whole.reshape(-1, HEADS, N, N))


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + mask[:, None].repeat(IMAGES, 1, 1, 1)).softmax(-1) @ v


def neighbours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """All images of a window follow each other."""
    return (q @ k.mT * 0.3 + mask.repeat_interleave(IMAGES, 0)[:, None]).softmax(-1) @ v


def by_image(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Added where the images are an axis of their own."""
    scores = (q @ k.mT * 0.3).view(IMAGES, WINDOWS, HEADS, N, N) + mask[None, :, None]
    return scores.view(-1, HEADS, N, N).softmax(-1) @ v


def turned(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Queries and keys change places."""
    whole = mask.mT[:, None].expand(WINDOWS, HEADS, N, N).repeat(IMAGES, 1, 1, 1)
    return (q @ k.mT * 0.3 + whole).softmax(-1) @ v


REPEATED = {
    transformers: "Mod(b, 4)", timm: "Mod(b, 4)", repeated: "Mod(b, 4)", neighbours: "(b//3)", by_image: "Mod(b, 4)",
    turned: "Mod(b, 4)",
}  # fmt: skip


def once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Each image has a mask of its own."""
    whole = mask[None].expand(IMAGES, -1, -1, -1).cumsum(0).reshape(-1, 1, N, N)
    return (q @ k.mT * 0.3 + whole).softmax(-1) @ v


def along_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What is read would go by a key's place in a row."""
    return (q @ k.mT * 0.3 + mask[..., : N // 2].repeat(IMAGES, 1, 2)[:, None]).softmax(-1) @ v


def inputs(images: int = IMAGES) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(images * WINDOWS, *SHAPE[1:]) for _ in range(3))
    return [q, k, v, torch.where(torch.rand(WINDOWS, N, N) < 0.3, -100.0, 0.0)]


def run(program: Program, route: str | None, *, dynamic: bool = False) -> xfcompile.Report:
    options = {"strict": True, **({} if route is None else {"routes": {"attention": route}})}
    report = xfcompile.Report()
    compilations = 0

    def backend(gm: fx.GraphModule, example_inputs: list[object]) -> fx.GraphModule:
        nonlocal compilations
        compilations += 1
        report.extend(xfcompile.rewrite(gm, example_inputs, options))
        return gm

    torch._dynamo.reset()
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    for images in (IMAGES, 2, 5) if dynamic else (IMAGES,):
        x = inputs(images)
        for y in x[:3] if dynamic else ():
            torch._dynamo.mark_dynamic(y, 0)
        right = program(*[y.double() for y in x])
        error, eager = ((f(*x).double() - right).abs().max() for f in (compiled, program))
        assert error <= 2 * eager + 1e-6, (program.__name__, error, eager)
    assert compilations == 1
    return report


@pytest.mark.parametrize("program", REPEATED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("route", ["triton", "sdpa", None])
def test_what_is_repeated_is_loaded_once(program: Program, route: str | None) -> None:
    (site,) = run(program, route).sites
    assert site.matched and REPEATED[program] in site.expression, site.expression


@pytest.mark.parametrize("program", [transformers, timm], ids=lambda f: f.__name__)
def test_any_number_of_images(program: Program) -> None:
    (site,) = run(program, "triton", dynamic=True).sites
    assert "Mod(b, 4)" in site.expression, site.expression


@pytest.mark.parametrize("program", [once, along_keys], ids=lambda f: f.__name__)
def test_what_is_not_stays_as_it_was_made(program: Program) -> None:
    (site,) = run(program, "triton").sites
    assert "Mod" not in site.expression and "//" not in site.expression, site.expression


@pytest.mark.parametrize("program", REPEATED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("route", ["triton", "sdpa"])
def test_what_is_learned_of_each_window_has_its_gradient(program: Program, route: str) -> None:
    """The sum over all images."""
    x = [y.requires_grad_() for y in inputs()]
    x[3] = torch.randn_like(x[3]).requires_grad_()
    report = xfcompile.Report()

    def backend(gm: fx.GraphModule, example_inputs: list[object]) -> fx.GraphModule:
        report.extend(xfcompile.rewrite(gm, example_inputs, {"strict": True, "routes": {"attention": route}}))
        return gm

    def gradients(fn: Program, given: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(fn(*given).square().sum(), given)

    ours = gradients(torch.compile(program, backend=backend, fullgraph=True), x)
    right = gradients(program, [y.detach().double().requires_grad_() for y in x])
    for a, b, c in zip(ours, gradients(program, x), right, strict=True):
        error, eager = ((y - c).abs().max() for y in (a, b))
        assert error <= 2 * eager + 2e-6 * c.abs().max(), (error, eager)
    (site,) = report.sites
    assert site.route == (route if route == "triton" else "inductor"), site.reason  # SDPA on CPUs: only unfused
