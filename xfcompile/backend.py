"""The backend: rewrites the graph that Dynamo traced, then hands it to Inductor."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xfcompile.ahead import start_processes
from xfcompile.options import Options
from xfcompile.report import Report, publish
from xfcompile.rewrite import rewrite_graph
from xfcompile.tuning import Tuner
from xfcompile.verification import Verification

log = logging.getLogger(__name__)


def xformers(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph with its attention replaced; `torch.compile(model, backend="xformers")` calls this.

    mode, options: as for Inductor, and ours (`xfcompile.Options`). Takes the graph over, as Inductor does.
    """
    # Both are done already where torch.compile was told the backend's name (`entry.py`).
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs):
        start_processes()
    from torch._inductor.compile_fx import compile_fx  # which takes seconds to import

    from xfcompile.direct import compile_ahead, lower
    from xfcompile.identity import identified

    ours, patches = Options.parse(mode, options)
    before = _snapshot(gm)
    report, verification = _rewritten(gm, example_inputs, ours, before, patches)
    lower()
    compile_ahead(gm)

    # Callable for any graph module; its other results are those of ahead-of-time compilation.
    def compiled() -> Callable[..., Any]:
        return compile_fx(gm, example_inputs, config_patches=identified(patches, ours.fingerprint()))  # type: ignore

    try:
        run = compiled()
    except Exception as error:
        if ours.strict or _control_flow(error) or not any(site.replaced for site in report.sites):
            raise
        _restore(before)
        run = compiled()  # an error that the program has without us is raised here, as it is
        report, verification = _failed("compiling a rewritten graph", error, strict=False), None
        report.calls = _calls(gm)
        _warn(report.failures)
    # Only now: Inductor may have Dynamo trace anew, with numbers in place of symbols, and call us again.
    publish(report)
    return run if verification is None else verification.before(run, strict=ours.strict)


def _control_flow(error: Exception) -> bool:
    """Whether an error is how torch asks Dynamo to trace anew, or to break the graph."""
    import torch._dynamo.exc as exc

    return isinstance(error, (exc.RestartAnalysis, exc.Unsupported, exc.SkipFrame))


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options | Mapping[str, Any] | None = None
) -> Report:
    """Replace what is recognised in `gm`, in place, and say what was found: the bare pass, for any FX graph.

    example_inputs: the graph's inputs, fake or real; their values are not read. An error of ours leaves `gm` as it was
    and is in `Report.failures`, unless `options` says `strict`.
    """
    options = Options.of(options)
    if options.verify:
        raise ValueError(
            "option 'verify' needs a run: xfcompile.verify(gm, *inputs) rewrites and runs a graph, or any program"
        )
    return rewritten(gm, example_inputs, options)[0]


def rewritten(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Report, Verification | None]:
    """`rewrite`, with what verifies it, if the options ask for that."""
    return _rewritten(gm, example_inputs, options, _snapshot(gm))


def _rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    before: list[tuple[fx.GraphModule, fx.Graph]],
    patches: Mapping[str, Any] | None = None,
) -> tuple[Report, Verification | None]:
    # Reading traces, which sets flags of torch's that all threads share: no other thread may compile meanwhile.
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor import config

    report = Report(graphs=1)
    verification: Verification | None = None
    try:
        with compile_lock, config.patch(cpp_wrapper=(patches or {}).get("cpp_wrapper", config.cpp_wrapper)):
            tuner = Tuner(options, patches or {}) if options.autotune else None
            verification = rewrite_graph(gm, example_inputs, options, report, tuner)
    except Exception as error:
        report = _failed("rewriting a graph", error, strict=options.strict)
        _restore(before)
    report.calls = _calls(gm)
    if report.failures:
        _warn(report.failures)
    log.info("%s", report.summary())
    return report, verification


def _calls(gm: fx.GraphModule) -> Counter[str]:
    """What the graph, and those inside it, consist of now."""
    nodes = (n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes)
    return Counter(getattr(n.target, "__name__", str(n.target)) for n in nodes if n.op.startswith("call_"))


def _failed(doing: str, error: Exception, *, strict: bool) -> Report:
    """The report of a graph of which nothing holds any more that was reported."""
    report = Report(graphs=1)
    report.failed(doing, error, strict=strict)
    return report


def _snapshot(gm: fx.GraphModule) -> list[tuple[fx.GraphModule, fx.Graph]]:
    """Copies of the graph and of those inside it. Working on the graph itself, and keeping the copy for the case of an
    error, leaves the usual case with the very nodes that Dynamo made."""
    return [(m, _copied(m.graph)) for m in gm.modules() if isinstance(m, fx.GraphModule)]


def _copied(graph: fx.Graph) -> fx.Graph:
    made = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, made.nodes, strict=True):
        # Dynamo tells AOTAutograd of its inputs in attributes that FX does not copy.
        for name in vars(old).keys() - vars(new).keys():
            setattr(new, name, getattr(old, name))
    return made


def _restore(before: list[tuple[fx.GraphModule, fx.Graph]]) -> None:
    for module, graph in before:
        module.graph = graph


def _warn(failures: Sequence[str]) -> None:
    """Python shows a warning with the same text once."""
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    warnings.warn(
        f"xfcompile failed at {failures[0]}{more}. The program is compiled without it. "
        "options={'strict': True} raises the error instead; please report it.",
        RuntimeWarning,
        stacklevel=3,
    )
