"""`compress --size`, `--bits-per-weight` and `--allow`: what cannot be met, and what to give."""

import math
import re
from pathlib import Path

import pytest

from camera_serve.checkpoint.reader import Checkpoint
from tests.cli.conftest import Run

FIT = ["--align", "8", "--group-size", "64"]
"""What the tiny model can follow."""


def _refused(run: Run, model: Path, small: list[str], *flags: str) -> str:
    result = run("compress", model, "-o", model.parent / "out", *FIT, *flags, *small)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (model.parent / "out").exists()
    return str(result.stderr)


@pytest.mark.parametrize("allow", ["16,8,4,3,2,1,0", "4,3", "16,0"])
@pytest.mark.parametrize("goal", [["--size", "1"], ["--bits-per-weight", "0.001"]])
def test_too_small_a_size_names_the_least_that_can_be_met(
    run: Run, model: Path, small: list[str], tmp_path: Path, goal: list[str], allow: str
) -> None:
    # Groups are for packed tiers.
    flags = [*(FIT[:2] if allow == "16,0" else FIT), "--allow", allow, *small]
    result = run("compress", model, "-o", tmp_path / "out", *goal, *flags)
    assert result.exit_code == 1, result.output
    assert " is too small: this model's experts take 456KiB, all else 147.625KiB, " in result.stderr
    (least,) = re.findall(r"give (?:a size of )?(\S+)(?: bits per weight)? or more", result.stderr)
    command = ["compress", model, "-o", tmp_path / "out", goal[0], least, *flags]
    assert run(*command).exit_code == 0


@pytest.mark.parametrize("goal", ["--size", "--bits-per-weight"])
def test_more_than_the_allowed_bits_take_names_the_most(
    run: Run, model: Path, small: list[str], tmp_path: Path, goal: str
) -> None:
    more = {"--size": "590KiB", "--bits-per-weight": "15"}[goal]
    said = _refused(run, model, small, goal, more, "--allow", "2,1")
    assert "is more than bits 2,1 take, 71.25KiB: this model's experts take 456KiB" in said
    (most,) = re.findall(r"or give (?:a size of )?(\S+)(?: bits per weight)? or less", said)
    command = ["compress", model, "-o", tmp_path / "out", goal, most, "--allow", "2,1"]
    assert run(*command, *FIT, *small).exit_code == 0


def test_a_size_above_the_original_is_no_compression(
    run: Run, model: Path, small: list[str]
) -> None:
    total = Checkpoint.open(model).total_bytes
    for size in (str(total), "12GB"):
        said = _refused(run, model, small, "--size", size)
        assert "is no compression: this model's experts take 456KiB, all else 147.625KiB" in said
    assert "16 bits per weight" in _refused(run, model, small, "--bits-per-weight", "16")


@pytest.mark.parametrize("size", ["12XB", "0", "0GB", "-3GB", "nan", "1e9", "9" * 400, "1.5.5GB"])
def test_what_is_no_size_is_a_usage_error(run: Run, model: Path, tmp_path: Path, size: str) -> None:
    result = run("compress", model, "-o", tmp_path / "out", "--size", size)
    assert result.exit_code == 2, result.output
    said = result.stderr.splitlines()[-1]
    assert "--size" in said and "give one like 12GB, 11.5GiB or 12000000000" in said


@pytest.mark.parametrize("bits", ["0", "-2", "17", "nan", "inf"])
def test_bits_per_weight_out_of_range_are_a_usage_error(
    run: Run, model: Path, tmp_path: Path, bits: str
) -> None:
    result = run("compress", model, "-o", tmp_path / "out", "--bits-per-weight", bits)
    assert result.exit_code == 2, result.output
    said = result.stderr.splitlines()[-1]
    assert "Invalid value for --bits-per-weight: " in said
    assert f"found {float(bits)!r}" in said or math.isnan(float(bits))


@pytest.mark.parametrize("allow", ["5", "4,5,0", "0", "-1,2", "a", "4;3", ",", "4,"])
def test_bits_that_are_not_served_are_a_usage_error(
    run: Run, model: Path, tmp_path: Path, allow: str
) -> None:
    goal = ["--bits-per-weight", "3", "--allow", allow]
    result = run("compress", model, "-o", tmp_path / "out", *goal)
    assert result.exit_code == 2, result.output
    said = result.stderr.splitlines()[-1]
    assert "--allow" in said and "Value error" not in said
    assert "wanted falling bit-widths out of 16, 8, 4, 3, 2, 1, 0" in said or "like 4,3,2,0" in said


