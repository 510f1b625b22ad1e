import json
import os
import shutil

import pytest
import torch
from camera_serve.converters import dense
from camera_serve.converters.dense import convert_to_dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import camera_serve.hf  # noqa: F401
from camera_serve.checkpoint.lock import sole_writer
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.workspace import Workspace
from camera_serve.errors import CheckpointError, OutputError
from tests import pruning, quantized, tiny_models
from tests.editing import digest
from tests.races import in_child, race

# The ragged and the padded layer sum the same float32 terms in another order; logits have a
# standard deviation of 4.
FLOAT32 = {"rtol": 1e-4, "atol": 4e-4}


def compress(tmp_path, family, widths=pruning.hostile):
    dense = tiny_models.save(family, tmp_path / "dense")
    kept = pruning.prune(dense, tmp_path / "camera", widths)
    return dense, tmp_path / "camera", kept


def all_tensors(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def logits(path):
    model = tiny_models.load(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([[42, 71, 78, 78, 81, 9, 200, 31, 5, 310, 11, 63]])).logits


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_converted_model_equals_the_compressed_one(tmp_path, family):
    _, compressed, _ = compress(tmp_path, family)
    convert_to_dense(compressed, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(compressed), **FLOAT32)


@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_every_tensor_is_the_original_with_removed_micro_experts_as_zeros(tmp_path, family):
    dense, compressed, kept = compress(tmp_path, family)
    convert_to_dense(compressed, tmp_path / "out")
    original, converted = (pruning.one_by_one(path) for path in (dense, tmp_path / "out"))
    assert converted.keys() == original.keys()
    original, converted = map(pruning.single_experts, (original, converted))
    for name, tensor in original.items():
        assert converted[name].dtype == tensor.dtype
        expected = tensor
        if (expert := name.rsplit(".", 2)[0]) in kept:
            rows, dim = kept[expert], 1 if name.endswith(("down_proj.weight", "w2.weight")) else 0
            expected = torch.zeros_like(tensor)
            expected.narrow(dim, 0, len(rows)).copy_(tensor.index_select(dim, rows))
        torch.testing.assert_close(converted[name], expected, rtol=0, atol=0)


def test_experts_are_fused_where_transformers_loads_no_others(tmp_path):
    dense, compressed, _ = compress(tmp_path, "qwen3_vl_moe")
    convert_to_dense(compressed, tmp_path / "out")
    original, converted = all_tensors(dense), all_tensors(tmp_path / "out")
    shapes = [{name: t.shape for name, t in tensors.items()} for tensors in (original, converted)]
    assert shapes[0] == shapes[1]


def test_a_layer_that_kept_nothing_becomes_all_zeros(tmp_path):
    _, compressed, _ = compress(tmp_path, "qwen2_moe", lambda expert, d_ff: 0)
    convert_to_dense(compressed, tmp_path / "out")
    converted = all_tensors(tmp_path / "out")
    names = [n for n in converted if ".experts." in n or ".shared_expert." in n]
    assert len(names) == 2 * (8 + 1) * 3
    assert not any(converted[name].any() for name in names)


def test_the_output_is_an_ordinary_checkpoint_with_a_tokenizer(tmp_path):
    _, compressed, _ = compress(tmp_path, "phimoe")
    convert_to_dense(compressed, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["PhiMoEForCausalLM"]
    assert Checkpoint.open(tmp_path / "out").quantization is None
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    converted = all_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == converted.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in converted.values())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hi")["input_ids"] == [74, 75]


def test_an_existing_output_is_refused_and_untouched(tmp_path):
    _, compressed, _ = compress(tmp_path, "olmoe")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="exists"):
        convert_to_dense(compressed, tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_foreign_partial_folder_is_refused_and_untouched(tmp_path):
    _, compressed, _ = compress(tmp_path, "olmoe")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="was not begun by camera-serve: move it away"):
        convert_to_dense(compressed, tmp_path / "out")
    assert [f.name for f in (tmp_path / "out.partial").iterdir()] == ["mine"]


