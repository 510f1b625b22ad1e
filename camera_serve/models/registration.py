"""Model types that transformers lacks, or knows under another name."""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from camera_serve.models.deepseek_config import register_deepseek_config
from camera_serve.models.families import FAMILIES


def register_configs() -> None:
    """Teach transformers' `AutoConfig` every family; repeatable. Imports no model's code.

    A family that is another in all but its name gets that one's config, as in vLLM.
    """
    register_deepseek_config()
    for model_type, family in FAMILIES.items():
        if family.known_as:
            CONFIG_MAPPING.register(model_type, CONFIG_MAPPING[family.known_as], exist_ok=True)


def register_models() -> None:
    """Teach transformers' other Auto classes every family as well; repeatable."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    from camera_serve.models.deepseek import register_deepseek

    register_configs()
    register_deepseek()
    for model_type, family in FAMILIES.items():
        if family.known_as:
            conversions: list[Any] = get_checkpoint_conversion_mapping(family.known_as)
            register_checkpoint_conversion_mapping(model_type, conversions, overwrite=True)
