"""With `autotune` the routes of a site are timed on its own shapes, and the fastest right one runs it."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xfcompile
from xfcompile.emit import Emitter
from xfcompile.families.attention import ATTENTION
from xfcompile.options import Options
from xfcompile.tuning import Timings, Trial, measured_by, tuner

Q = torch.randn(2, 2, 24, 16, generator=torch.Generator().manual_seed(0))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 4
    above = torch.triu(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), 1)
    return torch.softmax(scores.masked_fill(above, float("-inf")), -1) @ v


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(causal(q, k, v), k, v)


def padded(q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 4
    return torch.softmax(scores.masked_fill(~live[:, None, None, :], float("-inf")), -1) @ v


class Stopwatch:
    """Says what each route takes, and remembers what it was asked."""

    def __init__(self, **ms: float) -> None:
        self.ms, self.asked = ms, list[tuple[str, ...]]()

    def __call__(
        self, calls: Mapping[str, Callable[[], object]], device: torch.device, replayed: bool
    ) -> dict[str, float]:
        self.asked.append(tuple(calls))
        for call in calls.values():
            call()
        return {name: self.ms[name] for name in calls}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def compiled(
    fn: Callable[..., Tensor], *args: Any, watch: Stopwatch, dynamic: bool = False, **options: Any
) -> tuple[Tensor, xfcompile.Report]:
    torch._dynamo.reset()
    options = {"autotune": True, "strict": True, **options}
    with xfcompile.collect() as report, measured_by(watch):
        out = torch.compile(fn, backend="xformers", options=options, dynamic=dynamic)(*args)
    return out, report


def inputs(grad: bool = False) -> list[Tensor]:
    return [Q.clone().requires_grad_(grad) for _ in range(3)]


@pytest.mark.parametrize("winner", ["sdpa", "inductor"])
def test_the_fastest_route_runs_the_site(winner: str) -> None:
    watch = Stopwatch(**{"sdpa": 2.0, "inductor": 2.0, winner: 1.0})
    args = inputs()
    out, report = compiled(causal, *args, watch=watch)
    assert watch.asked == [("sdpa", "inductor")]
    assert [s.route for s in report.sites] == [winner]
    other = "inductor" if winner == "sdpa" else "sdpa"
    assert report.sites[0].reason == f"timed: {winner} 1 ms, {other} 2"
    torch.testing.assert_close(out, causal(*args))


def test_forward_and_backward_are_timed_together_and_gradients_are_right() -> None:
    args, mine = inputs(grad=True), inputs(grad=True)
    out, report = compiled(causal, *mine, watch=Stopwatch(sdpa=1, inductor=2))
    assert all(x.grad is None for x in mine)
    out.sum().backward()
    causal(*args).sum().backward()
    for x, y in zip(mine, args, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    assert report.sites[0].route == "sdpa"


def test_sites_that_are_alike_are_timed_once() -> None:
    watch = Stopwatch(sdpa=1, inductor=2)
    _, report = compiled(twice, *inputs(), watch=watch)
    assert [s.route for s in report.sites] == ["sdpa", "sdpa"]
    assert all(s.reason is not None and s.reason.startswith("timed: sdpa 1 ms") for s in report.sites)
    assert len(watch.asked) <= 2  # the first makes the mask of both


def test_nothing_is_timed_unless_it_is_asked_for() -> None:
    watch = Stopwatch()
    _, report = compiled(causal, *inputs(), watch=watch, autotune=False)
    assert not watch.asked
    assert report.sites[0].route == "sdpa"


def test_a_route_that_the_user_chose_is_not_timed() -> None:
    watch = Stopwatch()
    _, report = compiled(causal, *inputs(), watch=watch, routes={"attention": "inductor"})
    assert not watch.asked
    assert report.sites[0].route == "inductor"


def test_without_time_left_the_usual_route_runs_it_and_the_report_says_so() -> None:
    watch = Stopwatch()
    out, report = compiled(causal, *inputs(), watch=watch, autotune_budget=0)
    assert not watch.asked
    assert report.sites[0].route == "sdpa"
    expected = "nothing was timed; not timed, for the budget was spent: sdpa, inductor"
    assert report.sites[0].reason == expected
    torch.testing.assert_close(out, causal(*inputs()))


def test_random_numbers_and_inputs_are_as_before() -> None:
    args = inputs()
    kept, state = [x.clone() for x in args], torch.get_rng_state()
    compiled(causal, *args, watch=Stopwatch(sdpa=2, inductor=1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(args, kept, strict=True))


def test_symbolic_sizes_are_timed_as_they_are_met_first_and_stay_symbolic() -> None:
    args = inputs()
    watch = Stopwatch(sdpa=1, inductor=2)
    torch._dynamo.reset()
    fn = torch.compile(causal, backend="xformers", dynamic=True, options={"autotune": True, "strict": True})
    with xfcompile.collect() as report, measured_by(watch):
        fn(*args)
        longer = [torch.cat([x, x[:, :, :9]], 2) for x in args]
        out = fn(*longer)
    assert len(report.sites) == 1
    assert "= 24" in (report.sites[0].reason or "")
    torch.testing.assert_close(out, causal(*longer))


def test_masks_that_are_data_are_made_up_and_the_report_says_how() -> None:
    live = torch.ones(2, 24, dtype=torch.bool)
    out, report = compiled(padded, *inputs(), live, watch=Stopwatch(sdpa=1, inductor=2))
    assert "3/4 of the keys live" in (report.sites[0].reason or "")
    torch.testing.assert_close(out, padded(*inputs(), live))


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's route computes something else."""

    def replaced(emitter: Emitter, candidate: Any) -> torch.fx.Node:
        good = ATTENTION.replace(emitter, candidate)
        return emitter.call(torch.mul, good, 1.01)

    family = replace(ATTENTION, replace=replaced)
    from xfcompile import families

    others = tuple(f for f in families.known() if f.name != "attention")
    monkeypatch.setattr(families, "known", lambda: (family, *others))


