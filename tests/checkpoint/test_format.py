import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from camera_serve.checkpoint.format import (
    DENSE_TIERS,
    CameraQuantizationConfig,
    check_groups,
    dense_layout,
    expert_shapes,
)
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CheckpointError
from camera_serve.ragged.layout import LayerLayout
from tests import pruning, quantized, tiny_models


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("format")
    dense = tiny_models.save("qwen2_moe", root / "dense")
    pruning.prune(dense, root / "compressed")
    return root / "compressed"


def quantization_of(compressed: Path) -> dict[str, Any]:
    return json.loads((compressed / "config.json").read_text())["quantization_config"]


def test_json_survives_a_round_trip(compressed: Path) -> None:
    config = CameraQuantizationConfig.parse(quantization_of(compressed))
    assert CameraQuantizationConfig.parse(json.loads(config.model_dump_json())) == config


def test_shapes_follow_the_layout_and_empty_experts_are_absent(compressed: Path) -> None:
    structure = pruning.structure_of(compressed)
    experts = ((0,), (1,), (17,), *dense_layout(structure).experts[3:])
    shapes = expert_shapes(structure, 1, LayerLayout(experts=experts, shared=((5,),)), DENSE_TIERS)
    prefix = "model.layers.1.mlp"
    assert not any(name.startswith(f"{prefix}.experts.0.") for name in shapes)
    assert shapes[f"{prefix}.experts.1.gate_proj.weight"] == (1, 64)
    assert shapes[f"{prefix}.experts.2.down_proj.weight"] == (64, 17)
    assert shapes[f"{prefix}.experts.7.up_proj.weight"] == (64, 64)
    assert shapes[f"{prefix}.shared_expert.down_proj.weight"] == (64, 5)
    assert len(shapes) == 7 * 3 + 3


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_config_implies_exactly_the_tensors_on_disk(family: str, tmp_path: Path) -> None:
    dense = tiny_models.save(family, tmp_path / "dense")
    pruning.prune(dense, tmp_path / "compressed")
    for path in (dense, tmp_path / "compressed"):
        checkpoint = Checkpoint.open(path)
        shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
        beside = ("mtp.", *checkpoint.structure.family.elsewhere)
        for name in shapes.keys() - checkpoint.expected_shapes:
            layer = checkpoint.structure.layer_number(name)
            assert name.startswith(beside) or layer == checkpoint.structure.num_layers
            del shapes[name]
        assert shapes == checkpoint.expected_shapes


Tamper = Callable[[dict[str, Any]], None]
LAYER = "model.layers.0.mlp"


def _set(*keys: Any, to: Any) -> Tamper:
    def tamper(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = to

    return tamper


def _drop_layer(config: dict[str, Any]) -> None:
    del config["layers"][LAYER]


def _add_layer(config: dict[str, Any]) -> None:
    config["layers"]["model.layers.9.mlp"] = config["layers"][LAYER]


def _drop_expert(config: dict[str, Any]) -> None:
    config["layers"][LAYER]["experts"].pop()


TAMPERED: dict[str, tuple[Tamper, str]] = {
    "negative count": (
        _set("layers", LAYER, "experts", 2, 0, to=-3),
        r"experts\[2\] counts \[-3\]",
    ),
    "count above d_ff": (
        _set("layers", LAYER, "experts", 5, 0, to=65),
        r"experts\[5\] counts \[65\] .* at most 64",
    ),
    "shared above d_ff": (
        _set("layers", LAYER, "shared", 0, 0, to=97),
        r"shared\[0\] counts \[97\] .* at most 96",
    ),
    "too many tiers": (
        _set("layers", LAYER, "experts", 1, to=[1, 1]),
        r"experts\[1\] has 2 tiers, wanted 1",
    ),
    "an expert too few": (_drop_expert, "counts 7 experts, the model has 8"),
    "no shared expert": (
        _set("layers", LAYER, "shared", to=[]),
        "counts 0 shared, the model has 1",
    ),
    "a layer too few": (_drop_layer, r"model\.layers\.0\.mlp is missing"),
    "a layer too many": (_add_layer, r"model\.layers\.9\.mlp, which is not a MoE layer"),
    "another format": (_set("format", to=2), "format: Input should be 1"),
    "bits nobody serves": (_set("bits", to=[5]), r"bits \[5\] cannot be served"),
    "a group size of 0": (_set("group_size", to=0), "group_size: Input should be greater than 0"),
    "an unknown key": (_set("surprise", to=1), "surprise: Extra inputs"),
    "no recipe": (lambda config: config.pop("recipe"), "recipe: Field required"),
    "counts that are text": (
        _set("layers", LAYER, "experts", 0, 0, to="many"),
        "valid integer",
    ),
    "a wrong but possible width": (
        _set("layers", LAYER, "experts", 2, 0, to=16),
        r"experts\.2\.gate_proj\.weight has shape \[17, 64\], config.json implies \[16, 64\]",
    ),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED.keys())
def test_a_tampered_config_is_refused_by_name(
    compressed: Path, tmp_path: Path, tamper: tuple[Tamper, str]
) -> None:
    change, message = tamper
    config = json.loads((compressed / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(compressed / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_compressed_checkpoint_without_its_config_is_not_taken_for_dense(
    compressed: Path, tmp_path: Path
) -> None:
    config = json.loads((compressed / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(compressed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight .* is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("part", "dtype", "wanted"),
    [
        ("qweight", torch.float32, "stored as F32, wanted I32"),
        ("scales", torch.float32, "stored as F32, wanted F16"),
        ("zeros", torch.bfloat16, "stored as BF16, wanted F16"),
    ],
)
def test_a_packed_tensor_of_another_dtype_is_named(
    tmp_path: Path, part: str, dtype: torch.dtype, wanted: str
) -> None:
    dense = tiny_models.save("qwen3_moe", tmp_path / "dense")
    quantized.compress(dense, tmp_path / "out", "2:1")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(part))
    save_file({**tensors, name: tensors[name].to(dtype)}, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is {wanted}"):
        Checkpoint.open(tmp_path / "out")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    quantized.compress(tiny_models.save("qwen3_moe", root / "dense"), root / "out", "2:1")
    return root / "out"


@pytest.mark.parametrize("group_size", [16, 48, 96, 128])
def test_groups_that_are_no_whole_units_of_a_row_are_refused(
    packed: Path, tmp_path: Path, group_size: int
) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["group_size"] = group_size
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = rf"group size {group_size} must be a multiple of 32 that divides d_model 64: 32, 64$"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_rows_that_are_no_whole_units_cannot_be_packed() -> None:
    with pytest.raises(CheckpointError, match=r"d_model 80 is no multiple of 32.* 16 and 0 bits"):
        check_groups(80, 16, (2,))
    check_groups(80, 128, (16,))
