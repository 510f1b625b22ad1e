"""Originals that are published quantized, through the reader: every weight, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from camera_serve.checkpoint.originals import parse
from camera_serve.checkpoint.reader import Checkpoint, stored_quantization
from camera_serve.checkpoint.writer import serving_config
from camera_serve.errors import CameraError, CheckpointError, UnsupportedModelError
from tests import tiny_models
from tests.editing import WEIGHTS, Tensors, edit_config, edit_weights
from tests.originals import (
    FP8_BLOCKS,
    WAYS,
    Encoder,
    Published,
    compressed_tensors,
    fp8_whole,
    mxfp4,
    publish,
)

SIZES = {"hidden_size": 192, "moe_intermediate_size": 160, "num_hidden_layers": 2}
"""Not multiples of 128: every matrix has blocks that are cut off."""

EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("originals") / "model"
    return tiny_models.save("qwen3_moe", path, mlp_only_layers=[], num_experts=4, **SIZES)


@pytest.fixture(scope="module")
def fp8(dense: Path) -> Path:
    path = dense.with_name("fp8")
    publish(dense, path, FP8_BLOCKS)
    return path


@pytest.fixture
def model(fp8: Path, tmp_path: Path) -> Path:
    """An FP8 original of the test's own."""
    return Path(shutil.copytree(fp8, tmp_path / "model"))


