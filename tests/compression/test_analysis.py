"""analyze(): what it finds, and one folder, one run, of whichever command."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from camera_serve import (
    AnalysisReport,
    AnalysisSettings,
    Calibration,
    Recipe,
    TierPlan,
    analyze,
    compress,
)
from camera_serve.calibration.streaming import ModelStream
from camera_serve.calibration.text import windows_for
from camera_serve.checkpoint.reader import Checkpoint
from camera_serve.errors import OutputError
from camera_serve.progress import OnProgress
from camera_serve.ranking.layer import run_measured
from camera_serve.ranking.survey import survey_layer
from tests import tiny_models
from tests.editing import digest
from tests.races import Run, killed_in, race


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("olmoe", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def settings(tmp_path_factory: pytest.TempPathFactory) -> AnalysisSettings:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(Path(tiny_models.__file__).read_text())
    return AnalysisSettings(calibration=Calibration(source=str(text), samples=4, seq_len=32))


def analysis(model: Path, output: Path, settings: AnalysisSettings, **flags: bool) -> Run:
    def run(report: OnProgress) -> None:
        analyze(model, output, settings, on_progress=report, **flags)

    return run


def compression(model: Path, output: Path, settings: AnalysisSettings) -> Run:
    recipe = Recipe.paper(plan=TierPlan.prune(0.5), calibration=settings.calibration)

    def run(report: OnProgress) -> None:
        compress(model, output, recipe, on_progress=report)

    return run


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "laguna"])
def test_one_pass_gives_the_energies_and_the_survey_of_two(
    family: str, settings: AnalysisSettings, tmp_path: Path
) -> None:
    path, cpu = tiny_models.save(family, tmp_path / "model"), torch.device("cpu")
    report = analyze(path, tmp_path / "out", settings)
    energies, surveys = (
        load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("energies", "survey")
    )
    stream = ModelStream(Checkpoint.open(path), cpu, torch.bfloat16)
    hidden = stream.embed(windows_for(Checkpoint.open(path), settings.calibration).tokens)
    for layer in range(stream.structure.num_layers):
        if layer not in stream.structure.moe_layers:
            hidden = stream.run(layer, stream.load(layer), hidden)
            continue
        name, again = stream.structure.moe_prefix(layer), hidden.clone()
        found = run_measured(stream, layer, stream.load(layer), hidden).energies(settings.alpha)
        for part in ("experts", "shared", "tokens"):
            assert energies.pop(f"{name}.{part}").equal(getattr(found, part))
        ranked = torch.cat(found.per_expert).sort(descending=True, stable=True).indices
        assert energies.pop(f"{name}.ranking").equal(ranked)
        survey = survey_layer(stream, layer, stream.load(layer), again)
        for part, tensor in survey.tensors().items():
            assert surveys.pop(f"{name}.{part}").equal(tensor)
        assert not survey.energies.experts.equal(found.experts)
    assert not energies and not surveys
    assert [layer.layer for layer in report.layers] == [
        stream.structure.moe_prefix(layer) for layer in stream.structure.moe_layers
    ]


def test_reports_of_older_versions_are_read(
    model: Path, settings: AnalysisSettings, tmp_path: Path
) -> None:
    report = analyze(model, tmp_path / "out", settings)
    older = report.model_dump(mode="json") | {"version": 1}
    del older["fingerprint"], older["survey_sha256"]
    assert AnalysisReport.model_validate(older).layers == report.layers
    with pytest.raises(ValidationError):
        AnalysisReport.model_validate(older | {"version": 3})


def test_of_two_at_one_moment_one_finishes_and_the_other_is_told(
    model: Path, settings: AnalysisSettings, tmp_path: Path
) -> None:
    analyze(model, tmp_path / "undisturbed", settings)
    for flags in ({}, {"overwrite": True}):
        ends = race(*[analysis(model, tmp_path / "out", settings, **flags)] * 2)
        assert sorted(map(bool, ends)) == [False, True], ends
        assert "is being written by camera-serve analyze (pid " in max(ends)
        assert digest(tmp_path / "out") == digest(tmp_path / "undisturbed")
        (tmp_path / "out").rename(tmp_path / f"done-{len(flags)}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done-0", "done-1", "undisturbed"]


def test_two_commands_do_not_share_a_folder(
    model: Path, settings: AnalysisSettings, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ends = race(analysis(model, output, settings), compression(model, output, settings))
    assert sorted(map(bool, ends)) == [False, True], ends
    assert "is being written by camera-serve" in max(ends)
    assert (output / "camera_analysis.json").exists() == (not ends[0])
    assert (output / "camera_report.json").exists() == (not ends[1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_analysis_is_no_obstacle(
    model: Path, settings: AnalysisSettings, tmp_path: Path
) -> None:
    killed_in(analysis(model, tmp_path / "out", settings), step=1)
    analyze(model, tmp_path / "out", settings)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_compression_of_that_name_is_kept(
    model: Path, settings: AnalysisSettings, tmp_path: Path, overwrite: bool
) -> None:
    killed_in(compression(model, tmp_path / "out", settings), step=1)
    before = digest(tmp_path / "out.partial")
    with pytest.raises(OutputError, match="holds an interrupted run of compress: continue it"):
        analyze(model, tmp_path / "out", settings, overwrite=overwrite)
    assert digest(tmp_path / "out.partial") == before


@pytest.mark.parametrize("name", ["out.analysis", "out.partial", "out.old"])
def test_folders_of_the_user_beside_the_output_are_left_alone(
    model: Path, settings: AnalysisSettings, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "chapter1.tex").write_text("years of work")
    if name == "out.partial":
        with pytest.raises(OutputError, match="was not begun by camera-serve"):
            analyze(model, tmp_path / "out", settings)
    else:
        analyze(model, tmp_path / "out", settings)
        analyze(model, tmp_path / "out", settings, overwrite=True)
    assert (tmp_path / name / "chapter1.tex").read_text() == "years of work"
