"""Originals that are published quantized, through compress: to the bytes of their 16-bit copies."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from camera_serve import Calibration, Recipe, TierPlan, compress, estimate
from camera_serve.checkpoint.reader import Checkpoint, read_json
from camera_serve.errors import CheckpointError, DamagedWeightsError, OutputError
from camera_serve.evaluation.inspection import inspect
from camera_serve.evaluation.verification import verify
from camera_serve.progress import Progress
from tests import drafts, tiny_models
from tests.editing import WEIGHTS, digest, edit_weights
from tests.originals import FP8_BLOCKS, WAYS, Published, publish

SIZES = {
    "deepseek_v3": {"moe_intermediate_size": 160},
    "qwen3_moe": {"hidden_size": 192, "moe_intermediate_size": 160, "mlp_only_layers": []},
}
PRUNE, BITS = "16:0.6,0:0.4", "3:0.2,2:0.6,1:0.2"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dense")
    return {f: tiny_models.save(f, folder / f, **sizes) for f, sizes in SIZES.items()}


@pytest.fixture(scope="module")
def fp8(dense: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE in FP8; its copy in 16 bits is beside it."""
    path = tmp_path_factory.mktemp("fp8") / "model"
    publish(dense["qwen3_moe"], path, FP8_BLOCKS)
    return path


def copy_of(model: Path) -> Path:
    return model.with_name(f"{model.name}-16bit")


def recipe(text: Path, plan: str = PRUNE, **changes: Any) -> Recipe:
    calibration = Calibration(source=str(text), samples=4, seq_len=64)
    settings: dict[str, Any] = {"calibration": calibration, "align": 4, "group_size": 32}
    return Recipe.paper(plan=TierPlan.parse(plan), **settings | changes)


