"""Times one model under several backends in turn, and says how far their results are apart."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import xfcompile

Mode = Literal["infer", "train"]
BACKENDS: dict[str, Any] = {"inductor": "inductor", "xformers": xfcompile.xformers, "eager": "eager"}


@dataclass(frozen=True)
class Case:
    """A model as its library makes it, the arguments of one call, and what is done with it.

    build: makes the model and its arguments on `device`, in `dtype`; a train case's arguments include labels.
    """

    name: str
    attention: str
    mode: Mode
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]

    @property
    def title(self) -> str:
        return f"{self.name} {self.mode} {self.attention}"


def interleaved(
    runs: Mapping[str, Callable[[], Any]], device: str, *, warmup: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each of `runs`, taken in turns, so that a slow moment of the machine meets all alike.

    Stops after `rounds`, or, with at least three, after `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup):
        for run in runs.values():
            run()
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name].append(_milliseconds(run, device))
    return times


def _milliseconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def compare(
    case: Case,
    device: str,
    backends: Sequence[str] = ("inductor", "xformers"),
    *,
    warmup: int = 3,
    rounds: int = 10,
    seconds: float = 20.0,
    errors: bool = True,
) -> dict[str, Any]:
    """A row of results: by backend the median, its spread, the first call's seconds, the peak memory and the errors
    (which take one eager run in fp32).

    A backend that fails has an "error" in place of times; the others are measured all the same.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, arguments = case.build()
    model.train(case.mode == "train")
    row: dict[str, Any] = {"model": case.name, "mode": case.mode, "attention": case.attention, "backends": {}}
    steps: dict[str, Callable[[], Any]] = {}
    results: dict[str, list[Tensor]] = {}
    random = case.mode == "train" and _draws_numbers(model)
    for name in backends:
        cell: dict[str, Any] = {}
        row["backends"][name] = cell
        try:
            step = _step(model, arguments, case.mode, name)
            with xfcompile.collect() as report:
                cell["first_call_s"] = _milliseconds(step, device) / 1e3
            if name == "xformers":
                row["sites"] = report.summary()
                row["failures"] = list(report.failures)
            cell["peak_gb"] = _peak(step, device)
            if errors and not random:
                results[name] = _results(model, step(), case.mode)
            steps[name] = step
        except Exception as error:
            cell["error"] = f"{type(error).__name__}: {error}"[:400]
            _free(model)
    for name, times in interleaved(steps, device, warmup=warmup, rounds=rounds, seconds=seconds).items():
        row["backends"][name] |= {
            "ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "rounds": len(times)
        }  # fmt: skip
    reference = _reference(model, arguments, case.mode) if results else None
    for name, result in results.items():
        cell = row["backends"][name]
        if reference is not None:
            cell["error_to_fp32"] = _distance(result, reference)
        if name != backends[0] and backends[0] in results:
            cell[f"difference_to_{backends[0]}"] = _distance(result, results[backends[0]])
    speeds = [row["backends"].get(name, {}).get("ms") for name in ("inductor", "xformers")]
    row["speedup"] = speeds[0] / speeds[1] if all(speeds) else None
    row["close"] = closeness(row)
    del steps, results, reference, model, arguments
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def closeness(row: Mapping[str, Any]) -> bool | None:
    """Whether ours errs no more than Inductor does, both against fp32; None if that could not be told."""
    errors = [row["backends"].get(name, {}).get("error_to_fp32") for name in ("inductor", "xformers")]
    if None in errors:
        return None
    # The error is an average over all elements, so that noise hardly moves it: a fifth is room enough.
    return bool(errors[1] <= 1.2 * errors[0] + 1e-6)


def _step(model: nn.Module, arguments: Mapping[str, Any], mode: Mode, backend: str) -> Callable[[], Any]:
    compiled = model if backend == "eager" else torch.compile(model, backend=BACKENDS[backend])

    def infer() -> Any:
        with torch.no_grad():
            return compiled(**arguments)

    def train() -> Any:
        model.zero_grad(set_to_none=True)
        loss = compiled(**arguments).loss
        loss.backward()
        return loss

    return infer if mode == "infer" else train


def _peak(step: Callable[[], Any], device: str) -> float | None:
    """Gigabytes that one call has allocated at most, the model included."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def _free(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _results(model: nn.Module, outcome: Any, mode: Mode) -> list[Tensor]:
    """What is compared: the logits or the last states; in training all gradients. Kept in the host's memory, lest it
    count as the next backend's."""
    if mode == "train":
        return [p.grad.detach().to("cpu", copy=True) for p in model.parameters() if p.grad is not None]
    return [(outcome["logits"] if "logits" in outcome else outcome["last_hidden_state"]).to("cpu", copy=True)]


def _reference(model: nn.Module, arguments: Mapping[str, Any], mode: Mode) -> list[Tensor] | None:
    """The same by the same weights in fp32, eagerly, if there is memory for it."""
    try:
        _free(model)
        exact = copy.deepcopy(model).float()
        wide = {
            name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()
        }
        return _results(exact, _step(exact, wide, mode, "eager")(), mode)
    except torch.OutOfMemoryError:
        return None


def _draws_numbers(model: nn.Module) -> bool:
    """Whether a training step draws random numbers, so that no two give the same."""
    dropouts = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    config = getattr(model, "config", None)
    return dropouts or any("drop" in k and isinstance(v, float) and v > 0 for k, v in vars(config or object).items())


def _distance(result: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The norm of the difference over that of the reference, over all tensors together."""
    pairs = list(zip(result, reference, strict=True))
    error = sum(float((x.float() - y.float()).square().sum(dtype=torch.float64)) for x, y in pairs)
    size = sum(float(y.float().square().sum(dtype=torch.float64)) for _, y in pairs)
    return float((error / size) ** 0.5) if size else float(error**0.5)
