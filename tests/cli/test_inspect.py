"""`camera-serve inspect`: the printed table and JSON hold the checkpoint's real widths."""

import json
import statistics
from pathlib import Path

import pytest

from camera_serve.cli.inspect import BYTES_HEADING, _bytes_table, _layer_table
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


def test_where_the_bytes_went_is_shown_of_a_compressed_model(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    how = ["--plan", "16:0.1,2:0.5,0:0.4", "--align", 1, "--group-size", 32, "--paper"]
    run("compress", model, "-o", tmp_path / "out", *how, *small)
    data = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    lines = run("inspect", tmp_path / "out").stdout.splitlines()
    header = lines[lines.index(BYTES_HEADING) + 1].split("  ")
    assert [cell.strip() for cell in header if cell][-3:] == ["16 bits", "2 bits", "removed"]
    for line, layer in zip(lines[lines.index(BYTES_HEADING) + 2 :], data["layers"], strict=False):
        each = layer["expert_bits_per_original_weight"][:8]
        figures = [layer["bits_per_original_weight"], min(each), statistics.median(each), max(each)]
        counts = layer["micro_experts_at_bits"].values()
        shown = [str(layer["layer"]), *(f"{figure:.2f}" for figure in figures), *map(str, counts)]
        assert line.split() == shown
        assert sum(counts) == 8 * 64 + 96


def test_a_large_model_s_tables_are_readable() -> None:
    every = {bits: 196_608 for bits in (16, 8, 4, 3, 2, 1, 0)}
    widths = (1536,) * 128
    layers = tuple(
        LayerInspection(n, widths, (), 196_608, 2**30, 2048, (1000,) * 128, (10.25,) * 128, every)
        for n in range(48)
    )
    inspection = Inspection(Path("x"), "x", "x", 48, 128, 8, 2048, 1536, 0, 0, 0, layers)
    tables = (_bytes_table(inspection), _layer_table(inspection))
    assert all(len(line) <= 100 for made in tables for line in made.splitlines())
    assert len(tables[0].splitlines()) == 49


def test_a_dense_model_has_no_table_of_bytes(run: Run, model: Path) -> None:
    assert BYTES_HEADING not in run("inspect", model).stdout