def weights(folder: Path) -> dict[str, str]:
    return {name: value for name, value in digest(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("plan", [PRUNE, BITS], ids=["prune", "bits"])
def test_an_fp8_original_becomes_what_its_16_bit_copy_becomes(
    family: str, plan: str, dense: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    copy = publish(dense[family], tmp_path / "model", FP8_BLOCKS)
    found = compress(tmp_path / "model", tmp_path / "found", recipe(text, plan))
    wanted = compress(copy, tmp_path / "wanted", recipe(text, plan))
    assert weights(tmp_path / "found") == weights(tmp_path / "wanted") != {}
    assert found.layers == wanted.layers
    configs = [read_json(tmp_path / name / "config.json") for name in ("found", "wanted")]
    assert configs[0] == configs[1]
    assert found.total_bytes_before == wanted.total_bytes_before
    assert found.total_bytes_after == Checkpoint.open(tmp_path / "found").total_bytes
    assert wanted.stored is None and found.stored
    on_disk = sum(t.nbytes for t in load_file(tmp_path / "model" / WEIGHTS).values())
    assert found.stored.total_bytes == on_disk


@pytest.mark.parametrize("way", ["int4 groups", "nvfp4 of modelopt", "fp8 per tensor"])
def test_other_formats_become_what_their_16_bit_copies_become(
    way: str, dense: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    copy = publish(dense["qwen3_moe"], tmp_path / "model", WAYS[way])
    for source, name in ((tmp_path / "model", "found"), (copy, "wanted")):
        compress(source, tmp_path / name, recipe(text, "16:0.3,2:0.4,0:0.3"))
    assert weights(tmp_path / "found") == weights(tmp_path / "wanted") != {}
    assert verify(tmp_path / "found", tmp_path / "model").num_tensors


def test_a_draft_layer_is_written_in_16_bits(
    dense: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    model = tiny_models.save("deepseek_v3", tmp_path / "dense")
    drafts.add_deepseek_mtp(model)
    copy = publish(model, tmp_path / "model", FP8_BLOCKS)
    compress(tmp_path / "model", tmp_path / "out", recipe(text))
    written = Checkpoint.open(tmp_path / "out")
    draft = [name for name in written.entries if name.startswith("model.layers.3.")]
    assert len(draft) > 3 * 8
    wanted = load_file(copy / WEIGHTS)
    for name in draft:
        assert written.get(name).equal(wanted[name]), name
    assert not {"F8_E4M3"} & {entry.dtype for entry in written.entries.values()}


def test_an_output_is_verified_against_the_fp8_original(
    fp8: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(fp8, out, recipe(text))
    dropped = [layer.num_dropped for layer in verify(out, fp8).layers]
    assert dropped == [8 * 160 * 2 // 5] * 3
    file = Checkpoint.open(out).entries[EXPERT].file
    (out / "camera_report.json").unlink()
    damaged = load_file(file)
    damaged[EXPERT].view(torch.uint8)[2, 7] ^= 1
    file.unlink()
    save_file(damaged, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{EXPERT}, row 2 is no row of that tensor"):
        verify(out, fp8)


def test_a_flipped_byte_outside_the_experts_is_found(fp8: Path, text: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "out", "model.layers.1.self_attn.k_proj.weight"
    compress(fp8, out, recipe(text))
    other = tmp_path / "model"
    other.mkdir()
    for file in fp8.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    edit_weights(other, lambda tensors: tensors[name].view(torch.uint8)[5, 9].bitwise_xor_(1))
    with pytest.raises(CheckpointError, match=f"tensor {name}, row 5 differs from"):
        verify(out, other)


def test_a_run_on_an_fp8_original_resumes_to_the_same_bytes(
    fp8: Path, text: Path, tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 1:
            raise KeyboardInterrupt

    compress(fp8, tmp_path / "whole", recipe(text))
    with pytest.raises(KeyboardInterrupt):
        compress(fp8, tmp_path / "out", recipe(text), on_progress=stop)
    compress(fp8, tmp_path / "out", recipe(text), resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    with pytest.raises(OutputError, match=r"\d files of the model differ"):
        compress(copy_of(fp8), tmp_path / "out", recipe(text), resume=True)


def test_a_scale_that_changed_is_another_model(fp8: Path, text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in fp8.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    compress(model, tmp_path / "out", recipe(text))
    edit_weights(model, lambda tensors: tensors[f"{EXPERT}_scale_inv"].mul_(1.5))
    with pytest.raises(OutputError, match=r"file model\.safetensors of the model differs"):
        compress(model, tmp_path / "out", recipe(text), resume=True)


def test_a_damaged_scale_stops_the_run_and_leaves_nothing(
    fp8: Path, text: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in fp8.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    edit_weights(model, lambda tensors: tensors[f"{EXPERT}_scale_inv"].fill_(float("nan")))
    with pytest.raises(DamagedWeightsError, match=f"{EXPERT}_scale_inv holds 4 scales of 4"):
        compress(model, tmp_path / "out", recipe(text))
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "out.partial.lock"}


def test_an_estimate_counts_what_is_stored_and_what_it_stands_for(fp8: Path, text: Path) -> None:
    found, copy = (estimate(m, recipe(text), device="cpu") for m in (fp8, copy_of(fp8)))
    same = ("output_bytes", "expert_bytes_before", "expert_bytes_after", "total_bytes_before")
    for name in (*same, "disk_bytes", "layer_bytes", "tier_bytes"):
        assert getattr(found, name) == getattr(copy, name), name
    # One byte a weight and not two, but for routers, norms and scales.
    assert 0.5 < found.mapped_bytes / copy.mapped_bytes < 0.54
    assert found.stored and copy.stored is None
    assert copy.decoding_bytes == 0
    largest = max(t.numel() for t in load_file(fp8 / WEIGHTS).values() if t.dtype.itemsize == 1)
    assert found.decoding_bytes >= 7 * largest


def test_what_is_stored_is_seen_by_inspect(fp8: Path) -> None:
    found, copy = inspect(fp8), inspect(copy_of(fp8))
    assert found.stored and found.stored.format == "fp8 (FP8 in blocks of 128×128)"
    assert found.layers == copy.layers
    assert found.num_parameters == copy.num_parameters
    assert found.to_json()["stored"]["total_bytes"] < 0.75 * found.total_bytes
    assert copy.to_json()["stored"] is None


def test_nothing_but_the_output_is_written(fp8: Path, text: Path, tmp_path: Path) -> None:
    before = digest(fp8)
    compress(fp8, tmp_path / "out", recipe(text))
    assert digest(fp8) == before
    # No second copy of the model, in 16 bits, on the way.
    assert os.listdir(tmp_path) in (["out"], ["out", "out.partial.lock"])


def test_settings_of_the_original_format_are_in_no_output(
    dense: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    way = WAYS["fp8 of modelopt"]
    publish(
        dense["qwen3_moe"], tmp_path / "model", Published(way.encode, way.config, way.quantized)
    )
    (tmp_path / "model" / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    compress(tmp_path / "model", tmp_path / "out", recipe(text))
    assert read_json(tmp_path / "out" / "hf_quant_config.json") == {"quant_method": "camera"}
    assert "modelopt" not in (tmp_path / "out" / "config.json").read_text()
