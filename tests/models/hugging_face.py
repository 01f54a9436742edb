"""Builds transformers models from a few words: class names, sizes and inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from zoo import Entry, Program

BATCH, LENGTH, VOCABULARY = 2, 24, 99

DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
VISION = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    num_channels=3,
)

Inputs = Callable[[], dict[str, Any]]


def ids(**more: Any) -> Inputs:
    """Token numbers, no padding; `more` are further keyword arguments."""
    return lambda: {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH)), **more}


def padded(left: bool = False) -> Inputs:
    """Token numbers and a mask by which the second row is shorter, padded at its end or at its beginning."""

    def make() -> dict[str, Any]:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[1, slice(0, 7) if left else slice(-7, None)] = 0
        return {**ids()(), "attention_mask": mask}

    return make


def labelled(inputs: Inputs | None = None, **more: Any) -> Inputs:
    """Inputs whose token numbers are their labels too."""

    def make() -> dict[str, Any]:
        given = (inputs or ids())()
        return {**given, "labels": given["input_ids"], **more}

    return make


def pixels(size: int = 32, **more: Any) -> Inputs:
    """A batch of square images."""
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size), **more}


def seq2seq() -> dict[str, Any]:
    """Token numbers for an encoder and, fewer, for a decoder."""
    return {**ids()(), "decoder_input_ids": torch.randint(3, VOCABULARY, (BATCH, 17))}


def build(model: str, config: Any, inputs: Inputs, attention: str) -> Program:
    """The class named `model` of transformers, made from `config`: a configuration, or its class and its fields."""
    import transformers

    if isinstance(config, tuple):
        name, fields = config
        config = getattr(transformers, name)(**fields)
    kind = getattr(transformers, model)
    # The private constructor is the one that takes the attention's implementation for any class.
    module = kind._from_config(config, attn_implementation=attention)
    return Program(module, (), inputs())


def both(
    name: str,
    model: str,
    config: tuple[str, dict[str, Any]] | Callable[[], Any],
    inputs: Inputs,
    attentions: int,
    *,
    implementations: Iterable[str] = ("eager", "sdpa"),
    **more: Any,
) -> tuple[Entry, ...]:
    """One entry for each implementation of the attention."""

    def making(attention: str) -> Callable[[], Program]:
        def make() -> Program:
            return build(model, config() if callable(config) else config, inputs, attention)

        return make

    return tuple(Entry(f"{name}[{a}]", making(a), attentions, **more) for a in implementations)


def exists(name: str) -> bool:
    """Whether this version of transformers has the class."""
    return hasattr(importlib.import_module("transformers"), name)
