"""The sweep's rules: small configurations that fit together, and inputs that models take."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

from sweep_configs import HEADS, LAYERS, VOCABULARY, configurations  # noqa: E402
from sweep_inputs import BATCH, taken  # noqa: E402
from sweep_judge import built  # noqa: E402


def smallest(name: str):
    return next(iter(configurations(name, transformers.CONFIG_MAPPING[name])))


def test_a_configuration_is_shrunk_with_its_parts():
    config = smallest("llava")
    assert config.text_config.num_hidden_layers == LAYERS
    assert config.vision_config.num_hidden_layers == LAYERS
    assert config.text_config.vocab_size == VOCABULARY
    assert config.text_config.hidden_size < 100


def test_what_the_whole_asks_of_a_part_stays():
    assert smallest("detr").backbone_config.backbone == transformers.CONFIG_MAPPING["detr"]().backbone_config.backbone


def test_heads_that_share_no_keys_share_none_when_they_are_fewer():
    assert smallest("deepseek_v3").num_key_value_heads == HEADS


def test_words_for_layers_are_as_many_as_layers_and_each_is_there():
    usual, config = transformers.CONFIG_MAPPING["gpt_oss"](), smallest("gpt_oss")
    assert set(config.layer_types) == set(usual.layer_types)
    assert len(config.layer_types) == config.num_hidden_layers < usual.num_hidden_layers


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "glmasr"])
def test_a_text_has_a_place_for_each_feature_of_an_image_or_a_sound(name: str):
    model, given, why = built(name, "default")
    assert model is not None and given is not None, why
    token = getattr(model.config, "image_token_id", None) or model.config.audio_token_id
    assert {"pixel_values", "input_features"} & set(given)
    assert int((given["input_ids"] == token).sum()) >= BATCH


def test_a_model_that_takes_nothing_says_why():
    class Strange(transformers.BertModel):
        def forward(self, input_ids, unheard_of):
            raise TypeError("what is this")

    given, why = taken(Strange(smallest("bert")))
    assert given is None
    assert "what is this" in why or "unheard_of" in why
