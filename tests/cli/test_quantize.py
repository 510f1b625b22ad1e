import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from camera_serve.cli import main
from camera_serve.compression.quantize import cost
from camera_serve.compression.quantize.cost import SolveSize
from tests import quantized, tiny_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize")
    tiny_models.save("qwen2_moe", path / "model")
    (path / "text.txt").write_text(Path(__file__).read_text() * 8)
    return path


def run(folder: Path, *arguments: str) -> Result:
    short = ("--samples", "4", "--seq-len", "64", "--group-size", "32", "--align", "4")
    text = ("--calibration", str(folder / "text.txt"))
    model = str(folder / "model")
    return CliRunner().invoke(main, ["compress", model, *arguments, *text, *short])


def test_bits_and_tier_ratio_are_short_for_a_plan(folder: Path, tmp_path: Path) -> None:
    short = run(folder, "-o", str(tmp_path / "a"), "--bits", "2", "--tier-ratio", "0.25")
    long = run(folder, "-o", str(tmp_path / "b"), "--plan", "3:0.25,2:0.5,1:0.25")
    assert short.exit_code == long.exit_code == 0, short.output
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("a", "b")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["quantization_config"]["bits"] == [3, 2, 1]


def test_rtn_and_gptq_choose_other_codes(folder: Path, tmp_path: Path) -> None:
    for solver in ("gptq", "rtn"):
        result = run(folder, "-o", str(tmp_path / solver), "--bits", "2", "--solver", solver)
        assert result.exit_code == 0, result.output
    shards = [
        (tmp_path / s / "model-00002-of-00003.safetensors").read_bytes() for s in ("gptq", "rtn")
    ]
    assert len(shards[0]) == len(shards[1]) and shards[0] != shards[1]


def test_inspect_counts_scales_and_zeros(folder: Path, tmp_path: Path) -> None:
    quantized.compress(folder / "model", tmp_path / "out", "2:1")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--json"])
    report = json.loads(result.stdout)
    # 2 bits and, per 32 weights, two float16.
    assert report["bits_per_weight"] == 3.0
    assert [layer["bits_per_weight"] for layer in report["layers"]] == [3.0, 3.0]


def test_verify_reports_the_output_error_of_every_layer(folder: Path, tmp_path: Path) -> None:
    errors = []
    for plan in ("8:1", "1:1"):
        quantized.compress(folder / "model", tmp_path / plan, plan)
        command = ["verify", str(tmp_path / plan), "--against", str(folder / "model"), "--json"]
        text = ["--calibration", str(folder / "text.txt"), "--samples", "2", "--seq-len", "64"]
        result = CliRunner().invoke(main, [*command, *text])
        assert result.exit_code == 0, result.output
        errors.append(json.loads(result.stdout)["output_errors"])
    assert errors[0].keys() == errors[1].keys() == {"0", "1"}
    assert all(error < 0.05 for error in errors[0].values())
    assert all(0.2 < error < 2 for error in errors[1].values())


def test_verify_refuses_packed_experts_that_put_out_something_else(
    folder: Path, tmp_path: Path
) -> None:
    quantized.compress(folder / "model", tmp_path / "out", "2:1")
    command = ["verify", str(tmp_path / "out"), "--against", str(folder / "model")]
    text = ["--calibration", str(folder / "text.txt"), "--samples", "2", "--seq-len", "64"]
    unread = CliRunner().invoke(main, command)
    assert unread.exit_code == 0 and "with --calibration TEXT" in unread.stdout
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.startswith("model.layers.1.") and name.endswith("down_proj.scales"):
                tensors[name] *= 64
        save_file(tensors, file, metadata={"format": "pt"})
    # Or its checksums would tell.
    (tmp_path / "out" / "camera_report.json").unlink()
    assert CliRunner().invoke(main, command).exit_code == 0
    result = CliRunner().invoke(main, [*command, *text])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: layer 1 is off by ")


def test_dry_run_says_what_the_solver_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ("-o", str(tmp_path / "out"), "--bits", "2", "--dry-run")
    size = SolveSize(num_experts=8, width=64, d_model=64, group_size=32, polish=True)
    monkeypatch.setattr(cost, "SOLVER_BYTES", 3 * size.expert_bytes)
    lines = run(folder, *plan).output.splitlines()
    (solver,) = (line for line in lines if line.startswith("  solver"))
    assert solver.endswith(" for 3 of 8 experts at a time")
    monkeypatch.setattr(cost, "SOLVER_BYTES", 2**31)
    assert "for 8 of 8 experts at a time" in run(folder, *plan).output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "4"), "for an average of 4 bits give --plan 8:0.1,4:0.5,3:0.4"),
        (("--bits", "7"), "--plan 8:0.75,4:0.25"),
        (("--bits", "8"), "--plan 16:0.1,8:0.7,4:0.2"),
        (("--bits", "16"), "--bits is 16: give 1, 2 or 3"),
        (("--bits", "0"), "--bits is 0: give 1, 2 or 3"),
        (("--bits", "2", "--tier-ratio", "0.6"), "--tier-ratio is 0.6: the share must be in"),
        (("--bits", "2", "--prune", "0.4"), "found --prune and --bits"),
        (("--plan", "3:0.5,2:0.4"), "must sum to 1, found 0.9"),
        (("--plan", "2:0.5,3:0.5"), "must fall from tier to tier"),
        (("--plan", "16:0.01,0:0.99", "--align", "32"), "prunes all"),
        (("--bits", "2", "--group-size", "48"), "48 must be a multiple of 32 that divides"),
        (("--prune", "0.5", "--group-size", "64"), "--group-size is for tiers below 16 bits, and"),
        (("--plan", "16:1", "--solver", "rtn"), "--solver is for tiers below 16 bits, and"),
        (("--bits", "2", "--group-size", "0"), "--group-size: Input should be greater than 0"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    text = ("--calibration", str(folder / "text.txt"), "--samples", "4", "--seq-len", "64")
    command = ["compress", str(folder / "model"), "-o", str(tmp_path / "out"), *text, *arguments]
    result = CliRunner().invoke(main, command)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
