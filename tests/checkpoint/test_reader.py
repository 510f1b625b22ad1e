import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camera_serve.checkpoint.reader import Checkpoint, read_json
from camera_serve.errors import CheckpointError, UnsupportedModelError
from tests import tiny_models
from tests.editing import edit_config


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "model"
    return tiny_models.save("qwen2_moe", path, max_shard_size="200KB")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def first_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def test_tensors_are_read_from_the_shard_that_holds_them(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    assert len({entry.file for entry in checkpoint.entries.values()}) > 2
    for name, entry in checkpoint.entries.items():
        assert checkpoint.get(name).equal(load_file(entry.file)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_lies(
    model: Path, value: float, dtype: torch.dtype
) -> None:
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    file = Checkpoint.open(model).entries[name].file
    tensors = load_file(file)
    for place in ((0, 0), (0, 1), (31, 17), (63, 63)):
        weight = torch.randn(64, 64).to(dtype)
        weight[place] = value
        save_file(tensors | {name: weight}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name} holds 1 NaN or Inf values of 4096"):
            Checkpoint.open(model).get(name)


def test_expert_bytes_count_routed_and_shared_experts(model: Path) -> None:
    # 2 layers × (8 experts × 64 + 96 shared) micro-experts × 3 vectors of 64 bf16 weights.
    assert Checkpoint.open(model).expert_bytes == 2 * (8 * 64 + 96) * 3 * 64 * 2


def test_the_dtype_may_be_said_of_the_text_part_alone(tmp_path: Path) -> None:
    path = tiny_models.save("qwen3_5_moe", tmp_path / "model", dtype=torch.float16)
    assert Checkpoint.open(path).dtype == torch.float16
    edit_config(path, lambda config: config["text_config"].update(dtype=config.pop("dtype")))
    assert Checkpoint.open(path).dtype == torch.float16


def test_a_missing_shard_is_named(model: Path) -> None:
    shard = first_shard(model)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        Checkpoint.open(model)


def test_a_truncated_shard_is_named(model: Path) -> None:
    shard = first_shard(model)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated or not a safetensors"):
        Checkpoint.open(model)


def test_a_file_that_is_no_safetensors_is_named(model: Path) -> None:
    shard = first_shard(model)
    shard.write_bytes(b"PK\x03\x04" + b"\0" * 500)
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated or not a safetensors"):
        Checkpoint.open(model)


def test_pickled_weights_are_never_opened(model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*convert them to safetensors"):
        Checkpoint.open(model)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_weights_of_another_format_are_not_taken_for_the_model(tmp_path: Path, name: str) -> None:
    path = tiny_models.save("olmoe", tmp_path / "model")
    wanted = Checkpoint.open(path).entries
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, path / name)
    assert Checkpoint.open(path).entries == wanted
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"Hugging Face format, only {name}: download"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model-Q4_K_M.gguf", r"model-Q4_K_M\.gguf.*: download the model as safetensors"),
        ("model.safetensors.incomplete", r"\.incomplete.*: download the model again"),
        ("notes.txt", "download the model again"),
    ],
)
def test_what_lies_there_instead_of_weights_is_named(model: Path, name: str, remedy: str) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / name).touch()
    with pytest.raises(CheckpointError, match=f"holds no safetensors file.*{remedy}"):
        Checkpoint.open(model)


def test_files_without_an_index_are_told_with_the_remedy(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"but no model\.safetensors\.index\.json: download"):
        Checkpoint.open(model)


def test_an_index_that_points_outside_the_folder_is_refused(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = "../../other/model.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="no weight_map of plain file names"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.experts.8.gate_proj.weight", "is not part of this model"),
        ("model.layers.1.mlp.experts.3.gate_proj.bias", "is not part of this model"),
        ("model.layers.0.input_layernorm.bias", "is not part of this model"),
    ],
)
def test_an_extra_tensor_is_named(model: Path, name: str, message: str) -> None:
    _edit(model, add={name: torch.zeros(4)})
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.5.down_proj.weight"],
)
def test_a_missing_tensor_is_named(model: Path, name: str) -> None:
    _edit(model, drop=name)
    with pytest.raises(CheckpointError, match=f"{name} .* is missing: .* download .* again"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.2.eh_proj.weight",
        "mtp.fc.weight",
        "visual.patch_embed.proj.weight",
    ],
)
def test_tensors_that_the_model_itself_does_not_load_may_stay(model: Path, name: str) -> None:
    _edit(model, add={name: torch.zeros(4)})
    assert Checkpoint.open(model).carried_names == {name}


