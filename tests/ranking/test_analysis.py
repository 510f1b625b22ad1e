"""analyze(): one folder, one run, of whichever command."""

from pathlib import Path

import pytest

from camera_serve import AnalysisSettings, Calibration, Recipe, TierPlan, analyze, compress
from camera_serve.errors import OutputError
from camera_serve.progress import OnProgress
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
