"""Every bad input: one clear error, no traceback, nothing half-written, the input untouched."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors import SafetensorError

from tests import pruning, tiny_models
from tests.cli.conftest import Run
from tests.editing import WEIGHTS, Tensors, digest, edit_config, edit_weights

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A model of the test's own, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def compressed(model: Path, tmp_path: Path) -> Path:
    pruning.prune(model, tmp_path / "compressed")
    return tmp_path / "compressed"


def assert_one_error(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [result.stderr.splitlines()[-1]]
    for word in words:
        assert word in errors[0]


def _no_experts(config: dict[str, Any]) -> None:
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def _only_dense_layers(config: dict[str, Any]) -> None:
    config["mlp_only_layers"] = [0, 1]


def _unknown_type(config: dict[str, Any]) -> None:
    config |= {"model_type": "newmoe", "architectures": ["NewMoeForCausalLM"]}


def _unknown_class(config: dict[str, Any]) -> None:
    config["architectures"] = ["Qwen2MoeForSomethingElse"]


def _other_activation(config: dict[str, Any]) -> None:
    config["hidden_act"] = "gelu"


def _unknown_rope(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_type"] = "yarnx"


def _no_heads(config: dict[str, Any]) -> None:
    config["num_attention_heads"] = 0


def _text_for_a_number(config: dict[str, Any]) -> None:
    config["hidden_size"] = "64"


def _more_choices_than_experts(config: dict[str, Any]) -> None:
    config["num_experts_per_tok"] = 9


def _far_too_deep(config: dict[str, Any]) -> None:
    config["num_hidden_layers"] = 10**12


def _not_a_number(config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = float("nan")


def _clamping_and_wrong(config: dict[str, Any]) -> None:
    config |= {"model_type": "deepseek_v4", "sliding_window": None, "architectures": []}


def _quantized_in_a_word(config: dict[str, Any]) -> None:
    config["quantization_config"] = "fp8"


def _quantized_somehow(config: dict[str, Any]) -> None:
    config["quantization_config"] = {}


def _quantized(config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_no_experts, "llama"),
        (_only_dense_layers, "dense"),
        (_unknown_type, "newmoe"),
        (_unknown_class, "Qwen2MoeForSomethingElse"),
        (_other_activation, "hidden_act = 'gelu'"),
        (_quantized, "gptq"),
        (_clamping_and_wrong, "'deepseek_v4' is not supported: its experts clamp"),
        (_quantized_in_a_word, "quantization_config is 'fp8': wanted an object with quant_method"),
        (_quantized_somehow, "quantization_config has no quant_method"),
        (_unknown_rope, "config.json: transformers cannot build this model with rope_parameters"),
        (_no_heads, "cannot build this model with num_attention_heads = 0: ZeroDivisionError"),
        (
            _text_for_a_number,
            "config.json: transformers refuses it: TypeError: Field 'hidden_size'",
        ),
        (_more_choices_than_experts, "config.json: num_experts_per_tok is 9"),
        (_far_too_deep, "config.json: num_hidden_layers is 1000000000000"),
        (_not_a_number, "config.json cannot be read as JSON: NaN is no number in JSON: download"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "analyze", "inspect", "verify"])
def test_a_model_that_is_not_understood_is_refused(
    run: Run,
    copy: Path,
    small: list[str],
    change: Callable[[dict[str, Any]], None],
    named: str,
    command: str,
) -> None:
    edit_config(copy, change)
    _assert_refused(run, command, copy, small, named)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees pictures; its text part is described by a part of config.json."""
    return tiny_models.save("qwen3_5_moe", tmp_path_factory.mktemp("seeing") / "model")


