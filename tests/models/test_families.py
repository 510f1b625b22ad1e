"""Published config.json's of every family: read without their own code, other settings refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoConfig

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import LibraryError, UnsupportedModelError
from camera_serve.models import describe, families
from camera_serve.models.building import build_on_meta
from camera_serve.models.families import FAMILIES, is_new_enough, require_transformers
from camera_serve.models.registration import register_models
from tests import pruning, quantized, tiny_models
from tests.editing import edit_config


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_activation_other_than_silu_is_refused_by_name(family: str) -> None:
    config: Any = tiny_models.build(family).config
    config.model_type = family
    config.get_text_config().hidden_act = "gelu"
    with pytest.raises(UnsupportedModelError, match=f"{family} with hidden_act = 'gelu' is not"):
        describe(config)


# Where vLLM's model has the bias as well; of the others it leaves it out.
SERVED_WITH_BIASES = {
    ("qwen2_moe", "qkv_bias"),
    ("phimoe", "attention_bias"),
    ("phimoe", "lm_head_bias"),
    ("glm4_moe", "attention_bias"),
    ("mimo_v2_flash", "attention_bias"),
}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_bias_that_vllm_would_leave_out_is_refused_by_name(family: str) -> None:
    register_models()
    for key in _switches(_config(family)):
        config = _config(family)
        text = config.get_text_config()
        before = _biases(config)
        setattr(text, key, not getattr(text, key))
        if _biases(config) <= before or (family, key) in SERVED_WITH_BIASES:
            continue
        with pytest.raises(UnsupportedModelError, match=f"with {key} = True is not understood"):
            describe(config)


def _config(family: str) -> Any:
    config = AutoConfig.for_model(family, **tiny_models.settings(family))
    config.model_type = family
    return config


def _switches(config: Any) -> list[str]:
    settings = config.get_text_config().to_dict().items()
    return [key for key, value in settings if isinstance(value, bool) and "bias" in key]


def _biases(config: Any) -> set[str]:
    names = build_on_meta(config).state_dict()
    return {name for name in names if name.endswith(".bias")}


def test_what_vllm_would_do_is_said_of_a_setting_that_it_does_not_honour() -> None:
    config = _config("olmoe")
    config.tie_word_embeddings = True
    with pytest.raises(UnsupportedModelError, match=r"= True is .*: vLLM's model would have anot"):
        describe(config)


def test_a_transformers_that_is_too_old_for_a_family_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(families.transformers, "__version__", "5.17.9")
    require_transformers("qwen2_moe")
    require_transformers("of nobody here")
    with pytest.raises(
        LibraryError, match=r"minimax_m2 needs transformers 5\.18 or newer, .*5\.17"
    ):
        require_transformers("minimax_m2")
    monkeypatch.setattr(families.transformers, "__version__", "5.18.0")
    require_transformers("minimax_m2")


def test_a_checkpoint_is_refused_where_transformers_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.save("qwen2_moe", tmp_path)
    edit_config(path, lambda config: config.update(model_type="minimax_m2"))
    monkeypatch.setattr(families.transformers, "__version__", "5.13.0")
    with pytest.raises(LibraryError, match=r"config\.json: minimax_m2 needs transformers 5\.18"):
        Checkpoint.open(path)


@pytest.mark.skipif(not is_new_enough("minimax_m2"), reason="this transformers is too old")
def test_a_part_of_each_head_is_rotated_as_rotary_dim_says(tmp_path: Path) -> None:
    config = Checkpoint.open(tiny_models.save("minimax_m2", tmp_path)).config
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_theta"] == 5e6


OF_THEIR_OWN_CODE = ("deepseek_v3", "kimi_k2", "kimi_k25", "minimax_m2")


def with_its_own_code(family: str, path: Path) -> Path:
    """A checkpoint that names code which would be run by those who trust it, and lacks it."""
    tiny_models.save(family, path)
    code = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}

    def name_code(config: dict[str, Any]) -> None:
        config["auto_map"] = code
        if "text_config" in config:
            config["text_config"]["auto_map"] = code

    edit_config(path, name_code)
    (path / "modeling.py").write_text("raise SystemExit('code of the model was run')")
    return path


@pytest.mark.parametrize(
    "family", [family for family in OF_THEIR_OWN_CODE if family in tiny_models.FAMILIES]
)
def test_published_code_is_neither_run_nor_needed_by_the_output(
    family: str, tmp_path: Path
) -> None:
    dense = with_its_own_code(family, tmp_path / "dense")
    output = tmp_path / "out"
    quantized.compress(dense, output, "16:0.5,0:0.5")
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == family
    assert config["architectures"] == [FAMILIES[family].architectures[0]]
    assert not list(output.glob("*.py"))
    for file in output.glob("*.json"):
        assert "auto_map" not in file.read_text()
    tiny_models.load(dense)
    assert pruning.structure_of(output) == pruning.structure_of(dense)


DRAFTED = tuple(
    f for f in tiny_models.FAMILIES if tiny_models.settings(f).get("num_nextn_predict_layers")
)


@pytest.mark.parametrize("family", DRAFTED)
def test_a_draft_layer_is_carried_over_bit_by_bit(family: str, tmp_path: Path) -> None:
    dense = tiny_models.save(family, tmp_path / "dense")
    quantized.compress(dense, tmp_path / "out", "3:0.2,2:0.6,1:0.2")
    draft = {n: t for n, t in load_file(dense / "model.safetensors").items() if ".layers.3." in n}
    assert any(".experts.7.down_proj." in name for name in draft)
    assert any(name.endswith("shared_head.norm.weight") for name in draft)
    written = Checkpoint.open(tmp_path / "out")
    found = {name for name in written.entries if ".layers.3." in name}
    assert found == draft.keys()
    for name, tensor in draft.items():
        assert written.get(name).equal(tensor)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.14"),
    reason="this transformers saves the bias of a layer that sees in another order than it read",
)
def test_what_transformers_saves_gives_what_the_published_checkpoint_gives(tmp_path: Path) -> None:
    dense = tiny_models.save("kimi_k25", tmp_path / "dense")
    model = tiny_models.load(dense, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert "language_model.model.blocks.0.input_layernorm.weight" in stored
    shutil.copytree(dense, tmp_path / "again")
    shutil.copy(tmp_path / "saved" / "model.safetensors", tmp_path / "again")
    outputs = []
    for name in ("dense", "again"):
        quantized.compress(tmp_path / name, tmp_path / f"{name}-out", "3:0.5,0:0.5")
        files = sorted((tmp_path / f"{name}-out").glob("*.safetensors"))
        outputs.append({n: t for file in files for n, t in load_file(file).items()})
    assert outputs[0].keys() == outputs[1].keys()
    assert all(tensor.equal(outputs[1][name]) for name, tensor in outputs[0].items())


def test_parts_that_see_are_carried_over_under_their_names(tmp_path: Path) -> None:
    dense = tiny_models.save("kimi_k25", tmp_path / "dense")
    quantized.compress(dense, tmp_path / "out", "16:0.5,0:0.5")
    stored = load_file(dense / "model.safetensors")
    seeing = {n: t for n, t in stored.items() if n.startswith(("vision_tower.", "mm_projector."))}
    assert "vision_tower.encoder.blocks.0.wqkv.weight" in seeing
    written = Checkpoint.open(tmp_path / "out")
    found = {name for name in written.entries if not name.startswith("language_model.")}
    assert found == seeing.keys()
    for name, tensor in seeing.items():
        assert written.get(name).equal(tensor)


@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_a_model_with_no_experts_is_called_dense(family: str) -> None:
    config = _config(family)
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    setattr(text, next(name for name in names if getattr(text, name, None)), 0)
    with pytest.raises(UnsupportedModelError, match=f"this {family} model has experts in none of"):
        describe(config)
