"""A config that transformers cannot build a model from is one error with the setting at fault."""

from typing import Any

import pytest
from transformers import AutoConfig

from camera_serve.errors import CheckpointError
from camera_serve.models.building import build_on_meta
from tests import tiny_models


def _config(family: str) -> Any:
    return tiny_models.build(family).config


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("rope_parameters", {"rope_type": "x", "rope_theta": 1e4, "factor": 1.0}, "KeyError: 'x'"),
        ("vocab_size", -1, "-1"),
        ("hidden_size", -1, "-1"),
    ],
)
def test_the_setting_at_fault_is_named(family: str, key: str, value: Any, reason: str) -> None:
    config = _config(family)
    text = config.get_text_config()
    if key == "vocab_size":
        text.pad_token_id = None
    if key == "rope_parameters" and "rope_type" not in text.rope_parameters:
        # A table for each kind of layer.
        value = dict.fromkeys(text.rope_parameters, value)
    setattr(text, key, value)
    with pytest.raises(CheckpointError) as raised:
        build_on_meta(config)
    assert f"cannot build this model with {key} = " in str(raised.value)
    assert reason in str(raised.value)


def test_a_fault_of_no_single_setting_is_told_without_one() -> None:
    config = AutoConfig.for_model("qwen2_moe", num_hidden_layers=2)
    config.vocab_size, config.num_attention_heads = -1, 0
    with pytest.raises(CheckpointError, match="cannot build this model: "):
        build_on_meta(config)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_5_moe"])
def test_the_config_is_left_as_it_was(family: str) -> None:
    config = _config(family)
    # Of a model that sees pictures, some say the dtype of the text part alone.
    config.dtype, config.get_text_config().dtype = None, "float16"
    before = config.to_dict()
    assert build_on_meta(config).get_input_embeddings().weight.is_meta
    assert config.to_dict() == before
