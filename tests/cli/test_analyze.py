"""`camera-serve analyze`: settings reach the analysis, and its report reads well."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import Run
from tests.editing import digest


def test_the_report_shows_the_written_figures(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    before = digest(model)
    result = run("analyze", model, "-o", tmp_path / "out", "--alpha", 0.5, "--seed", 3, *small)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "camera_analysis.json").read_text())
    assert report["settings"]["alpha"] == 0.5
    assert report["settings"]["calibration"]["seed"] == 3
    rows = [line.split() for line in result.stdout.splitlines()[1:3]]
    for row, layer in zip(rows, report["layers"], strict=True):
        tokens = layer["tokens_per_expert"]
        assert row[:4] == [layer["layer"], str(min(tokens)), str(max(tokens)), "0"]
        assert row[-1] == f"{100 * layer['energy_below']['60%']:.2f}%"
    assert result.stdout.splitlines()[-1].startswith(f"wrote {tmp_path / 'out'}; next: ")
    assert digest(model) == before


def test_energies_are_written_for_every_layer(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    run("analyze", model, "-o", tmp_path / "out", *small)
    tensors = load_file(tmp_path / "out" / "energies.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        assert tensors[f"{prefix}.experts"].shape == (8, 64)
        assert tensors[f"{prefix}.tokens"].sum() == 3 * 4 * 64


@pytest.mark.parametrize(
    "flag",
    [["--samples", "0"], ["--seq-len", "1"], ["--alpha", "-1"], ["--dtype", "int4"]],
)
def test_a_bad_setting_is_a_usage_error_that_names_its_flag(
    run: Run, model: Path, tmp_path: Path, flag: list[str]
) -> None:
    result = run("analyze", model, "-o", tmp_path / "out", *flag)
    assert result.exit_code == 2
    assert flag[0] in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
