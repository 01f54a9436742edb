"""Builds one model type of transformers, runs it in eager and by the backend, and says what came of it."""

from __future__ import annotations

import math
from typing import Any

import measure
import torch
from sweep_configs import configurations
from sweep_inputs import taken
from zoo import Entry, Program

import xfcompile

LARGEST = 10**8
"""Parameters of a model that is still run."""

SEVERITY = [
    "right",
    "random",
    "not compared",
    "as without us",
    "wrong, fp64 is another program",
    "not compiled",
    "BREAKS",
    "WRONG",
]

Found = dict[str, Any]


def warm_up() -> None:
    """Read and compile a few models at inference, so that what is forked of this process need not begin with that."""
    import transformers

    for name in ("llama", "bert", "clip", "t5"):
        config = next(iter(configurations(name, transformers.CONFIG_MAPPING[name])))
        model = transformers.AutoModel.from_config(config).eval()
        given, _ = taken(model)
        if given is not None:
            measure.measure(Entry(name, lambda m=model, g=given: Program(m, (), g), 0), "aot")  # type: ignore[misc]
    torch._dynamo.reset()


KERNELS = {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": "epilogue"}
"""The routes by which as much as can runs by our kernels."""


def judge(name: str, attention: str, route: str | None, modes: tuple[str, ...] = ("training", "inference")) -> Found:
    """What came of one model type: "how" and why, and the sites."""
    model, given, reason = built(name, attention)
    if model is None:
        return {"how": "not built", "why": reason}
    if given is None:
        return {"how": "not called", "why": reason}
    options = {"routes": KERNELS if route == "kernels" else {"attention": route}} if route else {}
    found = {mode: _judged(name, model, given, options, mode == "training") for mode in modes}
    worst = max(found.values(), key=lambda x: SEVERITY.index(x["how"]))
    sites = {mode: x.pop("sites") for mode, x in found.items() if "sites" in x}
    return {**worst, "given": list(given), "modes": {mode: x["how"] for mode, x in found.items()}, "sites": sites}


def built(name: str, attention: str) -> tuple[torch.nn.Module | None, dict[str, Any] | None, str]:
    """The smallest model of this type that takes some inputs, and these; or what is missing, and why."""
    import transformers

    reason, last = "", None
    asked = {} if attention == "default" else {"attn_implementation": attention}
    for config in configurations(name, transformers.CONFIG_MAPPING[name]):
        try:
            if isinstance(config, Exception):
                raise config
            if _parameters(config, asked) > LARGEST:
                raise MemoryError("no small one")
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(config, **asked).eval()
        except Exception as error:
            reason = reason or said(error)
            continue
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # the default breaks graphs on a CPU, with any backend
        given, why = taken(model)
        if given is not None:
            return model, given, ""
        last, reason = model, reason or why
    return last, None, reason


def _parameters(config: Any, asked: dict[str, str]) -> int:
    import transformers

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in transformers.AutoModel.from_config(config, **asked).parameters())
    except RuntimeError:
        return 0  # it computes as it is made


def _judged(name: str, model: torch.nn.Module, given: dict[str, Any], options: dict[str, Any], grad: bool) -> Found:
    """By its results, or with `grad` by its gradients too."""

    def make() -> Program:
        return Program(model, (), given)

    entry = Entry(name, make, 0, grad=grad)
    try:
        eager = [measure._results(make(), grad) for _ in range(2)]
        exact = measure._exact(make(), entry)
    except Exception as error:
        return {"how": "not compared", "why": said(error)}
    if any(not torch.equal(x.nan_to_num(), eager[1][key].nan_to_num()) for key, x in eager[0].items()):
        return {"how": "random", "why": "two calls in eager differ"}
    if exact.keys() != eager[0].keys():
        return {"how": "not compared", "why": "other results in fp64"}
    try:
        outcome = measure.measure(entry, "graph", **options)
    except Exception as error:
        torch._dynamo.reset()
        try:  # is it ours?
            measure._results(Program(torch.compile(model, backend="aot_eager"), (), given), grad)
        except Exception as other:
            return {"how": "not compiled", "why": said(other)}
        return {"how": "BREAKS", "why": said(error)}
    about = {"sites": [_site(site) for site in outcome.report.sites]}
    if outcome.report.failures:
        return {"how": "BREAKS", "why": outcome.report.failures[0], **about}
    if not outcome.wrong:
        worst = outcome.worst.ours / outcome.worst.bound if outcome.worst.bound else 0.0
        return {"how": "right", "worst": round(worst, 3), **about}
    if outcome.baseless:
        return {"how": "wrong, fp64 is another program", "why": str(outcome.baseless[0]), **about}
    plain = _plain_errors(make(), grad, exact)
    wrong = [e for e in outcome.wrong if e.ours > 2 * plain.get(e.name, math.inf) + (e.bound - 2 * e.eager)]
    why = "; ".join(map(str, (wrong or outcome.wrong)[:3]))
    return {"how": "WRONG" if wrong else "as without us", "why": why, **about}


def _site(site: xfcompile.SiteReport) -> dict[str, str | None]:
    return {
        "family": site.family,
        "route": (site.route or "?") if site.matched else "left",
        "reason": site.reason and site.reason[:300],
        "source": site.source,
        "mask": site.mask,
    }


def _plain_errors(program: Program, grad: bool, exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Errors of the same graphs without this backend: other orders of the same sums."""
    torch._dynamo.reset()
    compiled = torch.compile(program.module, backend="aot_eager")
    found = measure._results(Program(compiled, program.args, program.kwargs), grad)
    return {key: measure._error(x, exact[key]) for key, x in found.items() if key in exact}


def said(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
