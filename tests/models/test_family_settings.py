"""What a family states of its settings: other values are refused, and missing names are written."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.writer import serving_config
from camera_serve.errors import UnsupportedModelError
from camera_serve.models import describe
from camera_serve.models.families import FAMILIES
from camera_serve.models.registration import register_configs
from tests import tiny_models

UNDERSTOOD = [
    (model_type, key, values)
    for model_type, family in FAMILIES.items()
    if model_type in tiny_models.FAMILIES
    for key, values in (("hidden_act", ("silu",)), *family.understood)
]
SPELLED_OUT = [
    (model_type, key)
    for model_type, family in FAMILIES.items()
    if model_type in tiny_models.FAMILIES
    for key, _ in family.spelled_out
]


def config_of(model_type: str) -> Any:
    register_configs()
    config = AutoConfig.for_model(model_type, **tiny_models.settings(model_type))
    config.model_type = model_type
    return config


def another(value: Any) -> Any:
    """A value of the same kind that is not this one, or a number where there is none."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case list():
            return [*value, *(value[-1:] or [1])]
        case None:
            return 2.0
        case _:
            return f"not {value}"


@pytest.mark.parametrize(("model_type", "key", "values"), UNDERSTOOD)
def test_a_setting_that_is_not_reproduced_exactly_is_refused_by_name(
    model_type: str, key: str, values: tuple[Any, ...]
) -> None:
    config = config_of(model_type)
    describe(config)
    other = next(v for value in values if (v := another(value)) not in values)
    setattr(config.get_text_config(), key, other)
    with pytest.raises(UnsupportedModelError, match=f"{model_type} with {key} = "):
        describe(config)


@pytest.mark.parametrize(("model_type", "key"), SPELLED_OUT)
def test_what_only_serving_engines_read_must_agree_with_what_transformers_reads(
    model_type: str, key: str
) -> None:
    config = config_of(model_type)
    text = config.get_text_config()
    wanted = FAMILIES[model_type].settings_spelled_out(text)[key]
    setattr(text, key, another(wanted))
    with pytest.raises(UnsupportedModelError, match=f"{model_type} with {key} = "):
        describe(config)
    setattr(text, key, wanted)
    describe(config)


@pytest.mark.parametrize("model_type", sorted({model_type for model_type, _ in SPELLED_OUT}))
def test_what_serving_engines_read_is_written_where_the_original_lacks_it(
    model_type: str, tmp_path: Path
) -> None:
    path = tiny_models.save(model_type, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    published = dict(text_part(config))
    names = {name for kind, name in SPELLED_OUT if kind == model_type}
    for name in names & published.keys():
        del text_part(config)[name]
    (path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(path)
    written = text_part(serving_config(checkpoint, None))
    spelled_out = FAMILIES[model_type].settings_spelled_out(checkpoint.config.get_text_config())
    assert {name: written[name] for name in names} == spelled_out
    for name in names & published.keys():
        assert written[name] == published[name]


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = config.get("text_config", config)
    return part