def test_of_two_at_one_moment_one_finishes_and_the_other_is_told(tmp_path):
    _, compressed, _ = compress(tmp_path, "olmoe")
    convert_to_dense(compressed, tmp_path / "undisturbed")
    ends = race(*[lambda report: convert_to_dense(compressed, tmp_path / "out")] * 2)
    assert sorted(map(bool, ends)) == [False, True], ends
    assert any(words in max(ends) for words in ("is being written by camera-serve", "exists"))
    assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")
    names = ["camera", "dense", "out", "undisturbed"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_it_does_not_write_where_another_command_does(tmp_path):
    _, compressed, _ = compress(tmp_path, "olmoe")
    with (
        sole_writer(tmp_path / "out", "analyze"),
        pytest.raises(OutputError, match="is being written by camera-serve analyze"),
    ):
        convert_to_dense(compressed, tmp_path / "out")


def test_a_killed_conversion_is_no_obstacle(tmp_path, monkeypatch):
    _, compressed, _ = compress(tmp_path, "olmoe")

    def killed():
        monkeypatch.setattr(dense, "copy_side_files", lambda source, target: os._exit(9))
        convert_to_dense(compressed, tmp_path / "out")

    child = in_child(killed)
    child.join()
    assert child.exitcode == 9 and (tmp_path / "out.partial").exists()
    convert_to_dense(compressed, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["camera", "dense", "out"]


def test_an_interrupted_compression_of_that_name_is_kept(tmp_path):
    _, compressed, _ = compress(tmp_path, "olmoe")
    workspace = Workspace(tmp_path / "out")
    workspace.create()
    workspace.record({"torch": "2"})
    before = digest(tmp_path / "out.partial")
    with pytest.raises(OutputError, match="holds an interrupted run of compress: continue it"):
        convert_to_dense(compressed, tmp_path / "out")
    assert digest(tmp_path / "out.partial") == before


def test_a_source_that_is_replaced_meanwhile_is_refused(tmp_path, monkeypatch):
    _, compressed, _ = compress(tmp_path, "olmoe")
    another = shutil.copytree(compressed, tmp_path / "another")
    copy = dense.copy_side_files

    def replaced(source, target):
        compressed.rename(tmp_path / "before")
        another.rename(compressed)
        copy(source, target)

    monkeypatch.setattr(dense, "copy_side_files", replaced)
    with pytest.raises(CheckpointError, match="camera was replaced while it was read: run the"):
        convert_to_dense(compressed, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before", "camera", "dense"]


def test_a_dense_checkpoint_is_refused(tmp_path):
    dense = tiny_models.save("olmoe", tmp_path / "dense")
    with pytest.raises(CheckpointError, match="dense checkpoint already"):
        convert_to_dense(dense, tmp_path / "out")


def test_packed_tiers_become_the_weights_they_stand_for(tmp_path):
    dense = tiny_models.save("qwen2_moe", tmp_path / "dense", dtype=torch.float32)
    quantized.compress(dense, tmp_path / "camera", "16:0.1,3:0.3,1:0.4,0:0.2")
    convert_to_dense(tmp_path / "camera", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = quantized.dequantized(dense, tmp_path / "camera")
    for (name, found), (_, expected) in zip(
        ours.named_parameters(), wanted.named_parameters(), strict=True
    ):
        assert found.equal(expected), name


def test_a_checkpoint_that_lies_is_refused_and_leaves_nothing(tmp_path):
    _, compressed, _ = compress(tmp_path, "olmoe")
    tensors = load_file(compressed / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, compressed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight .* is missing"):
        convert_to_dense(compressed, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["camera", "dense"]


def test_a_failure_half_way_leaves_nothing(tmp_path):
    _, compressed, _ = compress(tmp_path, "olmoe")
    tensors = load_file(compressed / "model.safetensors")
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, compressed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN"):
        convert_to_dense(compressed, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["camera", "dense"]