def _dense_text(config: dict[str, Any]) -> None:
    config |= {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    text = {key: value for key, value in config["text_config"].items() if "expert" not in key}
    config["text_config"] = text | {"model_type": "qwen3_5_text"}
    config["vision_config"]["model_type"] = "qwen3_5_vision"


@pytest.mark.parametrize(
    ("part", "settings", "named"),
    [
        ("text_config", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ("vision_config", {"depth": 10**12}, "depth is 1000000000000"),
        ("text_config", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("text_config", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("text_config", {"attn_output_gate": False}, "attn_output_gate = False"),
        ("text_config", {"attention_bias": True}, "attention_bias = True"),
        ("text_config", {"layer_scale": True}, "layer_scale = True"),
        ("text_config", {"output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid'"),
        ("text_config", {"vocab_size": -1}, "cannot build this model with vocab_size = -1"),
        ("text_config", {"moe_intermediate_size": 40}, "config.json implies [8, 64, 40]"),
        ("vision_config", {"out_hidden_size": 32}, "model.visual.merger.linear_fc2.weight"),
    ],
)
def test_a_part_of_a_model_that_is_not_understood_is_refused(
    run: Run,
    seeing: Path,
    tmp_path: Path,
    small: list[str],
    part: str,
    settings: dict[str, Any],
    named: str,
) -> None:
    shutil.copytree(seeing, tmp_path / "model")
    edit_config(tmp_path / "model", lambda config: config[part].update(settings))
    _assert_refused(run, "compress", tmp_path / "model", small, named)


@pytest.mark.parametrize("command", ["compress", "inspect"])
def test_a_model_that_sees_pictures_with_a_dense_text_part_is_refused(
    run: Run, seeing: Path, tmp_path: Path, small: list[str], command: str
) -> None:
    shutil.copytree(seeing, tmp_path / "model")
    edit_config(tmp_path / "model", _dense_text)
    named = ("qwen3_5", "Qwen3_5ForConditionalGeneration", "is not supported: it is a dense model,")
    _assert_refused(run, command, tmp_path / "model", small, *named)


def _assert_refused(run: Run, command: str, model: Path, small: list[str], *words: str) -> None:
    before = digest(model.parent)
    flags = {
        "compress": ["-o", model.parent / "out", "--prune", "0.4", *small],
        "analyze": ["-o", model.parent / "out", *small],
    }
    assert_one_error(run(command, model, *flags.get(command, [])), *words)
    assert digest(model.parent) == before


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda tensors: tensors.pop(name))


def _misshape(folder: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors[EXPERT] = tensors[EXPERT][:-1].clone()

    edit_weights(folder, cut)


def _add(folder: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = tensors[EXPERT].clone()

    edit_weights(folder, add)


def _truncate(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def _cut_header(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:100])


def _empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def _junk(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04 this is a zip, not safetensors" * 10)


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, WEIGHTS),
        (_cut_header, WEIGHTS),
        (_empty, WEIGHTS),
        (_junk, WEIGHTS),
        (_pickle_only, "pytorch_model.bin"),
        (_no_config, "config.json"),
        (_config_is_no_json, "config.json"),
        (_config_is_a_list, "config.json"),
        (_drop(EXPERT), EXPERT),
        (_drop("model.norm.weight"), "model.norm.weight"),
        (_misshape, EXPERT),
        (_add, "model.layers.1.mlp.experts.8.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "inspect", "verify"])
def test_a_damaged_folder_is_refused_by_file_or_tensor(
    run: Run,
    copy: Path,
    small: list[str],
    damage: Callable[[Path], None],
    named: str,
    command: str,
) -> None:
    damage(copy)
    _assert_refused(run, command, copy, small, named)


@pytest.mark.parametrize("command", ["compress", "inspect", "verify"])
def test_a_missing_shard_is_refused_by_name(
    run: Run, tmp_path: Path, small: list[str], command: str
) -> None:
    model = tiny_models.save("qwen2_moe", tmp_path / "model", max_shard_size="200KB")
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    _assert_refused(run, command, model, small, shard.name, "missing")


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    "name",
    [
        WEIGHTS,
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "tokenizer.model.v3",
        "additional_chat_templates/tools.jinja",
    ],
)
@pytest.mark.parametrize("command", ["compress", "analyze", "inspect", "verify"])
def test_a_git_lfs_pointer_is_refused_with_what_to_run(
    run: Run, copy: Path, small: list[str], name: str, command: str
) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text(POINTER)
    _assert_refused(run, command, copy, small, "Git LFS pointer", name, str(copy), "git lfs pull")


def test_all_git_lfs_pointers_are_named_at_once(run: Run, copy: Path, small: list[str]) -> None:
    names = [WEIGHTS, "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt"]
    for name in names:
        (copy / name).write_text(POINTER)
    _assert_refused(run, "compress", copy, small, WEIGHTS, "merges.txt", "2 more")


def test_git_lfs_pointers_that_are_not_read_do_no_harm(
    run: Run, copy: Path, small: list[str]
) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(POINTER)
    result = run("compress", copy, "-o", copy.parent / "out", "--prune", "0.4", *small)
    assert result.exit_code == 0, result.output


def test_a_git_lfs_pointer_in_a_compressed_checkpoint_is_refused(
    run: Run, compressed: Path
) -> None:
    (compressed / "tokenizer.json").write_text(POINTER)
    target = ["--to", "dense", "-o", compressed.parent / "out"]
    for command, flags in (("inspect", []), ("verify", []), ("convert", target)):
        assert_one_error(run(command, compressed, *flags), "Git LFS pointer", "tokenizer.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("command", ["compress", "analyze", "verify"])
def test_a_weight_that_is_not_finite_is_refused_by_tensor(
    run: Run, copy: Path, small: list[str], value: float, command: str
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[EXPERT][1, 2] = value

    edit_weights(copy, spoil)
    _assert_refused(run, command, copy, small, EXPERT, "1 NaN or Inf")


def _negative_epsilon(config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = -1e30


def _other_attention(config: dict[str, Any]) -> None:
    config["layer_types"][0] = "linear_attention"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_negative_epsilon, "layer 0 makes NaN or Inf of "),
        (_other_attention, "layer 0 cannot"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_settings_that_only_fail_when_run_are_refused_and_leave_nothing(
    run: Run,
    copy: Path,
    small: list[str],
    change: Callable[[dict[str, Any]], None],
    named: str,
    command: str,
) -> None:
    edit_config(copy, change)
    _assert_refused(run, command, copy, small, named)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_bad_weight_after_the_last_layer_is_refused_too(
    run: Run, copy: Path, small: list[str], name: str
) -> None:
    edit_weights(copy, lambda tensors: tensors[name].view(-1)[:1].fill_(float("inf")))
    _assert_refused(run, "compress", copy, small, name)


def test_too_little_text_says_how_much_was_found_and_needed(
    run: Run, copy: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words only")
    flags = ["--calibration", str(text), "--samples", "4", "--seq-len", "64"]
    _assert_refused(run, "compress", copy, flags, "tokens", "256")
    _assert_refused(run, "analyze", copy, flags, "tokens", "256")
    _assert_refused(run, "compress", copy, [*flags, "--dry-run"], "tokens", "256")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("missing.txt", None, "does not exist"),
        ("text.csv", b"a,b", ".txt"),
        ("latin.txt", b"\xe9\xe8 not UTF-8", "UTF-8"),
        ("lines.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2"),
        ("lines.jsonl", b"{not json", "line 1"),
        ("lines.jsonl", b'{"text": "\xe9"}\n', "line 1"),
        ("lines.jsonl", b'{"text": 3}\n', "line 1"),
    ],
)
def test_a_calibration_file_that_cannot_be_read_is_refused(
    run: Run, copy: Path, tmp_path: Path, name: str, content: bytes | None, named: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    flags = ["--calibration", str(file), "--seq-len", "64"]
    _assert_refused(run, "compress", copy, flags, named, name)


def test_a_model_without_a_tokenizer_is_refused(run: Run, copy: Path, small: list[str]) -> None:
    for file in copy.glob("token*"):
        file.unlink()
    _assert_refused(run, "compress", copy, small, "tokenizer")


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_an_existing_folder_is_left_alone(
    run: Run, copy: Path, small: list[str], command: str, flags: list[str]
) -> None:
    output = copy.parent / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("do not lose this")
    _assert_refused(run, command, copy, [*small, *flags], str(output))


@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_an_output_inside_or_around_the_model_is_refused(
    run: Run, copy: Path, small: list[str], command: str
) -> None:
    before = digest(copy.parent)
    prune = ["--prune", "0.4"] if command == "compress" else []
    for output in (copy, copy / "out", copy.parent):
        result = run(command, copy, "-o", output, "--overwrite", *prune, *small)
        assert_one_error(result, str(output))
        assert digest(copy.parent) == before


def test_an_output_that_is_a_file_is_refused(run: Run, copy: Path, small: list[str]) -> None:
    (copy.parent / "out").write_text("a file")
    _assert_refused(run, "compress", copy, small, "out")


def test_a_full_disk_is_refused_before_anything_is_written(
    run: Run, copy: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    _assert_refused(run, "compress", copy, small, "disk", "free")


def test_a_disk_that_fills_up_during_the_run_can_be_resumed(
    run: Run, copy: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Tensors, path: Path, **_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    command = ["compress", copy, "-o", copy.parent / "out", "--prune", "0.4", *small]
    before = digest(copy)
    with monkeypatch.context() as patch:
        patch.setattr("camera_serve.checkpoint.writer.save_file", full)
        assert_one_error(run(*command), "No space left")
    assert not (copy.parent / "out").exists()
    assert digest(copy) == before
    assert run(*command, "--resume").exit_code == 0


def test_an_alignment_that_does_not_divide_is_refused_before_anything_is_written(
    run: Run, copy: Path, small: list[str]
) -> None:
    _assert_refused(run, "compress", copy, [*small, "--align", "48"], "align 48", "--align")


def test_a_compressed_model_is_not_compressed_again(
    run: Run, compressed: Path, small: list[str]
) -> None:
    _assert_refused(run, "compress", compressed, small, "already compressed")
    _assert_refused(run, "analyze", compressed, small, "already compressed")


def _count(value: int) -> Callable[[dict[str, Any]], None]:
    def change(quantization: dict[str, Any]) -> None:
        quantization["layers"]["model.layers.1.mlp"]["experts"][3] = [value]

    return change


def _fewer_experts(quantization: dict[str, Any]) -> None:
    quantization["layers"]["model.layers.1.mlp"]["experts"].pop()


def _more_experts(quantization: dict[str, Any]) -> None:
    quantization["layers"]["model.layers.1.mlp"]["experts"].append([0])


def _fewer_layers(quantization: dict[str, Any]) -> None:
    quantization["layers"].pop("model.layers.1.mlp")


def _more_layers(quantization: dict[str, Any]) -> None:
    layers = quantization["layers"]
    layers["model.layers.2.mlp"] = layers["model.layers.1.mlp"]


def _no_shared(quantization: dict[str, Any]) -> None:
    quantization["layers"]["model.layers.1.mlp"]["shared"] = []


def _two_tiers(quantization: dict[str, Any]) -> None:
    quantization["layers"]["model.layers.1.mlp"]["experts"][3] = [1, 1]


def _no_tiers(quantization: dict[str, Any]) -> None:
    quantization["layers"]["model.layers.1.mlp"]["experts"][3] = []


def _text_count(quantization: dict[str, Any]) -> None:
    quantization["layers"]["model.layers.1.mlp"]["experts"][3] = ["many"]


def _other_bits(quantization: dict[str, Any]) -> None:
    quantization["bits"] = [7]


def _other_format(quantization: dict[str, Any]) -> None:
    quantization["format"] = 2


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (_count(-1), "experts[3]"),
        (_count(65), "experts[3]"),
        (_count(2**63), "experts[3]"),
        (_count(32), "model.layers.1.mlp.experts.3"),
        (_count(0), "model.layers.1.mlp.experts.3"),
        (_fewer_experts, "7 experts"),
        (_more_experts, "9 experts"),
        (_fewer_layers, "model.layers.1.mlp"),
        (_more_layers, "model.layers.2.mlp"),
        (_no_shared, "shared"),
        (_two_tiers, "experts[3]"),
        (_no_tiers, "experts[3]"),
        (_text_count, "experts.3"),
        (_other_bits, "bits"),
        (_other_format, "format"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_a_tampered_quantization_config_is_refused(
    run: Run,
    compressed: Path,
    tamper: Callable[[dict[str, Any]], None],
    named: str,
    command: str,
) -> None:
    edit_config(compressed, lambda config: tamper(config["quantization_config"]))
    before = digest(compressed.parent)
    target = ["--to", "dense", "-o", compressed.parent / "out"] if command == "convert" else []
    assert_one_error(run(command, compressed, *target), named)
    assert digest(compressed.parent) == before


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_path_that_is_no_model_is_refused(run: Run, tmp_path: Path, command: str) -> None:
    assert_one_error(run(command, tmp_path), "config.json")
    assert_one_error(run(command, tmp_path / "nowhere"), "nowhere")