def test_bits_named_twice_or_in_another_order_are_the_same(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    outputs = []
    for number, allow in enumerate(("4,2,0", "0,2,4,4,2")):
        output = tmp_path / str(number)
        goal = ["--bits-per-weight", "3", "--allow", allow]
        assert run("compress", model, "-o", output, *goal, *FIT, *small).exit_code == 0
        outputs.append((output / "camera_recipe.yaml").read_text())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--paper", "--size", "500KB"], "--size does not go with --paper"),
        (["--paper", "--bits-per-weight", "3"], "--bits-per-weight does not go with --paper"),
        (["--paper", "--prune", "0.4", "--budget", "model"], "--budget does not go with --paper"),
        (["--paper", "--prune", "0.4", "--sweeps", "2"], "--sweeps does not go with --paper"),
        (["--prune", "0.4", "--allow", "3,2"], "--allow goes with --bits-per-weight and --size"),
        (["--bits", "2", "--allow", "3,2"], "--allow goes with --bits-per-weight and --size"),
        (["--size", "500KB", "--budget", "layer"], "--size is of the whole model: drop --budget"),
        (["--size", "500KB", "--tier-ratio", "0.3"], "--tier-ratio goes with --bits only"),
        (["--size", "500KB", "--prune", "0.4"], "found --prune and --size"),
        (["--size", "500KB", "--bits-per-weight", "3"], "found --bits-per-weight and --size"),
        (["--prune", "0.4", "--sweeps", "-1"], "--sweeps"),
    ],
)
def test_settings_that_contradict_each_other_are_a_usage_error(
    run: Run, model: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    result = run("compress", model, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2, result.output
    assert named in result.stderr.splitlines()[-1]


PLAN = "plan: {tiers: [{bits: 16, fraction: 0.6}, {bits: 0, fraction: 0.4}]}"


@pytest.mark.parametrize(
    ("goals", "named"),
    [
        (f"{PLAN}\nsize: 500000", "wanted exactly one of plan, bits_per_weight, size, found plan"),
        ("align: 8", "wanted exactly one of plan, bits_per_weight, size, found none"),
        ("size: 500000\nversion: 2", "size is a budget of the whole model: set budget to model"),
        ("bits_per_weight: .nan", "bits_per_weight: "),
        ("size: 0", "size: "),
        ("size: 500000\nallow: [2, 4]", "allow: wanted falling bit-widths out of 16, 8, 4"),
        ("size: 500000\nallow: []", "allow: wanted falling bit-widths out of 16, 8, 4"),
    ],
)
def test_a_recipe_file_with_no_one_goal_is_refused(
    run: Run, model: Path, tmp_path: Path, goals: str, named: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{goals}\ncalibration: {{source: a.txt}}\n")
    result = run("compress", model, "-o", tmp_path / "out", "--recipe", file)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"error: recipe {file}") and result.stderr.count("\n") == 1
    assert named in result.stderr


@pytest.mark.parametrize("goal", [["--bits", "2"], ["--bits-per-weight", "4"]])
def test_sweeps_of_packed_tiers_are_refused(
    run: Run, model: Path, small: list[str], tmp_path: Path, goal: list[str]
) -> None:
    result = run("compress", model, "-o", tmp_path / "out", *FIT, *goal, "--sweeps", "1", *small)
    assert result.exit_code == 2
    assert "Sweeps are for pruning alone: set sweeps to 0, or keep 16 bits." in result.stderr


def test_alpha_is_refused_where_energies_have_none(
    run: Run, model: Path, small: list[str], tmp_path: Path
) -> None:
    how = ["--prune", "0.4", "--align", "8", "--alpha", "0.5", *small]
    result = run("compress", model, "-o", tmp_path / "out", *how)
    assert result.exit_code == 2 and "it goes with --paper" in result.stderr
    assert run("compress", model, "-o", tmp_path / "out", "--paper", *how).exit_code == 0