@pytest.mark.usefixtures("wrong")
def test_a_route_that_computes_something_else_is_dropped() -> None:
    out, report = compiled(causal, *inputs(), watch=Stopwatch(sdpa=1, inductor=2))
    assert report.sites[0].route == "inductor"
    assert "dropped: sdpa: out is wrong" in (report.sites[0].reason or "")
    torch.testing.assert_close(out, causal(*inputs()))


def test_a_route_that_does_not_compile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuner.call_of

    def broken(part: Any, *rest: Any) -> Any:
        if any("scaled_dot" in str(n.target) for n in part.gm.graph.nodes):
            raise RuntimeError("no such instruction")
        return real(part, *rest)

    monkeypatch.setattr(tuner, "call_of", broken)
    out, report = compiled(causal, *inputs(), watch=Stopwatch(sdpa=1, inductor=2))
    assert report.sites[0].route == "inductor"
    assert report.sites[0].reason == "timed: inductor 2 ms; dropped: sdpa: RuntimeError: no such instruction"
    torch.testing.assert_close(out, causal(*inputs()))


def test_a_route_whose_kernel_does_not_compile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though else its op would compute by other means."""
    from fresh import forget
    from triton.runtime.interpreter import InterpretedFunction

    from xfcompile import families

    def warmup(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("PassManager::run failed")

    forget()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(InterpretedFunction, "warmup", warmup)
    family = replace(ATTENTION, timed_routes=lambda candidate: ("triton", "sdpa"))
    monkeypatch.setattr(families, "known", lambda: (family,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        out, report = compiled(causal, *inputs(), watch=Stopwatch(sdpa=1, inductor=2), patterns=["attention"])
    assert report.sites[0].route == "sdpa"
    assert "dropped: triton: RewriteError: compiling a kernel of attention, to time it: " in str(report.sites[0].reason)
    torch.testing.assert_close(out, causal(*inputs()))


def test_progress_is_lines_of_the_log_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="xfcompile.tuning"):
        compiled(causal, *inputs(), watch=Stopwatch(sdpa=1, inductor=2))
    lines = [r.getMessage() for r in caplog.records if r.name == "xfcompile.tuning.progress"]
    assert [line.rpartition(": ")[2] for line in lines] == ["sdpa", "inductor"]
    assert "xfcompile times" not in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_the_modes_of_inductor_that_tune_ask_for_it(mode: str) -> None:
    assert Options.parse(mode, None)[0].autotune
    assert not Options.parse(mode, {"autotune": False})[0].autotune
    assert not Options.parse("reduce-overhead", None)[0].autotune


@pytest.mark.parametrize("budget", [-1, float("nan"), float("inf"), "10", True])
def test_a_budget_is_a_number_of_seconds(budget: object) -> None:
    with pytest.raises(ValueError, match="autotune_budget"):
        Options(autotune_budget=budget)  # type: ignore[arg-type]


def test_about_as_fast_is_not_faster() -> None:
    timings = Timings((Trial("sdpa", 1.0), Trial("inductor", 0.99)))
    assert timings.winner() == "sdpa"
    assert Timings((Trial("sdpa", 1.0), Trial("inductor", 0.9))).winner() == "inductor"


def test_times_are_in_milliseconds_with_two_digits() -> None:
    timings = Timings((Trial("triton", 0.3123), Trial("sdpa", 123.4), Trial("inductor", 1.98)))
    assert timings.words() == "timed: triton 0.31 ms, inductor 2, sdpa 123"


class Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def test_definitions_in_place_of_kernels_are_not_timed_on_cpus() -> None:
    watch, module, x = Stopwatch(), Gated(), torch.randn(2, 16, 64)
    out, report = compiled(module, x, watch=watch)
    assert not watch.asked
    assert [(s.family, s.route) for s in report.sites] == [("gated_mlp", "inductor")]
    torch.testing.assert_close(out, module(x))


def test_what_drops_weights_out_is_left_as_it_is_on_cpus() -> None:
    def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.transpose(-2, -1) / 4, -1)
        return torch.nn.functional.dropout(weights, 0.5) @ v

    watch = Stopwatch()
    _, report = compiled(dropping, *inputs(), watch=watch)
    assert not watch.asked
    assert [s.route for s in report.sites] == ["inductor"]


def test_the_body_of_a_checkpoint_is_tuned_too() -> None:
    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(causal, q, k, v, use_reentrant=False)

    args, mine = inputs(grad=True), inputs(grad=True)
    out, report = compiled(checkpointed, *mine, watch=Stopwatch(sdpa=2, inductor=1))
    out.sum().backward()
    causal(*args).sum().backward()
    assert [s.route for s in report.sites] == ["inductor"]
    for x, y in zip(mine, args, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_two_threads_may_tune_at_a_time() -> None:
    def work(scale: float) -> tuple[Tensor, Tensor]:
        def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v

        mine, theirs = inputs(grad=True), inputs(grad=True)
        with measured_by(Stopwatch(sdpa=1, inductor=2)):
            out = torch.compile(scaled, backend="xformers", options={"autotune": True, "strict": True})(*mine)
        out.sum().backward()
        scaled(*theirs).sum().backward()
        assert mine[0].grad is not None and theirs[0].grad is not None
        return mine[0].grad, theirs[0].grad

    with ThreadPoolExecutor(2) as pool:
        for mine, theirs in [f.result(timeout=120) for f in [pool.submit(work, s) for s in (0.25, 0.5)]]:
            torch.testing.assert_close(mine, theirs)
    assert not torch.compiler.is_compiling()


def test_a_thread_that_tunes_while_another_does_keeps_its_own_modes() -> None:
    """torch puts the modes of the thread that compiles away, in one place for all threads."""
    from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

    class Passing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    started = threading.Barrier(2)

    def work(scale: float) -> tuple[list[Any], list[Any]]:
        def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v

        given = inputs()
        with Passing(), measured_by(Stopwatch(sdpa=1, inductor=2)):
            before = _get_current_function_mode_stack()
            started.wait(60)
            with torch.no_grad():
                torch.compile(scaled, backend="xformers", options={"autotune": True, "strict": True})(*given)
            return before, _get_current_function_mode_stack()

    with ThreadPoolExecutor(2) as pool:
        for before, after in [f.result(timeout=120) for f in [pool.submit(work, s) for s in (0.25, 0.5)]]:
            assert before == after
            assert len(after) == 1
    assert not torch.compiler.is_compiling()


def test_what_is_wrong_never_runs() -> None:
    assert Timings((Trial("triton", None, "out is wrong"), Trial("sdpa"))).winner() == "inductor"
    assert Timings((Trial("triton", None, "out is wrong"), Trial("sdpa", 3.0))).winner() == "sdpa"
    assert Timings((Trial("triton"), Trial("sdpa", 3.0))).winner() == "triton"
