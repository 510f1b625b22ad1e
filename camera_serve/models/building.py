"""transformers' own model of a config, on the meta device: names, shapes and code, no memory."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

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


def _build(config: Config, dtype: torch.dtype | None) -> Any:
    if config.model_type == "deepseek":
        from camera_serve.models.deepseek import register_deepseek

        register_deepseek()
    with torch.device("meta"):
        return _make(config)(_own_config(config), **({"dtype": dtype} if dtype else {}))


def _make(config: Config) -> Callable[..., Any]:
    """What makes the model: the family's own class, which has all that its checkpoints hold.

    `AutoModelForCausalLM` makes the text part alone of a model that sees pictures as well.
    """
    if model_class := _own_class(config):
        return model_class._from_config
    return AutoModelForCausalLM.from_config


def _own_class(config: Config) -> Any:
    """transformers' class of a family's whole model; None for one that is not transformers' own."""
    family = FAMILIES.get(config.model_type)
    names = family.architectures if family else ()
    return next((found for name in names if (found := getattr(transformers, name, None))), None)


def _own_config(config: Config) -> Config:
    """The config as its model reads it: vLLM reads some families' with the class of another."""
    model_class = _own_class(config)
    if model_class is None or isinstance(config, model_class.config_class):
        return config
    return model_class.config_class.from_dict(config.to_dict())


def _setting_at_fault(config: Config) -> str:
    """` with KEY = VALUE` for the first setting whose default builds; empty when none does."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, defaults = 1, vars(type(text)())
    if _builds(small):
        return ""
    for key, value in list(vars(text).items()):
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