def test_a_layer_that_config_json_does_not_count_is_named(model: Path) -> None:
    _set_config(model, num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(CheckpointError, match="holds layer 1, but num_hidden_layers is 1"):
        Checkpoint.open(model)


def test_a_whole_model_beside_the_one_that_the_index_names_is_refused(model: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(320, 64)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformers reads the first, .*: remove the one"):
        Checkpoint.open(model)


def test_a_tensor_that_only_the_index_knows_is_named(model: Path) -> None:
    _edit(model, add={"mtp.fc.weight": torch.zeros(4)})
    index = model / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] |= {name: first_shard(model).name for name in ("mtp.fc.weight", "mtp.gone")}
    index.write_text(json.dumps(data))
    with pytest.raises(
        CheckpointError, match=rf"{first_shard(model)}: tensor mtp\.gone is missing"
    ):
        Checkpoint.open(model)


def test_fp8_weights_are_refused_with_the_remedy(model: Path) -> None:
    name = "model.layers.0.mlp.experts.5.down_proj.weight"
    tensor = load_file(Checkpoint.open(model).entries[name].file)[name]
    _edit(model, add={name: tensor.to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedModelError, match="start from the 16-bit checkpoint"):
        Checkpoint.open(model)


def test_an_already_quantized_model_is_refused(model: Path) -> None:
    _set_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="already quantized with 'gptq'"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "'llama' .* not supported",
        ),
        ({"model_type": "brand_new_moe"}, "'brand_new_moe' is not understood"),
        (
            {"architectures": ["Qwen2MoeForSequenceClassification"]},
            "SequenceClassification' is not",
        ),
        ({"num_experts": 0}, "is dense"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not understood"),
        ({"model_type": 3}, "names no model_type"),
    ],
)
def test_a_model_that_is_not_understood_is_refused_with_what_was_not(
    model: Path, changes: dict[str, object], message: str
) -> None:
    _set_config(model, **changes)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=message):
        Checkpoint.open(model)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing: this is not a model"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is no number in JSON"),
        ('{"a": [{"b": -Infinity}]}', "-Infinity is no number"),
        ('{"a": 1e999}', "not JSON compliant"),
        ('{"a": {"b": 1, "b": 2}}', "'b' has two values: 1 and 2"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a":' * 100_000, "recursion"),
        ("[]", "holds a list, wanted a JSON object"),
    ],
)
def test_json_that_others_would_read_in_another_way_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"file\.json .*{message}"):
        read_json(tmp_path / "file.json")


def test_a_key_twice_with_one_value_is_one_key(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"dtype": "bfloat16", "ü": 1, "dtype": "bfloat16"}')
    assert read_json(tmp_path / "file.json") == {"dtype": "bfloat16", "ü": 1}


def _edit(model: Path, *, add: dict[str, torch.Tensor] | None = None, drop: str = "") -> None:
    index = model / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    tensors |= add or {}
    tensors.pop(drop, None)
    save_file(tensors, model / "all.safetensors", metadata={"format": "pt"})
    data["weight_map"] = dict.fromkeys(tensors, "all.safetensors")
    index.write_text(json.dumps(data))


def _set_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_a_file_that_the_index_does_not_name_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_models.save("qwen3_moe", tmp_path, max_shard_size="200KB")
    with caplog.at_level("WARNING"):
        Checkpoint.open(path)
        assert not caplog.records
        save_file({"mtp.fc.weight": torch.ones(4, 4)}, path / "model_mtp.safetensors")
        Checkpoint.open(path)
    assert "model_mtp.safetensors holds tensors that model.safetensors.index.json" in caplog.text
