"""`camera-serve verify`: OK with the counts of what was dropped, or the tensor at fault."""

import json
from pathlib import Path

import pytest

from tests import pruning, tiny_models
from tests.cli.conftest import Run
from tests.editing import Tensors, edit_weights


@pytest.fixture
def compressed(model: Path, tmp_path: Path) -> Path:
    pruning.prune(model, tmp_path / "out")
    return tmp_path / "out"


def _dropped_per_layer() -> int:
    kept = sum(pruning.hostile(expert, 64) for expert in range(8)) + pruning.hostile(-1, 96)
    return 8 * 64 + 96 - kept


def test_dropped_micro_experts_are_counted_per_layer(
    run: Run, model: Path, compressed: Path
) -> None:
    result = run("verify", compressed, "--against", model)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[-2:]]
    share = f"{100 * _dropped_per_layer() / (8 * 64 + 96):.1f}%"
    for layer, row in enumerate(rows):
        assert row == [str(layer), str(_dropped_per_layer()), "608", share, "1"]


def test_without_an_original_only_the_tensors_are_judged(run: Run, compressed: Path) -> None:
    result = run("verify", compressed)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["OK:", "no"]


def test_without_the_report_of_compress_no_checksum_is_compared_and_that_is_said(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("compress", model, "-o", out, "--prune", 0.5, *small)
    assert "no checksum" not in run("verify", out).stdout
    report = json.loads((out / "camera_report.json").read_text())
    (out / "camera_report.json").write_text(json.dumps({**report, "sha256": {}}))
    assert "no checksum was compared: camera_report.json is of" in run("verify", out).stdout
    (out / "camera_report.json").unlink()
    result = run("verify", out)
    assert result.exit_code == 0
    assert f"no checksum was compared: {out} has no camera_report.json" in result.stdout
    # An original never had one.
    assert len(run("verify", model).stdout.splitlines()) == 1


def test_settings_of_a_text_want_the_text(run: Run, model: Path, compressed: Path) -> None:
    result = run("verify", compressed, "--against", model, "--samples", 3)
    assert result.exit_code == 2
    assert "--samples is of --calibration SOURCE" in result.stderr


def test_json_lists_every_dropped_micro_expert(run: Run, model: Path, compressed: Path) -> None:
    data = json.loads(run("verify", compressed, "--against", model, "--json").stdout)
    for layer in data["layers"]:
        assert layer["experts"][0] == list(range(64))
        assert layer["num_dropped"] == _dropped_per_layer()
        assert layer["num_dropped"] == sum(map(len, layer["experts"] + layer["shared"]))


def test_an_altered_weight_is_one_error_that_names_tensor_and_row(
    run: Run, model: Path, compressed: Path
) -> None:
    name = "model.layers.1.mlp.experts.4.gate_proj.weight"

    def alter(tensors: Tensors) -> None:
        tensors[name][11, 20] *= 2

    edit_weights(compressed, alter)
    assert run("verify", compressed).exit_code == 0
    result = run("verify", compressed, "--against", model)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert f"{name}, row 11" in result.stderr


def test_another_family_is_not_the_original(run: Run, compressed: Path, tmp_path: Path) -> None:
    other = tiny_models.save("olmoe", tmp_path / "olmoe")
    result = run("verify", compressed, "--against", other)
    assert result.exit_code == 1
    assert "config.json" in result.stderr


def test_what_compress_writes_is_verified(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    how = ["--prune", 0.5, "--align", 8]
    run("compress", model, "-o", tmp_path / "real", *how, *small)
    result = run("verify", tmp_path / "real", "--against", model)
    assert result.exit_code == 0, result.output
    dropped = [int(line.split()[1]) for line in result.stdout.splitlines()[-2:]]
    assert sum(dropped) == 2 * 304
    assert "OK: gate and up of every kept micro-expert are those of one of" in result.stdout
    # config.json, its marker, index, generation settings, and three of the tokenizer.
    assert "OK: 3 files of weights and 7 more that engines read, config.json" in result.stdout
    found = json.loads(run("verify", tmp_path / "real", "--json").stdout)
    assert (found["num_checksums"], found["num_side_checksums"]) == (3, 7)


@pytest.mark.parametrize("command", ["verify", "inspect", "convert"])
def test_a_dense_config_in_a_compressed_folder_is_named_with_the_remedy(
    run: Run, model: Path, small: list[str], tmp_path: Path, command: str
) -> None:
    run("compress", model, "-o", tmp_path / "out", "--prune", 0.5, *small)
    (tmp_path / "out" / "config.json").write_bytes((model / "config.json").read_bytes())
    more = ["--to", "dense", "-o", tmp_path / "dense"] if command == "convert" else []
    result = run(command, tmp_path / "out", *more)
    assert result.exit_code == 1
    assert "config.json of this CAMERA checkpoint has lost its quantization_config" in result.stderr
