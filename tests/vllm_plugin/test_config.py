"""What vLLM hears about a checkpoint that lies, before it allocates anything."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_config

from camera_serve.errors import CheckpointError, ServingError, UnsupportedModelError
from camera_serve.vllm_plugin import compat, register
from camera_serve.vllm_plugin.config import CameraConfig
from tests import pruning, tiny_models
from tests.editing import Tensors, edit_config, edit_weights

PREFIX = "model.layers.1.mlp"
EXPERT = f"{PREFIX}.experts.3"
WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dense = tiny_models.save("qwen2_moe", tmp_path / "dense")
    pruning.prune(dense, tmp_path / "pruned")
    return tmp_path / "pruned"


def open_as_vllm_does(path: Path) -> CameraConfig:
    register()
    hf_config = get_config(path, trust_remote_code=False)
    config = CameraConfig.from_config(hf_config.quantization_config)
    config.maybe_update_config(str(path), hf_config=hf_config, revision=None)
    return config


def refusal(path: Path, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        open_as_vllm_does(path)
    return str(caught.value)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_good_checkpoint_of_every_family_passes(family: str, tmp_path: Path) -> None:
    dense = tiny_models.save(family, tmp_path / "dense")
    pruning.prune(dense, tmp_path / "pruned")
    open_as_vllm_does(tmp_path / "pruned")


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_layers_are_found_by_the_names_that_vllm_gives_them(family: str, tmp_path: Path) -> None:
    dense = tiny_models.save(family, tmp_path / "dense")
    pruning.prune(dense, tmp_path / "pruned")
    config = open_as_vllm_does(tmp_path / "pruned")
    # As vLLM's model says: its mapper cannot be imported here, as it asks for torchvision.
    config.apply_vllm_mapper(
        WeightsMapper(
            orig_to_new_prefix={
                "model.visual.": "visual.",
                "lm_head.": "language_model.lm_head.",
                "model.language_model.": "language_model.model.",
                "mtp.": None,
            }
        )
    )
    methods = pickle.loads(pickle.dumps(config))._methods
    found = methods._stored_name("language_model.model.layers.0.mlp")
    assert found == "model.language_model.layers.0.mlp"
    assert methods._stored_name("language_model.model.layers.2.mlp.x") is None
    assert methods._stored_name("visual.blocks.0.mlp") is None


def test_config_travels_to_workers(checkpoint: Path) -> None:
    config = open_as_vllm_does(checkpoint)
    copy = pickle.loads(pickle.dumps(config))
    assert copy.quantization == config.quantization
    assert copy._structure == config._structure


def test_folder_without_weights_passes_for_dummy_loading(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    open_as_vllm_does(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{EXPERT}.up_proj.weight"),
            f"tensor {EXPERT}.up_proj.weight [64, 64] is missing",
        ),
        (
            lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"),
            "tensor model.layers.0.self_attn.q_proj.weight [64, 64] is missing",
        ),
        (
            lambda t: t.update({f"{PREFIX}.experts.8.up_proj.weight": torch.ones(4, 64)}),
            f"tensor {PREFIX}.experts.8.up_proj.weight is not part of this model",
        ),
        (
            lambda t: t.update({f"{EXPERT}.gate_proj.bias": torch.ones(64)}),
            f"tensor {EXPERT}.gate_proj.bias is not part of this model",
        ),
        (
            # Expert 0 keeps nothing.
            lambda t: t.update({f"{PREFIX}.experts.0.up_proj.weight": torch.ones(1, 64)}),
            f"tensor {PREFIX}.experts.0.up_proj.weight is not part of this model",
        ),
        (
            lambda t: t.update({f"{EXPERT}.down_proj.weight": torch.ones(64, 63)}),
            f"tensor {EXPERT}.down_proj.weight has shape [64, 63], config.json implies [64, 64]",
        ),
        (
            lambda t: t.update({f"{PREFIX}.shared_expert.up_proj.weight": torch.ones(36, 64)}),
            f"tensor {PREFIX}.shared_expert.up_proj.weight has shape [36, 64], config.json "
            "implies [37, 64]",
        ),
    ],
    ids=["missing", "missing-attention", "expert", "bias", "empty-expert", "shape", "shared-shape"],
)
def test_tensors_that_do_not_fit_are_named(
    checkpoint: Path, change: Callable[[Tensors], object], message: str
) -> None:
    edit_weights(checkpoint, change)
    assert message in refusal(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["layers"][PREFIX]["experts"][3].__setitem__(0, -1), "experts[3] counts [-1]"),
        (lambda q: q["layers"][PREFIX]["experts"][3].__setitem__(0, 65), "at most 64 in all"),
        (lambda q: q["layers"][PREFIX]["experts"].pop(), "counts 7 experts, the model has 8"),
        (lambda q: q["layers"][PREFIX]["experts"][3].append(1), "experts[3] has 2 tiers, wanted 1"),
        (lambda q: q["layers"][PREFIX].update(shared=[]), "counts 0 shared, the model has 1"),
        (lambda q: q["layers"].pop(PREFIX), f"{PREFIX} is missing"),
        (
            lambda q: q["layers"].update({"model.layers.2.mlp": q["layers"][PREFIX]}),
            "model.layers.2.mlp, which is not a MoE layer",
        ),
        (lambda q: q["layers"][PREFIX]["experts"][3].__setitem__(0, "many"), "valid integer"),
        (lambda q: q.update(format=2), "format: "),
        (lambda q: q.update(bits=[5]), "bits [5] cannot be served by this version"),
        (lambda q: q["layers"][PREFIX]["experts"][1].__setitem__(0, 2), "experts.1.gate_proj"),
    ],
    ids=[
        "negative",
        "above-d_ff",
        "experts",
        "tiers",
        "shared",
        "layer-missing",
        "layer-extra",
        "not-a-number",
        "format",
        "bits",
        "off-by-one",
    ],
)
def test_counts_that_do_not_add_up_are_named(
    checkpoint: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(checkpoint, lambda config: change(config["quantization_config"]))
    assert message in refusal(checkpoint)


def test_a_removed_quantization_config_is_noticed(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.pop("quantization_config"))
    assert "has lost its quantization_config" in refusal(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({key: tensors[key] for key in half}, checkpoint / file)
    weight_map = {key: file for file, half in halves.items() for key in half}
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (checkpoint / WEIGHTS).unlink()
    open_as_vllm_does(checkpoint)

    (checkpoint / "b.safetensors").unlink()
    assert "b.safetensors is missing" in refusal(checkpoint)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    weights = checkpoint / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{WEIGHTS} is truncated or not a safetensors file" in refusal(checkpoint)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    assert "pickled weights (pytorch_model.bin)" in refusal(checkpoint)


def test_a_setting_that_is_not_understood_is_named(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.update(hidden_act="gelu"))
    assert "hidden_act = 'gelu'" in refusal(checkpoint, UnsupportedModelError)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 128, "makes d_model 128; .* has 64"),
        ("moe_intermediate_size", 128, "makes d_ff 128; .* has 64"),
        ("shared_expert_intermediate_size", 48, "makes shared_d_ff 48; .* has 96"),
        ("num_experts", 4, "makes num_experts 4; .* has 8"),
        ("num_hidden_layers", 1, "makes num_layers 1; .* has 2"),
    ],
)
def test_sizes_that_vllm_was_told_instead_are_refused(
    checkpoint: Path, key: str, value: int, message: str
) -> None:
    hf_config = get_config(checkpoint, trust_remote_code=False)
    config = CameraConfig.from_config(hf_config.quantization_config)
    setattr(hf_config, key, value)
    with pytest.raises(ServingError, match=f"--hf-overrides .*{message}.*start without it"):
        config.maybe_update_config(str(checkpoint), hf_config=hf_config, revision=None)


def test_fewer_experts_per_token_are_the_users_choice(checkpoint: Path) -> None:
    hf_config = get_config(checkpoint, trust_remote_code=False)
    config = CameraConfig.from_config(hf_config.quantization_config)
    hf_config.num_experts_per_tok = 1
    config.maybe_update_config(str(checkpoint), hf_config=hf_config, revision=None)


def test_a_hub_model_is_checked_by_its_headers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_config = get_config(checkpoint, trust_remote_code=False)
    shapes = {key: tuple(t.shape) for key, t in load_file(checkpoint / WEIGHTS).items()}
    monkeypatch.setattr(compat, "hub_shapes", lambda model, revision: shapes)
    config = CameraConfig.from_config(hf_config.quantization_config)
    config.maybe_update_config("someone/model", hf_config=hf_config, revision=None)

    del shapes[f"{EXPERT}.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight .* is missing"):
        config.maybe_update_config("someone/model", hf_config=hf_config, revision=None)
