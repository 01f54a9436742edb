"""Runs a model of the zoo compiled and eagerly, and judges both against the same model in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from zoo import Entry, Program

import xfcompile

Through = Literal["graph", "aot", "inductor"]
"""What runs the rewritten graph: itself, as it stands; the graphs that autograd makes of it; Inductor's code."""


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors of one result against fp64: eager's, ours, and what ours may be.

    scale: the largest absolute value of the results of its kind.
    """

    name: str
    eager: float
    ours: float
    bound: float
    scale: float

    @property
    def within(self) -> bool:
        return self.ours <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: error {self.ours:.3g}, eager's {self.eager:.3g}, allowed {self.bound:.3g}"


@dataclass(frozen=True)
class Outcome:
    """What one compiled run of an entry gave."""

    report: xfcompile.Report
    errors: tuple[Errors, ...]

    @property
    def sites(self) -> list[xfcompile.SiteReport]:
        return [site for site in self.report.sites if site.family == "attention"]

    @property
    def matched(self) -> int:
        return sum(site.matched for site in self.sites)

    @property
    def wrong(self) -> list[Errors]:
        return [e for e in self.errors if not e.within]

    @property
    def baseless(self) -> list[Errors]:
        """Results in which eager itself is so far off that the fp64 run cannot have been the same program."""
        return [e for e in self.errors if not e.eager <= 1e-3 * e.scale]

    @property
    def worst(self) -> Errors:
        """The result that is nearest to its bound, or the farthest beyond it."""
        return max(self.errors, key=lambda e: e.ours / e.bound if e.bound else float(e.ours > 0))


class _InDouble(TorchFunctionMode):
    """What a program computes in fp32 by its own word (`softmax(dtype=torch.float32)`, `.float()`) is fp64 here: the
    reference would have fp32's rounding otherwise, and fp32's range for fp64's numbers, in which finfo.min is -inf."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widen(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{key: widen(x) for key, x in (kwargs or {}).items()})


def _exact(program: Program, entry: Entry) -> dict[str, Tensor]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        double = _doubled(program)
        if entry.loosen is not None:
            entry.loosen(double.module)
        with _InDouble():
            return _results(double, entry.differentiates)
    finally:
        torch.set_default_dtype(usual)


def measure(entry: Entry, through: Through, **options: Any) -> Outcome:
    """Compile and run the entry, and compare its results (its gradients too, if it differentiates).

    options: the backend's own; not through Inductor.
    """
    program = entry.build()
    exact = _exact(program, entry)
    eager = _results(program, entry.differentiates)
    torch._dynamo.reset()
    with xfcompile.collect() as collected:
        report = xfcompile.Report()
        compiled = torch.compile(program.module, backend=_backend(through, report, options))
        ours = _results(Program(compiled, program.args, program.kwargs), entry.differentiates)
    report.extend(collected)
    return Outcome(report, tuple(_compare(exact, eager, ours)))


def _backend(through: Through, report: xfcompile.Report, options: Mapping[str, Any]) -> Any:
    if through == "inductor":
        return "xformers" if "xformers" in torch._dynamo.list_backends() else xfcompile.xformers

    def rewriting(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report.extend(xfcompile.rewrite(gm, example_inputs, {"strict": True, **options}))
        if through == "graph":
            return gm
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, example_inputs)

    return rewriting


def _doubled(program: Program) -> Program:
    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    module = copy.deepcopy(program.module).double()
    if hasattr(module, "set_experts_implementation"):
        # PyTorch's grouped product of matrices, which experts use by default, knows no fp64.
        module.set_experts_implementation("batched_mm")
    return Program(module, tuple(map(double, program.args)), {k: double(v) for k, v in program.kwargs.items()})


def _results(program: Program, differentiate: bool) -> dict[str, Tensor]:
    """All floating-point results of one call by name, and the gradients of a random combination of them."""
    with torch.set_grad_enabled(differentiate):
        outputs = dict(_tensors(program.module(*program.args, **program.kwargs), "output"))
    results = {name: x.detach() for name, x in outputs.items()}
    if not differentiate:
        return results
    # NumPy's numbers: they are the same while torch computes in double.
    numbers = numpy.random.default_rng(0)
    wanted = [
        (x, torch.from_numpy(numbers.standard_normal(x.shape)).to(x)) for x in outputs.values() if x.requires_grad
    ]
    total = sum((x * weight).sum() for x, weight in wanted)
    assert isinstance(total, Tensor), "a program that differentiates has results that need gradients"
    parameters = {name.replace("_orig_mod.", ""): p for name, p in program.module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            results[f"gradient of {name}"] = gradient
    return results


def _tensors(value: Any, name: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, tuple | list):
        for n, item in enumerate(value):
            yield from _tensors(item, f"{name}[{n}]")


def _compare(exact: dict[str, Tensor], eager: dict[str, Tensor], ours: dict[str, Tensor]) -> Iterable[Errors]:
    """Errors by result. Ours may be twice eager's: both are samples of the same rounding noise, whose largest element
    varies by less than that, and a few ulps of the largest result of the kind: where eager happens to be exact (a row
    with one key, gradients that cancel) its error says nothing of the noise."""
    assert exact.keys() == eager.keys() == ours.keys(), f"other results: {exact.keys() ^ ours.keys()}"
    for name, reference in exact.items():
        kind = name.partition(" ")[0]
        scale = max(_largest(x) for n, x in exact.items() if n.partition(" ")[0] == kind)
        ulp = torch.finfo(eager[name].dtype).eps * scale
        ours_error, eager_error = _error(ours[name], reference), _error(eager[name], reference)
        yield Errors(name, eager_error, ours_error, 2 * eager_error + 4 * ulp, scale)


def _largest(x: Tensor) -> float:
    return float(x.nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def _error(x: Tensor, reference: Tensor) -> float:
    """The largest absolute difference; NaN and infinities are right in the same places only."""
    x = x.double()
    reference = reference.double()
    # Where the fp64 run is NaN (a row without keys, after -inf), so must the others be.
    same = (x == reference) | (x.isnan() & reference.isnan())
    return float(torch.where(same, 0.0, (x - reference).abs().nan_to_num(torch.inf)).max()) if x.numel() else 0.0
