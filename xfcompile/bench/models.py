"""Whole models, unmodified: inference, a training step, decoding, and how long each takes to compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xfcompile.bench import columns as c
from xfcompile.bench.errors import InDouble
from xfcompile.bench.job import Benchmark, Call, Check, Place, Row, Scale, Skip, Start, Work
from xfcompile.bench.zoo import MODELS, Arguments, Attention, Model

INFER, TRAIN, DECODE = "infer", "train", "decode"
STARTS = {"start": INFER, "start with backward": TRAIN}
"""The modes of rows of compile times, and what is then run once."""
TOKENS, QUICK_TOKENS = 32, 4
"""That a decoding loop makes."""


def rows(scale: Scale) -> list[Row]:
    """All times first, model by model; then all compile times."""
    timed = [
        Row(name, mode, (), attention)
        for name, model in MODELS.items()
        for mode in model.modes
        for attention in model.attentions
    ]
    starts = {mode: start for start, mode in STARTS.items()}
    return timed + [Row(row.name, starts[row.mode], (), row.variant) for row in timed if row.mode in starts]


def build(name: str, mode: str, attention: Attention, place: Place) -> tuple[nn.Module, Arguments]:
    """The model and the arguments of one call, where and in which dtype they are measured."""
    model = MODELS[name]
    model.needs()
    torch.manual_seed(0)
    with torch.device(place.device):  # a GPU draws a model's weights in no time
        module, arguments = model.make(place.scale, attention, mode == TRAIN)
    return _cast(module.to(place.device), place.dtype).train(mode == TRAIN), _moved(
        arguments, place.device, place.dtype
    )


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What a checkpoint holds, in another dtype. Tables that are computed (of rotary embeddings) stay what they are, as
    in a model that is loaded in that dtype."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
    return model


def _moved(arguments: Arguments, device: str, dtype: torch.dtype) -> Arguments:
    return {k: (x.to(dtype) if x.is_floating_point() else x).to(device) for k, x in arguments.items()}


def step(model: nn.Module, fn: Callable[..., Any], arguments: Arguments, mode: str) -> Call:
    """One call of `fn`, the model or what it was compiled into; in training with its backward."""
    if mode == INFER:
        return lambda: fn(**arguments)

    def train() -> Any:
        model.zero_grad(set_to_none=True)
        loss = loss_of(fn(**arguments))
        loss.backward()
        return loss

    return train


def loss_of(outcome: Any) -> Tensor:
    """The model's own, or the mean square of what it gives."""
    if getattr(outcome, "loss", None) is not None:
        return outcome.loss
    return result_of(outcome).float().square().mean()


def result_of(outcome: Any) -> Tensor:
    """Logits, a prediction or the last states."""
    if isinstance(outcome, Tensor):
        return outcome
    for name in ("logits", "sample", "last_hidden_state"):
        if getattr(outcome, name, None) is not None:
            return getattr(outcome, name)
    raise TypeError(f"a {type(outcome).__name__} has neither logits nor a sample nor last states")


def prepare(row: Row, place: Place, routes: Mapping[str, str] | None = None) -> Work | Start:
    """routes: by family, what this backend's columns are asked for."""
    entry, attention = MODELS[row.name], row.variant
    entry.needs()
    if row.mode in STARTS:
        return Start({"name": row.name, "mode": STARTS[row.mode], "attention": attention, "device": place.device,
                      "scale": place.scale})  # fmt: skip
    if row.mode == DECODE:
        from xfcompile.bench.generation import decoding

        return decoding(row, place)
    model, arguments = build(row.name, row.mode, attention, place)  # type: ignore[arg-type]

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    def way(column: str) -> Call:
        module = model
        if column in (c.FLEX, c.TOLD):
            module = _otherwise(entry, model, row, place, "flex_attention" if column == c.FLEX else "told")
            column = c.INDUCTOR
        return step(model, c.compiled(module, column, routes=routes), arguments, row.mode)

    def seen(outcome: Any) -> Sequence[Tensor]:
        if row.mode == TRAIN:
            return [p.grad for p in model.parameters() if p.grad is not None]
        return [result_of(outcome)]

    check: Check | str = "a training step draws random numbers, each column its own"
    if not (row.mode == TRAIN and draws_numbers(model)):
        eager = step(model, model, arguments, row.mode)
        check = Check(lambda: _exact(model, arguments, row.mode), lambda: seen(eager()), seen)
    unchecked = {c.TOLD: entry.ignores} if entry.ignores else {}
    return Work(way, check, grad=row.mode == TRAIN, cold=False, clear=clear, unchecked=unchecked)


def _otherwise(entry: Model, model: nn.Module, row: Row, place: Place, attention: Attention) -> nn.Module:
    """The same model, of the same weights, with another attention."""
    if attention == "flex_attention" and not entry.flex:
        raise Skip(f"{entry.library} offers no FlexAttention for it")
    if attention == "told" and not entry.told:
        raise Skip("its attention cannot be said to SDPA without a mask")
    other, _ = build(row.name, row.mode, attention, place)
    mine = dict(model.named_parameters(remove_duplicate=False))
    for name, _parameter in list(other.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, mine[name])
    return other


def _exact(model: nn.Module, arguments: Arguments, mode: str) -> list[Tensor]:
    """The logits, or all gradients, in fp64; with checkpoints where there is no memory for all activations."""
    wide = copy.deepcopy(model).double()
    if hasattr(getattr(wide, "config", None), "_experts_implementation"):
        wide.config._experts_implementation = "eager"  # type: ignore[union-attr]  # grouped products know no fp64
    given = _moved(arguments, next(model.parameters()).device.type, torch.float64)

    def run() -> list[Tensor]:
        wide.zero_grad(set_to_none=True)
        # What checkpoints recompute is in fp64 too: the mode is this thread's, where the backward then runs as well.
        with InDouble(), torch.autograd.set_multithreading_enabled(False):
            outcome = step(wide, wide, given, mode)()
        if mode == TRAIN:
            return [p.grad for p in wide.parameters() if p.grad is not None]
        return [result_of(outcome)]

    try:
        return run()
    except torch.OutOfMemoryError:
        # The names of the models are those of the wrapped, where there is a wrapper.
        inner = getattr(wide, "model", wide)
        if mode != TRAIN or not hasattr(inner, "gradient_checkpointing_enable"):
            raise
    wide.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    target = wide if hasattr(wide, "gradient_checkpointing_enable") else inner
    target.gradient_checkpointing_enable()  # type: ignore[operator]
    return run()


def draws_numbers(model: nn.Module) -> bool:
    """Whether a training step draws random numbers, so that no two give the same."""
    dropouts = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    config = getattr(model, "config", None)
    fields = vars(config).items() if hasattr(config, "__dict__") else ()
    return dropouts or any("drop" in key and isinstance(x, float) and x > 0 for key, x in fields)


BENCHMARK = Benchmark(
    "models",
    "whole models, unmodified",
    (c.EAGER, c.INDUCTOR, c.MAX, c.FLEX, c.TOLD, c.XFORMERS, c.XFORMERS_MAX),
    rows,
    prepare,
)
