"""What a model of transformers may take: tensors by the names of its forward's parameters, the likeliest first."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sweep_configs import IMAGE, WORDS
from torch import Tensor

BATCH, LENGTH, TARGETS = 2, 24, 17
LONGEST = 15.0
"""Seconds that inputs are tried for."""
Inputs = dict[str, Any]


def taken(model: torch.nn.Module) -> tuple[Inputs | None, str]:
    """The first inputs that the model takes; or None, and why it did not take the first ones."""
    reason, start = "", time.monotonic()
    for candidate in inputs_of(model):
        if time.monotonic() > start + LONGEST:
            break
        for _ in range(4):
            try:
                with torch.no_grad():
                    model(**candidate)
                return candidate, ""
            except Exception as error:
                said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
                reason = reason or f"{said} of {', '.join(candidate)}"
                mended = mend(model, candidate, str(error))
            if mended is None:
                break
            candidate = mended
    return None, reason


def mend(model: torch.nn.Module, given: Inputs, said: str) -> Inputs | None:
    """The same with as many places in the text as there are features of images, videos or sounds to be put there."""
    counts = re.search(r"(\w+) features and \w+ tokens do not match,? tokens: (\d+),? features:? (\d+)", said)
    if counts is None or "input_ids" not in given:
        return None
    kind, held, wanted = counts[1].lower(), int(counts[2]), int(counts[3])
    token = _seek(model.config, f"{kind}_token_id", f"{kind}_token_index", "image_token_id", "audio_token_id")
    width = _seek(getattr(model.config, "text_config", model.config), "hidden_size") or 1
    if held == wanted:  # some models count numbers, and not rows of them
        wanted //= width
    if token is None or not wanted or wanted % BATCH or wanted > 4096 or held == wanted:
        return None
    ids = torch.stack([row[row != token][:LENGTH] for row in given["input_ids"]]) if held else given["input_ids"]
    places = torch.full((BATCH, wanted // BATCH), token)
    ids = torch.cat([ids[:, :1], places, ids[:, 1:]], 1)
    mended = {**given, "input_ids": ids}
    if "attention_mask" in given:
        mask = torch.ones_like(ids)
        mask[1, -7:] = 0
        mended["attention_mask"] = mask
    if "mm_token_type_ids" in given:
        mended["mm_token_type_ids"] = (ids == token).long()
    return mended


def inputs_of(model: torch.nn.Module) -> Iterator[Inputs]:
    """Text of each kind with each kind of everything else, padded and not; then text alone."""
    parameters = inspect.signature(model.forward).parameters
    names = set(parameters)
    needed = {
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    for text in _texts(model.config, names):
        for extra in _others(model.config, names):
            given = {**text, **extra}
            given |= _guessed(model.config, needed - set(given))
            if "attention_mask" in names and "input_ids" in given:
                mask = torch.ones(BATCH, given["input_ids"].shape[1], dtype=torch.long)
                mask[1, -7:] = 0
                yield {**given, "attention_mask": mask}
            yield given


def _texts(config: Any, names: set[str]) -> Iterator[Inputs]:
    length = min([LENGTH, *(n for n in _all(config, "max_position_embeddings") if n > 0)])
    books = _seek(config, "num_codebooks", "num_vq", "decoder_num_channels")

    def ids(*shape: int) -> Tensor:
        words = min([n for n in _all(config, "vocab_size") if n > 8] or [WORDS + 8])
        return torch.randint(min(WORDS, words // 2), words, shape)

    def text(shape: tuple[int, ...]) -> Inputs:
        given: Inputs = {}
        if "input_ids" in names:
            given["input_ids"] = ids(*shape)
        if "bbox" in names:
            given["bbox"] = torch.zeros(BATCH, length, 4, dtype=torch.long)
        if "decoder_input_ids" in names:
            given["decoder_input_ids"] = ids(BATCH, min(TARGETS, length))
        return given

    yield text((BATCH, length))
    if books and "input_ids" in names:
        yield text((BATCH, length, books))
        yield text((BATCH, books, length))


def _others(config: Any, names: set[str]) -> Iterator[Inputs]:
    """What there is besides text, in one of its layouts."""
    found = False
    for key, layouts in (
        ("grid_thw", _patches),
        ("image_grid_thw", _patches),
        ("spatial_shapes", _flat_images),
        ("pixel_values", _images),
        ("pixel_values_videos", _videos),
        ("input_features", _spectra),
        ("input_values", _sounds),
        ("past_values", _series),
    ):
        if key in names:
            found = True
            for given in layouts(config):
                yield {n: x for n, x in given.items() if n in names}
    if not found or "input_ids" in names:
        yield {}


def _size(config: Any) -> tuple[int, int]:
    for x in _values(config, "image_size"):
        if isinstance(x, int):
            return x, x
        if isinstance(x, list | tuple) and len(x) == 2 and all(isinstance(n, int) for n in x):
            return x[0], x[1]
        if isinstance(x, dict) and {"height", "width"} <= set(x):
            return x["height"], x["width"]
    return IMAGE, IMAGE


def _images(config: Any) -> Iterator[Inputs]:
    channels, (height, width) = _seek(config, "num_channels", "in_channels") or 3, _size(config)
    frames = _seek(config, "num_frames") or 4
    for rows, columns in dict.fromkeys([(height, width), (64, 64), (224, 224)]):
        yield {"pixel_values": torch.randn(BATCH, channels, rows, columns)}
        yield {"pixel_values": torch.randn(BATCH, frames, channels, rows, columns)}
    yield {"pixel_values": torch.randn(BATCH, 1, channels, height, width)}
    yield {
        "pixel_values": torch.randn(BATCH, 2, channels, height, width),
        "prompt_pixel_values": torch.randn(BATCH, channels, height, width),
    }


def _videos(config: Any) -> Iterator[Inputs]:
    channels, (height, width) = _seek(config, "num_channels", "in_channels", "in_chans") or 3, _size(config)
    for frames in dict.fromkeys([_seek(config, "num_frames", "frames_per_clip") or 4, 8, 16]):
        yield {"pixel_values_videos": torch.randn(BATCH, frames, channels, height, width)}


def _patches(config: Any) -> Iterator[Inputs]:
    """An image of four patches by four, each a row."""
    patch = _seek(config, "patch_size") or 14
    channels = _seek(config, "in_channels", "in_chans", "num_channels") or 3
    merge = _seek(config, "spatial_merge_size", "merge_size") or 2
    for times in dict.fromkeys([_seek(config, "temporal_patch_size") or 1, 1, 2]):
        numbers = torch.randn(BATCH * 16, channels * times * patch * patch)
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        for pixels in (numbers, numbers.view(BATCH * 16, channels, patch, patch) if times == 1 else numbers):
            yield {
                "pixel_values": pixels,
                "hidden_states": pixels,
                "grid_thw": grid,
                "image_grid_thw": grid,
                "merge_sizes": torch.tensor([merge] * BATCH),
                "mm_token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long),
            }
    width = _seek(config, "hidden_size", "embed_dim") or 64
    yield {"hidden_states": torch.randn(BATCH * 16, width), "grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}


def _flat_images(config: Any) -> Iterator[Inputs]:
    patch, channels = _seek(config, "patch_size") or 16, _seek(config, "num_channels") or 3
    yield {
        "pixel_values": torch.randn(BATCH, 16, channels * patch * patch),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
    }


def _spectra(config: Any) -> Iterator[Inputs]:
    """Sounds as spectra: time last, or first, or an image of one channel."""
    names = ("num_mel_bins", "feature_size", "n_mels", "feature_projection_input_dim", "input_dim", "input_channels")
    mels = dict.fromkeys([*(n for name in names for n in _all(config, name)), 80, 128])
    lengths = dict.fromkeys([2 * (_seek(config, "max_source_positions") or 48), 200, 3000])
    for frames in lengths:
        for n in mels:
            for shape in ((BATCH, n, frames), (BATCH, frames, n), (BATCH, 1, frames, n)):
                mask = torch.ones(BATCH, frames, dtype=torch.long)
                given = {"input_features": torch.randn(shape)}
                yield {**given, "input_features_mask": mask, "feature_attention_mask": mask}
                yield given


def _sounds(config: Any) -> Iterator[Inputs]:
    for shape in ((BATCH, 4000), (BATCH, 1, 4000), (BATCH, 1024, 128), (BATCH, 48, 80)):
        yield {"input_values": torch.randn(shape)}


def _series(config: Any) -> Iterator[Inputs]:
    length = _seek(config, "context_length") or 64
    lags = max(_seek_list(config, "lags_sequence") or [0])
    channels = _seek(config, "num_input_channels") or 1
    for shape in ((BATCH, length, channels), (BATCH, length + lags), (BATCH, length)):
        yield {
            "past_values": torch.randn(shape),
            "past_observed_mask": torch.ones(shape),
            "past_time_features": torch.zeros(BATCH, shape[1], _seek(config, "num_time_features") or 0),
            "past_values_padding": torch.zeros(BATCH, length, dtype=torch.long),
            "freq": torch.zeros(BATCH, 1, dtype=torch.long),
        }


def _guessed(config: Any, names: set[str]) -> Inputs:
    """By the ends of their names."""
    width = _seek(config, "hidden_size", "d_model", "embed_dim") or 64
    makers: list[tuple[str, Callable[[], Tensor]]] = [
        (r".*mask$", lambda: torch.ones(BATCH, LENGTH, dtype=torch.long)),
        (r".*position_ids$", lambda: torch.arange(LENGTH)[None].expand(BATCH, -1)),
        (r".*(_ids|task_inputs)$", lambda: torch.randint(WORDS, WORDS + 8, (BATCH, LENGTH))),
        (r".*(states|embeds|embeddings)$", lambda: torch.randn(BATCH, LENGTH, width)),
    ]
    return {name: make() for name in sorted(names) for pattern, make in makers[:] if re.fullmatch(pattern, name)}


def _values(config: Any, name: str) -> Iterator[Any]:
    """Of a configuration, and of its parts, from outside to inside."""
    if (x := getattr(config, name, None)) is not None:
        yield x
    for key in getattr(config, "sub_configs", {}):
        if (part := getattr(config, key, None)) is not None:
            yield from _values(part, name)


def _all(config: Any, name: str) -> list[int]:
    numbers = []
    for x in _values(config, name):
        if isinstance(x, int) and not isinstance(x, bool):
            numbers.append(x)
        elif isinstance(x, list | tuple) and x and isinstance(x[0], int):
            numbers.append(x[0])
    return numbers


def _seek(config: Any, *names: str) -> int | None:
    return next((n for name in names for n in _all(config, name)), None)


def _seek_list(config: Any, name: str) -> list[int] | None:
    return next((list(x) for x in _values(config, name) if isinstance(x, list | tuple)), None)