def same_tensors(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.entries.keys() == wanted.entries.keys()
    for name, entry in wanted.entries.items():
        assert (found.entries[name].shape, found.entries[name].dtype) == (entry.shape, entry.dtype)
        assert found.get(name).equal(wanted.get(name)), name


@pytest.mark.parametrize("way", WAYS)
def test_a_quantized_original_holds_the_weights_of_its_16_bit_copy(
    way: str, dense: Path, tmp_path: Path
) -> None:
    copy = publish(dense, tmp_path / "model", WAYS[way])
    found, wanted = Checkpoint.open(tmp_path / "model"), Checkpoint.open(copy)
    same_tensors(found, wanted)
    # They are others than before, or nothing was quantized.
    assert not found.get(EXPERT).equal(Checkpoint.open(dense).get(EXPERT))


def test_deepseek_with_its_draft_layer_is_read(tmp_path: Path) -> None:
    dense = tiny_models.save("deepseek_v3", tmp_path / "dense")

    def add_draft(tensors: Tensors) -> None:
        last = [name for name in tensors if name.startswith("model.layers.2.")]
        tensors |= {name.replace(".2.", ".3.", 1): tensors[name].clone() for name in last}
        tensors["model.layers.3.eh_proj.weight"] = torch.randn(64, 128).bfloat16()

    edit_weights(dense, add_draft)
    copy = publish(dense, tmp_path / "model", FP8_BLOCKS)
    stored = load_file(tmp_path / "model" / WEIGHTS)
    assert stored["model.layers.3.eh_proj.weight"].dtype == torch.float8_e4m3fn
    found = Checkpoint.open(tmp_path / "model")
    same_tensors(found, Checkpoint.open(copy))
    name = "model.layers.3.mlp.experts.0.down_proj.weight"
    assert found.get(name).dtype == found.get("model.layers.3.eh_proj.weight").dtype


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek"])
def test_families_with_other_names_are_read(family: str, tmp_path: Path) -> None:
    dense = tiny_models.save(family, tmp_path / "dense")
    copy = publish(dense, tmp_path / "model", WAYS["fp8 blocks, bf16 scales"])
    same_tensors(Checkpoint.open(tmp_path / "model"), Checkpoint.open(copy))


FUSED = {
    "fp8 blocks": Published(
        FP8_BLOCKS.encode, FP8_BLOCKS.config, r".*(\.experts\..*|self_attn\.._proj\.weight)"
    ),
    "mxfp4": Published(
        mxfp4,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        r".*\.experts\..*",
    ),
}


@pytest.mark.parametrize("way", FUSED)
def test_fused_experts_are_read_one_by_one(way: str, tmp_path: Path) -> None:
    # Gate and up share a block of FP8: 96 rows are no whole block of 128.
    sizes = {"hidden_size": 160, "moe_intermediate_size": 96}
    dense = tiny_models.save("qwen3_moe", tmp_path / "dense", original_format=False, **sizes)
    copy = publish(dense, tmp_path / "model", FUSED[way])
    found = Checkpoint.open(tmp_path / "model")
    assert found.entries[EXPERT].index
    same_tensors(found, Checkpoint.open(copy))


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_weights_are_decoded_into_the_dtype_of_the_config(name: str, model: Path) -> None:
    edit_config(model, lambda config: config.update(dtype=name))
    assert Checkpoint.open(model).get(EXPERT).dtype == getattr(torch, name)


def test_scales_may_lie_in_another_file(model: Path) -> None:
    wanted = {name: tensor.clone() for name, tensor in load_file(model / WEIGHTS).items()}
    before = {name: Checkpoint.open(model).get(name) for name in (EXPERT, QUERY)}
    scales = {name for name in wanted if name.endswith("_scale_inv")}
    (model / WEIGHTS).unlink()
    parts = {"a.safetensors": wanted.keys() - scales, "b.safetensors": scales}
    for file, names in parts.items():
        save_file({name: wanted[name] for name in names}, model / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    found = Checkpoint.open(model)
    assert {file.name for file in found.weight_files} == parts.keys()
    for name, tensor in before.items():
        assert found.get(name).equal(tensor)


def test_bytes_are_told_in_16_bits_and_as_stored(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    on_disk = sum(tensor.nbytes for tensor in load_file(model / WEIGHTS).values())
    assert checkpoint.stored and checkpoint.stored.total_bytes == on_disk
    # 2 layers × 4 experts: matrices of 160×192, one byte a weight, 2×2 blocks.
    assert checkpoint.stored.expert_bytes == 2 * 4 * 3 * (160 * 192 + 4 * 4)
    assert checkpoint.expert_bytes == 2 * 4 * 3 * 160 * 192 * 2
    assert checkpoint.stored.format == "fp8 (FP8 in blocks of 128×128)"


def test_the_config_of_an_output_says_nothing_of_the_original_format(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    nested = {"text_config": checkpoint.raw_config | {"hidden_size": 3}}
    raw = checkpoint.raw_config | nested
    assert stored_quantization(nested, model) == checkpoint.raw_config["quantization_config"]
    written = serving_config(replace(checkpoint, raw_config=raw), None)
    assert "quantization_config" not in written
    assert written["text_config"]["hidden_size"] == 3
    assert "quantization_config" not in written["text_config"]


def test_the_config_may_lie_beside_as_modelopt_wrote_it(dense: Path, tmp_path: Path) -> None:
    copy = publish(dense, tmp_path / "model", WAYS["nvfp4 of modelopt"])
    edit_config(tmp_path / "model", lambda config: config.pop("quantization_config"))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    beside = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (tmp_path / "model" / "hf_quant_config.json").write_text(json.dumps(beside))
    same_tensors(Checkpoint.open(tmp_path / "model"), Checkpoint.open(copy))


def _fill(suffix: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{EXPERT}{suffix}"][1].fill_(value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_named(model: Path, value: float) -> None:
    edit_weights(model, _fill("_scale_inv", value))
    checkpoint = Checkpoint.open(model)
    with pytest.raises(CheckpointError, match=rf"{EXPERT}_scale_inv holds 2 scales of 4 that are"):
        checkpoint.get(EXPERT)


def test_a_code_that_is_no_number_is_named(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors[EXPERT].view(torch.uint8)[7, 5:8].fill_(0x7F))
    with pytest.raises(CheckpointError, match=rf"{EXPERT} holds 3 NaN or Inf values of 30720"):
        Checkpoint.open(model).get(EXPERT)


def test_a_group_of_tiny_weights_may_have_a_scale_of_0(dense: Path, tmp_path: Path) -> None:
    publish(dense, tmp_path / "model", WAYS["nvfp4 of modelopt"])
    edit_weights(
        tmp_path / "model", lambda t: t[f"{EXPERT}_scale"].view(torch.uint8)[2, :3].zero_()
    )
    assert not Checkpoint.open(tmp_path / "model").get(EXPERT)[2, :48].any()


def _rename(old: str, new: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def _cut(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize("name", [EXPERT, QUERY])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: lambda t: t.pop(f"{n}_scale_inv"), "{n}_scale_inv is missing: {n} is stored in"),
        (lambda n: lambda t: t.pop(n), "{n} is missing: .*weight_scale_inv F32"),
        (lambda n: _cut(f"{n}_scale_inv"), r"{n}_scale_inv has shape \[\d, 2\], wanted \[\d, 2\]"),
        (lambda n: _rename(f"{n}_scale_inv", f"{n}_scale"), "{n}_scale_inv is missing"),
        (
            lambda n: lambda t: t.update({n: t[n].bfloat16()}),
            "{n} is stored as BF16, wanted F8_E4M3 for FP8 in blocks",
        ),
        (
            lambda n: lambda t: t.update({f"{n}_scale_inv": t[f"{n}_scale_inv"].int()}),
            "{n}_scale_inv is stored as I32, wanted BF16 or F16",
        ),
        (
            lambda n: lambda t: t.update({f"{n}_zero_point": torch.zeros(2, 2)}),
            "{n}_zero_point is no part of FP8 in blocks of 128×128",
        ),
        (
            lambda n: lambda t: t.update({f"{n}_g_idx": torch.zeros(160, dtype=torch.int32)}),
            "actorder .tensor {n}_g_idx. is not read",
        ),
        (lambda n: _cut(n), r"tensor {n} has shape \[\d+, 192\], config.json implies"),
        (lambda n: lambda t: t.update({n: t[n].flatten()}), r"{n} has shape .* is for matrices"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    model: Path, name: str, change: Callable[[str], Callable[[Tensors], object]], message: str
) -> None:
    edit_weights(model, change(name))
    with pytest.raises(CameraError, match=message.format(n=re.escape(name))) as caught:
        Checkpoint.open(model)
    assert WEIGHTS in str(caught.value) or "actorder" in message or "implies" in message


def test_an_expert_left_in_16_bits_is_refused(model: Path) -> None:
    def leave(tensors: Tensors) -> None:
        tensors[EXPERT] = tensors[EXPERT].bfloat16()
        del tensors[f"{EXPERT}_scale_inv"]

    edit_weights(model, leave)
    with pytest.raises(CheckpointError, match=f"{EXPERT} is stored as BF16, but quantization_con"):
        Checkpoint.open(model)
    # Unless the config says so.
    excepted = ["model.layers.0.mlp.experts.3.up_proj"]
    edit_config(model, lambda c: c["quantization_config"].update(modules_to_not_convert=excepted))
    Checkpoint.open(model).get(EXPERT)


@pytest.mark.parametrize(
    "entry",
    ["model.layers.0.mlp.experts.3.up_proj", "up_proj", "model.layers.0", "model.layers.*.mlp"],
)
def test_a_quantized_weight_that_the_config_excepts_is_refused(model: Path, entry: str) -> None:
    edit_config(model, lambda c: c["quantization_config"].update(modules_to_not_convert=[entry]))
    with pytest.raises(CheckpointError, match=f"is stored .* excepts '{re.escape(entry)}'"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    "entry", ["proj", "p_proj", "model.layers.0.ml", "odel", "layers.0.mlp", "mlp.experts.33"]
)
def test_an_entry_excepts_whole_names_only(model: Path, entry: str) -> None:
    edit_config(model, lambda c: c["quantization_config"].update(modules_to_not_convert=[entry]))
    Checkpoint.open(model).get(EXPERT)


def test_fp8_without_a_config_that_explains_it_is_refused(model: Path) -> None:
    edit_config(model, lambda config: config.pop("quantization_config"))
    with pytest.raises(UnsupportedModelError, match=r"stored as F8_E4M3.*start from the 16-bit"):
        Checkpoint.open(model)


def test_fused_and_single_experts_in_one_model_are_refused(tmp_path: Path) -> None:
    dense = tiny_models.save("qwen3_moe", tmp_path / "dense", original_format=False)
    publish(dense, tmp_path / "model", FUSED["fp8 blocks"])
    single = tiny_models.save("qwen3_moe", tmp_path / "single")
    publish(single, tmp_path / "other", FP8_BLOCKS)
    experts = {
        name: tensor
        for name, tensor in load_file(tmp_path / "other" / WEIGHTS).items()
        if ".layers.0.mlp.experts." in name
    }
    edit_weights(tmp_path / "model", lambda tensors: tensors.update(experts))
    with pytest.raises(CheckpointError, match=r"stores experts both as .*\(fused\)"):
        Checkpoint.open(tmp_path / "model")


def test_a_shape_that_the_other_parts_contradict_is_named(dense: Path, tmp_path: Path) -> None:
    publish(dense, tmp_path / "model", WAYS["int4 groups"])
    edit_weights(tmp_path / "model", lambda tensors: tensors[f"{EXPERT}_shape"].fill_(8))
    with pytest.raises(CheckpointError, match=rf"{EXPERT}_shape says .* \[8, 8\], .* \[160, 192\]"):
        Checkpoint.open(tmp_path / "model").get(EXPERT)


CT = WAYS["int4 groups"].config


def _group(**weights: Any) -> dict[str, Any]:
    group = CT["config_groups"]["group_0"]
    return CT | {"config_groups": {"group_0": group | {"weights": group["weights"] | weights}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq', which is not read: start .* mxfp4, compress"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes', which is not"),
        ({"bits": 4}, "None, which is not read"),
        ("fp8", "not understood|not read|Input should"),
        (FP8_BLOCKS.config | {"weight_block_size": [128]}, "fp8 is not understood: weight_block_s"),
        (FP8_BLOCKS.config | {"weight_block_size": [0, 128]}, "weight_block_size.0: .* greater"),
        (FP8_BLOCKS.config | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        (FP8_BLOCKS.config | {"store_dtype": "mxfp4"}, "store_dtype"),
        (_group(actorder="group"), "actorder 'group': its columns are in another order"),
        (_group(actorder=True), "actorder True"),
        (_group(num_bits=3), "pack-quantized of int3 with a scale per group, in compressed-tens"),
        (_group(strategy="block"), "int4 with a scale per block"),
        (_group(type="float"), "pack-quantized of float4"),
        (CT | {"format": "marlin-24"}, "marlin-24 of int4"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config of format"),
        (CT | {"transform_config": {"config_groups": {"u": {}}}}, "its weights are rotated"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "quant_algo 'W4A8_AWQ' of modelopt",
        ),
    ],
)
def test_what_is_not_read_is_named(config: Any, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        parse(config)


def test_mxfp4_of_single_experts_is_told_to_be_a_layout_that_is_not_read(
    dense: Path, tmp_path: Path
) -> None:
    experts = r".*\.experts\.\d+\..*\.weight"
    way = Published(mxfp4, {"quant_method": "mxfp4"}, quantized=experts)
    publish(dense, tmp_path / "model", way)
    with pytest.raises(UnsupportedModelError, match=r"mxfp4 of one matrix at a time .* not read"):
        Checkpoint.open(tmp_path / "model")


def test_a_pattern_of_targets_goes_before_a_class() -> None:
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    fp8 = {"targets": ["Linear"], "weights": weights, "format": "float-quantized"}
    int4 = CT["config_groups"]["group_0"] | {"targets": ["re:.*experts.*"]}
    groups = {"group_0": fp8, "group_1": int4 | {"format": "pack-quantized"}}
    quantization = parse(CT | {"format": "mixed-precision", "config_groups": groups, "ignore": []})
    title = quantization.formats("model.layers.0.mlp.experts.3.up_proj")[0].title
    assert title == "int4 in groups of 32"
    assert quantization.formats("model.layers.0.self_attn.q_proj")[0].title.startswith("FP8")


SHAPES_OF_NOTHING = [
    {"quantization": None},
    {"quantization": 5},
    {"quant_method": None, "quantization": ["quant_algo"]},
    {**FP8_BLOCKS.config, "modules_to_not_convert": ["re:("]},
    {**FP8_BLOCKS.config, "modules_to_not_convert": [None]},
    {**WAYS["int4 groups"].config, "ignore": ["re:*experts"]},
    {
        **WAYS["int4 groups"].config,
        "config_groups": {
            "g": WAYS["int4 groups"].config["config_groups"]["group_0"] | {"targets": ["re:["]}
        },
    },
]


@pytest.mark.parametrize("config", SHAPES_OF_NOTHING, ids=str)
def test_a_config_of_another_shape_is_refused_and_never_a_traceback(config: Any) -> None:
    with pytest.raises(CameraError, match="quant"):
        parse(config)


@pytest.mark.parametrize("quantized", [False, True])
def test_positions_and_masks_beside_the_model_are_read_as_they_are(
    quantized: bool, dense: Path, model: Path, tmp_path: Path
) -> None:
    path = model if quantized else Path(shutil.copytree(dense, tmp_path / "dense"))
    beside = {
        "visual.position_ids": torch.tensor([3, 1, 2**40]),
        "visual.mask": torch.tensor([True, False]),
    }
    edit_weights(path, lambda tensors: tensors.update(beside))
    checkpoint = Checkpoint.open(path)
    for name, tensor in beside.items():
        assert checkpoint.get(name).equal(tensor)
    edit_weights(path, lambda tensors: tensors.update({"model.norm.weight": torch.arange(192)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I64"):
        Checkpoint.open(path)


FUSED_AND_QUERIES = r".*(\.experts\..*|self_attn\.._proj\.weight)"


def stacked(encode: Encoder) -> Encoder:
    """Every expert of a fused weight on its own; its shape is told once."""

    def encoded(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        if weight.dim() == 2:
            return encode(weight)
        pairs = [encode(expert) for expert in weight]
        parts = {key: torch.stack([p[key] for p, _ in pairs]) for key in pairs[0][0]}
        if "_shape" in parts:
            parts["_shape"] = torch.tensor(weight.shape)
        return parts, torch.stack([value for _, value in pairs])

    return encoded


@pytest.mark.parametrize("way", ["int4 groups", "int4 groups, zero points", "nvfp4 of modelopt"])
def test_fused_experts_that_are_packed_are_read_one_by_one(way: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128}
    dense = tiny_models.save("qwen3_moe", tmp_path / "dense", original_format=False, **sizes)
    fused = replace(
        WAYS[way],
        encode=stacked(WAYS[way].encode),
        config=WAYS[way].config | {"ignore": ["lm_head"]},
        quantized=FUSED_AND_QUERIES,
        extra={},
    )
    copy = publish(dense, tmp_path / "model", fused)
    same_tensors(Checkpoint.open(tmp_path / "model"), Checkpoint.open(copy))


def mxfp4_packed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The blocks of gpt-oss in the parts of compressed-tensors."""
    parts, decoded = mxfp4(weight)
    return {"_packed": parts["_blocks"].flatten(-2), "_scale": parts["_scales"]}, decoded


def named(way: str, **settings: str) -> Published:
    return replace(WAYS[way], config=WAYS[way].config | settings)


OTHER_NAMES = {
    "mxfp4-pack-quantized": Published(
        mxfp4_packed,
        compressed_tensors(
            "mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32
        ),
    ),
    "naive-quantized": named("compressed-tensors fp8 per row", format="naive-quantized"),
    "W4A16_NVFP4": named("nvfp4 of modelopt", quant_algo="W4A16_NVFP4"),
    "FP8_PER_CHANNEL_PER_TOKEN": Published(
        fp8_whole("_scale", lambda rows: (rows, 1)),
        WAYS["fp8 of modelopt"].config | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    ),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_formats_under_other_names_hold_the_weights_of_their_16_bit_copy(
    name: str, dense: Path, tmp_path: Path
) -> None:
    copy = publish(dense, tmp_path / "model", OTHER_NAMES[name])
    same_tensors(Checkpoint.open(tmp_path / "model"), Checkpoint.open(copy))
