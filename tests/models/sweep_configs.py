"""Configurations of transformers' models that are small: usual ones, shrunk by rules for the names of their fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

VOCABULARY, IMAGE, WORDS = 99, 32, 24
"""Sizes; and the first token that is a word: those before it are special ones."""

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2, 4, 2, 16, 64

COUNTS: list[tuple[str, Any]] = [
    (
        r"(num|n)_(hidden_|decoder_|encoder_|text_|vision_|attention_|transformer_)?layers?$|depth$|(en|de)coder_layers$",
        LAYERS,
    ),
    (r"(\w+_)?vocab_size$", VOCABULARY),
    (r"(num|n)_(local_|routed_)?experts$", 4),
    (r"(num_experts_per_tok|top_k|num_experts_per_token|moe_topk)$", 2),
    (r"n_shared_experts$|n_group$|topk_group$|first_k_dense_replace$", 1),
    (r".*(dropout|drop_rate|drop_path_rate|_pdrop|layerdrop|drop)$", 0),
]
INNER: list[tuple[str, Any]] = [
    (
        r"(en|de)coder_(ffn_dim|intermediate_size)$|(intermediate|ffn|inner)_(size|dim)$|n_inner$|d_ff$|ffn_hidden_size$",
        128,
    ),
    (r"moe_intermediate_size$|shared_expert_intermediate_size$", 32),
    (r"image_size$|img_size$", IMAGE),
    (r"patch_size$", 8),
    (r"max_(position_embeddings|sequence_length|seq_len)$|n_positions$", 128),
    (r"(sliding_window|attention_window|local_attention|attention_chunk_size)$", 8),
    (r"window_size$", 32),
]
WIDTHS: list[tuple[str, Any]] = [
    (r"(num|n)_(key_value|kv)_heads$|multi_query_group_num$", KV_HEADS),
    (r"(num|n)_(attention_|encoder_attention_|decoder_attention_)?heads?$|(en|de)coder_attention_heads$", HEADS),
    (
        r"(out_hidden|hidden|embedding|embed|projection|emb)_(size|dim)$|d_model$|n_embd$|dim$|encoder_embed_dim$|decoder_hidden_size$",
        WIDTH,
    ),
    (r"head_dim$|d_kv$|d_head$|attention_head_size$|v_head_dim$|qk_nope_head_dim$", HEAD_DIM),
    (r"qk_rope_head_dim$|rotary_dim$", 8),
    (r"q_lora_rank$|kv_lora_rank$", 16),
]
"""What a field is set to whose name is one of these to its end, where it is a number that is larger."""

Rules = list[tuple[str, Any]]

WIDER: Rules = [
    (pattern, {WIDTH: 512, HEAD_DIM: 128, 8: 64}.get(value, value) if value not in (HEADS, KV_HEADS) else value)
    for pattern, value in WIDTHS
]

DEGREES: tuple[Rules, ...] = (
    COUNTS + INNER + WIDTHS,
    COUNTS + INNER + WIDER,  # where a rotation has sections
    COUNTS + INNER,  # where widths have to fit what no rule knows
    COUNTS,
    [],
)
"""How much is shrunk: less and less, until there is a model that takes what it is given."""

NAMED: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"axial_pos_embds": False},
    "time_series_transformer": {"prediction_length": 4},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 4, "pad_token_id": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}
"""What no rule can know."""


def configurations(name: str, kind: Any) -> Iterator[Any]:
    """Configurations of this class, the smallest first. A degree of which none can be made is an error in its place."""
    for rules in DEGREES:
        for filled in (False, True):
            try:
                usual = kind()
                yield kind(**{**fields_of(usual, rules, filled, {}), **(NAMED.get(name, {}))})
            except Exception as error:
                yield error


def fields_of(usual: Any, rules: Rules, filled: bool, tokens: dict[str, int]) -> dict[str, Any]:
    """What is to be given to the class of `usual`. filled: sizes of heads that are None are numbers.
    tokens: the special ones that were given numbers, by name."""
    parts = set(getattr(usual, "sub_configs", {}))
    fields: dict[str, Any] = {}
    for name, x in usual.to_dict().items():
        if name in parts:
            part = getattr(usual, name)
            if part is not None:
                fields[name] = type(part)(**{**_own(part), **fields_of(part, rules, filled, tokens)})
        elif _derived(usual, name):
            continue
        elif rules and re.search(r"_token_(id|index)$", name) and isinstance(x, int) and x >= 3:
            fields[name] = tokens.setdefault(re.sub("index$", "id", name), 3 + len(tokens) % (WORDS - 3))
        elif isinstance(x, int | float) and not isinstance(x, bool):
            value = next((value for pattern, value in rules if re.fullmatch(pattern, name)), None)
            if value is not None and x > value:
                fields[name] = type(x)(value)
    if "kv_lora_rank" in fields or _heads(usual) == getattr(usual, "num_key_value_heads", None):
        if "num_key_value_heads" in fields:
            fields["num_key_value_heads"] = HEADS
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]  # which the rotation is of
    if filled and WIDTHS[0] in rules:
        given = usual.to_dict()
        for name, value in (("num_key_value_heads", HEADS), ("head_dim", HEAD_DIM)):
            if name in given and given[name] is None and not _derived(usual, name):
                fields[name] = value
    _cut_layers(usual, rules, fields)
    _scale_heads(usual, fields)
    if WIDTHS[0] in rules and WIDER[2] not in rules:
        _scale_rotations(usual, fields)
    return fields


def _own(part: Any) -> dict[str, Any]:
    """What this part has that its class has not: the whole asked for it."""
    parts, usual = set(getattr(part, "sub_configs", {})), type(part)().to_dict()
    return {
        name: x
        for name, x in part.to_dict().items()
        if name in usual and usual[name] != x and name not in parts and not _derived(part, name)
    }


def _derived(usual: Any, name: str) -> bool:
    """Whether it cannot be set: it is computed of others."""
    own = getattr(type(usual), name, None)
    return isinstance(own, property) and own.fset is None


def _heads(usual: Any) -> int | None:
    return next((x for n in ("num_attention_heads", "num_heads", "n_head") if (x := getattr(usual, n, None))), None)


def _cut_layers(usual: Any, rules: Rules, fields: dict[str, Any]) -> None:
    """Lists that have a word for each layer have one for those that are left, and each of the words once."""
    if not rules:
        return
    depth = COUNTS[0][0]
    depths = {x for n, x in usual.to_dict().items() if re.fullmatch(depth, n) and isinstance(x, int)}
    most = LAYERS
    lists: dict[str, list[Any]] = {
        name: x
        for name, x in usual.to_dict().items()
        if isinstance(x, list) and len(x) in depths and len(x) > LAYERS and not _derived(usual, name)
    }
    for x in lists.values():
        if all(isinstance(kind, str) for kind in x):
            most = max(most, len(dict.fromkeys(x)))
    for name, x in lists.items():
        distinct = list(dict.fromkeys(x)) if all(isinstance(kind, str) for kind in x) else x
        fields[name] = (distinct * most)[:most]
    if lists or most > LAYERS:
        for name in list(fields):
            if re.fullmatch(depth, name):
                fields[name] = most
    for name, x in usual.to_dict().items():
        if re.fullmatch(r"(\w+_)?depths|layers_per_stage|num_blocks", name) and isinstance(x, list):
            if all(isinstance(n, int) for n in x):
                fields[name] = [min(n, LAYERS) for n in x]


def _scale_heads(usual: Any, fields: dict[str, Any]) -> None:
    """Heads of stages, where the width of the first is one number."""
    heads = getattr(usual, "num_heads", None)
    if not isinstance(heads, list | tuple) or not heads or not all(isinstance(n, int) for n in heads):
        return
    if "embed_dim" in fields and heads[0] > 2:
        fields["num_heads"] = [2 * n // heads[0] for n in heads]


def _scale_rotations(usual: Any, fields: dict[str, Any]) -> None:
    """Sections of a rotation, which add up to a part of a head's dims."""
    rope = getattr(usual, "rope_parameters", None)
    heads, width = _heads(usual), getattr(usual, "hidden_size", None)
    before = getattr(usual, "head_dim", None) or (
        width // heads if isinstance(heads, int) and heads and width else None
    )
    after = fields.get("head_dim") or (
        HEAD_DIM if "hidden_size" in fields or "num_attention_heads" in fields else before
    )
    if not isinstance(rope, dict) or not before or not after or before == after:
        return

    def scaled(x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        x = {key: scaled(item) for key, item in x.items()}
        if sections := x.get("mrope_section"):
            first, *rest = [n * after // before for n in sections]
            x["mrope_section"] = [first + sum(sections) * after // before - first - sum(rest), *rest]
        return x

    if "mrope_section" in str(rope):
        fields["rope_parameters"] = scaled(rope)
