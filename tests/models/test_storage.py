"""Experts stored fused, as transformers 5 saves them with `save_original_format=False`."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import CheckpointError
from tests import drafts, tiny_models
from tests.editing import WEIGHTS, Tensors, edit_weights
from tests.pruning import structure_of
from tests.quantized import compress

EXPERTS = "model.layers.1.mlp.experts"
GATE_UP = f"{EXPERTS}.gate_up_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused") / "model"
    return tiny_models.save("qwen2_moe", path, original_format=False)


@pytest.fixture
def fused(pristine: Path, tmp_path: Path) -> Path:
    """A fused model of the test's own; its one file of weights is a copy."""
    path = tmp_path / "model"
    path.mkdir()
    for file in pristine.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_fused_model_holds_the_tensors_of_the_original_format(
    family: str, tmp_path: Path
) -> None:
    original = Checkpoint.open(tiny_models.save(family, tmp_path / "original"))
    path = tiny_models.save(
        family, tmp_path / "fused", original_format=False, max_shard_size="100KB"
    )
    assert len(list(path.glob("*.safetensors"))) > 2
    fused = Checkpoint.open(path)
    beside = original.structure.family.elsewhere
    text = {name for name in original.entries if not name.startswith(beside)}
    assert {name for name in fused.entries if not name.startswith(beside)} == text
    assert fused.expert_names == original.expert_names
    assert fused.expert_bytes == original.expert_bytes
    assert fused.total_bytes == original.total_bytes
    for name in text:
        entry = original.entries[name]
        assert (fused.entries[name].shape, fused.entries[name].dtype) == (entry.shape, entry.dtype)
        assert fused.get(name).equal(original.get(name)), name


def test_a_fused_draft_layer_is_carried_over_expert_by_expert(fused: Path) -> None:
    def add(tensors: Tensors) -> None:
        for part in ("gate_up_proj", "down_proj"):
            tensors[f"model.layers.2.mlp.experts.{part}"] = tensors[f"{EXPERTS}.{part}"] + 1
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128).bfloat16()

    edit_weights(fused, add)
    checkpoint = Checkpoint.open(fused)
    stored = load_file(fused / WEIGHTS)["model.layers.2.mlp.experts.gate_up_proj"]
    assert checkpoint.get("model.layers.2.mlp.experts.5.up_proj.weight").equal(stored[5, 64:])


def test_one_expert_is_read_without_the_others(fused: Path) -> None:
    # 64 experts of 32 MiB a tensor: a hole in the file, so that only what is read is in memory.
    shape = (64, 2 * 1024, 8192)
    config = json.loads((fused / "config.json").read_text())
    config |= {"num_experts": 64, "moe_intermediate_size": 1024, "hidden_size": 8192}
    (fused / "config.json").write_text(json.dumps(config))
    _write_hole(fused / WEIGHTS, GATE_UP, shape)
    checkpoint = Checkpoint.open_unchecked(fused)
    before = _resident_bytes()
    gate = checkpoint.get(f"{EXPERTS}.7.gate_proj.weight")
    assert gate.shape == (1024, 8192)
    assert gate.nbytes // 2 < _resident_bytes() - before < 3 * gate.nbytes


def _write_hole(file: Path, name: str, shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel() * 2
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}})
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header.encode())
        out.truncate(8 + len(header) + size)


def _resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _split(tensors: Tensors, layer: int, *, keep_fused: bool) -> None:
    prefix = f"model.layers.{layer}.mlp.experts"
    gate_up, down = tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"]
    if not keep_fused:
        del tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"]
    for expert in range(len(down)):
        gate, up = gate_up[expert].chunk(2)
        tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate.clone()
        tensors[f"{prefix}.{expert}.up_proj.weight"] = up.clone()
        tensors[f"{prefix}.{expert}.down_proj.weight"] = down[expert].clone()


@pytest.mark.parametrize("keep_fused", [True, False], ids=["same layer", "another layer"])
def test_fused_and_single_experts_in_one_model_are_refused(fused: Path, keep_fused: bool) -> None:
    edit_weights(fused, lambda tensors: _split(tensors, 0, keep_fused=keep_fused))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(fused)
    message = str(caught.value)
    assert re.search(r"model\.layers\.[01]\.mlp\.experts\.(gate_up|down)_proj \(fused\)", message)
    assert re.search(r"model\.layers\.0\.mlp\.experts\.\d\.\w+_proj\.weight", message)
    assert "save it again, in one form" in message


