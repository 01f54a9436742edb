"""Runs one training step of a program, eagerly and compiled, and judges both against the same step in fp64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import xfcompile

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"strict": True},
    "kernel": {"strict": True, "routes": {"attention": "triton"}},
}
"""Options by route: what a CPU takes by itself, and our kernel."""

ROUTE = {"default": "sdpa", "kernel": "triton"}
"""What runs a site that nothing speaks against."""

Program = Callable[..., Any]


def numbers(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + sum(shape)))
    return made.requires_grad_(grad)


def qkv(batch: int = 2, heads: int = 2, lq: int = 19, lk: int = 23, dim: int = 16, draw: int = 0) -> list[Tensor]:
    """q, k, v, which need gradients: no size a multiple of a tile's, queries and keys not of one length."""
    return [numbers(batch, heads, n, dim, seed=s) for s, n in enumerate((lq, lk, lk), 3 * draw)]


def compiled(program: Program, route: str, report: xfcompile.Report, **how: Any) -> Program:
    """The program with its sites replaced, run through AOTAutograd's graphs: Inductor takes most of the time and is not
    what is judged."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        report.extend(xfcompile.rewrite(gm, example_inputs, OPTIONS[route]))
        return aot_eager(gm, example_inputs)

    return torch.compile(program, backend=backend, **how)


def step(program: Program, inputs: Sequence[Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Outputs, and the gradients of the inputs that need one, of a random combination of the outputs."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    outputs = program(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {n}": x.detach() for n, x in enumerate(outputs)}
    generator = torch.Generator().manual_seed(seed)
    total = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in outputs if x.requires_grad)
    assert isinstance(total, Tensor)
    total.backward()
    for n, x in enumerate(leaves):
        if x.requires_grad:
            results[f"gradient {n}"] = torch.zeros_like(x) if x.grad is None else x.grad
        else:
            assert x.grad is None
    return results


def doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]


def judge(
    exact: dict[str, Tensor],
    eager: dict[str, Tensor],
    ours: dict[str, Tensor],
    eps: float,
    terms: Mapping[str, float] | None = None,
) -> None:
    """Each result's largest error may be twice eager's, and a few ulps of the largest result of its kind: where eager
    happens to be exact its error says nothing of the noise. As in tests/models.

    terms: of a result that is a sum of very many numbers, the sum of their sizes, in which its roundings are measured.
    """
    assert exact.keys() == eager.keys() == ours.keys()
    for name, right in exact.items():
        kind = name.partition(" ")[0]
        scale = max(_largest(x) for n, x in exact.items() if n.startswith(kind))
        mine, theirs = _error(ours[name], right), _error(eager[name], right)
        allowed = 2 * theirs + 4 * eps * scale + eps * (terms or {}).get(name, 0.0)
        assert math.isfinite(theirs), f"{name}: eager is not what it is compared with"
        assert mine <= allowed, f"{name}: error {mine:.3g}, eager's {theirs:.3g}, allowed {allowed:.3g} of {scale:.3g}"


def _largest(x: Tensor) -> float:
    return float(x.nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def _error(x: Tensor, right: Tensor) -> float:
    assert x.shape == right.shape
    x, right = x.double(), right.double()
    same = (x == right) | (x.isnan() & right.isnan())
    return float(torch.where(same, 0.0, (x - right).abs().nan_to_num(math.inf)).max()) if x.numel() else 0.0


def check(
    program: Program,
    inputs: Sequence[Tensor],
    route: str,
    expected: str | None = None,
    sites: int = 1,
    terms: Mapping[str, float] | None = None,
    **how: Any,
) -> xfcompile.Report:
    """One step, compiled, errs no more than eager does; and its sites ran by `expected`, the route if it is None."""
    report = xfcompile.Report()
    ours = step(compiled(program, route, report, **how), inputs)
    routes = [site.route for site in report.sites if site.matched]
    assert routes == [expected or ROUTE[route]] * sites, [(x.route, x.reason) for x in report.sites]
    judge(step(program, doubled(inputs)), step(program, inputs), ours, torch.finfo(inputs[0].dtype).eps, terms)
    return report


def check_on_average(
    program: Program, draws: Sequence[Sequence[Tensor]], route: str, expected: str | None = None
) -> None:
    """As `check`, of the geometric means of errors: where a result is what large terms leave of each other, its error
    in one draw says as little as eager's does."""
    report = xfcompile.Report()
    ours = compiled(program, route, report)
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for n, inputs in enumerate(draws):
        exact, eager = step(program, doubled(inputs), n), step(program, inputs, n)
        mine = step(ours, inputs, n)
        for name, right in exact.items():
            scale = _largest(right)
            errors.setdefault(name, []).append((_error(mine[name], right), _error(eager[name], right), scale))
    assert [site.route for site in report.sites if site.matched] == [expected or ROUTE[route]]
    eps = torch.finfo(draws[0][0].dtype).eps
    for name, found in errors.items():
        own, theirs, scale = (statistics.geometric_mean([x + 1e-30 for x in each]) for each in zip(*found, strict=True))
        assert own <= 2 * theirs + 4 * eps * scale, f"{name}: {own:.3g}, eager's {theirs:.3g} of {scale:.3g}"


@dataclass
class Launches:
    """Kernels that were launched: how many forwards, and of each backward what it was to make."""

    forwards: int = 0
    needs: list[Any] = field(default_factory=list)
