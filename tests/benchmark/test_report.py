import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from camera_serve.benchmark import plot
from camera_serve.benchmark.environment import Environment
from camera_serve.benchmark.report import (
    BenchedModel,
    BenchReport,
    Drafts,
    LatencyRun,
    ServerMemory,
    ServingRun,
    ThroughputRun,
    Times,
)
from camera_serve.benchmark.settings import BenchSettings, Load
from camera_serve.benchmark.table import model_table, serving_table
from camera_serve.errors import OutputError

LOADS = (Load(concurrency=1), Load(concurrency=16), Load(request_rate=2.5))


def _run(model: str, repeat: int, load: Load, speed: float) -> ServingRun:
    times = Times(mean=1, median=1000 / speed, p99=2)
    return ServingRun(
        model=model,
        repeat=repeat,
        load=load,
        requests=8,
        seconds=1,
        output_tokens_per_second=speed,
        total_tokens_per_second=2 * speed,
        ttft_ms=times,
        tpot_ms=times,
    )


def _memory(model: str, resident: int | None) -> ServerMemory:
    return ServerMemory(
        model=model, repeat=0, resident_bytes=resident, peak_resident_bytes=None, model_bytes=None
    )


@pytest.fixture
def report() -> BenchReport:
    # Medians of three repeats: 40 and 50; their means would be 60 and 60.
    speeds = {"dense": (40, 100, 40), "pruned": (50, 30, 100)}
    serving = tuple(
        _run(model, repeat, load, speed)
        for model, repeats in speeds.items()
        for load in LOADS[:2]
        for repeat, speed in enumerate(repeats)
    )
    return BenchReport(
        settings=BenchSettings(request_rates=(2.5,), repeats=3),
        environment=Environment(
            cpu="some", cores=2, gpus=(), python="3", packages={}, variables={}, commit=None
        ),
        models=(
            BenchedModel(name="dense", plan=None, weight_bytes=5_000_000_000),
            BenchedModel(name="pruned", plan="16:0.6,0:0.4", weight_bytes=3_000_000_000),
        ),
        serving=serving,
        memory=(_memory("dense", 8_000_000_000), _memory("pruned", None)),
        throughput=(
            ThroughputRun(model="dense", requests=8, seconds=1, output_tokens_per_second=100),
            ThroughputRun(model="pruned", requests=8, seconds=1, output_tokens_per_second=140),
        ),
        latency=(LatencyRun(model="dense", mean_seconds=3, median_seconds=2),),
    )


def _rows(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_a_report_is_read_as_it_was_written(report: BenchReport, tmp_path: Path) -> None:
    report.write(tmp_path / "bench.json")
    text = (tmp_path / "bench.json").read_text()
    assert BenchReport.model_validate_json(text) == report
    assert next(iter(json.loads(text))) == "version"
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("change", [{"version": 2}, {"speed": 1}, {"models": [{"name": "A"}]}])
def test_a_report_of_another_kind_is_refused(report: BenchReport, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BenchReport.model_validate(report.model_dump(mode="json") | change)


def test_the_serving_table_holds_medians_and_ratios_over_the_first_model(
    report: BenchReport,
) -> None:
    rows = _rows(serving_table(report))
    assert rows[:2] == [
        ["1 at once", "dense", "40", "25", "25"],
        ["1 at once", "pruned", "50 (1.25×)", "20 (0.80×)", "20 (0.80×)"],
    ]
    assert [row[:2] for row in rows[2:]] == [
        [load, model] for load in ("16 at once", "2.5/s") for model in ("dense", "pruned")
    ]
    # Nothing was measured at that rate.
    assert rows[4][2:] == rows[5][2:] == ["", "", ""]


def test_drafts_have_a_column_where_some_server_speculated(report: BenchReport) -> None:
    assert "drafts accepted" not in [column.header for column in serving_table(report).columns]
    # Both are served three times with 16 at once; of the first model nothing is known.
    accepted = iter((10, 30, 27))
    serving = [
        run.model_copy(update={"drafts": Drafts(tokens=40, accepted=next(accepted))})
        if (run.model, run.load) == ("pruned", LOADS[1])
        else run
        for run in report.serving
    ]
    table = serving_table(report.model_copy(update={"serving": tuple(serving)}))
    assert table.columns[-1].header == "drafts accepted"
    assert [row[-1] for row in _rows(table)] == ["", "", "", "68%", "", ""]


def test_the_model_table_shows_what_is_known(report: BenchReport) -> None:
    table = model_table(report)
    assert [column.header for column in table.columns] == [
        *("model", "plan", "weights GB", "resident GB", "throughput tokens/s", "latency s"),
    ]
    assert _rows(table) == [
        ["dense", "-", "5", "8", "100", "2"],
        ["pruned", "16:0.6,0:0.4", "3 (0.60×)", "", "140 (1.40×)", ""],
    ]


def test_no_cell_is_cut_at_the_width_of_a_file(report: BenchReport) -> None:
    console = Console(width=120)
    with console.capture() as shown:
        console.print(serving_table(report))
        console.print(model_table(report))
    assert "…" not in shown.get()


def test_a_picture_without_matplotlib_is_refused_by_the_extra_s_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plot, "Figure", None)
    with pytest.raises(OutputError, match=r"camera-serve\[plots\]"):
        plot.require_plots()


def test_the_picture_is_a_png_with_a_line_per_model(report: BenchReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.draw(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
