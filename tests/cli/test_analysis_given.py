"""`camera-serve compress --analysis`: flags that need not be repeated, sizes, and refusals."""

import shutil
from pathlib import Path

import pytest

from camera_serve.recipe import Recipe
from tests.cli.conftest import Run
from tests.editing import digest

HOW = ["--align", 8, "--group-size", 32]


@pytest.fixture(scope="module")
def flags(calibration: Path) -> list[object]:
    return [
        *("--calibration", calibration, "--samples", 4, "--seq-len", 64, "--seed", 3),
        *("--dtype", "float32"),
    ]


@pytest.fixture
def analysis(run: Run, model: Path, flags: list[object], tmp_path: Path) -> Path:
    result = run("analyze", model, "-o", tmp_path / "analysis", *flags, "--alpha", 0.5)
    assert result.exit_code == 0, result.output
    command = f"camera-serve compress {model} -o OUT --analysis {tmp_path / 'analysis'}"
    assert result.stdout.splitlines()[-1].endswith(f"next: {command} --prune 0.4")
    return tmp_path / "analysis"


def test_flags_that_are_not_given_are_those_of_the_analysis(
    run: Run, model: Path, flags: list[object], analysis: Path, tmp_path: Path
) -> None:
    goal = ["--bits-per-weight", 2.5, *HOW]
    given = ["--analysis", analysis]
    assert run("compress", model, "-o", tmp_path / "a", *goal, *flags).exit_code == 0
    for name, more in (("b", []), ("c", flags), ("d", flags[:4])):
        result = run("compress", model, "-o", tmp_path / name, *goal, *given, *more)
        assert result.exit_code == 0, result.output
        assert "survey" not in result.stderr
    wanted = digest(tmp_path / "a")
    for name in ("b", "c", "d"):
        found = digest(tmp_path / name)
        assert found | {"camera.log": ""} == wanted | {"camera.log": ""}
    recipe = Recipe.load(tmp_path / "b" / "camera_recipe.yaml")
    # α is of a ranking that no survey needs.
    assert (recipe.calibration.samples, recipe.calibration.seed, recipe.alpha) == (4, 3, 0.95)


def test_a_recipe_file_takes_an_analysis_of_its_own_calibration(
    run: Run, model: Path, flags: list[object], analysis: Path, tmp_path: Path
) -> None:
    run("compress", model, "-o", tmp_path / "a", "--prune", 0.4, *HOW[:2], *flags)
    recipe = ["--recipe", tmp_path / "a" / "camera_recipe.yaml", "--analysis", analysis]
    result = run("compress", model, "-o", tmp_path / "b", *recipe)
    assert result.exit_code == 0, result.output
    found, wanted = digest(tmp_path / "b"), digest(tmp_path / "a")
    assert found | {"camera.log": ""} == wanted | {"camera.log": ""}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (["--samples", 5], "calibration.samples: then 4, now 5"),
        (["--dtype", "bfloat16"], "dtype: then float32, now bfloat16 (--dtype float32)"),
    ],
)
def test_a_flag_that_differs_is_one_error(
    run: Run, model: Path, analysis: Path, tmp_path: Path, flag: list[object], words: str
) -> None:
    command = ["compress", model, "-o", tmp_path / "out", "--prune", 0.4, *HOW[:2]]
    for more in ([], ["--dry-run"]):
        result = run(*command, "--analysis", analysis, *flag, *more)
        assert result.exit_code == 1
        assert result.stderr == (
            f"error: {analysis} was made from other inputs: {words}; compress with the inputs of "
            "that analysis, run camera-serve analyze again, or leave out --analysis\n"
        )
    assert not list(tmp_path.glob("out*"))


def test_the_paper_s_algorithm_has_no_use_for_an_analysis(
    run: Run, model: Path, analysis: Path, tmp_path: Path
) -> None:
    command = ["compress", model, "-o", tmp_path / "out", "--analysis", analysis]
    result = run(*command, "--prune", 0.4, "--paper")
    assert result.exit_code == 2
    assert "--analysis stands for a pass over the whole model, and --paper" in result.stderr
    result = run(*command, "--bits", 2, *HOW, "--budget", "layer")
    assert result.exit_code == 1
    assert "budget layer and without elimination" in result.stderr


def test_a_text_that_is_gone_is_asked_for(
    run: Run, model: Path, calibration: Path, small: list[str], tmp_path: Path
) -> None:
    text = Path(shutil.copyfile(calibration, tmp_path / "text.txt"))
    run("analyze", model, "-o", tmp_path / "analysis", *small[2:], "--calibration", text)
    moved = text.rename(tmp_path / "moved.txt")
    command = ["compress", model, "-o", tmp_path / "out", "--prune", 0.4, *HOW[:2]]
    command += ["--analysis", tmp_path / "analysis"]
    result = run(*command)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: calibration source {text} does not exist, and ")
    assert run(*command, "--calibration", moved).exit_code == 0


def test_a_dry_run_of_a_size_says_how_sure_it_is(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    run("analyze", model, "-o", tmp_path / "analysis", *small)
    command = ["compress", model, "-o", tmp_path / "out", "--size", "300kB", *HOW]
    before = digest(tmp_path)
    limit = run(*command, *small, "--dry-run").stdout
    assert "checkpoint      at most 293.0 KiB, within 3.0 KiB\n" in limit
    assert "expected loss" not in limit
    exact = run(*command, "--analysis", tmp_path / "analysis", "--dry-run").stdout
    assert digest(tmp_path) == before
    run(*command, "--analysis", tmp_path / "analysis")
    from safetensors.torch import load_file

    files = (tmp_path / "out").glob("*.safetensors")
    found = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    lines = dict(line.split(maxsplit=1) for line in exact.splitlines() if line[0] != " ")
    assert lines["checkpoint"].endswith(f"({found:,} bytes)")
    assert "% of what the micro-experts add to the model" in exact
    shares = [line for line in exact.splitlines() if " of 1,216 micro-experts, " in line]
    assert sum(int(line.split()[-5].replace(",", "")) for line in shares) == 1216