def test_a_tensor_under_both_of_its_names_is_refused(tmp_path: Path) -> None:
    path = tiny_models.save("mixtral", tmp_path / "model", original_format=False)

    def add(tensors: Tensors) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"] = torch.zeros(8, 64)

    edit_weights(path, add)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    for name in ("mlp", "block_sparse_moe"):
        assert f"model.layers.1.{name}.gate.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda tensor: tensor[:-1], "[7, 128, 64]"),
        (lambda tensor: tensor[:, :-2], "[8, 126, 64]"),
        (lambda tensor: tensor.mT, "[8, 64, 128]"),
        (lambda tensor: tensor[0], "[128, 64]"),
    ],
)
def test_a_fused_tensor_of_another_shape_is_named_with_both_shapes(
    fused: Path, change: Callable[[torch.Tensor], torch.Tensor], shape: str
) -> None:
    def cut(tensors: Tensors) -> None:
        tensors[GATE_UP] = change(tensors[GATE_UP]).contiguous()

    edit_weights(fused, cut)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(fused)
    for part in (WEIGHTS, GATE_UP, shape, "[8, 128, 64]"):
        assert part in str(caught.value)


SEEING = "model.language_model.layers.2.mlp.experts"


@pytest.mark.parametrize("d_ff", [32, 48, 64], ids=["gate and up", "none", "down"])
def test_transposed_experts_are_read_whichever_is_square(d_ff: int, tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": d_ff, "dtype": torch.float32}
    path = tiny_models.save("qwen3_vl_moe", tmp_path / "model", **sizes)
    stored = load_file(path / WEIGHTS)
    assert stored[f"{SEEING}.gate_up_proj"].shape == (8, 64, 2 * d_ff)
    assert stored[f"{SEEING}.down_proj"].shape == (8, d_ff, 64)
    checkpoint = Checkpoint.open(path)
    built = tiny_models.build("qwen3_vl_moe", moe_intermediate_size=d_ff).state_dict()
    gate, up = built[f"{SEEING}.gate_up_proj"][5].chunk(2)
    wanted = {"gate": gate, "up": up, "down": built[f"{SEEING}.down_proj"][5]}
    for projection, weight in wanted.items():
        assert checkpoint.get(f"{SEEING}.5.{projection}_proj.weight").equal(weight)


def test_experts_that_lie_in_both_ways_are_refused(tmp_path: Path) -> None:
    path = tiny_models.save("qwen3_vl_moe", tmp_path / "model")

    def turn(tensors: Tensors) -> None:
        tensors[f"{SEEING}.down_proj"] = tensors[f"{SEEING}.down_proj"].mT.contiguous()

    edit_weights(path, turn)
    with pytest.raises(CheckpointError, match=r"layers\.\d\.mlp\.experts\.\w+_proj has shape"):
        Checkpoint.open(path)


def test_a_missing_half_is_named(fused: Path) -> None:
    edit_weights(fused, lambda tensors: tensors.pop(f"{EXPERTS}.down_proj"))
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.down_proj\.weight \[64, 64\] is missing"
    ):
        Checkpoint.open(fused)


def test_a_bad_weight_is_named_by_its_expert(fused: Path) -> None:
    edit_weights(fused, lambda tensors: tensors[GATE_UP][3, 64 + 5, 7:9].fill_(float("nan")))
    checkpoint = Checkpoint.open(fused)
    checkpoint.get(f"{EXPERTS}.3.gate_proj.weight")
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight holds 2 NaN or Inf"):
        checkpoint.get(f"{EXPERTS}.3.up_proj.weight")


def test_names_of_both_forms_are_those_of_the_family(tmp_path: Path) -> None:
    path = tiny_models.save("phimoe", tmp_path / "model", original_format=False)
    structure = structure_of(path)
    stored = load_file(path / WEIGHTS).keys() - Checkpoint.open(path).entries.keys()
    assert {name for name in stored if ".layers.1." in name} == {
        "model.layers.1.mlp.router.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    entries = Checkpoint.open(path).entries
    assert f"{structure.moe_prefix(1)}.gate.weight" in entries
    assert f"{structure.expert_prefix(1, 7, 'down')}.weight" in entries


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("hy_v3", "model.layers.2.mlp.experts.3.up_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.up_proj.weight"),
        ("mimo_v2_flash", "model.mtp.layers.0.mlp.up_proj.weight"),
    ],
)
def test_what_drafts_the_next_tokens_is_carried_over(
    family: str, name: str, tmp_path: Path
) -> None:
    path = tiny_models.save(family, tmp_path / "model")
    draft = torch.randn(48, 64).bfloat16()
    drafts.add_mtp(family, path)
    edit_weights(path, lambda tensors: tensors.update({name: draft}))
    compress(path, tmp_path / "out", "16:0.5,0:0.5")
    assert Checkpoint.open(tmp_path / "out").get(name).equal(draft)


@pytest.mark.parametrize("name", ["model.mtp_block.0.weight", "model.layers.1.mtp.weight"])
def test_another_family_s_draft_is_refused(name: str, tmp_path: Path) -> None:
    path = tiny_models.save("qwen3_moe", tmp_path / "model")
    edit_weights(path, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=f"tensor {re.escape(name)} is not part of"):
        Checkpoint.open(path)
