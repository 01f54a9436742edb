"""Decoding by a model with a cache of one size: a loop of greedy steps after a prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.bench import columns as c
from xfcompile.bench.errors import InDouble
from xfcompile.bench.job import Call, Check, Place, Row, Work

TOKENS = {"gpu": 32, "cpu": 16, "quick": 3}
"""That the loop makes; times are those of one."""
ROOM = {"gpu": 4096, "cpu": 2048, "quick": 128}
"""The cache's length, for prompt and tokens."""


def decoding(row: Row, place: Place) -> Work:
    """Compiled are steps alone, on GPUs into CUDA graphs (mode "reduce-overhead"), as one decodes there."""
    from xfcompile.bench.models import build

    model, arguments = build(row.name, row.mode, row.variant, place)  # type: ignore[arg-type]
    prompt, count = arguments["input_ids"], TOKENS[place.scale]
    loop = Loop(model, prompt, ROOM[place.scale])
    mode = "reduce-overhead" if place.device == "cuda" else None

    def way(column: str) -> Call:
        fn = c.compiled(model, column, mode=mode)
        return lambda: loop.run(fn, count)

    def exact() -> Sequence[Tensor]:
        wide = copy.deepcopy(model).double()
        with InDouble():
            return [Loop(wide, prompt, ROOM[place.scale]).first(wide)]

    # All tokens depend on the first: what is compared are the logits of the first step, where all columns stand alike.
    check = Check(exact, lambda: [loop.first(model)], lambda outcome: [outcome[0]])
    return Work(way, check, per=count, cold=False)


class Loop:
    """A cache that a prompt has been read into, and steps from there."""

    def __init__(self, model: Any, prompt: Tensor, room: int) -> None:
        from transformers import StaticCache

        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.length = prompt.shape[1]
        with torch.no_grad():
            logits = model(input_ids=prompt, past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1:].float().argmax(-1).clone()

    def rewind(self) -> None:
        """To the prompt's end: what the cache holds behind it is masked until it is written over."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    def first(self, fn: Callable[..., Any]) -> Tensor:
        self.rewind()
        return self.step(fn, self.token)

    def step(self, fn: Callable[..., Any], token: Tensor) -> Tensor:
        """The logits of the next token."""
        torch.compiler.cudagraph_mark_step_begin()
        return fn(input_ids=token, past_key_values=self.cache, use_cache=True).logits[:, -1:].clone()

    def run(self, fn: Callable[..., Any], count: int) -> tuple[Tensor, Tensor]:
        """The first step's logits, and all tokens."""
        self.rewind()
        token, tokens, first = self.token, [], None
        for _ in range(count):
            logits = self.step(fn, token)
            first = logits if first is None else first
            token = logits.argmax(-1)
            tokens.append(token)
        assert first is not None
        return first, torch.cat(tokens, 1)
