"""`camera-serve inspect`: the printed table and JSON hold the checkpoint's real widths."""

import json
from pathlib import Path

import pytest

from camera_serve.cli.inspect import _layer_table
from camera_serve.evaluation.inspection import Inspection, LayerInspection
from tests import pruning
from tests.cli.conftest import Run

WIDTHS = (0, 1, 7, 64, 33, 2, 0, 5)


@pytest.fixture
def compressed(model: Path, tmp_path: Path) -> Path:
    pruning.prune(model, tmp_path / "out", lambda e, d_ff: 40 if e < 0 else WIDTHS[e])
    return tmp_path / "out"


def test_the_table_shows_widths_shares_and_bytes(run: Run, compressed: Path) -> None:
    result = run("inspect", compressed)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    removed = f"{100 * (1 - (sum(WIDTHS) + 40) / (8 * 64 + 96)):.1f}%"
    size = f"{(sum(WIDTHS) + 40) * 3 * 64 * 2 / 1024:.1f}"
    for layer, line in enumerate(lines[-2:]):
        assert line.split() == [
            *(str(layer), "0", "3.5", "64", "2", "40", removed, "16.00", size, "KiB"),
        ]
    assert f"{removed} of the micro-experts" in result.stdout
    assert "16:0.5,0:0.5" in result.stdout


def test_a_dense_model_lacks_nothing(run: Run, model: Path) -> None:
    result = run("inspect", model)
    assert result.exit_code == 0, result.output
    assert "none: a dense checkpoint" in result.stdout
    assert "0.0% of the micro-experts" in result.stdout


def test_json_is_the_whole_layout(run: Run, compressed: Path) -> None:
    data = json.loads(run("inspect", compressed, "--json").stdout)
    assert [layer["expert_d_ff"] for layer in data["layers"]] == [list(WIDTHS)] * 2
    assert [layer["shared_d_ff"] for layer in data["layers"]] == [[40]] * 2


def test_least_seen_experts_of_a_real_run_are_shown(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    run("compress", model, "-o", tmp_path / "real", "--prune", 0.5, *small)
    report = json.loads((tmp_path / "real" / "camera_report.json").read_text())
    lines = run("inspect", tmp_path / "real").stdout.splitlines()
    assert lines[-3].endswith("least seen (expert: tokens)")
    for line, layer in zip(lines[-2:], report["layers"], strict=True):
        tokens = layer["tokens_per_expert"]
        least = min(range(8), key=lambda e: (tokens[e], e))
        assert f"  {least}: {tokens[least]}, " in line


def test_layers_without_shared_experts_show_a_dash() -> None:
    layer = LayerInspection(3, (1, 2), (), 8, 9, 4, None)
    inspection = Inspection(Path("x"), "olmoe", None, 4, 2, 1, 8, 4, 0, 0, 0, (layer,))
    row = _layer_table(inspection).splitlines()[1].split()
    assert row == ["3", "1", "1.5", "2", "0", "-", "62.5%", "2.00", "9", "B"]
