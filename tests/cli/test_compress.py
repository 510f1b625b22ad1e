"""`camera-serve compress`: the flags become the recipe, and the checkpoint follows it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from camera_serve.checkpoint.lock import sole_writer
from camera_serve.compression import sizing
from camera_serve.recipe import Recipe
from tests import pruning, tiny_models
from tests.cli.conftest import Run
from tests.editing import digest


def _recipe(output: Path) -> Recipe:
    return Recipe.load(output / "camera_recipe.yaml")


def test_prune_removes_the_share_and_says_what_comes_next(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    before = digest(model)
    how = ["--prune", 0.5, "--align", 8, "--paper"]
    result = run("compress", model, "-o", output, *how, *small)
    assert result.exit_code == 0, result.output
    assert "left out" not in result.stdout
    assert result.stdout.splitlines()[-1] == f"wrote {output}; next: vllm serve {output}"
    assert "456.0 KiB -> 228.0 KiB (50.0% smaller)" in result.stdout
    assert "compress  2/2 layers" in result.stderr
    assert digest(model) == before
    kept = json.loads((output / "config.json").read_text())["quantization_config"]["layers"]
    for counts in kept.values():
        assert sum(n for (n,) in counts["experts"] + counts["shared"]) == (8 * 64 + 96) // 2


@pytest.mark.parametrize("goal", [["--prune", 0.4], ["--bits-per-weight", 3]])
def test_a_summary_counts_what_was_left_out_by_step(
    run: Run, model: Path, calibration: Path, tmp_path: Path, goal: list[object]
) -> None:
    text = ["--calibration", calibration, "--samples", 2, "--seq-len", 64]
    how = [*goal, "--align", 8, *(["--group-size", 64] if goal[0] != "--prune" else [])]
    result = run("compress", model, "-o", tmp_path / "out", *how, *text)
    assert result.exit_code == 0, result.output
    layers = json.loads((tmp_path / "out" / "camera_report.json").read_text())["layers"]
    counts = {
        "ranked by energy": sum(len(layer.get("ranked_by_energy", ())) for layer in layers),
        "not refitted": sum(len(layer["unfitted_experts"]) for layer in layers),
        "not compensated": sum(len(layer.get("uncompensated_experts", ())) for layer in layers),
    }
    assert any(counts.values())
    (said,) = [line for line in result.stdout.splitlines() if "so that it was left out: " in line]
    for what, count in counts.items():
        assert (f"{count} {what}" in said) == bool(count)


def test_it_says_what_was_lost_and_where_most_else_than_expected(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    result = run("compress", model, "-o", tmp_path / "out", "--prune", 0.5, *small)
    layers = json.loads((tmp_path / "out" / "camera_report.json").read_text())["layers"]
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("lost energy"))
    found, expected = (
        [layer[error] for layer in layers] for error in ("output_error", "predicted_error")
    )
    furthest = max(range(2), key=lambda n: abs(found[n] - expected[n]))
    assert line == (
        f"lost energy     {50 * sum(found):.1f}% on average over 2 layers, {50 * sum(expected):.1f}"
        f"% expected; furthest off is model.layers.{furthest}.mlp: {100 * found[furthest]:.1f}%, "
        f"{100 * expected[furthest]:.1f}% expected"
    )
    plain = run("compress", model, "-o", tmp_path / "plain", "--prune", 0.5, "--paper", *small)
    assert "lost energy" not in plain.stdout


def test_every_flag_reaches_the_recipe(
    run: Run, model: Path, calibration: Path, tmp_path: Path
) -> None:
    flags = ["--calibration", calibration, "--samples", 3, "--seq-len", 32, "--seed", 5]
    flags += ["--alpha", 0.5, "--align", 4, "--dtype", "float32", "--device", "cpu", "--paper"]
    result = run("compress", model, "-o", tmp_path / "out", "--plan", "16:0.75,0:0.25", *flags)
    assert result.exit_code == 0, result.output
    recipe = _recipe(tmp_path / "out")
    assert str(recipe.plan) == "16:0.75,0:0.25"
    assert recipe.calibration.model_dump() == {
        "source": str(calibration),
        "samples": 3,
        "seq_len": 32,
        "seed": 5,
    }
    assert (recipe.alpha, recipe.align, recipe.dtype) == (0.5, 4, "float32")


def test_plan_prune_and_recipe_file_write_the_same_bytes(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    common = [*small, "--align", 8]
    run("compress", model, "-o", tmp_path / "a", "--prune", 0.4, *common)
    run("compress", model, "-o", tmp_path / "b", "--plan", "16:0.6,0:0.4", *common)
    recipe = tmp_path / "a" / "camera_recipe.yaml"
    run("compress", model, "-o", tmp_path / "c", "--recipe", recipe)
    wanted = digest(tmp_path / "a")
    wanted.pop("camera.log")
    for name in ("b", "c"):
        found = digest(tmp_path / name)
        found.pop("camera.log")
        assert found == wanted


def test_python_call_writes_what_the_command_writes(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    import camera_serve

    run("compress", model, "-o", tmp_path / "a", "--prune", 0.25, *small)
    camera_serve.compress(model, tmp_path / "b", _recipe(tmp_path / "a"))
    for name, value in digest(tmp_path / "a").items():
        if name != "camera.log":
            assert digest(tmp_path / "b")[name] == value, name


def test_dry_run_prints_the_real_sizes_and_touches_nothing(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    command = ["compress", model, "-o", tmp_path / "out", "--prune", 0.5, "--align", 8, *small]
    result = run(*command, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "expert weights  456.0 KiB -> 228.0 KiB" in result.stdout
    for name in ("checkpoint", "peak memory", "disk needed", "time"):
        assert any(line.startswith(name) for line in result.stdout.splitlines())
    assert "solver" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_downloads_no_text(run: Run, model: Path, tmp_path: Path) -> None:
    command = ["compress", model, "-o", tmp_path / "out", "--prune", 0.5, "--align", 8]
    assert run(*command, "--calibration", "c4", "--dry-run").exit_code == 0


def test_dry_run_says_when_two_layers_are_in_memory(
    run: Run, model: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", model, "-o", tmp_path / "out", "--prune", 0.5, "--align", 8, *small]
    said = "the next layer is read while one computes"
    assert said not in run(*command, "--dry-run").stdout
    monkeypatch.setattr(sizing, "layers_at_once", lambda device: 2)
    assert said in run(*command, "--dry-run").stdout


def test_overwrite_replaces_an_earlier_output(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run("compress", model, "-o", output, "--prune", 0.25, "--align", 8, *small)
    run("compress", model, "-o", output, "--prune", 0.75, "--align", 8, "--overwrite", *small)
    assert _recipe(output).plan.pruned == 0.75
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("paper", [[], ["--paper"]], ids=["default", "paper"])
def test_interrupt_says_how_to_resume_and_resume_gives_the_same_bytes(
    run: Run,
    model: Path,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    paper: list[str],
) -> None:
    how = ["--prune", 0.4, "--align", 8, *paper]
    command = ["compress", model, "-o", tmp_path / "out", *how, *small]
    run("compress", model, "-o", tmp_path / "whole", *command[4:])
    _interrupt_after_layers(1, monkeypatch)
    before = digest(model)
    result = run(*command)
    monkeypatch.undo()
    assert result.exit_code == 130
    assert "--resume" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert digest(model) == before
    assert run(*command).exit_code == 1, "an interrupted run must not be overwritten silently"
    resumed = run(*command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    steps = [line for line in resumed.stderr.splitlines() if "layers" in line]
    assert any("compress  1/2 layers" in line for line in steps[:2])
    whole, again = digest(tmp_path / "whole"), digest(tmp_path / "out")
    assert {k: v for k, v in again.items() if k != "camera.log"} == {
        k: v for k, v in whole.items() if k != "camera.log"
    }


def test_resuming_nothing_says_so_in_one_line(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    command = ["compress", model, "-o", tmp_path / "out", "--prune", 0.4, *small, "--resume"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    partial = tmp_path / "out.partial"
    said = f"nothing to resume: {partial} holds no interrupted run; starting anew"
    assert result.stderr.splitlines()[0] == said
    assert "nothing to resume: " in run(*command).stderr


@pytest.mark.parametrize("command", ["compress", "analyze", "convert"])
def test_an_output_that_another_run_writes_is_refused_by_its_name(
    run: Run, model: Path, small: list[str], tmp_path: Path, command: str
) -> None:
    pruning.prune(model, tmp_path / "compressed")
    flags = {
        "compress": [model, "--prune", 0.4, *small, "--overwrite"],
        "analyze": [model, *small, "--overwrite"],
        "convert": [tmp_path / "compressed", "--to", "dense"],
    }
    with sole_writer(tmp_path / "out", "compress"):
        before = sorted(tmp_path.iterdir())
        result = run(command, *flags[command], "-o", tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before
    assert result.exit_code == 1
    who = f"is being written by camera-serve compress (pid {os.getpid()} on "
    assert result.stderr.startswith(f"error: {tmp_path / 'out'} {who}")


def _interrupt_after_layers(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from camera_serve.checkpoint.workspace import Workspace

    commit = Workspace.commit

    def interrupted(self: Workspace, layer: int, *args: object) -> None:
        if layer == count:
            raise KeyboardInterrupt
        commit(self, layer, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Workspace, "commit", interrupted)


def test_a_real_interrupt_signal_ends_the_process_with_130(
    calibration: Path, tmp_path: Path
) -> None:
    # Enough layers that the signal arrives long before the run is over.
    model = tiny_models.save("qwen2_moe", tmp_path / "model", num_hidden_layers=24)
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = "import camera_serve.cli; camera_serve.cli.main(prog_name='camera-serve')"
    command = f"{listen}; {program}"
    flags = ["--calibration", calibration, "--samples", "4", "--seq-len", "64", "--prune", "0.4"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, "compress", model, "-o", tmp_path / "out", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert first.startswith("survey  0/24 layers")
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].startswith("error: interrupted")
    assert not (tmp_path / "out").exists()
    finished = list(tmp_path.glob("out.partial/.state/survey-*"))
    assert (tmp_path / "out.partial").exists() == bool(finished)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "none"),
        (["--prune", "0.4", "--plan", "16:0.6,0:0.4"], "--prune and --plan"),
        (["--prune", "0"], "--prune"),
        (["--prune", "1"], "--prune"),
        (["--prune", "-0.1"], "--prune"),
        (["--prune", "1.5"], "--prune"),
        (["--prune", "nan"], "--prune"),
        (["--prune", "half"], "--prune"),
        (["--plan", "16:0.7,0:0.4"], "--plan"),
        (["--plan", "everything"], "--plan"),
        (["--plan", "0:0.4,16:0.6"], "--plan"),
        (["--prune", "0.4", "--samples", "0"], "--samples"),
        (["--prune", "0.4", "--seq-len", "1"], "--seq-len"),
        (["--prune", "0.4", "--alpha", "1.01"], "--alpha"),
        (["--prune", "0.4", "--alpha", "nan"], "--alpha"),
        (["--prune", "0.4", "--align", "0"], "--align"),
        (["--prune", "0.4", "--seed", str(2**64)], "--seed"),
        (["--prune", "0.4", "--dtype", "int8"], "--dtype"),
        (["--prune", "0.4", "--device", "tpu"], "--device"),
    ],
)
def test_a_bad_setting_is_a_usage_error_that_names_its_flag(
    run: Run, model: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    result = run("compress", model, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert named in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flag",
    [
        ["--alpha", "0.95"],
        ["--align", "32"],
        ["--calibration", "c4"],
        ["--samples", "128"],
        ["--seq-len", "2048"],
        ["--seed", "0"],
        ["--dtype", "auto"],
        ["--prune", "0.4"],
        ["--plan", "16:0.6,0:0.4"],
    ],
)
def test_a_flag_that_the_recipe_decides_is_refused_by_name(
    run: Run, model: Path, tmp_path: Path, flag: list[str]
) -> None:
    result = run("compress", model, "-o", tmp_path / "out", "--recipe", "recipe.yaml", *flag)
    assert result.exit_code == 2
    assert flag[0] in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "recipe"),
        (b"plan: [", "is not YAML"),
        (b"- 1", "recipe"),
        (b"plan: {tiers: [{bits: 16, fraction: 0.6}]}\ncalibration: {source: a.txt}", "sum to 1"),
        (b"calibration: {source: a.txt, sample: 3}", "calibration.sample"),
    ],
)
def test_a_bad_recipe_file_is_refused_by_setting(
    run: Run, model: Path, tmp_path: Path, text: bytes | None, named: str
) -> None:
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_bytes(text)
    result = run("compress", model, "-o", tmp_path / "out", "--recipe", file)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: recipe {file}")
    assert named in result.stderr
    assert not (tmp_path / "out").exists()


def test_products_are_not_kept_for_shapes_that_do_not_come_again(
    run: Run, model: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(setting, "")
    monkeypatch.delenv(setting)
    run("bench", tmp_path)
    assert setting not in os.environ
    run("compress", model, "-o", tmp_path / "out", "--prune", 0.5, "--dry-run", *small)
    assert int(os.environ[setting]) < 1024
