"""`verify` finds every dropped micro-expert, and every weight that is not the original's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camera_serve.converters.dense import convert_to_dense
from safetensors.torch import load_file, save_file

from camera_serve import Calibration, Recipe, TierPlan, compress
from camera_serve.checkpoint import writer
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.checkpoint.report import CONVERSION_FILE, REPORT_FILE
from camera_serve.errors import CheckpointError
from camera_serve.evaluation import checksums
from camera_serve.evaluation.verification import verify
from camera_serve.progress import Progress
from tests import drafts, pruning, quantized, tiny_models
from tests.editing import Tensors, digest, edit_config, edit_weights

D_FF, NUM_EXPERTS, SHARED_D_FF = 64, 8, 96
WIDTHS = (0, 1, 7, 64, 33, 2, 16, 5)
SHARED_WIDTH = 40
EXPERT_2 = "model.layers.1.mlp.experts.2"


def _width(expert: int, d_ff: int) -> int:
    return SHARED_WIDTH if expert < 0 else WIDTHS[expert]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("qwen2_moe", tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture
def compressed(dense: Path, tmp_path: Path) -> Path:
    pruning.prune(dense, tmp_path / "out", _width)
    return tmp_path / "out"


@pytest.mark.parametrize("family", tiny_models.FORMS)
def test_dropped_micro_experts_are_the_ones_not_kept(family: str, tmp_path: Path) -> None:
    model = tiny_models.save(family, tmp_path / "model")
    kept = pruning.prune(model, tmp_path / "out")
    structure = pruning.structure_of(model)
    found = verify(tmp_path / "out", model)
    assert [layer.layer for layer in found.layers] == list(structure.moe_layers)
    for layer in found.layers:
        prefix = structure.moe_prefix(layer.layer)
        for expert, dropped in enumerate(layer.experts):
            assert dropped == _others(kept[f"{prefix}.experts.{expert}"], structure.d_ff)
        for dropped in layer.shared:
            shared = kept[structure.shared_expert_prefix(layer.layer)]
            assert dropped == _others(shared, structure.shared_d_ff)
        assert len(layer.shared) == bool(structure.shared_d_ff)


def _others(kept: torch.Tensor, d_ff: int) -> tuple[int, ...]:
    return tuple(sorted(set(range(d_ff)) - set(kept.tolist())))


PARTS = {
    "qwen3_next": "mtp.layers.0.mlp.experts.3.up_proj.weight",
    "qwen3_5_moe": "mtp.layers.0.mlp.experts.down_proj",
    "qwen3_vl_moe": "model.visual.blocks.0.attn.qkv.weight",
}
"""A tensor of each family that is of none of its layers: drafts of tokens, what sees pictures."""


@pytest.mark.parametrize("family", PARTS)
def test_a_family_s_other_parts_are_the_original_s(tmp_path: Path, family: str) -> None:
    name = PARTS[family]
    model = tiny_models.save(family, tmp_path / "model")
    quantized.compress(model, tmp_path / "out", "16:0.4,2:0.3,0:0.3")
    verify(tmp_path / "out", model)
    (shard,) = (f for f in (tmp_path / "out").glob("*.safetensors") if name in load_file(f))
    written = load_file(shard)
    for change, error in (
        (lambda t: t.view(torch.int16).bitwise_xor_(1), rf"{name}, row 0 differs from"),
        (lambda t: written.pop(name), rf"tensor {name} (.* )?is missing"),
    ):
        change(written[name])
        save_file(written, shard, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=error):
            verify(tmp_path / "out", model)
        with pytest.raises(CheckpointError, match=rf"{shard.name}|{name}"):
            verify(tmp_path / "out")


def test_dropped_are_counted_and_emptied_experts_listed(dense: Path, compressed: Path) -> None:
    for layer in verify(compressed, dense).layers:
        assert layer.emptied == (0,)
        assert layer.original_micro_experts == NUM_EXPERTS * D_FF + SHARED_D_FF
        kept = layer.original_micro_experts - layer.num_dropped
        assert kept == sum(WIDTHS) + SHARED_WIDTH


def test_a_model_lacks_nothing_of_itself(dense: Path) -> None:
    assert [layer.num_dropped for layer in verify(dense, dense).layers] == [0, 0]


def test_a_converted_checkpoint_lacks_what_the_compressed_one_lacks(
    dense: Path, compressed: Path, tmp_path: Path
) -> None:
    convert_to_dense(compressed, tmp_path / "converted")
    found, wanted = verify(tmp_path / "converted", dense), verify(compressed, dense)
    for ours, theirs in zip(found.layers, wanted.layers, strict=True):
        assert (ours.experts, ours.shared) == (theirs.experts, theirs.shared)


def test_without_an_original_every_weight_is_read(compressed: Path) -> None:
    assert verify(compressed).layers == ()

    def spoil(tensors: Tensors) -> None:
        tensors[f"{EXPERT_2}.down_proj.weight"][3, 6] = float("nan")

    edit_weights(compressed, spoil)
    with pytest.raises(CheckpointError, match=rf"{EXPERT_2}\.down_proj\.weight holds 1 NaN"):
        verify(compressed)


@pytest.mark.parametrize(
    ("projection", "where", "named"),
    [
        ("gate_proj", (4, 9), "row 4"),
        ("up_proj", (6, 0), "row 6"),
        ("down_proj", (9, 5), "column 5"),
    ],
)
def test_an_altered_expert_weight_is_named(
    dense: Path, compressed: Path, projection: str, where: tuple[int, int], named: str
) -> None:
    name = f"{EXPERT_2}.{projection}.weight"

    def alter(tensors: Tensors) -> None:
        tensors[name][where] += 0.5

    edit_weights(compressed, alter)
    with pytest.raises(CheckpointError, match=rf"{name}, {named} is no .*changed"):
        verify(compressed, dense)


def test_the_sign_of_a_zero_is_a_change(tmp_path: Path) -> None:
    name = f"{EXPERT_2}.up_proj.weight"

    def write(value: float) -> None:
        edit_weights(out, lambda tensors: tensors[name][5, :1].fill_(value))

    model = tiny_models.save("olmoe", tmp_path / "model")
    edit_weights(model, lambda tensors: tensors[name][:, 0].zero_())
    out = tmp_path / "out"
    pruning.prune(model, out)
    write(0.0)
    verify(out, model)
    write(-0.0)
    with pytest.raises(CheckpointError, match=f"{name}, row 5"):
        verify(out, model)


def test_parts_of_different_micro_experts_do_not_pass(dense: Path, compressed: Path) -> None:
    def swap(tensors: Tensors) -> None:
        rows = tensors[f"{EXPERT_2}.up_proj.weight"]
        rows[[2, 3]] = rows[[3, 2]]

    edit_weights(compressed, swap)
    with pytest.raises(CheckpointError, match=rf"row 2 of {EXPERT_2}.gate_proj.*different"):
        verify(compressed, dense)


def _copy_micro_expert(tensors: Tensors, source: int, target: int) -> None:
    for projection in ("gate_proj", "up_proj"):
        rows = tensors[f"{EXPERT_2}.{projection}.weight"]
        rows[target] = rows[source]
    columns = tensors[f"{EXPERT_2}.down_proj.weight"]
    columns[:, target] = columns[:, source]


def test_a_micro_expert_kept_twice_does_not_pass(dense: Path, compressed: Path) -> None:
    edit_weights(compressed, lambda tensors: _copy_micro_expert(tensors, 1, 4))
    with pytest.raises(CheckpointError, match=rf"{EXPERT_2}\.gate_proj\.weight, row 4 .*already"):
        verify(compressed, dense)


def test_equal_micro_experts_of_the_original_may_all_be_kept(tmp_path: Path) -> None:
    model = tiny_models.save("olmoe", tmp_path / "model")
    edit_weights(model, lambda tensors: _copy_micro_expert(tensors, 3, 7))
    pruning.prune(model, tmp_path / "out", lambda expert, d_ff: d_ff)
    assert verify(tmp_path / "out", model).layers[1].experts[2] == ()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_an_altered_tensor_outside_the_experts_is_named(
    name: str, dense: Path, compressed: Path
) -> None:
    def alter(tensors: Tensors) -> None:
        tensors[name][17] += 1

    edit_weights(compressed, alter)
    with pytest.raises(CheckpointError, match=rf"{name}, row 17 differs .*\(1 of"):
        verify(compressed, dense)


CARRIED = {
    "deepseek_v3": (drafts.add_deepseek_mtp, f"{drafts.DRAFT}mlp.experts.2.up_proj.weight"),
    "qwen2_moe": (drafts.add_qwen_mtp, "mtp.layers.0.mlp.experts.down_proj"),
    "olmoe": (drafts.add_qwen_mtp, "visual.blocks.0.attn.qkv.weight"),
}


@pytest.mark.parametrize("family", CARRIED)
def test_parts_that_compress_has_nothing_to_do_with_are_compared(
    family: str, tmp_path: Path
) -> None:
    add, name = CARRIED[family]
    model = tiny_models.save(family, tmp_path / "model")
    add(model)
    pruning.prune(model, tmp_path / "out")
    verify(tmp_path / "out", model)

    def flip_a_bit(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8)[3, ..., 7] ^= 1

    edit_weights(tmp_path / "out", flip_a_bit)
    with pytest.raises(CheckpointError, match=rf"{name}, row 3 differs"):
        verify(tmp_path / "out", model)
    edit_weights(tmp_path / "out", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{name} of {model} is missing.*1 such"):
        verify(tmp_path / "out", model)


def test_an_altered_setting_is_named(dense: Path, compressed: Path) -> None:
    edit_config(compressed, lambda config: config.update(norm_topk_prob=True))
    with pytest.raises(CheckpointError, match="norm_topk_prob is True, but False"):
        verify(compressed, dense)


def test_a_tensor_stored_in_another_dtype_is_named(dense: Path, compressed: Path) -> None:
    name = f"{EXPERT_2}.up_proj.weight"

    def widen(tensors: Tensors) -> None:
        tensors[name] = tensors[name].float()

    edit_weights(compressed, widen)
    with pytest.raises(CheckpointError, match=f"{name} is stored as F32, but as BF16"):
        verify(compressed, dense)


def test_another_model_is_not_the_original(compressed: Path, tmp_path: Path) -> None:
    other = tiny_models.save("qwen2_moe", tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="differs from"):
        verify(compressed, other)


def test_json_lists_the_dropped(dense: Path, compressed: Path) -> None:
    found = verify(compressed, dense)
    data = json.loads(json.dumps(found.to_json()))
    assert data["layers"][1]["experts"][1] == list(found.layers[1].experts[1])
    assert len(data["layers"][1]["experts"][1]) == D_FF - 1
    assert data["layers"][1]["num_dropped"] == found.layers[1].num_dropped


def test_progress_counts_bytes_of_both_and_of_hashing(
    dense: Path, mixed: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BYTES_AT_ONCE", 50_000)
    for path, against in ((compressed, dense), (mixed, None), (mixed, dense)):
        reports: list[Progress] = []
        found = verify(path, against, on_progress=reports.append)
        done = [report.done for report in reports]
        assert {report.unit for report in reports} == {"bytes"}
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, reports[0].total)
        hashed = [r for r in reports if r.step == "verify checksums"]
        noted = checksums.Checksums.of(Checkpoint.open(path))
        files = [(path / f).stat().st_size for f in (*noted.weights, *noted.side_files)]
        parts = sum(-(-size // 50_000) for size in files)
        assert len(hashed) == parts and bool(parts) == bool(found.num_checksums)
        assert all(report.eta is not None for report in hashed)


@pytest.mark.parametrize("original", ["alone", "against the original"])
@pytest.mark.parametrize("plan", ["16:1", "16:0.6,0:0.4", "16:0.4,2:0.4,0:0.2", "3:0.5,1:0.5"])
def test_progress_stands_where_reading_and_hashing_stand(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str, original: str
) -> None:
    """At every report, `done` is what was read and hashed by then; at the last one, the total."""
    quantized.compress(dense, tmp_path / "out", plan)
    monkeypatch.setattr(writer, "BYTES_AT_ONCE", 50_000)
    worked = 0
    get, hash_of = Checkpoint.get, checksums.sha256_of

    def counting_get(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal worked
        worked += self.entries[name].num_bytes
        return get(self, name)

    def counting_hash(file: Path, hashed: Callable[[int], None]) -> str:
        def count(num_bytes: int) -> None:
            nonlocal worked
            worked += num_bytes
            hashed(num_bytes)

        return hash_of(file, count)

    monkeypatch.setattr(Checkpoint, "get", counting_get)
    monkeypatch.setattr(checksums, "sha256_of", counting_hash)
    stood: list[tuple[int, int]] = []
    totals: list[int] = []

    def note(progress: Progress) -> None:
        stood.append((progress.done, worked))
        totals.append(progress.total)

    verify(tmp_path / "out", None if original == "alone" else dense, on_progress=note)
    assert [done for done, _ in stood] == [actual for _, actual in stood]
    assert set(totals) == {worked}
    side_files = checksums.Checksums.of(Checkpoint.open(tmp_path / "out")).side_files
    hashed = sum((tmp_path / "out" / name).stat().st_size for name in side_files)
    assert stood[0] == (0, 0) and worked > hashed > 0


@pytest.fixture(scope="module")
def mixed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("mixed") / "out"
    quantized.compress(dense, output, "16:0.4,2:0.4,0:0.2")
    return output


def test_16_bit_rows_beside_packed_ones_are_the_originals(dense: Path, mixed: Path) -> None:
    found = verify(mixed, dense)
    # Which micro-experts were packed and which dropped cannot be told.
    assert found.layers == ()
    assert found.against == dense


@pytest.mark.parametrize(
    ("projection", "where", "named"),
    [("gate_proj", (1, 9), "row 1"), ("down_proj", (9, 2), "column 2")],
)
def test_an_altered_16_bit_row_beside_packed_ones_is_named(
    dense: Path, mixed: Path, tmp_path: Path, projection: str, where: tuple[int, int], named: str
) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    name = f"{EXPERT_2}.{projection}.weight"
    (shard,) = (file for file in out.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(shard)
    tensors[name][where] += 0.5
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{shard.name} is not the file that compress wrote"):
        verify(out)
    with pytest.raises(CheckpointError, match=rf"{name}, {named} is no .*changed"):
        verify(out, dense)


def test_every_file_is_what_compress_wrote_to_the_byte(mixed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    shards = sorted(out.glob("*.safetensors"))
    assert verify(out).num_checksums == len(shards) == 3
    # Random codes are codes: nothing but the checksum tells.
    shard = shards[-1]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("qweight"))
    tensors[name].view(-1)[0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    found = digest(out)[shard.name]
    with pytest.raises(CheckpointError, match=f"{shard.name} is not the file.*{found}.*copy"):
        verify(out)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_change_of_what_engines_read_is_found(mixed: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    assert verify(out).num_side_checksums > 4
    data = json.loads((out / name).read_text())
    (out / name).write_text(json.dumps({**data, "rope_parameters": {"rope_theta": 5.0}}))
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that compress wrote"):
        verify(out)


def test_a_file_that_was_added_for_engines_is_found(mixed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    (out / "notes.md").write_text("no engine reads this")
    verify(out)
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is no file that compress"):
        verify(out)


@pytest.mark.parametrize(
    "name",
    [
        "extra.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "model.gguf",
        "modeling_qwen2_moe.py",
        "pytorch_model.bin.index.json",
        "draft/model.safetensors",
    ],
)
def test_weights_and_code_that_were_added_are_found(mixed: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    (out / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(next(out.glob("*-of-*.safetensors")), out / name)
    with pytest.raises(CheckpointError, match=rf"{name} is no file that compress wrote"):
        verify(out)


@pytest.mark.parametrize("name", [".gitattributes", ".git/config", "plot.png"])
def test_what_a_folder_gets_beside_a_model_is_not_asked_about(
    mixed: Path, tmp_path: Path, name: str
) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    verify(out)


@pytest.mark.parametrize("name", ["README.md", "camera_recipe.yaml", "camera.log"])
def test_what_no_engine_reads_may_change(mixed: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    (out / name).write_text("edited")
    verify(out)
    (out / name).unlink()
    verify(out)


def test_tensor_and_file_are_named_where_both_are_known(
    dense: Path, mixed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    shard = sorted(out.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    both = rf"{shard}: tensor model.norm.weight, row 3 .*{shard.name} is not the file that compress"
    with pytest.raises(CheckpointError, match=both):
        verify(out, dense)
    with pytest.raises(CheckpointError, match=rf"{shard.name} is not .* --against MODEL tells"):
        verify(out)
    other = Path(shutil.copytree(dense, tmp_path / "other"))
    edit_weights(other, lambda tensors: tensors["model.norm.weight"][3].add_(1))
    with pytest.raises(CheckpointError, match="is as compress wrote it: give the model it was"):
        verify(mixed, other)


def test_packed_weights_that_changed_are_named_by_file(
    dense: Path, mixed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    shard = sorted(out.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    next(t for name, t in tensors.items() if name.endswith("qweight")).view(-1)[0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{shard.name} is not .*; none of its tensors that"):
        verify(out, dense)


def _edit_report(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    report = json.loads((out / REPORT_FILE).read_text())
    change(report)
    (out / REPORT_FILE).write_text(json.dumps(report))


def test_a_report_with_checksums_of_weights_alone_is_an_older_versions(
    mixed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))

    def older(report: dict[str, Any]) -> None:
        sums = report["sha256"]
        report["sha256"] = {name: sums[name] for name in sums if name.endswith(".safetensors")}

    _edit_report(out, older)
    found = verify(out)
    assert (found.num_checksums, found.num_side_checksums) == (3, 0)


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors"])
def test_a_report_that_lost_a_checksum_is_refused(mixed: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    _edit_report(out, lambda report: report["sha256"].pop(name))
    with pytest.raises(CheckpointError, match=f"{name} is no file that compress wrote"):
        verify(out)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda report: report["recipe"].update(alpha=0.5), "another recipe"),
        (lambda report: report["layers"].pop(), "another list of layers"),
        (lambda report: report["layers"][1]["expert_d_ff"].reverse(), r"another d_ff of .*1\.mlp"),
        (lambda report: report["layers"][1]["tokens_per_expert"].pop(), "another number of exp"),
        (lambda report: report.update(total_bytes_after=7), "another number of bytes"),
    ],
)
def test_a_report_of_another_compression_is_refused(
    mixed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    _edit_report(out, change)
    with pytest.raises(CheckpointError, match=rf"camera_report\.json has {named}"):
        verify(out)


def test_a_file_that_the_report_lists_and_nobody_has_is_named(mixed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    report = json.loads((out / REPORT_FILE).read_text())
    report["sha256"]["model-9.safetensors"] = "0" * 64
    (out / REPORT_FILE).write_text(json.dumps(report))
    with pytest.raises(
        CheckpointError, match=r"model-9\.safetensors cannot be read .*copy the file"
    ):
        verify(out)


def test_reports_of_older_versions_have_no_checksums(mixed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    report = json.loads((out / REPORT_FILE).read_text())
    del report["sha256"]
    (out / REPORT_FILE).write_text(json.dumps(report))
    assert verify(out).num_checksums == 0


def test_the_original_is_not_compressed_itself(mixed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is compressed itself .* was made from"):
        verify(mixed, mixed)


@pytest.fixture(scope="module", params=["16:0.5,0:0.5", "2:0.6,0:0.4", "16:0.4,2:0.4,0:0.2"])
def fitted(
    dense: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """A checkpoint whose down vectors are fitted to what was lost, and the dense one of it."""
    folder = tmp_path_factory.mktemp("fitted")
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text())
    calibration = Calibration(source=str(text), samples=6, seq_len=128)
    recipe = Recipe(
        plan=TierPlan.parse(request.param), calibration=calibration, align=1, group_size=32
    )
    compress(dense, folder / "out", recipe)
    convert_to_dense(folder / "out", folder / "dense")
    return folder / "out", folder / "dense"


def test_what_was_fitted_is_verified_as_such_when_it_is_dense_again(
    dense: Path, fitted: tuple[Path, Path]
) -> None:
    compressed, converted = (verify(path, dense) for path in fitted)
    assert compressed.refitted and converted.refitted
    assert compressed.packed == converted.packed
    assert (compressed.written_by, converted.written_by) == ("compress", "convert")
    assert converted.num_checksums == compressed.num_checksums == 3
    assert converted.num_side_checksums > 0
    assert [layer.experts for layer in converted.layers] == [
        layer.experts for layer in compressed.layers
    ]
    assert bool(converted.layers) != converted.packed


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_damage_to_what_was_fitted_is_found_when_it_is_dense_again(
    dense: Path, fitted: tuple[Path, Path], tmp_path: Path, projection: str
) -> None:
    out = Path(shutil.copytree(fitted[1], tmp_path / "dense"))
    name = f"{EXPERT_2}.{projection}.weight"
    (shard,) = (file for file in out.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(shard)
    tensors[name][0, 0] += 0.5
    save_file(tensors, shard, metadata={"format": "pt"})
    compared = projection != "down_proj" and not verify(fitted[0], dense).packed
    found = f"{name}, row 0 is no row" if compared else "its SHA-256 is"
    for against in (None, dense):
        with pytest.raises(CheckpointError, match=f"{shard.name}.* not the file that convert"):
            verify(out, against)
    with pytest.raises(CheckpointError, match=found):
        verify(out, dense)


def test_a_conversion_does_not_speak_for_what_is_made_of_it(
    fitted: tuple[Path, Path], tmp_path: Path
) -> None:
    quantized.compress(fitted[1], tmp_path / "again", "16:0.5,0:0.5")
    assert not (tmp_path / "again" / CONVERSION_FILE).exists()
    found = verify(tmp_path / "again", fitted[1])
    assert not found.refitted and found.written_by == "compress"


def test_a_conversion_that_is_none_is_refused(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(fitted[1], tmp_path / "dense"))
    (out / CONVERSION_FILE).write_text('{"version": 2}')
    with pytest.raises(CheckpointError, match=rf"{CONVERSION_FILE} is not as .*convert again"):
        verify(out)
