"""transformers' own model of a config, on the meta device: names, shapes and code, no memory."""

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from camera_serve.errors import CheckpointError, described
from camera_serve.models.families import FAMILIES, Config


def build_on_meta(config: Config, dtype: torch.dtype | None = None) -> Any:
    """The model without weights; `dtype` None is the config's own.

    Raises `CheckpointError` with transformers' reason, and the setting at fault where it is one.
    """
    try:
        return _build(config, dtype)
    except Exception as error:  # transformers checks few settings: the rest fails in its code.
        raise CheckpointError(
            f"transformers cannot build this model{_setting_at_fault(config)}: {described(error)}"
        ) from error


def model_class(config: Config) -> Any:
    """The family's own class, which has all that its checkpoints hold, or `AutoModelForCausalLM`.

    That makes the text part alone of a model that sees pictures as well, or knows it not at all.
    """
    family = FAMILIES.get(config.model_type)
    names = family.architectures if family else ()
    found = (getattr(transformers, name, None) for name in names)
    return next(filter(None, found), AutoModelForCausalLM)


def auto_class_name(config: Config) -> str:
    """Which of transformers' classes a user loads a model's checkpoint with."""
    seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    if config.model_type in seeing - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"


def _build(config: Config, dtype: torch.dtype | None) -> Any:
    if config.model_type == "deepseek":
        from camera_serve.models.deepseek import register_deepseek

        register_deepseek()
    made, config = model_class(config), copy.deepcopy(config)  # transformers sets dtypes in it.
    if made is AutoModelForCausalLM:
        make = made.from_config
    else:
        make = made._from_config
        if not isinstance(config, made.config_class):
            # vLLM reads some families' configs with the class of another.
            config = made.config_class.from_dict(config.to_dict())
    with torch.device("meta"):
        return make(config, **({"dtype": dtype} if dtype else {}))


def _setting_at_fault(config: Config) -> str:
    """` with KEY = VALUE` for the first setting whose default builds; empty when none does."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, defaults = 1, vars(type(text)())
    if _builds(small):
        return ""
    for key, value in vars(text).copy().items():
        vars(text)[key] = defaults.get(key)
        if _builds(small):
            return f" with {key} = {value!r:.100}"
        vars(text)[key] = value
    return ""


def _builds(config: Config) -> bool:
    try:
        _build(config, None)
    except Exception:
        return False
    return True
