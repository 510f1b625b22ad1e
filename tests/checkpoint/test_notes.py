import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from camera_serve.checkpoint.notes import notes
from camera_serve.checkpoint.reader import Checkpoint
from tests import drafts, originals, tiny_models
from tests.editing import edit_config, edit_weights


def _notes(model: Path) -> list[str]:
    return list(notes(Checkpoint.open(model)))


def _without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name)
    )


def test_there_is_nothing_to_say_of_a_model_as_it_is_published(tmp_path: Path) -> None:
    model = tiny_models.save("deepseek_v3", tmp_path / "model")
    drafts.add_deepseek_mtp(model)
    assert _notes(model) == []


def test_tensors_that_are_no_part_of_the_model_are_named(tmp_path: Path) -> None:
    model = tiny_models.save("qwen2_moe", tmp_path / "model")
    edit_weights(model, lambda tensors: tensors.update({"foo.bar": torch.ones(2)}))
    edit_weights(model, lambda tensors: tensors.update({"foo.baz": torch.ones(2)}))
    (note,) = _notes(model)
    assert "foo.bar" in note and "2 tensors" in note and "copied as they are" in note


def test_what_is_quantized_beside_the_weights_is_told(tmp_path: Path) -> None:
    way = originals.WAYS["compressed-tensors fp8 per row"]
    dense = tiny_models.save("qwen3_moe", tmp_path / "dense")
    model = tmp_path / "model"
    originals.publish(dense, model, way)
    assert _notes(model) == []

    def quantize_more(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = {"num_bits": 8, "type": "int"}
        config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}

    edit_config(model, quantize_more)
    (note,) = _notes(model)
    assert note.startswith("activations and keys and values in the cache of the original are")


def test_a_model_that_sees_pictures_wants_torchvision_to_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_torchvision(monkeypatch)
    (note,) = _notes(tiny_models.save("qwen3_5_moe", tmp_path / "seeing"))
    assert "vLLM needs torchvision" in note and "pip install torchvision" in note
    assert _notes(tiny_models.save("qwen2_moe", tmp_path / "blind")) == []
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert _notes(tmp_path / "seeing") == []
